"""UniAD's transformer: neighbour-masked encoder (NME) and layer-wise query decoder (LQD), paper section 3.2.

Inside, everything is batch first: B batch, N = height * width tokens, C hidden width. Module and parameter
names are the public code's, so that its state dicts load.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..ops.geometry import Size
from ..ops.linear import linear
from ..ops.packed_heads import in_heads
from .attention import NeighborMaskedAttention
from .layers import DecoderLayer, EncoderLayer, Heads, LayerOptions
from .plain_decoder import PlainDecoder, PlainDecoderLayer
from .submodules import is_plain

_Layered = TypeVar("_Layered")

QUERY_EMBEDDINGS = ("every", "first", "none")


class Transformer(nn.Module):
    """Encoder and decoder over one token grid.

    Args:
        hidden_dim, nhead: width and heads.
        feature_size: (height, width) of the grid.
        neighbor_sizes: the hidden window of the encoder's attention and of the decoder's first and second; None
            for full attention.
        layers: how many the encoder and the decoder have.
        options: what every layer is built with.
        query_embedding: "every", "first" or "none", see `UniAD`.
        impl: implementation of the ops, see `uniad_fast.ops.neighbor_masked_attention`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        hidden_dim: int,
        nhead: int,
        feature_size: Size,
        neighbor_sizes: tuple[Size | None, Size | None, Size | None],
        layers: tuple[int, int],
        options: LayerOptions,
        query_embedding: str,
        impl: str | None,
    ) -> None:
        super().__init__()
        if query_embedding not in QUERY_EMBEDDINGS:
            raise ValueError(f"query_embedding must be one of {', '.join(QUERY_EMBEDDINGS)}, got {query_embedding!r}")
        encoder_window, first_window, second_window = neighbor_sizes
        encoder_layers, decoder_layers = layers

        def attention(window: Size | None) -> NeighborMaskedAttention:
            dropout = options.dropout
            return NeighborMaskedAttention(
                hidden_dim, nhead, feature_size, window, dropout, batch_first=True, impl=impl
            )

        self.encoder = Encoder(
            [EncoderLayer(attention(encoder_window), options) for _ in range(encoder_layers)],
            nn.LayerNorm(hidden_dim) if options.normalize_before else None,
        )

        def decoder(layer_type: Callable[..., _Layered]) -> list[_Layered]:
            return [
                layer_type(attention(first_window), attention(second_window), options) for _ in range(decoder_layers)
            ]

        norm = nn.LayerNorm(hidden_dim)
        if query_embedding == "every":
            self.decoder: Decoder | PlainDecoder = Decoder(decoder(DecoderLayer), norm)
        else:
            height, width = feature_size
            queries = nn.Embedding(height * width, hidden_dim) if query_embedding == "first" else None
            self.decoder = PlainDecoder(decoder(PlainDecoderLayer), norm, queries)

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
            projected.append(in_heads(product, len(attentions), first.num_heads))
        return dict(zip(attentions, zip(*projected, strict=True), strict=True))
