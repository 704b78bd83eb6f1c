"""What breaks first with many images, many classes, little memory and a slow disk.

python -m bench.reports.scale disk [--megabytes-a-second 40]   training on a cache on a throttled disk, ahead and not
python -m bench.reports.scale memory [--limit-mb 1200]         a cache larger than the memory a process may have
python -m bench.reports.scale classes [--classes 1000]         bundle, load time and scoring time of many classes
python -m bench.reports.scale scan [--height 4000 --width 20000]   time and memory of one line scan in tiles

Features are drawn at random, of the paper's shape (14 x 14 x 272) or lite0's at 128 pixels: what is measured does not
hang on their values.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.tools.peak import status
from uniad_fast import AnomalyDetector
from uniad_fast.data.feature_shards import FeatureShards, read_shard, write_shard
from uniad_fast.detect.calibration import Calibration
from uniad_fast.detect.fitting import new_model, new_pipeline
from uniad_fast.detect.good_gaussians import FittedGaussian
from uniad_fast.detect.scales import Scale
from uniad_fast.detect.settings import DetectorSettings
from uniad_fast.detect.tail import threshold_for
from uniad_fast.detect.trained import Trained
from uniad_fast.models.backbone import Backbone
from uniad_fast.training import optimization
from uniad_fast.training.build import build_model
from uniad_fast.training.loop import train
from uniad_fast.training.recipes import FAST
from uniad_fast.training.reconstruction_loss import ReconstructionLoss
from uniad_fast.training.run_files import RunFiles

PLACES, CHANNELS, SIDE = 196, 272, 14
_SHARD = 64  # images


def cache(folder: Path, images: int, precision: str) -> FeatureShards:
    """Features of so many images in shards, at random."""
    shards = []
    for first in range(0, images, _SHARD):
        path = folder / f"{first:08d}.safetensors"
        rows = torch.randn(min(_SHARD, images - first), PLACES, CHANNELS)
        write_shard(path, rows.to(getattr(torch, precision)), {})
        shard, problem = read_shard(path, PLACES, CHANNELS, precision)
        assert shard is not None, problem
        shards.append(shard)
    return FeatureShards(shards, PLACES, CHANNELS, precision)


def rate(tokens: Any, steps: int, batch: int = 16) -> float:
    """Images a second of a training on these features, the first steps left out."""
    recipe = replace(FAST, batch_size=batch, epochs=0, min_steps=steps, precision="auto")
    model = build_model(CHANNELS, 16, (SIDE, SIDE), recipe)
    criterion = ReconstructionLoss(
        model, torch.zeros(CHANNELS), torch.ones(CHANNELS), optimization.loss(recipe), recipe.precision
    )
    with tempfile.TemporaryDirectory() as folder:
        train(criterion, _Part(tokens, steps * batch), recipe, 0, RunFiles(folder, {}, quiet=True))
        rows = Path(folder, "log.csv").read_text().splitlines()[1:]
    seconds = [float(row.split(",")[-1]) for row in rows]
    warm = steps // 4
    return batch * (steps - 1 - warm) / (seconds[-1] - seconds[warm])


class _Part:
    """So many first rows, so that an epoch is no longer than the measurement."""

    def __init__(self, tokens: Any, rows: int) -> None:
        self._tokens, self.shape = tokens, (min(rows, len(tokens)), *tokens.shape[1:])
        if hasattr(tokens, "begin_reading"):
            self.begin_reading = tokens.begin_reading

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._tokens[rows]


class Throttled(FeatureShards):
    """Shards on a disk of so many bytes a second, that takes some milliseconds to begin to read elsewhere."""

    bytes_a_second, seek = 40e6, 0.008

    def _read_from(self, shard: Any, wanted: Any) -> None:
        super()._read_from(shard, wanted)
        rows = sorted(row for row, _ in wanted)
        jumps = 1 + sum(later - row > 1 for row, later in zip(rows, rows[1:], strict=False))
        time.sleep(jumps * self.seek + len(rows) * self._row_bytes / self.bytes_a_second)


class Unread(Throttled):
    """The same without reading ahead."""

    begin_reading = None  # type: ignore[assignment]


def disk(arguments: argparse.Namespace) -> None:
    """Print training rates by where features are, in turns."""
    Throttled.bytes_a_second = arguments.megabytes_a_second * 1e6
    steps = arguments.steps
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for precision in ("float32", "bfloat16"):
            files = cache(Path(folder), steps * 16, precision)
            ways: dict[str, Any] = {
                "in memory": files[:],
                "files, ahead": files,
                "slow disk, ahead": Throttled(files._shards, PLACES, CHANNELS, precision),
                "slow disk, when needed": Unread(files._shards, PLACES, CHANNELS, precision),
            }
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.rounds):
                for name, tokens in ways.items():
                    found[name].append(rate(tokens, steps))
            base = float(np.median(found["in memory"]))
            for name, rates in found.items():
                middle = float(np.median(rates))
                print(f"{precision:9} {name:24} {middle:7.1f} images/s  {middle / base:.2f}")


def memory(arguments: argparse.Namespace) -> None:
    """Train on a cache in a process whose address space is smaller than it."""
    images = arguments.images
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        files = cache(Path(folder), images, "float32")
        print(f"{images} images: {files.nbytes / 1e9:.2f} GB in {len(files._shards)} files")
        for limit in (0, arguments.limit_mb):
            command = [sys.executable, "-m", "bench.reports.scale", "inside", folder, "--limit-mb", str(limit)]
            done = subprocess.run(command, capture_output=True, text=True)
            what = f"at most {limit} MB beyond what torch takes" if limit else "without a limit"
            print(f"{what}: {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}")


def inside(arguments: argparse.Namespace) -> None:
    """A training under a limit on memory that may be written to, counted from here on."""
    paths = sorted(Path(arguments.place).glob("*.safetensors"))
    shards = [read_shard(path, PLACES, CHANNELS, "float32")[0] for path in paths]
    tokens = FeatureShards([shard for shard in shards if shard is not None], PLACES, CHANNELS, "float32")
    rate(tokens, 8)  # everything is loaded
    if arguments.limit_mb:
        taken = status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (taken + arguments.limit_mb * 2**20,) * 2)
    found = rate(tokens, len(tokens) // 16)
    peak = status("VmHWM") / 2**20
    print(f"{found:.1f} images/s, {peak:.0f} MB at most")


def classes(arguments: argparse.Namespace) -> None:
    """Print what a detector of many classes takes: statistics at random, of as many directions as real ones have."""
    for count in (15, 100, arguments.classes):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            _many_classes(count, arguments.directions).save(Path(folder, "b"))
            size = sum(file.stat().st_size for file in Path(folder, "b").iterdir())
            start = time.perf_counter()
            detector = AnomalyDetector.load(Path(folder, "b"))
            loaded = time.perf_counter() - start
            images = torch.rand(32, 3, 128, 128)
            times = []
            for _ in range(5):
                start = time.perf_counter()
                _, maps, fields = detector.measure(images, [number % count for number in range(32)])
                detector.judge(detector.pipeline.enlarge(maps), fields)
                times.append(time.perf_counter() - start)
            print(
                f"{count:5} classes: bundle {size / 1e6:8.1f} MB, loaded in {loaded:5.2f} s, "
                f"32 images in {1000 * float(np.median(times)):6.1f} ms"
            )


def _many_classes(count: int, directions: int) -> AnomalyDetector:
    settings = DetectorSettings("tf_efficientnet_lite0", 128)
    backbone = Backbone.pretrained(settings.backbone, settings.image_size)
    size = backbone.feature_size(settings.image_size)
    pipeline = new_pipeline(settings, backbone, new_model(settings, backbone, size, None), count)
    assert pipeline.residual_score.gaussians is not None
    channels, places = backbone.deepest.stop - backbone.deepest.start, size[0] * size[1]
    one = FittedGaussian(
        torch.zeros(places, channels), torch.eye(channels), torch.ones(places),
        torch.zeros(places, directions, channels, dtype=torch.float16), torch.ones(places, directions),
    )  # fmt: skip
    pipeline.residual_score.gaussians.set([one] * pipeline.fields)
    scores = tuple(tuple(float(s) for s in np.random.default_rng(k).normal(size=20)) for k in range(count))
    scale = Scale((0.0,) * pipeline.fields, (1.0,) * pipeline.fields)
    threshold = threshold_for([s for own in scores for s in own], 0.01)
    images = (20,) * count + (20 * count,)
    calibration = Calibration(threshold, 9.0, (0.0, 9.0), scale, scale, images, scores)
    names = tuple(f"class {number}" for number in range(count))
    return AnomalyDetector.of(Trained(settings, pipeline, calibration, names))


def scan(arguments: argparse.Namespace) -> None:
    """Score one large picture in tiles, by the command line, and print time and memory."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows, cols = np.mgrid[0 : arguments.height, 0 : arguments.width].astype(np.float32)
        pixels = (120 + 30 * np.sin(rows / 11) + 30 * np.sin(cols / 17)).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(Path(folder, "scan.png"), compress_level=1)
        del rows, cols, pixels
        command = [sys.executable, "-c", _SCORE, "score", arguments.place, f"{folder}/scan.png", "-o", f"{folder}/out"]
        start = time.perf_counter()
        done = subprocess.run([*command, "-q"], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        peak = json.loads(done.stderr.strip().splitlines()[-1])["peak_mb"]
        print(done.stdout.strip().splitlines()[-2])
        size = f"{arguments.height} x {arguments.width}"
        print(f"{size}: {seconds:.1f} s, {peak} MB at most, exit code {done.returncode}")


_SCORE = """
import json, sys
from uniad_fast.cli.main import app
try:
    app()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    print(json.dumps({"peak_mb": int(peak) // 1024}), file=sys.stderr)
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["disk", "memory", "inside", "classes", "scan"])
    parser.add_argument("place", nargs="?", help="folder of `inside`, bundle of `scan`")
    parser.add_argument("--folder", help="for files; default: the system's")
    for name, default in (
        ("megabytes-a-second", 40), ("steps", 24), ("rounds", 3), ("images", 12000), ("limit-mb", 600),
        ("classes", 1000), ("directions", 40), ("height", 4000), ("width", 20000),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)


if __name__ == "__main__":
    main()
