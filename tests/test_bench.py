"""The comparison scripts run, small; what they print is for people."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK

ROOT = Path(__file__).parents[1]


def report(name, *arguments):
    command = [sys.executable, "-m", f"bench.reports.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("compare --smoke --only 14x14", "x public, float32"),
        ("compare_replaced --smoke", "MB more"),
        ("profile_step --steps 1 --smoke", "attention, backward"),
        ("pace --smoke", "x fast"),
    ],
)
def test_comparisons_run(command, expected):
    result = report(*command.split())
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout, result.stdout


def test_a_memory_finds_what_is_far_from_all_it_has_seen(made_up_classes, backbone_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["nearest_neighbors", made_up_classes, *QUICK, "--backbone-weights", backbone_weights]
    result = report(*command)
    assert result.returncode == 0, result.stderr
    best = next(line for line in result.stdout.splitlines() if line.split()[:3] == ["all", "stages", "max"])
    assert float(best.split()[4]) > 0.9, result.stdout


def test_distances_are_those_to_the_nearest():
    from bench.reports.nearest_neighbors import distances

    tokens, remembered = torch.randn(20, 3, 5), torch.randn(30, 5)
    torch.testing.assert_close(distances(tokens, remembered), torch.cdist(tokens, remembered[None]).amin(-1))
