"""What detectors find: image and pixel AUROC, defects found and false alarms at promised rates, beside simpler means.

python -m bench.reports.detectors DATA [--seeds N] [--image-size S] [--backbone NAME] [--image-score max|mean] [-o FILE]

For each seed a detector is trained by the fast recipe, and measured with the class of each image recognized and told;
so are the features alone and a memory of them (`uniad_fast.detect.beside`).
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import Dataset
from uniad_fast.detect.beside import beside
from uniad_fast.detect.detector import AnomalyDetector
from uniad_fast.detect.evaluation import Evaluation, evaluate
from uniad_fast.detect.results import table
from uniad_fast.training.recipes import FAST

RATES = (0.01, 0.05)


def row(name: str, detector: AnomalyDetector, evaluation: Evaluation) -> dict[str, object]:
    """Figures of one evaluation; found and false alarms at each of `RATES`, as it was promised."""
    figures: dict[str, object] = {"detector": name}
    for column in ("image_auroc", "pixel_auroc"):
        value = evaluation.mean[column]
        figures[column] = None if value is None else round(value, 4)
    defective = [sample.defective for sample in evaluation.samples]
    for rate in RATES:
        limit = detector.calibration.threshold_at(rate).value
        above = [score > limit for score in evaluation.scores]
        found = sum(a and d for a, d in zip(above, defective, strict=True))
        figures[f"found at {rate:.0%}"] = round(found / sum(defective), 3)
        figures[f"held at {rate:.0%}"] = round((sum(above) - found) / (len(defective) - sum(defective)), 3)
    good = sorted(score for score, bad in zip(evaluation.scores, defective, strict=True) if not bad)
    cut = good[len(good) - 1 - int(0.05 * len(good))]
    hits = sum(score > cut for score, bad in zip(evaluation.scores, defective, strict=True) if bad)
    figures["found, 5% of the test's good ones"] = round(hits / sum(defective), 3)
    return figures


def measured(dataset: Dataset, seed: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """All rows of one seed."""
    settings = {
        "image_score": options.image_score,
        "seed": seed,
        "backbone_weights": options.backbone_weights,
        "recipe": replace(FAST, precision=options.precision),
    }
    started = time.perf_counter()
    detector = AnomalyDetector(options.backbone, options.image_size, **settings)
    detector.fit(dataset, quiet=True)
    seconds = time.perf_counter() - started
    rows = []
    for name, one in {"UniAD": detector, **beside(detector, dataset.train, quiet=True)}.items():
        for how in ("recognized", "told") if len(one.classes) > 1 else ("told",):
            found = evaluate(one, dataset.test, class_from_data=how == "told", quiet=True)
            rows.append(row(name, one, found) | {"class": how, "recognized": found.recognized})
    rows[0]["seconds"] = round(seconds)
    rows[0]["log"] = detector.trained.training_log.splitlines()[-1]
    return [one | {"seed": seed} for one in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set, as for uniad-fast, with good and defective test images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--image-score", default="max")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--backbone-weights")
    parser.add_argument("-o", "--output", type=Path, help="JSON lines, a row a detector and seed")
    options = parser.parse_args()
    dataset = load_dataset(options.data)
    rows: list[dict[str, object]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rows += measured(dataset, seed, options)
        if options.output:
            options.output.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    columns = [name for name in rows[0] if name not in ("log", "recognized")]
    print(table(columns, [[str(one.get(name, "")) for name in columns] for one in rows]))


if __name__ == "__main__":
    main()
