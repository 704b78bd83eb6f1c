"""What a `UniAD` is built with that does not follow from the feature map: the paper's choices, or a checkpoint's."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UniadFastError
from ..ops.geometry import Size, size_pair
from ..state_dicts import StateDict, WeightsError


@dataclass(frozen=True)
class Architecture:
    """The network's choices; the defaults are the paper's.

    Attributes:
        neighbor_size: (h, w) of the hidden window; None for half of the grid, as the public configurations have it.
        mask: whether the window hides in the encoder, in the decoder's first and in its second attention.
        The others: as in `UniAD`.

    Raises:
        UniadFastError: a value is out of range.
    """

    hidden_dim: int = 256
    nhead: int = 8
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    dim_feedforward: int = 1024
    pos_embed_type: str = "learned"
    activation: str = "relu"
    normalize_before: bool = False
    query_embedding: str = "every"
    neighbor_size: Size | None = None
    mask: tuple[bool, bool, bool] = (True, True, True)

    def __post_init__(self) -> None:
        for name, highest in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= highest:
                raise UniadFastError(f"architecture: {name} must be an integer from 1 to {highest}, got {value!r}")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise UniadFastError(
                    f"architecture: {name} must be one of {', '.join(words)}, got {getattr(self, name)!r}"
                )
        if not isinstance(self.normalize_before, bool):
            raise UniadFastError(f"architecture: normalize_before must be true or false, got {self.normalize_before!r}")
        if self.neighbor_size is not None:
            try:
                size_pair("architecture: neighbor_size", self.neighbor_size)
            except ValueError as error:
                raise UniadFastError(str(error)) from None
        if not isinstance(self.mask, tuple) or len(self.mask) != 3 or {type(flag) for flag in self.mask} != {bool}:
            raise UniadFastError(f"architecture: mask must be three of true and false, got {self.mask!r}")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Architecture":
        """From what `dataclasses.asdict` gave, after JSON made lists of the tuples."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)

    def kwargs(self, feature_size: Size) -> dict[str, Any]:
        """Those of `UniAD` that they are."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("neighbor_size", "mask")}
        window = self.neighbor_size or tuple(max(1, n // 2) for n in feature_size)
        masked = {"neighbor_size": window, "mask": self.mask} if any(self.mask) else None
        return own | {"neighbor_mask": masked}


# Beyond any network that was ever trained so, and small enough that a hostile file costs nothing.
_LARGEST = {
    "hidden_dim": 8192,
    "nhead": 512,
    "num_encoder_layers": 64,
    "num_decoder_layers": 64,
    "dim_feedforward": 65536,
}
_WORDS = {
    "pos_embed_type": ("learned", "v3", "sine", "v2"),
    "activation": ("relu", "gelu", "glu"),
    "query_embedding": ("every", "first", "none"),
}
PAPER_ARCHITECTURE = Architecture()


def read_architecture(
    state: StateDict, nhead: int, neighbor_size: Size | None, grid: Size | None = None
) -> tuple[Architecture, int, Size]:
    """(architecture, channels of the feature map, grid) of a reconstruction network, read off its state dict.

    Heads, windows and the choice between relu and gelu leave no trace in a state dict: the first two are arguments,
    the third is relu. Nor does the grid where positions are sines: it is that of the argument, or a square one.

    Raises:
        WeightsError: these are no tensors of a UniAD.
    """
    try:
        hidden_dim, channels = state["input_proj.weight"].shape
        layers = [re.match(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.", name) for name in state]
        count = {kind: 1 + max(int(m[2]) for m in layers if m and m[1] == kind) for kind in ("encoder", "decoder")}
        linear1, linear2 = (state[f"transformer.encoder.layers.0.linear{i}.weight"] for i in (1, 2))
        tokens = len(state["transformer.decoder.layers.0.learned_embed.weight"])
        learned = "pos_embed.row_embed.weight" in state
        if learned:
            grid = (len(state["pos_embed.row_embed.weight"]), len(state["pos_embed.col_embed.weight"]))
        elif grid is None or grid[0] * grid[1] != tokens:
            grid = (math.isqrt(tokens), math.isqrt(tokens))
        dim_feedforward = linear2.shape[1]
        glu = len(linear1) == 2 * dim_feedforward
    except KeyError as error:
        raise WeightsError(f"these are not the tensors of a UniAD network: {error} is not there") from None
    except (ValueError, IndexError, TypeError) as error:
        raise WeightsError(f"these are not the tensors of a UniAD network: one has another shape ({error})") from None
    if grid[0] * grid[1] != tokens:
        raise WeightsError(f"{tokens} query embeddings do not fit a grid of {grid[0]} x {grid[1]} tokens")
    architecture = Architecture(
        hidden_dim=hidden_dim,
        nhead=nhead,
        num_encoder_layers=count["encoder"],
        num_decoder_layers=count["decoder"],
        dim_feedforward=dim_feedforward,
        pos_embed_type="learned" if learned else "sine",
        activation="glu" if glu else "relu",
        normalize_before="transformer.encoder.norm.weight" in state,
        neighbor_size=neighbor_size,
    )
    return architecture, channels, grid
