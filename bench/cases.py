"""Shapes to measure, and how much work they are."""

from dataclasses import dataclass

from uniad_fast.neighborhood import Size


@dataclass(frozen=True)
class AttentionCase:
    """One attention: a name, batch, heads, head_dim, grid, hidden window."""

    name: str
    batch: int
    heads: int
    head_dim: int
    feature_size: Size
    neighbor_size: Size

    @property
    def tokens(self) -> int:
        height, width = self.feature_size
        return height * width

    @property
    def forward_flops(self) -> int:
        """Two matrix products over all pairs, hidden ones counted: what a dense computation does."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim

    @property
    def forward_bytes(self) -> int:
        """Query, key and value read once, output written once, in float32."""
        return 4 * 4 * self.batch * self.heads * self.tokens * self.head_dim


ATTENTION = [
    AttentionCase("14x14_window7_batch32", 32, 8, 32, (14, 14), (7, 7)),
    AttentionCase("28x28_window15_batch8", 8, 8, 32, (28, 28), (15, 15)),
]
"""The paper's shape, and the same network on twice the resolution."""


@dataclass(frozen=True)
class ModelCase:
    """UniAD of the paper's size on a feature map."""

    name: str
    batch: int
    channels: int
    feature_size: Size
    neighbor_size: Size


MODEL = [
    ModelCase("14x14_batch32", 32, 272, (14, 14), (7, 7)),
    ModelCase("28x28_batch8", 8, 272, (28, 28), (15, 15)),
]
