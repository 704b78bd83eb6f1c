"""Kill it at random moments; whatever was whole stays whole, and the end is that of an unbroken run, to the bit.

    python -m tests.torture [--kills N] [--seed S] [SCENARIO ...]

train: from images to a bundle, features and checkpoints included, gone on with by --resume until it is done.
bundle: a bundle written over another. score: a folder scored into one that has results already.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from conftest import BACKBONE, QUICK, save, striped_picture  # noqa: E402

from uniad_fast import AnomalyDetector  # noqa: E402
from uniad_fast.cli.main import app  # noqa: E402
from uniad_fast.data.image_batches import read_batches  # noqa: E402

_fork = multiprocessing.get_context("fork")


def _quietly(function: Callable[[], None]) -> None:
    """In a child: no output, and an exit code for what it ends in."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    torch.set_num_threads(1)
    try:
        function()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(0)


def run(function: Callable[[], None], after: float | None = None) -> tuple[int, float]:
    """(exit code, seconds) of a child that does it, killed after so many seconds; None waits for its end."""
    started = time.monotonic()
    process = _fork.Process(target=_quietly, args=(function,))
    process.start()
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode is not None
    return process.exitcode, time.monotonic() - started


class Place:
    """Images, a backbone's weights and a trained bundle, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        for number in range(14):
            save(striped_picture(rng, number % 3, False)[0], root / "good" / f"{number:02}.png")
        torch.manual_seed(0)
        torch.save(timm.create_model(BACKBONE).state_dict(), root / "weights.pth")
        # Small steps, so that there is much to be interrupted.
        read_batches.__defaults__ = (2,)
        AnomalyDetector.fit.__kwdefaults__["checkpoint_seconds"] = 0.0

    def train(self, name: str) -> Callable[[], None]:
        options = ["--backbone-weights", str(self.root / "weights.pth"), "--epochs", "6", "--resume", "-q"]
        arguments = ["train", str(self.root / "good"), "-o", str(self.root / name / "bundle"), *QUICK, *options]
        return lambda: app([*arguments, "--cache", str(self.root / name / "cache")])

    def score(self, bundle: Path, output: Path) -> Callable[[], None]:
        arguments = ["score", str(bundle), str(self.root / "good"), "-o", str(output), "--threshold", "1e9", "-q"]
        return lambda: app([*arguments, "--batch-size", "2"])


def contents(folder: Path, leave_out: str = "training.csv") -> dict[str, str]:
    """{path: hash} of every file below, but for the log, which has seconds in it."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != leave_out]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def torture_train(place: Place, kills: int, rng: random.Random) -> int:
    """Chains of kills, each ending in a finished run."""
    code, seconds = run(place.train("whole"))
    assert code == 0, code
    expected, done, chain = contents(place.root / "whole/bundle"), 0, 0
    while done < kills:
        name = f"chain{chain}"
        chain += 1
        for _ in range(rng.randint(1, 6)):
            code, _ = run(place.train(name), rng.uniform(0, 1.1 * seconds))
            assert code in (0, -signal.SIGKILL), code
            if (place.root / name / "bundle").exists():
                AnomalyDetector.load(place.root / name / "bundle")
            done += code != 0
            if code == 0:
                break
        code, _ = run(place.train(name))
        assert code == 0, code
        assert contents(place.root / name / "bundle") == expected, "another bundle than that of an unbroken run"
        rest = [p.name for p in (place.root / name).iterdir()]
        assert sorted(rest) == ["bundle", "cache"], rest
        assert not list((place.root / name / "cache").glob("*.partial*")), "half a cache is left"
        shutil.rmtree(place.root / name)
    return done


def torture_bundle(place: Place, kills: int, rng: random.Random) -> int:
    """One of two detectors lies there, whole, at every moment."""
    if not (place.root / "whole").exists():
        assert run(place.train("whole"))[0] == 0
    first = AnomalyDetector.load(place.root / "whole/bundle")
    second = AnomalyDetector.load(place.root / "whole/bundle")
    second._trained = second.trained._replace(trained_with={"another": "machine"})
    target = place.root / "swapped" / "bundle"
    first.save(target)
    _, seconds = run(lambda: [d.save(target) for d in (second, first)] and None)
    done = 0
    while done < kills:
        one, other = rng.sample([first, second], 2)
        code, _ = run(lambda a=one, b=other: [d.save(target) for d in (a, b)] and None, rng.uniform(0, seconds))
        done += code != 0
        found = AnomalyDetector.load(target).trained.trained_with
        assert found in (first.trained.trained_with, second.trained.trained_with)
    first.save(target)
    assert contents(target) == contents(place.root / "whole/bundle")
    assert [p.name for p in target.parent.iterdir()] == ["bundle"], "killed writers have left something"
    return done


def torture_score(place: Place, kills: int, rng: random.Random) -> int:
    """Results are those of the last finished run, or not there; never half of them."""
    if not (place.root / "whole").exists():
        assert run(place.train("whole"))[0] == 0
    bundle, output = place.root / "whole/bundle", place.root / "scores"
    _, seconds = run(place.score(bundle, output))
    expected, done = contents(output), 0
    while done < kills:
        if rng.random() < 0.3:
            shutil.rmtree(output, ignore_errors=True)
        code, _ = run(place.score(bundle, output), rng.uniform(0, 1.1 * seconds))
        done += code != 0
        found = {
            name: digest for name, digest in contents(output).items() if not name.rpartition("/")[2].startswith(".")
        }
        assert found.items() <= expected.items(), "a file that is not the finished run's"
    run(place.score(bundle, output))
    assert contents(output) == expected, "killed runs have left something"
    return done


SCENARIOS = {"train": torture_train, "bundle": torture_bundle, "score": torture_score}
_SHARES = {"train": 0.5, "bundle": 0.25, "score": 0.25}


def torture(root: Path, kills: int, seed: int, scenarios: list[str]) -> dict[str, int]:
    """{scenario: kills that were survived}."""
    place, rng = Place(root), random.Random(seed)
    shares = sum(_SHARES[name] for name in scenarios)
    return {name: SCENARIOS[name](place, max(1, round(kills * _SHARES[name] / shares)), rng) for name in scenarios}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], help="all of them by default")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    scenarios = options.scenarios or list(SCENARIOS)
    with tempfile.TemporaryDirectory() as folder:
        for name, done in torture(Path(folder), options.kills, options.seed, scenarios).items():
            print(f"{name}: {done} kills survived")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
