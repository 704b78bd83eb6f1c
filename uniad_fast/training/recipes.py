"""Training recipes: every choice that is not the model's."""

from dataclasses import dataclass, replace

from ..errors import UniadFastError

_LARGE = 1e30  # beyond, float32 has nothing to compute with
_RANGES: tuple[tuple[str, type, float, float], ...] = (
    ("epochs", int, 0, 10**7),
    ("min_steps", int, 0, 10**9),
    ("batch_size", int, 1, 10**6),
    ("patience", int, 0, 10**7),
    ("learning_rate", float, 0, _LARGE),
    ("weight_decay", float, 0, _LARGE),
    ("clip", float, 1e-30, _LARGE),
    ("warmup", float, 0, 1),
    ("dropout", float, 0, 1 - 2**-16),
    ("jitter_scale", float, 0, _LARGE),
    ("jitter_prob", float, 0, 1),
    ("query_std", float, 0, _LARGE),
)
_WORDS = {
    "schedule": ("step", "one_cycle", "constant"),
    "precision": ("float32", "bfloat16", "auto"),
    "residual_score": ("l2", "whitened", "relative", "gaussian"),
    "optimizer": ("adamw", "muon"),
    "loss": ("mse", "l1"),
    "sampling": ("all", "balanced"),
}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        min_steps: a small data set is passed over more often than `epochs`, until it has made so many steps.
        batch_size, learning_rate, weight_decay, clip: of the optimiser; `clip` is the largest gradient norm.
        schedule: "step" (x 0.1 after 80% of the steps), "one_cycle" (up over `warmup`, then down, by cosine) or
            "constant" (up over `warmup`, then no change).
        warmup: share of the steps in which a one-cycle or constant schedule rises.
        dropout: of attention, FFN and residuals.
        jitter_scale, jitter_prob: of the feature jittering (paper, section 3.2).
        standardize: features scaled to mean 0 and deviation 1 per channel, as measured on the training images.
        query_std: deviation of the learned queries' initial values.
        zero_blocks: attention and FFN give zero at first, so that every layer begins as its residual connection.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device multiplies it
            faster than float32.
        optimizer: "adamw", or "muon" (torch 2.9 or newer) for the matrices of attention and FFN with "adamw" for the
            rest. Muon computes in bfloat16, which takes 20 times as long on a processor without it.
        loss: between reconstruction and feature, "mse" (the paper's) or "l1".
        residual_score: how a residual becomes a number, "l2" (the paper's), "whitened", "relative" or "gaussian"; see
            `uniad_fast.detect.residual_score`.
        patience: training ends after so many epochs in which the loss on held-out good images has not fallen by a
            hundredth below its lowest; 0 goes on to the end.
        sampling: "all", every image once an epoch, or "balanced", every class as often as any other: its images come
            again, or not all of them, where classes differ in number.

    Raises:
        UniadFastError: a value is out of range, not finite or of another type.
    """

    name: str
    epochs: int
    min_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    clip: float
    schedule: str
    warmup: float
    dropout: float
    jitter_scale: float
    jitter_prob: float
    standardize: bool
    query_std: float
    precision: str
    residual_score: str
    optimizer: str = "adamw"
    loss: str = "mse"
    patience: int = 0
    zero_blocks: bool = False
    sampling: str = "all"

    def __post_init__(self) -> None:
        for name, allowed, lowest, highest in _RANGES:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole if allowed is int else whole or isinstance(value, float)) or not lowest <= value <= highest:
                kind = "an integer" if allowed is int else "a number"
                raise UniadFastError(f"recipe: {name} must be {kind} from {lowest} to {highest}, got {value!r}")
        if self.epochs == 0 and self.min_steps == 0:
            raise UniadFastError("recipe: epochs and min_steps are both 0, which trains nothing")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise UniadFastError(f"recipe: {name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        for name in ("standardize", "zero_blocks"):
            if not isinstance(getattr(self, name), bool):
                raise UniadFastError(f"recipe: {name} must be true or false, got {getattr(self, name)!r}")

    def with_epochs(self, epochs: int | None) -> "Recipe":
        """This recipe with exactly so many epochs; itself for None."""
        return self if epochs is None else replace(self, epochs=epochs, min_steps=0)


PAPER = Recipe(
    name="paper",
    epochs=1000,
    min_steps=0,
    batch_size=8,
    learning_rate=1e-4,
    weight_decay=1e-4,
    clip=0.1,
    schedule="step",
    warmup=0.0,
    dropout=0.1,
    jitter_scale=20.0,
    jitter_prob=1.0,
    standardize=False,
    query_std=1.0,
    precision="float32",
    residual_score="l2",
)

FAST = Recipe(
    name="fast",
    epochs=5,
    min_steps=300,
    batch_size=16,
    learning_rate=1e-3,
    weight_decay=1e-4,
    clip=1.0,
    schedule="one_cycle",
    warmup=0.15,
    dropout=0.0,
    jitter_scale=20.0,
    jitter_prob=1.0,
    standardize=True,
    query_std=0.02,
    precision="auto",
    residual_score="gaussian",
    zero_blocks=True,
)

RECIPES = {recipe.name: recipe for recipe in (PAPER, FAST)}
