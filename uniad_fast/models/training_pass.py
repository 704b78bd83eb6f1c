"""A UniAD's transformer in training by `training_function`, in half as many launches as layer by layer: on a GPU.

That does the work of all modules at once, which nobody may notice: as soon as one of them is not just what this package
made it, or somebody writes down what torch does, the network goes layer by layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.dispatch import choose_impl
from ..ops.geometry import Window
from ..ops.noise import drawable
from ..ops.tracing import is_traced
from .attention import NeighborMaskedAttention
from .layers import DecoderLayer, EncoderLayer, Layer
from .submodules import is_plain
from .training_function import AttentionPlan, LayerPlan, Plan, TransformerFunction
from .transformer import Decoder, Encoder, Transformer

# A launch costs a CPU nothing, and the positions' own products 4% of a step of 8 images.
IMPLS = ("triton",)


class _NotPlain(Exception):
    """A module has to be called."""


def reconstruct(transformer: nn.Module, tokens: Tensor, position: Tensor) -> Tensor | None:
    """tokens [B, N, C], position [N, C] -> reconstructed tokens, [B, N, C]; None for layer by layer."""
    if is_traced() or not is_plain(transformer, Transformer) or not _is_served(transformer, tokens, position):
        return None
    try:
        reader = _Reader(transformer, tokens)
    except _NotPlain:
        return None
    out = TransformerFunction.apply(tokens, position.to(tokens.dtype), reader.plan, *reader.parameters)
    return transformer.decoder.norm(out)


def _is_served(transformer: Transformer, tokens: Tensor, position: Tensor) -> bool:
    device = tokens.device.type
    if device not in ("cpu", "cuda"):
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return (
        transformer.training
        and torch.is_grad_enabled()
        and type(tokens) is Tensor
        and type(position) in (Tensor, nn.Parameter)
        and tokens.dtype == dtype
        and tokens.shape[0] > 0
        and tokens.shape[1:] == position.shape
        and torch.autograd.forward_ad._current_level < 0
    )


class _Reader:
    """The plan, and the parameters in its order: see `stacked_parameters`."""

    def __init__(self, transformer: Transformer, tokens: Tensor) -> None:
        self.width, self.tokens, self.device = tokens.shape[2], tokens.shape[1], tokens.device
        self.parameters: list[Tensor] = []
        encoder, decoder = transformer.encoder, transformer.decoder
        _need(is_plain(encoder, Encoder) and is_plain(decoder, Decoder) and encoder.norm is None)
        _need(is_plain(encoder.layers, nn.ModuleList) and is_plain(decoder.layers, nn.ModuleList))
        _need(len(decoder.layers) > 0)
        for layer in encoder.layers:
            _need(is_plain(layer, EncoderLayer))
        for layer in decoder.layers:
            _need(is_plain(layer, DecoderLayer))
        self.first = first = _plain_attention(decoder.layers[0])
        impl = choose_impl(first.impl, tokens)
        _need(impl in IMPLS and self.width <= 128 * first.num_heads)
        self.plan = Plan(
            tuple(self._layer(layer, ["self_attn"]) for layer in encoder.layers),
            tuple(self._layer(layer, ["self_attn", "multihead_attn"]) for layer in decoder.layers),
            first.num_heads,
            impl,
        )

    def _layer(self, layer: Any, attentions: list[str]) -> LayerPlan:
        _need(layer.activation == "relu" and not layer.normalize_before and layer.impl == self.first.impl)
        _need(is_plain(layer.dropout, nn.Dropout) and layer.training)
        if isinstance(layer, DecoderLayer):
            embed = layer.learned_embed
            _need(is_plain(embed, nn.Embedding) and embed.max_norm is None)
            self._parameter(embed.weight, (self.tokens, self.width))
        plans = tuple(self._attention(getattr(layer, name)) for name in attentions)
        self._feed_forward(layer)
        eps = tuple(self._norm(getattr(layer, f"norm{n}")) for n in range(1, len(attentions) + 2))
        return LayerPlan(plans, drawable(layer.dropout.p) if layer.dropout.training else 0.0, eps)

    def _attention(self, module: Any) -> AttentionPlan:
        _need(is_plain(module, NeighborMaskedAttention) and module.is_like(self.first))
        self._weights(module.in_proj_weight, module.in_proj_bias, self.width, 3 * self.width)
        self._linear(module.out_proj, self.width, self.width)
        window = Window.of(module.feature_size, module.neighbor_size)
        _need(window.tokens == self.tokens)
        return AttentionPlan(window, drawable(module.dropout_p))

    def _feed_forward(self, layer: Layer) -> None:
        hidden: int = layer.linear1.out_features if isinstance(layer.linear1, nn.Linear) else 0
        self._linear(layer.linear1, self.width, hidden)
        self._linear(layer.linear2, hidden, self.width)

    def _norm(self, module: Any) -> float:
        _need(is_plain(module, nn.LayerNorm))
        self._weights(module.weight, module.bias, None, self.width)
        return module.eps

    def _linear(self, module: Any, ins: int, outs: int) -> None:
        _need(is_plain(module, nn.Linear) or is_plain(module, NonDynamicallyQuantizableLinear))
        self._weights(module.weight, module.bias, ins, outs)

    def _weights(self, weight: Tensor | None, bias: Tensor | None, ins: int | None, outs: int) -> None:
        self._parameter(weight, (outs,) if ins is None else (outs, ins))
        self._parameter(bias, (outs,))

    def _parameter(self, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
        _need(type(tensor) in (Tensor, nn.Parameter))
        assert tensor is not None
        _need(tensor.layout == torch.strided and tensor.shape == shape and tensor.is_contiguous())
        _need(tensor.dtype == torch.float32 and tensor.device == self.device and not tensor.is_neg())
        self.parameters.append(tensor)


def _plain_attention(layer: Any) -> NeighborMaskedAttention:
    if not is_plain(layer.self_attn, NeighborMaskedAttention):
        raise _NotPlain
    return layer.self_attn


def _need(fact: bool) -> None:
    if not fact:
        raise _NotPlain
