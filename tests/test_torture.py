"""A few kills and a few sanitized calls; `python -m tests.torture` and `python -m tests.sanitized` do many."""

import pytest
import sanitized
import torture
from uniad_fast.kernels.cpu import build


@pytest.mark.parametrize("scenario", torture.SCENARIOS)
def test_killed_at_random_moments(scenario, tmp_path):
    """In a process of its own: what it makes small for itself would stay so for other tests."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "tests.torture", "--kills", "3", "--seed", "1", scenario]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sanitized.TESTS.parent)
    assert done.returncode == 0 and f"{scenario}: " in done.stdout, done.stderr


@pytest.fixture(scope="module")
def sanitizer():
    if problem := sanitized.sanitizer():
        pytest.skip(problem)


def test_nothing_is_read_or_written_beside_a_tensor(sanitizer):
    path = build.paths()[0]
    done = sanitized.run(path, examples=20)
    assert done.returncode == 0 and f"{path}: " in done.stdout, done.stderr[-4000:]


def test_the_sanitizer_would_notice(sanitizer):
    done = sanitized.run(build.paths()[0], examples=0, wrong=True)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
