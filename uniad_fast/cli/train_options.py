"""The options of `uniad-fast train` that no other command has."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import ImageScore, RecipeName, ResidualScore, read_image_size

AddTo = Annotated[
    Path | None, typer.Option(metavar="BUNDLE", help="Go on from this bundle; DATA has its classes and new ones.")
]
Backbone = Annotated[str, typer.Option(help="Any timm model that gives features.")]
BackboneWeights = Annotated[
    Path | None, typer.Option(help="Its weights: .pth or .safetensors, timm's or EfficientNet-PyTorch's names.")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")]
HeldOut = Annotated[float, typer.Option(help="Share of the good images that the network is not trained on.")]
ImageScoreOfTraining = Annotated[
    ImageScore, typer.Option(help="How a map becomes the image's score; mean suits defects all over the image.")
]
RecipeOfTraining = Annotated[RecipeName, typer.Option(help="How to train.")]
Logger = Annotated[Literal["tensorboard"] | None, typer.Option(help="Also log to BUNDLE.tensorboard, for TensorBoard.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write the trained detector to.")
]
ResidualScoreOrNone = Annotated[
    ResidualScore | None, typer.Option(help="How a residual becomes a number. Default: the recipe's.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of this command.")]
Sampling = Annotated[
    Literal["all", "balanced"],
    typer.Option(help="balanced: every class as often as any other, however many images it has."),
]
Tile = Annotated[
    Any,
    typer.Option(
        parser=read_image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="Cut pictures in tiles of so many pixels, at their own resolution, and do not resize them.",
    ),
]
Overlap = Annotated[
    float | None, typer.Option(help="Share of a tile's sides that neighbours have in common. Default: 0.25.")
]
Aligned = Annotated[
    bool,
    typer.Option("--aligned", help="Pictures in tiles show the same at the same place: it is judged by what is there."),
]
