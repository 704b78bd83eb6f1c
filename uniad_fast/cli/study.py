"""`uniad-fast study` and `uniad-fast data`: the paper's experiments, and data to make them on."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data.datasets import load_dataset
from ..files import atomic_path
from ..models.backbone import Backbone
from ..models.placement import usable_device
from ..signals import Stopped
from ..studies.data import StudyData
from ..studies.digits import write_digits
from ..studies.extra import require
from ..studies.figures import draw_curves, draw_maps
from ..studies.objects import write_objects
from ..studies.study import Study, plan, run_study
from ..studies.tables import DETECTION, DETECTION_BY_MEAN, final_table, shortcut_table, time_table
from ..studies.textures import write_textures
from .options import CacheDirectory, DataArgument, Device, ImageRoot, Quiet, Seed, finish, reports_errors, say

data_app = typer.Typer(help="Make a data set (the extra [study] brings what they are made of).")


def study(
    name: Annotated[
        Literal["shortcut", "ablation", "recipe", "time"],
        typer.Argument(
            metavar="STUDY",
            help="shortcut: MLP, CNN, Transformer and UniAD as the loss falls, one model for all classes and one for "
            "each. ablation: the paper's parts on and off. recipe: each change of the fast recipe alone. time: how "
            "long the fast recipe takes to what the paper's reaches.",
        ),
    ],
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; finished runs stay there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, from 0.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every run, in time of the paper's recipe.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed and an eighth of the epochs: a look.")] = False,
    backbone: Annotated[str, typer.Option(help="timm model whose features are reconstructed.")] = (
        "tf_efficientnet_lite0"
    ),
    backbone_weights: Annotated[Path | None, typer.Option(help="Weight file of the backbone.")] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Side that images are resized to, in pixels.")] = 128,
    image_score: Annotated[
        Literal["max", "mean"], typer.Option(help="How a map becomes an image's score, in the tables of UniADs.")
    ] = "max",
    image_root: ImageRoot = None,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train the systems that the paper compares and measure them as they learn.

    The same command goes on where it was interrupted; started several times at once, for a core or a GPU each, its
    processes share the runs. Writes results.csv, table.md and the figures.
    """
    started = time.monotonic()
    require("matplotlib")
    where = usable_device(device)
    frozen = Backbone.pretrained(backbone, image_size, backbone_weights).to(where)
    loaded = StudyData.load(load_dataset(data, image_root), frozen, image_size, cache, quiet)
    planned = plan(name, loaded, seeds, epochs, quick)
    say(f"{name} on {loaded.name}: {len(planned.trials)} runs of {len(planned.systems)} systems")
    try:
        rows = run_study(planned, loaded, output, where, quiet=quiet)
    except Stopped:
        say(f"what was done is in {output}: the same command goes on from there", err=True)
        raise
    for path in _written(planned, loaded, rows, output, DETECTION if image_score == "max" else DETECTION_BY_MEAN):
        say(f"wrote {path}")
    say(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    finish(loaded.unreadable)


def _written(planned: Study, data: StudyData, rows: list[dict[str, Any]], output: Path, metric: str) -> list[Path]:
    """The files of a study that is done; its table is printed too."""
    systems = planned.systems
    if planned.name == "shortcut":
        table = shortcut_table(rows, systems)
    else:
        table = time_table(rows, metric) if planned.name == "time" else final_table(rows, systems, metric)
    with atomic_path(output / "table.md") as path:
        path.write_text(table + "\n", encoding="utf-8")
    say("\n" + table + "\n")
    written = [output / "results.csv", output / "table.md"]
    if planned.name == "shortcut":
        curves = {"shortcut": ["unified"], "unified-separate": ["unified", "separate"]}
        if len(data.classes) == 1:
            del curves["unified-separate"]
        for file, settings in curves.items():
            written.append(draw_curves(rows, systems, settings, output / f"{file}.png", data.name))
        maps = draw_maps(rows, systems, data, output / "maps.png", f"{data.name}: AUROC's best epoch, last")
        written += [maps] if maps else []
    return written


@data_app.command()
@reports_errors
def textures(
    output: Annotated[Path, typer.Argument(help="New folder, in MVTec AD's layout.")],
    train_images: Annotated[int, typer.Option(min=1, help="Good images to train on, for each class.")] = 48,
    good_images: Annotated[int, typer.Option(min=1, help="Good images to test on, for each class.")] = 16,
    defective_images: Annotated[int, typer.Option(min=1, help="For each class and kind of defect.")] = 4,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Eight classes of textures and photographs with six kinds of painted defects and exact masks."""
    write_textures(output, train_images, good_images, defective_images, seed, quiet)
    say(f"wrote {output}")


@data_app.command()
@reports_errors
def objects(
    output: Annotated[Path, typer.Argument(help="New folder, in MVTec AD's layout.")],
    train_images: Annotated[int, typer.Option(min=1, help="Good images to train on, for each class.")] = 48,
    good_images: Annotated[int, typer.Option(min=1, help="Good images to test on, for each class.")] = 16,
    defective_images: Annotated[int, typer.Option(min=1, help="For each class and kind of defect.")] = 4,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Eight photographs, each taken again and again as a part in a fixture, with six kinds of defects and masks."""
    write_objects(output, train_images, good_images, defective_images, seed, quiet)
    say(f"wrote {output}")


@data_app.command()
@reports_errors
def digits(
    output: Annotated[Path, typer.Argument(help="New folder, in MVTec AD's layout.")],
    normal: Annotated[str, typer.Option(help="The normal digits; the others are the anomalies.")] = "01234",
    seed: Seed = 0,
) -> None:
    """Handwritten digits, five of them normal and five anomalous (after the paper's CIFAR-10 setting)."""
    write_digits(output, normal, seed)
    say(f"wrote {output}")
