"""Position embeddings of a token grid, [N, C]: learned tables, or DETR's normalised 2D sine."""

import math

import torch
from torch import Tensor, nn

from ..ops.geometry import Size
from .submodules import whole_table


class LearnedPosition(nn.Module):
    """A row table and a column table: the first half of the channels from the column, the second from the row."""

    def __init__(self, feature_size: Size, hidden_dim: int) -> None:
        super().__init__()
        self.height, self.width = height, width = feature_size
        self.row_embed = nn.Embedding(height, hidden_dim // 2)
        self.col_embed = nn.Embedding(width, hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self) -> Tensor:
        row, col = whole_table(self.row_embed, self.height), whole_table(self.col_embed, self.width)
        height, width = len(row), len(col)
        grid = torch.cat([col.expand(height, -1, -1), row[:, None].expand(-1, width, -1)], dim=-1)
        return grid.flatten(0, 1)


class SinePosition(nn.Module):
    """Sines and cosines of row (first half) and column, counted from 1 and scaled to (0, 2 pi]."""

    position: Tensor

    def __init__(self, feature_size: Size, hidden_dim: int, temperature: float = 10_000) -> None:
        super().__init__()
        height, width = feature_size
        channel = torch.arange(hidden_dim // 2)
        period = temperature ** (2 * (channel // 2) / (hidden_dim // 2))

        def waves(count: int) -> Tensor:  # [count, hidden_dim // 2]
            angle = torch.arange(1, count + 1) / (count + 1e-6) * 2 * math.pi
            phase = angle[:, None] / period
            return torch.where(channel % 2 == 0, phase.sin(), phase.cos())

        grid = torch.cat([waves(height)[:, None].expand(-1, width, -1), waves(width).expand(height, -1, -1)], dim=-1)
        self.register_buffer("position", grid.flatten(0, 1), persistent=False)

    def forward(self) -> Tensor:
        return self.position


def position_embedding(kind: str, feature_size: Size, hidden_dim: int) -> nn.Module:
    """The module of that kind: "learned" (or "v3") or "sine" (or "v2"); called with nothing, it gives [N, C].

    Raises:
        ValueError: unknown kind, or `hidden_dim` does not split in two halves.
    """
    if hidden_dim % 2:
        raise ValueError(f"hidden_dim must be even for a row half and a column half, got {hidden_dim}")
    if kind in ("learned", "v3"):
        return LearnedPosition(feature_size, hidden_dim)
    if kind in ("sine", "v2"):
        return SinePosition(feature_size, hidden_dim)
    raise ValueError(f"pos_embed_type must be 'learned' or 'sine', got {kind!r}")
