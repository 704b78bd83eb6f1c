"""Shapes to measure, and how much work they are."""

from dataclasses import dataclass, replace

from uniad_fast.ops.geometry import Size

_TINY = (4, 5)


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
    def tiny(self) -> "AttentionCase":
        """The same so small that it is only seen to run."""
        return replace(self, batch=1, feature_size=_TINY, neighbor_size=(3, 3))


ATTENTION = [
    AttentionCase("14x14_window7_batch32", 32, 8, 32, (14, 14), (7, 7)),
    AttentionCase("28x28_window15_batch8", 8, 8, 32, (28, 28), (15, 15)),
]
"""The paper's shape, and the same network on twice the resolution."""

LARGE = [
    AttentionCase("56x56_window29_batch1", 1, 8, 32, (56, 56), (29, 29)),
    AttentionCase("100x100_window9_3heads", 1, 3, 32, (100, 100), (9, 9)),
]
"""Grids at which a materialised N x N tensor hurts."""

BATCHES = [AttentionCase(f"14x14_window7_batch{batch}", batch, 8, 32, (14, 14), (7, 7)) for batch in (1, 256, 8, 128)]
"""The paper's shape in other batches: a GPU has little to do in the smallest, and is full in the largest."""

SPARSE = AttentionCase("64x64_window11_batch4_3heads", 4, 3, 32, (64, 64), (11, 11))
"""A window that hides little of the grid."""


@dataclass(frozen=True)
class ModelCase:
    """UniAD of the paper's size on a feature map."""

    name: str
    batch: int
    channels: int
    feature_size: Size
    neighbor_size: Size

    @property
    def tiny(self) -> "ModelCase":
        """The same so small that it is only seen to run."""
        return replace(self, batch=1, feature_size=_TINY, neighbor_size=(3, 3))

    @property
    def forward_flops(self) -> int:
        """Of all matrix products: width 256, FFN 1024, 4 + 4 layers, attention over all pairs."""
        tokens = self.feature_size[0] * self.feature_size[1]
        width, hidden = 256, 1024
        feed_forward, pairs = 2 * width * hidden, 2 * tokens * width
        encoder, decoder = 4 * width**2 + feed_forward + pairs, 8 * width**2 + feed_forward + 2 * pairs
        # The decoder's learned queries are projected once for the batch, of which this counts nothing.
        per_token = 4 * encoder + 4 * (decoder - width**2) + 2 * width * self.channels
        return 2 * self.batch * tokens * per_token


MODEL = [
    ModelCase("14x14_batch32", 32, 272, (14, 14), (7, 7)),
    ModelCase("28x28_batch8", 8, 272, (28, 28), (15, 15)),
]
MODEL_BATCHES = [ModelCase(f"14x14_batch{batch}", batch, 272, (14, 14), (7, 7)) for batch in (1, 256)]
"""The same for a GPU."""
