"""What a `UniAD` is built with that does not follow from the feature map: the paper's choices, or a checkpoint's."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .model import UniAD
from .neighborhood import Size
from .recipes import Recipe
from .state_dicts import StateDict, WeightsError
from .transformer import DecoderLayer


@dataclass(frozen=True)
class Architecture:
    """The network's choices; the defaults are the paper's.

    Attributes:
        neighbor_size: (h, w) of the hidden window; None for half of the grid, as the public configurations have it.
        mask: whether the window hides in the encoder, in the decoder's first and in its second attention.
        The others: as in `UniAD`.
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


PAPER_ARCHITECTURE = Architecture()


def build_model(
    channels: int,
    stride: int,
    feature_size: Size,
    recipe: Recipe,
    impl: str | None = None,
    architecture: Architecture = PAPER_ARCHITECTURE,
) -> UniAD:
    """The network for a feature map, with the recipe's dropout, jitter and initial queries."""
    model = UniAD(
        inplanes=[channels],
        instrides=[stride],
        feature_size=feature_size,
        feature_jitter={"scale": recipe.jitter_scale, "prob": recipe.jitter_prob},
        save_recon=None,
        initializer={"method": "xavier_uniform"},
        dropout=recipe.dropout,
        impl=impl,
        **architecture.kwargs(feature_size),
    )
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            nn.init.normal_(module.learned_embed.weight, std=recipe.query_std)
    if recipe.zero_blocks:
        zero_blocks(model)
    return model


def zero_blocks(model: UniAD) -> None:
    """Let every attention and FFN give zero, whose biases are zero already: layers are their residual connections."""
    for name, parameter in model.transformer.named_parameters():
        if name.endswith(("out_proj.weight", "linear2.weight")):
            nn.init.zeros_(parameter)


def read_architecture(state: StateDict, nhead: int, neighbor_size: Size | None) -> tuple[Architecture, int, Size]:
    """(architecture, channels of the feature map, grid) of a reconstruction network, read off its state dict.

    Heads, windows and the choice between relu and gelu leave no trace in a state dict: the first two are arguments,
    the third is relu.

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
        grid = (
            (len(state["pos_embed.row_embed.weight"]), len(state["pos_embed.col_embed.weight"]))
            if learned
            else (math.isqrt(tokens), math.isqrt(tokens))
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"these are not the tensors of a UniAD network: {error} is not there") from None
    if grid[0] * grid[1] != tokens:
        raise WeightsError(f"{tokens} query embeddings do not fit a grid of {grid[0]} x {grid[1]} tokens")
    architecture = Architecture(
        hidden_dim=hidden_dim,
        nhead=nhead,
        num_encoder_layers=count["encoder"],
        num_decoder_layers=count["decoder"],
        dim_feedforward=linear2.shape[1],
        pos_embed_type="learned" if learned else "sine",
        activation="glu" if len(linear1) == 2 * linear2.shape[1] else "relu",
        normalize_before="transformer.encoder.norm.weight" in state,
        neighbor_size=neighbor_size,
    )
    return architecture, channels, grid
