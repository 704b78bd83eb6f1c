"""A UniAD's forward pass in evaluation as one call of a C++ kernel, on a CPU in float32, or under autocast, where this
is the faster way, with the operands of its linear layers in bfloat16 and all else in float32.

The kernel reads the parameters where they lie and keeps no copy of them, so that whatever changes them counts. It does
the work of all modules at once, which nobody may notice: as soon as one of them is not just what this package made it,
or gradients are recorded, the network goes layer by layer.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.dispatch import choose_impl
from ..ops.geometry import Window, hidden_keys
from ..ops.tracing import is_traced
from ..ops.whole_network import has_pairs, has_tiles, panel
from ..ops.whole_network import reconstruct as run_whole_network
from .attention import NeighborMaskedAttention
from .layers import DecoderLayer, EncoderLayer, Layer
from .submodules import is_plain
from .transformer import Decoder, Encoder, Transformer

# Tokens of a batch up to which one call is faster in bfloat16 by vectors; beyond, a layer's products are, whose weights
# are rounded and packed once for all rows.
_MOST_IN_BFLOAT16 = 1024
_MOST_TOKENS = 4096  # beyond, the mask as bits is large, and the attention's own kernel skips what is hidden

Words = list[Tensor | float | None]
"""Parameters in the kernel's order."""


class _NotPlain(Exception):
    """A module has to be called."""


def reconstruct(model: Any, tokens: Tensor) -> Tensor | None:
    """tokens [B, N, C_org] -> their reconstruction by a `UniAD`; None where the network has to go layer by layer."""
    if model.training or torch.is_grad_enabled() or not _is_served(model, tokens):
        return None
    in_bfloat16 = torch.is_autocast_enabled("cpu")
    try:
        with torch.autocast("cpu", enabled=False):  # what is read here are parameters, and products of them
            position = model.pos_embed()
            sizes, words = _network(model, position)
    except _NotPlain:
        return None
    found = run_whole_network(tokens, position, sizes, words, in_bfloat16)
    return found.to(torch.bfloat16) if in_bfloat16 else found  # as linear layers under autocast give it


def _is_served(model: Any, tokens: Tensor) -> bool:
    return (
        type(tokens) is Tensor
        and tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and tokens.shape[1:] == (model.feature_size[0] * model.feature_size[1], model.inplanes)
        and tokens.shape[0] > 0
        and tokens.shape[1] <= _MOST_TOKENS
        and not tokens.is_neg()
        and not tokens._is_zerotensor()
        and not is_traced()
        and torch.autograd.forward_ad._current_level < 0
        and choose_impl(model.impl, tokens) == "cpu"
        and (not torch.is_autocast_enabled("cpu") or _is_served_in_bfloat16(tokens))
    )


def _is_served_in_bfloat16(tokens: Tensor) -> bool:
    """Whether autocast asks for what the kernel does best.

    Where it has no products of bfloat16 it computes in float32, which is nearer to the truth, and sooner there than
    torch, whose products are then emulated or at half of float32's rate.
    """
    if torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return has_tiles() or not has_pairs() or tokens.shape[0] * tokens.shape[1] <= _MOST_IN_BFLOAT16


def _network(model: Any, position: Tensor) -> tuple[tuple[int, ...], Words]:
    """Sizes but for the batch, and all parameters.

    Raises:
        _NotPlain: not all of it is what this package made it.
    """
    transformer = model.transformer
    _need(is_plain(transformer, Transformer) and not transformer.training)
    encoder, decoder = transformer.encoder, transformer.decoder
    _need(is_plain(encoder, Encoder) and is_plain(decoder, Decoder) and encoder.norm is None)
    _need(is_plain(encoder.layers, nn.ModuleList) and is_plain(decoder.layers, nn.ModuleList))
    read = _Reader(model, position)
    for layer in encoder.layers:
        if not is_plain(layer, EncoderLayer):
            raise _NotPlain
        read.encoder_layer(layer)
    for layer in decoder.layers:
        if not is_plain(layer, DecoderLayer):
            raise _NotPlain
        read.decoder_layer(layer)
    read.norm(decoder.norm)
    read.linear(model.input_proj, model.inplanes, read.width)
    read.linear(model.output_proj, read.width, model.inplanes)
    tokens = model.feature_size[0] * model.feature_size[1]
    counts = (len(encoder.layers), len(decoder.layers))
    return (tokens, model.inplanes, read.width, read.heads, read.hidden, *counts), read.words


