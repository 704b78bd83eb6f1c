"""NeighborMaskedAttention: an nn.MultiheadAttention with the 2D neighbourhood mask built in."""

import torch
from torch import Tensor, nn

from ..ops.dispatch import check_impl
from ..ops.geometry import Size, Window, size_pair
from ..ops.linear import linear
from ..ops.neighbor_masked_attention import neighbor_masked_attention
from ..ops.packed_heads import in_heads
from .submodules import apply_linear


class Projections(nn.Module):
    """What an attention with `nn.MultiheadAttention`'s parameters does around the op: project, split heads, merge."""

    embed_dim: int
    num_heads: int
    dropout: float
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    def project_all(self, query: Tensor, key: Tensor, value: Tensor, impl: str | None) -> list[Tensor]:
        """Batch first: query, key and value [B, N, embed_dim] in heads, those of one tensor in one product."""
        if query is key and key is value:
            return self.project(query, 0, 3, impl)
        if query is key:
            return self.project(query, 0, 2, impl) + self.project(value, 2, 3, impl)
        if key is value:
            return self.project(query, 0, 1, impl) + self.project(key, 1, 3, impl)
        return [part for i, tokens in enumerate((query, key, value)) for part in self.project(tokens, i, i + 1, impl)]

    def project(self, tokens: Tensor, first: int, last: int, impl: str | None) -> list[Tensor]:
        """Input projections first .. last - 1 of (query, key, value) of tokens [B, N, embed_dim].

        Each is split in heads: [B, heads, N, head_dim], a view of one product.
        """
        return in_heads(linear(tokens, *self.in_proj(first, last), impl), last - first, self.num_heads)

    def in_proj(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the input projections first .. last - 1 of (query, key, value)."""
        rows = slice(first * self.embed_dim, last * self.embed_dim)
        return self.in_proj_weight[rows], None if self.in_proj_bias is None else self.in_proj_bias[rows]

    def merge_heads(self, out: Tensor, impl: str | None) -> Tensor:
        """[B, heads, N, head_dim] -> output projection, [B, N, embed_dim]."""
        return apply_linear(self.out_proj, out.transpose(1, 2).flatten(2), impl)

    @property
    def dropout_p(self) -> float:
        """Dropout probability in effect: `dropout` in training, 0 in evaluation."""
        return self.dropout if self.training else 0.0


class NeighborMaskedAttention(Projections):
    """Multi-head attention in which no token sees its neighbours (UniAD, section 3.2, NMA).

    Parameters have the names, shapes and initial values of `nn.MultiheadAttention`'s (`in_proj_weight`,
    `in_proj_bias`, `out_proj.weight`, `out_proj.bias`), so its state dicts load; it is called the same way.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first: as in `nn.MultiheadAttention`.
        feature_size: (height, width) of the token grid; sequences have height * width tokens, row by row.
        neighbor_size: (h, w) of the hidden window in tokens (an even n acts as n + 1), or None to hide nothing.
        impl: implementation of the op, see `uniad_fast.ops.neighbor_masked_attention`.

    Raises:
        ValueError: a size is out of range, or the window covers the grid so that a query has no key left.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feature_size: Size,
        neighbor_size: Size | None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.feature_size = size_pair("feature_size", feature_size)
        self.neighbor_size = None if neighbor_size is None else size_pair("neighbor_size", neighbor_size)
        if Window.of(self.feature_size, self.neighbor_size).leaves_a_query_without_key:
            raise ValueError(
                f"neighbor_size {self.neighbor_size} covers the whole grid {self.feature_size} for some query, "
                "which would have nothing left to attend to: choose a smaller window"
            )
        self.dropout = dropout
        self.batch_first = batch_first
        check_impl(impl)
        self.impl = impl
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend, and return (output, None): the weights never exist.

        query, key, value: [N, B, embed_dim], [B, N, embed_dim] with `batch_first`, or [N, embed_dim]; the query
        may have batch 1, it then serves the whole batch. Output: the shape of `key`.

        Raises:
            ValueError: a mask is passed (it is built in), or shapes do not match the grid.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("the mask is built in: attn_mask and key_padding_mask must be None, is_causal False")
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.ndim != key.ndim or tensor.ndim not in (2, 3) or tensor.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"query, key and value must be [N, B, {self.embed_dim}] (batch first: [B, N, "
                    f"{self.embed_dim}]) or [N, {self.embed_dim}], got {name} {tuple(tensor.shape)}"
                )
        if key.ndim == 2:
            return self._attend(query[None], key[None], value[None])[0], None
        if self.batch_first:
            return self._attend(query, key, value), None
        # One tensor stays one tensor, so that what is projected together is still seen.
        first = {id(tensor): tensor.transpose(0, 1) for tensor in (query, key, value)}
        return self._attend(first[id(query)], first[id(key)], first[id(value)]).transpose(0, 1), None

    def is_like(self, other: "NeighborMaskedAttention") -> bool:
        """Whether both split and serve their tokens the same way, so that one product can project for both."""
        mine, its = ((a.embed_dim, a.num_heads, a.in_proj_bias is None, a.impl) for a in (self, other))
        return mine == its

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(*self.project_all(query, key, value, self.impl))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Projected queries [B or 1, heads, N, head_dim], keys and values [B, ...] -> output [B, N, embed_dim]."""
        out = neighbor_masked_attention(
            query, key, value, self.feature_size, self.neighbor_size, dropout_p=self.dropout_p, impl=self.impl
        )
        return self.merge_heads(out, self.impl)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, feature_size={self.feature_size}, "
            f"neighbor_size={self.neighbor_size}, dropout={self.dropout}, batch_first={self.batch_first}, "
            f"impl={self.impl!r}"
        )
