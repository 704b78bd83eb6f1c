"""`uniad-fast study` and `uniad-fast data`: the paper's experiments, and data to make them on."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from ..data.datasets import load_dataset
from ..files import atomic_path
from ..models.backbone import Backbone
from ..models.placement import usable_device
from ..packages import require
from ..signals import Stopped
from ..studies.cifar10 import FEATURE_LEVELS, FEATURE_STRIDE, is_cifar10, load_cifar10, write_cifar10
from ..studies.data import ManyVersusMany, StudyData
from ..studies.digits import write_digits
from ..studies.figures import draw_curves, draw_maps
from ..studies.objects import write_objects
from ..studies.paper import paper_tables
from ..studies.study import Study, plan, run_study
from ..studies.tables import DETECTION, final_table, shortcut_table, time_table
from ..studies.textures import write_textures
from ..training.processes import current
from .options import CacheDirectory, DataArgument, Device, ImageRoot, Quiet, Seed, finish, reports_errors, say

StudyBackbone = Annotated[
    str | None,
    typer.Option(
        help="timm model whose features are reconstructed. Default: the paper's EfficientNet-b4 in paper, "
        "else tf_efficientnet_lite0."
    ),
]
data_app = typer.Typer(help="Make a data set (the extra [study] brings what they are made of).")


def study(
    name: Annotated[
        Literal["shortcut", "ablation", "recipe", "time", "paper"],
        typer.Argument(
            metavar="STUDY",
            help="shortcut: MLP, CNN, Transformer and UniAD as the loss falls, one model for all classes and one for "
            "each. ablation: the paper's parts on and off. recipe: each change of the fast recipe alone. time: how "
            "long the fast recipe takes to what the paper's reaches. paper: both recipes on MVTec AD, VisA or "
            "CIFAR-10, class by class, beside the published figures.",
        ),
    ],
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; finished runs stay there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, from 0.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of every run, in time and paper of the paper's recipe.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed and an eighth of the epochs: a look.")] = False,
    unified_only: Annotated[bool, typer.Option("--unified-only", help="In paper, no model for each class.")] = False,
    backbone: StudyBackbone = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="Weight file of the backbone.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="Side that images are resized to. Default: 224 in paper, else 128.")
    ] = None,
    image_score: Annotated[
        Literal["max", "mean"] | None,
        typer.Option(help="How a map becomes an image's score, for UniADs. Default: max, of CIFAR-10 the mean."),
    ] = None,
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
    if name == "shortcut":
        require("matplotlib")
    where = usable_device(device)
    usual = ("tf_efficientnet_b4", 224) if name == "paper" else ("tf_efficientnet_lite0", 128)
    chosen = (backbone or usual[0], image_size or usual[1], backbone_weights)
    loaded = _load(name, data, image_root, chosen, where, cache, quiet)
    planned = plan(name, loaded, seeds, epochs, quick, separate=not unified_only)
    say(f"{name} on {loaded.name}: {len(planned.trials)} runs of {len(planned.systems)} systems")
    try:
        rows = run_study(planned, loaded, output, where, quiet=quiet)
    except Stopped:
        say(f"what was done is in {output}: the same command goes on from there", err=True)
        raise
    if current().is_first:
        for path in _written(planned, loaded, rows, output, image_score and f"image_auroc_{image_score}"):
            say(f"wrote {path}")
    say(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    finish(loaded.unreadable)


def _load(
    name: str,
    data: str,
    image_root: Path | None,
    chosen: tuple[str, int, Path | None],
    where: torch.device,
    cache: Path | None,
    quiet: bool,
) -> StudyData:
    """chosen: backbone, image size and weight file."""
    image_size = chosen[1]
    if name == "paper" and is_cifar10(Path(data)):
        dataset = load_cifar10(Path(data))
        frozen = Backbone.pretrained(*chosen, FEATURE_LEVELS, FEATURE_STRIDE).to(where)
        return ManyVersusMany.load(dataset, frozen, image_size, cache, quiet)
    dataset = load_dataset(data, image_root)
    return StudyData.load(dataset, Backbone.pretrained(*chosen).to(where), image_size, cache, quiet)


def _written(
    planned: Study, data: StudyData, rows: list[dict[str, Any]], output: Path, metric: str | None
) -> list[Path]:
    """The files of a study that is done; its table is printed too."""
    systems = planned.systems
    if planned.name == "shortcut":
        table = shortcut_table(rows, systems)
    elif planned.name == "paper":
        table = paper_tables(rows, data, metric)
    elif planned.name == "time":
        table = time_table(rows, metric or DETECTION)
    else:
        table = final_table(rows, systems, metric or DETECTION)
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


@data_app.command()
@reports_errors
def cifar10(
    archive: Annotated[Path, typer.Argument(help="CIFAR-10's binary version, unpacked: cifar-10-batches-bin.")],
    output: Annotated[Path, typer.Argument(help="New folder, for `uniad-fast study paper`.")],
    quiet: Quiet = False,
) -> None:
    """CIFAR-10's 60,000 images as PNG files, in a folder for each class."""
    write_cifar10(archive, output, quiet)
    say(f"wrote {output}")