class _Reader:
    """Appends what modules hold to `words`, in the kernel's order."""

    def __init__(self, model: Any, position: Tensor) -> None:
        layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
        _need(all(is_plain(layer, EncoderLayer) or is_plain(layer, DecoderLayer) for layer in layers))
        self.model, self.words = model, Words()
        self.width: int = model.input_proj.out_features
        self.heads = layers[0].self_attn.num_heads if layers else 1
        self.hidden: int = layers[0].linear1.out_features if layers else 0
        self.position = self.parameter(position, (model.feature_size[0] * model.feature_size[1], self.width))

    def parameter(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        _need(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided)
        _need(tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.shape == shape)
        return tensor

    def linear(self, module: Any, ins: int, outs: int) -> None:
        _need(is_plain(module, nn.Linear) or is_plain(module, NonDynamicallyQuantizableLinear))
        self.weights(module.weight, module.bias, ins, outs)

    def weights(self, weight: Tensor, bias: Tensor | None, ins: int, outs: int) -> None:
        self.words += [self.parameter(weight, (outs, ins)), None if bias is None else self.parameter(bias, (outs,))]

    def norm(self, module: Any) -> None:
        _need(is_plain(module, nn.LayerNorm) and module.weight is not None and module.bias is not None)
        self.words += [self.parameter(part, (self.width,)) for part in (module.weight, module.bias)] + [module.eps]

    def attention(self, module: Any) -> None:
        _need(is_plain(module, NeighborMaskedAttention) and not module.training and module.impl == self.model.impl)
        _need((module.embed_dim, module.num_heads) == (self.width, self.heads))
        _need(module.feature_size == self.model.feature_size)
        self.weights(module.in_proj_weight, module.in_proj_bias, self.width, 3 * self.width)
        self.linear(module.out_proj, self.width, self.width)
        self.words.append(_seen(Window.of(module.feature_size, module.neighbor_size), panel()))

    def feed_forward(self, layer: Layer) -> None:
        _need(not layer.training and layer.activation == "relu" and not layer.normalize_before)
        _need(layer.impl == self.model.impl and is_plain(layer.dropout, nn.Dropout) and not layer.dropout.training)
        self.linear(layer.linear1, self.width, self.hidden)
        self.linear(layer.linear2, self.hidden, self.width)

    def encoder_layer(self, layer: EncoderLayer) -> None:
        self.attention(layer.self_attn)
        self.norm(layer.norm1)
        self.feed_forward(layer)
        self.norm(layer.norm2)

    def decoder_layer(self, layer: DecoderLayer) -> None:
        embed = layer.learned_embed
        _need(is_plain(embed, nn.Embedding) and embed.max_norm is None)
        table = self.parameter(embed.weight, tuple(self.position.shape))
        place = len(self.words)
        self.attention(layer.self_attn)
        # Known to be plain now, which its projection by itself does not ask.
        heads = layer.learned_query(self.position, table[None])
        self.words[place:place] = [table, heads.transpose(1, 2).flatten(2)[0]]
        self.attention(layer.multihead_attn)
        self.norm(layer.norm1)
        self.norm(layer.norm2)
        self.feed_forward(layer)
        self.norm(layer.norm3)


def _need(fact: bool) -> None:
    if not fact:
        raise _NotPlain


@lru_cache(maxsize=8)
def _seen(window: Window, width: int) -> Tensor | None:
    """int32 [panels, N]: bit l of [p, j] says whether query p * width + l sees key j. None where all see all."""
    if window.radius_row < 0:
        return None
    with torch.inference_mode(False):
        hidden = hidden_keys(window, torch.device("cpu"))
        panels = -(-window.tokens // width)
        seen = torch.ones(panels * width, window.tokens, dtype=torch.bool)
        seen[: window.tokens] = ~hidden
        bits = (1 << torch.arange(width))[:, None]
        return (seen.view(panels, width, -1) * bits).sum(1).to(torch.int32)
