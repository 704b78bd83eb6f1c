"""The layers of UniAD's transformer, and what they are made of (paper, section 3.2).

B batch, N = height * width tokens, C hidden width; batch first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dropout import dropout, dropout_add_norm
from ..ops.feed_forward import feed_forward
from .attention import NeighborMaskedAttention
from .parameter_cache import ParameterCache
from .submodules import apply_linear, call_attention, is_plain, pending_dropout, whole_table

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}

Heads = tuple[Tensor, Tensor]
"""Projected keys and values, [B, heads, N, head_dim] each."""


class LayerOptions(NamedTuple):
    """What every layer of a transformer is built with.

    dim_feedforward: width between the two layers of the FFN.
    dropout: the one probability of attention, FFN and residuals.
    activation: "relu", "gelu" or "glu" ("glu" doubles the output of `linear1`, which it halves again).
    normalize_before: pre-norm layers; the encoder then ends in a LayerNorm, as the decoder always does.
    """

    dim_feedforward: int
    dropout: float
    activation: str
    normalize_before: bool


class Layer(nn.Module):
    """What encoder and decoder layers have: the two-layer FFN and the choice of pre- or post-norm."""

    def __init__(self, hidden_dim: int, options: LayerOptions, impl: str | None) -> None:
        super().__init__()
        if options.activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {options.activation!r}")
        self.activation = options.activation
        self.normalize_before = options.normalize_before
        self.linear1 = nn.Linear(hidden_dim, options.dim_feedforward * (2 if options.activation == "glu" else 1))
        self.linear2 = nn.Linear(options.dim_feedforward, hidden_dim)
        self.dropout = nn.Dropout(options.dropout)
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
        relu = self.activation == "relu" and is_plain(self.dropout, nn.Dropout)  # which one pass does
        if relu and is_plain(self.linear1, nn.Linear) and is_plain(self.linear2, nn.Linear):
            p = self.dropout.p if self.dropout.training else 0.0
            first, second = ((layer.weight, layer.bias) for layer in (self.linear1, self.linear2))
            return feed_forward(tokens, first, second, p, self.impl)
        hidden = apply_linear(self.linear1, tokens, self.impl)
        if not relu:
            hidden = _ACTIVATIONS[self.activation](hidden)
        hidden, p = pending_dropout(self.dropout, hidden)
        hidden = dropout(hidden, p, relu=relu, impl=self.impl)
        return apply_linear(self.linear2, hidden, self.impl)


class EncoderLayer(Layer):
    def __init__(self, self_attn: NeighborMaskedAttention, options: LayerOptions) -> None:
        super().__init__(self_attn.embed_dim, options, self_attn.impl)
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(self_attn.embed_dim)
        self.norm2 = nn.LayerNorm(self_attn.embed_dim)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            query_key = x + position
            return call_attention(self.self_attn, query_key, query_key, x)

        tokens = self.residual(self.norm1, tokens, attend)
        return self.residual(self.norm2, tokens, self.feed_forward)


class TwoAttentions(Layer):
    """What both kinds of decoder layer have."""

    def __init__(
        self, self_attn: NeighborMaskedAttention, multihead_attn: NeighborMaskedAttention, options: LayerOptions
    ) -> None:
        hidden_dim = self_attn.embed_dim
        super().__init__(hidden_dim, options, self_attn.impl)
        self.self_attn = self_attn
        self.multihead_attn = multihead_attn
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)


class DecoderLayer(TwoAttentions):
    """Learned query -> encoder output -> previous layer's output -> FFN, each with its residual and norm."""

    def __init__(
        self, self_attn: NeighborMaskedAttention, multihead_attn: NeighborMaskedAttention, options: LayerOptions
    ) -> None:
        super().__init__(self_attn, multihead_attn, options)
        height, width = self_attn.feature_size
        self.learned_embed = nn.Embedding(height * width, self_attn.embed_dim)
        self._query = ParameterCache()

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
