"""uniad-fast demo: train and test on real photographs."""

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from ..data.datasets import load_dataset
from ..data.samples import Dataset, Sample
from ..deploy.report import Shown, write_report
from ..detect import results
from ..detect.detector import AnomalyDetector
from ..detect.evaluation import evaluate
from ..detect.result_pictures import draw_results
from ..training.recipes import RECIPES
from .options import CacheDirectory, Device, Quiet, Seed, finish, say
from .train import fit_and_save


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
    pictures, not_drawn = draw_results(detector, evaluation, output / "pictures")
    say("\n" + results.evaluation_table(evaluation) + "\n")
    if evaluation.decisions is not None:
        say(results.decisions_table(evaluation.decisions) + "\n")
    for path in written:
        say(f"wrote {path}")
    say(f"wrote {len(pictures)} pictures of the worst and best verdicts to {output / 'pictures'}")
    page = output / "report.html"
    shown = write_report(detector, [Shown.of(sample) for sample in dataset.test], page, "uniad-fast demo", quiet=quiet)
    say(f"wrote {page}: open it in a browser ({page.absolute().as_uri()})")
    say(f"score your own images with: {shlex.join(['uniad-fast', 'score', str(bundle), 'IMAGES', '-o', 'OUT'])}")
    say(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    finish([*detector.unreadable, *evaluation.unreadable, *shown.unreadable, *not_drawn])


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
