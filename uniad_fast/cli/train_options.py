"""The options of `uniad-fast train` that no other command has."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import ResidualScore as _Kind

AddTo = Annotated[
    Path | None, typer.Option(metavar="BUNDLE", help="Go on from this bundle; DATA has its classes and new ones.")
]
Backbone = Annotated[str, typer.Option(help="Any timm model that gives features.")]
BackboneWeights = Annotated[
    Path | None, typer.Option(help="Its weights: .pth or .safetensors, timm's or EfficientNet-PyTorch's names.")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")]
HeldOut = Annotated[float, typer.Option(help="Share of the good images that the network is not trained on.")]
Logger = Annotated[Literal["tensorboard"] | None, typer.Option(help="Also log to BUNDLE.tensorboard, for TensorBoard.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write the trained detector to.")
]
ResidualScoreOrNone = Annotated[
    _Kind | None, typer.Option(help="How a residual becomes a number. Default: the recipe's.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of this command.")]
Sampling = Annotated[
    Literal["all", "balanced"],
    typer.Option(help="balanced: every class as often as any other, however many images it has."),
]
