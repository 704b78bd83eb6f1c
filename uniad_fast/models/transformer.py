"""UniAD's transformer: neighbour-masked encoder (NME) and layer-wise query decoder (LQD), paper section 3.2.

Inside, everything is batch first: B batch, N = height * width tokens, C hidden width. Module and parameter
names are the public code's, so that its state dicts load.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import dropout, dropout_add_norm
from ..ops.geometry import Size
from ..ops.linear import linear
from .attention import NeighborMaskedAttention
from .parameter_cache import Kept
from .submodules import apply_linear, call_attention, is_plain, pending_dropout, whole_table

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


_Layered = TypeVar("_Layered")

QUERY_EMBEDDINGS = ("every", "first", "none")

Heads = tuple[Tensor, Tensor]
"""Projected keys and values, [B, heads, N, head_dim] each."""


class Transformer(nn.Module):
    """Encoder and decoder over one token grid.

    Args:
        hidden_dim, nhead, dim_feedforward, dropout: widths, heads, and the one dropout probability of attention,
            FFN and residuals.
        feature_size: (height, width) of the grid.
        neighbor_sizes: the hidden window of the encoder's attention and of the decoder's first and second; None
            for full attention.
        activation: "relu", "gelu" or "glu" ("glu" doubles the output of `linear1`, which it halves again).
        normalize_before: pre-norm layers; the encoder then ends in a LayerNorm, as the decoder always does.
        query_embedding: "every", "first" or "none", see `UniAD`.
    """

    def __init__(
        self,
        hidden_dim: int,
        feature_size: Size,
        neighbor_sizes: tuple[Size | None, Size | None, Size | None],
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int,
        dropout: float,
        activation: str,
        normalize_before: bool,
        query_embedding: str,
        impl: str | None,
    ) -> None:
        super().__init__()
        if query_embedding not in QUERY_EMBEDDINGS:
            raise ValueError(f"query_embedding must be one of {', '.join(QUERY_EMBEDDINGS)}, got {query_embedding!r}")
        encoder_window, *decoder_windows = neighbor_sizes

        def attention(window: Size | None) -> NeighborMaskedAttention:
            return NeighborMaskedAttention(
                hidden_dim, nhead, feature_size, window, dropout, batch_first=True, impl=impl
            )

        self.encoder = Encoder(
            [
                EncoderLayer(attention(encoder_window), dim_feedforward, dropout, activation, normalize_before)
                for _ in range(num_encoder_layers)
            ],
            nn.LayerNorm(hidden_dim) if normalize_before else None,
        )

        def layers(layer_type: Callable[..., _Layered]) -> list[_Layered]:
            return [
                layer_type(
                    attention(decoder_windows[0]),
                    attention(decoder_windows[1]),
                    dim_feedforward,
                    dropout,
                    activation,
                    normalize_before,
                )
                for _ in range(num_decoder_layers)
            ]

        norm = nn.LayerNorm(hidden_dim)
        if query_embedding == "every":
            self.decoder: Decoder | PlainDecoder = Decoder(layers(DecoderLayer), norm)
        else:
            height, width = feature_size
            queries = nn.Embedding(height * width, hidden_dim) if query_embedding == "first" else None
            self.decoder = PlainDecoder(layers(PlainDecoderLayer), norm, queries)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """tokens [B, N, C], position [N, C] -> reconstructed tokens [B, N, C]."""
        position = position.to(tokens.dtype)  # in float32 it would widen every sum under autocast
        return self.decoder(self.encoder(tokens, position), position)


class Encoder(nn.Module):
    def __init__(self, layers: list["EncoderLayer"], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, position)
        return tokens if self.norm is None else self.norm(tokens)


class Decoder(nn.Module):
    def __init__(self, layers: list["DecoderLayer"], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, memory: Tensor, position: Tensor) -> Tensor:
        out, projected = memory, self._project_memory(memory, position)
        for number, layer in enumerate(self.layers):
            # The first layer's previous output is the encoder's.
            out = layer(out, memory, position, projected.get((number, 0)), projected.get((number, 1)))
        return self.norm(out)

    def _project_memory(self, memory: Tensor, position: Tensor) -> dict[tuple[int, int], Heads]:
        """(keys, values) of every attention to the encoder's output, all in one product each: {(layer, 0 or 1): heads}.

        Those are every layer's first and the first layer's second, but for attentions that have to be called, that lie
        in layers that do something before, or that differ from the others.
        """
        attentions: dict[tuple[int, int], NeighborMaskedAttention] = {}
        for number, layer in enumerate(self.layers):
            if not is_plain(layer, DecoderLayer):
                continue
            for place, attention in enumerate((layer.self_attn, layer.multihead_attn)):
                if (place == 0 or number == 0) and is_plain(attention, NeighborMaskedAttention):
                    attentions[number, place] = attention
        if not attentions:
            return {}
        first = next(iter(attentions.values()))
        attentions = {place: a for place, a in attentions.items() if a.is_like(first)}
        projected = []
        for tokens, which in ((memory + position, 1), (memory, 2)):
            weights, biases = zip(*(a.in_proj(which, which + 1) for a in attentions.values()), strict=True)
            bias = None if biases[0] is None else torch.cat(biases)
            product = linear(tokens, torch.cat(weights), bias, first.impl)
            projected.append([first.split_heads(part) for part in product.chunk(len(attentions), dim=-1)])
        return dict(zip(attentions, zip(*projected, strict=True), strict=True))


class _Layer(nn.Module):
    """What both kinds of layer have: the two-layer FFN and the choice of pre- or post-norm."""

    def __init__(
        self,
        hidden_dim: int,
        dim_feedforward: int,
        dropout: float,
        activation: str,
        normalize_before: bool,
        impl: str | None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.normalize_before = normalize_before
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward * (2 if activation == "glu" else 1))
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.impl = impl

    def end(self, norm: nn.LayerNorm, tokens: Tensor, out: Tensor) -> Tensor:
        """End of a block: tokens (of batch 1, or B) + dropout(out), with the norm after it unless it was before."""
        out, p = pending_dropout(self.dropout, out)
        if self.normalize_before:
            return tokens + dropout(out, p, impl=self.impl)
        if is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
            return dropout_add_norm(out, tokens, norm.weight, norm.bias, dropout_p=p, eps=norm.eps, impl=self.impl)
        return norm(tokens + dropout(out, p, impl=self.impl))

    def residual(self, norm: nn.LayerNorm, tokens: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """tokens + block(tokens) with the norm before the block or after the sum."""
        return self.end(norm, tokens, block(norm(tokens) if self.normalize_before else tokens))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        hidden = apply_linear(self.linear1, tokens, self.impl)
        relu = self.activation == "relu" and is_plain(self.dropout, nn.Dropout)  # which one pass does
        if not relu:
            hidden = _ACTIVATIONS[self.activation](hidden)
        hidden, p = pending_dropout(self.dropout, hidden)
        hidden = dropout(hidden, p, relu=relu, impl=self.impl)
        return apply_linear(self.linear2, hidden, self.impl)


class EncoderLayer(_Layer):
    def __init__(
        self,
        self_attn: NeighborMaskedAttention,
        dim_feedforward: int,
        dropout: float,
        activation: str,
        normalize_before: bool,
    ) -> None:
        super().__init__(self_attn.embed_dim, dim_feedforward, dropout, activation, normalize_before, self_attn.impl)
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(self_attn.embed_dim)
        self.norm2 = nn.LayerNorm(self_attn.embed_dim)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            query_key = x + position
            return call_attention(self.self_attn, query_key, query_key, x)

        tokens = self.residual(self.norm1, tokens, attend)
        return self.residual(self.norm2, tokens, self.feed_forward)


class _TwoAttentions(_Layer):
    """What both kinds of decoder layer have."""

    def __init__(
        self,
        self_attn: NeighborMaskedAttention,
        multihead_attn: NeighborMaskedAttention,
        dim_feedforward: int,
        dropout: float,
        activation: str,
        normalize_before: bool,
    ) -> None:
        hidden_dim = self_attn.embed_dim
        super().__init__(hidden_dim, dim_feedforward, dropout, activation, normalize_before, self_attn.impl)
        self.self_attn = self_attn
        self.multihead_attn = multihead_attn
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)


class DecoderLayer(_TwoAttentions):
    """Learned query -> encoder output -> previous layer's output -> FFN, each with its residual and norm."""

    def __init__(self, self_attn: NeighborMaskedAttention, *args: Any) -> None:
        super().__init__(self_attn, *args)
        height, width = self_attn.feature_size
        self.learned_embed = nn.Embedding(height * width, self_attn.embed_dim)
        self._query = Kept()

    def forward(
        self,
        out: Tensor,
        memory: Tensor,
        position: Tensor,
        memory_heads: Heads | None = None,
        previous_heads: Heads | None = None,
    ) -> Tensor:
        """out [B, N, C], the previous layer's -> this one's.

        memory: the encoder's output [B, N, C]. memory_heads, previous_heads: the encoder's output as the first
        attention's keys and values, the previous one as the second's, where the caller has them.
        """
        table = whole_table(self.learned_embed, out.shape[1], out.device)[None]
        embed = table.to(out.dtype)  # [1, N, C], broadcast by what it meets
        if memory_heads is None:
            query = (self.norm1(embed) if self.normalize_before else embed) + position
            attended = call_attention(self.self_attn, query, memory + position, memory)
        else:
            attended = self.self_attn.attend(self.learned_query(position, table), *memory_heads)
        tokens = self.end(self.norm1, embed, attended)

        def attend_previous(x: Tensor) -> Tensor:
            query = x + position
            if previous_heads is None:
                return call_attention(self.multihead_attn, query, out + position, out)
            return self.multihead_attn.attend(self.multihead_attn.project(query, 0, 1, self.impl)[0], *previous_heads)

        tokens = self.residual(self.norm2, tokens, attend_previous)
        return self.residual(self.norm3, tokens, self.feed_forward)

    def learned_query(self, position: Tensor, embed: Tensor) -> Tensor:
        """The first attention's projected query [1, heads, N, head_dim]: once a step, once at all in evaluation.

        embed: the learned queries [1, N, C].
        """
        if self.normalize_before:
            embed = self.norm1(embed)
        weight, bias = self.self_attn.in_proj(0, 1)
        sources = [position, embed, weight, *([] if bias is None else [bias])]
        return self._query.get(sources, lambda: self.self_attn.project(embed + position, 0, 1, self.impl)[0])


