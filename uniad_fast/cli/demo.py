"""uniad-fast demo: train and test on real photographs."""

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from ..data.datasets import load_dataset
from ..data.images import read_image
from ..data.samples import Dataset, Sample
from ..detect import results
from ..detect.detector import AnomalyDetector
from ..detect.evaluation import Evaluation, evaluate
from ..detect.heatmap import heat_map
from ..printable import file_name
from ..training.recipes import RECIPES
from .options import CacheDirectory, Device, Quiet, Seed, finish, say
from .train import fit_and_save

_PICTURES = 8


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that it writes.")] = Path(
        "uniad-demo"
    ),
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the fast recipe's.")] = None,
    images_per_class: Annotated[int | None, typer.Option(min=4, help="Use only so many, for a quick look.")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train and test on real photographs of solar cells (the extra [demo] brings data and weights)."""
    started = time.monotonic()
    dataset = load_dataset("elpv", seed=seed)
    if images_per_class:
        dataset = thin_out(dataset, images_per_class)
    detector = AnomalyDetector(
        "tf_efficientnet_lite0",
        128,  # of the cells' 300 pixels: no worse than 224, in a third of the time
        recipe=RECIPES["fast"].with_epochs(epochs),
        seed=seed,
        device=device,
        cache_dir=cache,
    )
    bundle = output / "bundle"
    fit_and_save(detector, dataset, bundle, resume, restart=not resume, quiet=quiet)
    evaluation = evaluate(detector, dataset.test, quiet=quiet)
    written = results.write_evaluation(evaluation, output)
    pictures = picture_most_defective(detector, evaluation, output / "heatmaps")
    say("\n" + results.evaluation_table(evaluation) + "\n")
    if evaluation.decisions is not None:
        say(results.decisions_table(evaluation.decisions) + "\n")
    for path in written:
        say(f"wrote {path}")
    say(f"wrote {len(pictures)} heat maps of the most defective cells to {output / 'heatmaps'}")
    say(f"score your own images with: {shlex.join(['uniad-fast', 'score', str(bundle), 'IMAGES', '-o', 'OUT'])}")
    say(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    finish([*detector.unreadable, *evaluation.unreadable])


def picture_most_defective(detector: AnomalyDetector, evaluation: Evaluation, directory: Path) -> list[Path]:
    """Heat maps of the highest-scoring defective images, by rank."""
    ranked = sorted(
        (pair for pair in zip(evaluation.samples, evaluation.scores, strict=True) if pair[0].defective),
        key=lambda pair: -pair[1],
    )
    pictures = []
    for rank, (sample, _) in enumerate(ranked[:_PICTURES], start=1):
        picture = heat_map(
            read_image(sample.path),
            detector.predict(sample.path).anomaly_map,
            detector.calibration.color_range,
        )
        pictures.append(
            results.write_png(
                picture, directory / f"{rank:02}-{file_name(f'{sample.class_name}-{sample.path.stem}')}.png"
            )
        )
    return pictures


def thin_out(dataset: Dataset, images_per_class: int) -> Dataset:
    """The first so many training images of each class, and as many good and defective test images."""

    def first(samples: list[Sample]) -> list[Sample]:
        counts: dict[tuple[str, bool], int] = {}
        kept = []
        for sample in samples:
            group = (sample.class_name, sample.defective)
            counts[group] = counts.get(group, 0) + 1
            if counts[group] <= images_per_class:
                kept.append(sample)
        return kept

    return Dataset(dataset.name, first(dataset.train), first(dataset.test))
