"""Which neighbourhood a dense attention mask stands for: exactly one, or none."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.geometry import Size, Window, hidden_keys


@dataclass(frozen=True)
class Other:
    """A mask that is no neighbourhood's, and why."""

    why: str


class MaskMemory:
    """Remembers what each mask is for as long as the tensor lives and is not written to.

    The first look reads the mask, which waits for the device; the later ones do not. A copy or a pickle is empty.
    """

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[weakref.ref, int, Window | Other]] = {}

    def identify(self, mask: Tensor, feature_size: Size | None) -> Window | Other:
        """What `mask` [N, N] is; only on the grid `feature_size`, if one is given."""
        # A view made anew in each call is known by what it is a view of.
        owner = mask._base if mask._is_view() and mask._base is not None else mask
        key = (id(owner), mask.storage_offset(), mask.shape, mask.stride(), feature_size)
        version = -1 if owner.is_inference() else owner._version
        if key in self._known:
            reference, seen_version, found = self._known[key]
            if reference() is owner and seen_version == version and version >= 0:
                return found
        found = identify_mask(mask, feature_size)
        self.remember(key, owner, version, found)
        return found

    def remember(self, key: tuple, owner: Tensor, version: int, found: Window | Other) -> None:
        for stale in [k for k, (reference, *_) in self._known.items() if reference() is None]:
            del self._known[stale]
        self._known[key] = (weakref.ref(owner), version, found)

    def __reduce__(self) -> tuple:
        return MaskMemory, ()


def identify_mask(mask: Tensor, feature_size: Size | None = None) -> Window | Other:
    """The window whose mask this is, element for element; `Other` where one element differs.

    Args:
        mask: [N, N], bool with True where hidden, or floating with -inf where hidden and 0 elsewhere.
        feature_size: the grid; None tries every one of N tokens.
    """
    tokens = mask.shape[0]
    if mask.ndim != 2 or mask.shape[1] != tokens:
        return Other(f"the mask is {tuple(mask.shape)}, not [N, N]")
    if mask.dtype == torch.bool:
        hidden = mask
    elif mask.is_floating_point():
        hidden = mask == float("-inf")
        if not (hidden | (mask == 0)).all():
            return Other("the mask has values besides 0 and -inf")
    else:
        return Other(f"the mask is {mask.dtype}, neither bool nor floating")
    if not hidden.any():
        return Window.of(feature_size or (1, tokens), None)
    grids = [feature_size] if feature_size else _grids(tokens)
    first = hidden[0].cpu()  # what the query in the corner does not see is a quarter of the window, clipped
    for height, width in grids:
        corner = first.view(height, width)
        rows, cols = int(corner[:, 0].sum()), int(corner[0].sum())
        if not rows or not cols or int(corner.sum()) != rows * cols:
            continue
        window = Window(height, width, rows - 1, cols - 1)
        if torch.equal(hidden, hidden_keys(window, mask.device)):
            return window
    on = f"the grid {feature_size[0]}x{feature_size[1]}" if feature_size else f"any grid of {tokens} tokens"
    return Other(f"the mask is no neighbourhood's on {on}")


def _grids(tokens: int) -> list[Size]:
    """Every (height, width) of so many tokens, the squarest first."""
    sizes = [(height, tokens // height) for height in range(1, tokens + 1) if tokens % height == 0]
    return sorted(sizes, key=lambda size: abs(size[0] - size[1]))