class PlainDecoder(nn.Module):
    """The plain Transformer's decoder: at most one learned query, which goes into the first layer."""

    def __init__(self, layers: list["PlainDecoderLayer"], norm: nn.Module, learned_embed: nn.Embedding | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.learned_embed = learned_embed

    def forward(self, memory: Tensor, position: Tensor) -> Tensor:
        out = memory
        if self.learned_embed is not None:
            table = whole_table(self.learned_embed, memory.shape[1], memory.device)
            out = table.to(memory.dtype).expand_as(memory)
        for layer in self.layers:
            out = layer(out, memory, position)
        return self.norm(out)


class PlainDecoderLayer(_TwoAttentions):
    """What comes in -> itself -> encoder output -> FFN, each with its residual and norm."""

    def forward(self, out: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """out, memory [B, N, C], position [N, C] -> [B, N, C]."""

        def attend_itself(x: Tensor) -> Tensor:
            query_key = x + position
            return call_attention(self.self_attn, query_key, query_key, x)

        def attend_memory(x: Tensor) -> Tensor:
            return call_attention(self.multihead_attn, x + position, memory + position, memory)

        out = self.residual(self.norm1, out, attend_itself)
        out = self.residual(self.norm2, out, attend_memory)
        return self.residual(self.norm3, out, self.feed_forward)
