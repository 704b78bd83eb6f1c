"""Promised false-alarm rates beside those held: thresholds from a few good images, tried on all the others.

python -m bench.reports.promised DATA --images N [--splits 200] [--image-score max|mean] [-o FILE]

For each split, N good training images of every class are drawn to fit scores and set thresholds by; of the other good
training images, the share above each threshold is what is held. The features themselves are measured, without a
network (`uniad_fast.detect.beside`): fitting, cross-fitting and thresholds are the detector's own.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import DataError
from uniad_fast.detect.beside import without_network
from uniad_fast.detect.calibration import Calibration
from uniad_fast.detect.fit_scores import fields_of, fit_scores
from uniad_fast.detect.fitting import new_backbone, new_model, new_pipeline, score_maps_of
from uniad_fast.detect.learning import Surroundings
from uniad_fast.detect.pipeline import Pipeline
from uniad_fast.detect.residual_score import image_scores
from uniad_fast.detect.results import table
from uniad_fast.detect.settings import DetectorSettings
from uniad_fast.progress import progress
from uniad_fast.training.reconstruction_loss import channel_statistics

RATES = (0.01, 0.02, 0.05, 0.1)
_CPU = torch.device("cpu")


def one_split(
    like: Pipeline, tokens: NDArray, numbers: NDArray, learnt: NDArray, settings: DetectorSettings
) -> tuple[list[float], list[bool]]:
    """(rate held, whether the true one can lie in the printed interval) for each of `RATES`."""
    pipeline = without_network(like, len(set(numbers)), _CPU)
    calibration, _ = fit_scores(pipeline, [tokens[learnt]], numbers[learnt], settings)
    others = np.setdiff1d(np.arange(len(tokens)), learnt)
    fields = fields_of(pipeline, tokens[others], [None] * len(others))
    scores = _scores(pipeline, calibration, tokens[others], fields, settings.image_score)
    held, inside = [], []
    for rate in RATES:
        threshold = calibration.threshold_at(rate)
        held.append(float((scores > threshold.value).mean()))
        low, high = threshold.interval
        inside.append(low <= held[-1] <= high)
    return held, inside


def _scores(
    pipeline: Pipeline, calibration: Calibration, tokens: NDArray, fields: NDArray, image_score: str
) -> NDArray:
    maps = score_maps_of(pipeline, tokens, fields)
    raw = torch.cat([image_scores(pipeline.enlarge(part), image_score) for part in maps.split(32)])
    return np.array([calibration.of_score(float(s), int(f)) for s, f in zip(raw, fields, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set, as for uniad-fast")
    parser.add_argument("--images", type=int, required=True, help="good images of each class to learn from")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--image-score", default="max")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("-o", "--output", type=Path, help="JSON lines, a row a split")
    options = parser.parse_args()
    settings = DetectorSettings(options.backbone, options.image_size, image_score=options.image_score)
    samples = load_dataset(options.data).train
    backbone = new_backbone(settings, None)
    found = Surroundings(_CPU).features(backbone, options.image_size, samples, "features of good images")
    tokens = np.ascontiguousarray(found.tokens)
    names = [samples[row].class_name for row in found.used]
    classes = sorted(set(names))
    numbers = np.array([classes.index(name) for name in names])
    if min(np.bincount(numbers)) <= options.images:
        raise DataError(f"a class has {min(np.bincount(numbers))} good images, so none is left beside {options.images}")
    side = round(tokens.shape[1] ** 0.5)
    like = new_pipeline(settings, backbone, new_model(settings, backbone, (side, side), None))
    like.mean, like.std = channel_statistics(tokens)
    rows = []
    with progress("splits", options.splits) as bar:
        for split in range(options.splits):
            draw = np.random.default_rng(split)
            learnt = [draw.choice(np.flatnonzero(numbers == k), options.images, False) for k in range(len(classes))]
            rows.append(one_split(like, tokens, numbers, np.sort(np.concatenate(learnt)), settings))
            if options.output:
                options.output.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
            bar.update(1)
    held, inside = np.array([one[0] for one in rows]), np.array([one[1] for one in rows])
    print(
        table(
            ["promised", "held, mean", "deviation over splits", "held in the printed interval"],
            [
                [f"{rate:.0%}", f"{held[:, k].mean():.1%}", f"{held[:, k].std():.1%}", f"{inside[:, k].mean():.0%}"]
                for k, rate in enumerate(RATES)
            ],
        )
    )


if __name__ == "__main__":
    main()
