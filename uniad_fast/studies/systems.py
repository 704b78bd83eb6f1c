"""The systems that studies compare: a network, what it is built with, and what changes in the recipe with it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import UniadFastError
from ..models.architecture import Architecture
from ..models.reconstructor import Reconstructor
from ..training.build import build_model, zero_blocks
from ..training.recipes import Recipe
from .baselines import CNN, MLP, PlainTransformer

NETWORKS = ("uniad", "mlp", "cnn", "transformer")


@dataclass(frozen=True)
class System:
    """One line of a study's table.

    Attributes:
        name: as it stands in tables and figures.
        network: one of `NETWORKS`.
        options: for "uniad" of `Architecture`, for the others of their classes in `uniad_fast.studies.baselines`.
        changes: fields of the recipe that differ from the study's.
    """

    name: str
    network: str = "uniad"
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, base: Recipe) -> Recipe:
        """The study's recipe with this system's changes."""
        return replace(base, **self.changes)

    def build(
        self, channels: int, stride: int, feature_size: tuple[int, int], recipe: Recipe, impl: str | None = None
    ) -> Reconstructor:
        """The network for a feature map.

        Raises:
            UniadFastError: there is no such network, or an option is out of range.
        """
        if self.network == "uniad":
            architecture = Architecture(**self.options)
            return build_model(channels, stride, feature_size, recipe, impl, architecture)
        if self.network == "mlp":
            return MLP(channels, stride, feature_size, **self.options)
        if self.network == "cnn":
            return CNN(channels, stride, feature_size, **self.options)
        if self.network == "transformer":
            plain = PlainTransformer(channels, stride, feature_size, dropout=recipe.dropout, impl=impl, **self.options)
            if recipe.zero_blocks:
                zero_blocks(plain)
            return plain
        raise UniadFastError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")

    def identity(self) -> dict[str, Any]:
        """What a finished run of it is recognised by (JSON values)."""
        return asdict(self)


SHORTCUT_SYSTEMS = (
    System("linear", "mlp", {"num_layers": 1}),
    System("MLP", "mlp"),
    System("CNN 1x1", "cnn", {"kernel_size": 1}),
    System("CNN 3x3", "cnn", {"kernel_size": 3}),
    System("Transformer", "transformer", {"query_embedding": "first"}),
    System("Transformer, no query", "transformer", {"query_embedding": "none"}),
    System("UniAD"),
)
"""Figure 2a of the paper, its query ablation, and the one layer of its analysis."""

NO_JITTER: Mapping[str, Any] = {"jitter_prob": 0.0}
FULL_ATTENTION: Mapping[str, Any] = {"mask": (False, False, False)}
ONE_QUERY: Mapping[str, Any] = {"query_embedding": "first"}

PART_SYSTEMS = (
    System("UniAD: NMA, LQD, FJ"),
    System("without NMA", options=FULL_ATTENTION),
    System("without LQD", options=ONE_QUERY),
    System("without FJ", changes=NO_JITTER),
    System("NMA alone", options=ONE_QUERY, changes=NO_JITTER),
    System("LQD alone", options=FULL_ATTENTION, changes=NO_JITTER),
    System("FJ alone", options={**FULL_ATTENTION, **ONE_QUERY}),
    System("none of them", options={**FULL_ATTENTION, **ONE_QUERY}, changes=NO_JITTER),
    System("none, and no query", options={**FULL_ATTENTION, "query_embedding": "none"}, changes=NO_JITTER),
)
"""Each of the paper's three parts on and off."""


def _places() -> list[System]:
    """The mask in one place or two of the three."""
    names = ("encoder", "decoder's first", "decoder's second")
    flags = [(bool(i & 4), bool(i & 2), bool(i & 1)) for i in (4, 2, 1, 6, 5, 3)]
    return [
        System("mask in " + " and ".join(n for n, on in zip(names, f, strict=True) if on), options={"mask": f})
        for f in flags
    ]


def switch_systems(feature_size: tuple[int, int]) -> tuple[System, ...]:
    """Where the mask acts, its window, and the jitter's scale and probability, each alone."""
    half = tuple(max(1, n // 2) for n in feature_size)
    windows = [(n, n) for n in (1, 3, 5, 7) if n < min(feature_size) and (n, n) != half]
    return (
        *_places(),
        *(System(f"window {h}x{w}", options={"neighbor_size": (h, w)}) for h, w in windows),
        *(System(f"jitter scale {s:g}", changes={"jitter_scale": float(s)}) for s in (5, 10, 40)),
        *(System(f"jitter probability {p:g}", changes={"jitter_prob": p}) for p in (0.25, 0.5)),
    )


def recipe_systems(base: Recipe) -> tuple[System, ...]:
    """A recipe, the fast one or a shorter, and each change of it alone."""
    longer = {"epochs": 2 * base.epochs, "min_steps": 2 * base.min_steps}
    changes: dict[str, Mapping[str, Any]] = {
        "the recipe": {},
        "Muon, rate 2e-3": {"optimizer": "muon", "learning_rate": 2e-3},
        "blocks not zero at first": {"zero_blocks": False},
        "queries from N(0, 1)": {"query_std": 1.0},
        "features not standardised": {"standardize": False},
        "constant rate": {"schedule": "constant"},
        "early stop": {**longer, "schedule": "constant", "warmup": 0.08, "patience": 2},
        "rate 2e-3": {"learning_rate": 2e-3},
        "batch 32": {"batch_size": 32, "min_steps": base.min_steps // 2},
        "L1 loss": {"loss": "l1"},
        "dropout 0.1": {"dropout": 0.1},
        "no jitter": NO_JITTER,
        "jitter 40": {"jitter_scale": 40.0},
        "float32": {"precision": "float32"},
    }
    return tuple(System(name, changes=change) for name, change in changes.items())
