"""The benchmarks' own machinery, and the reports run, small; what they print is for people."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from uniad_fast.kernels.cpu import build

from bench.tools.cases import ATTENTION, AttentionCase
from bench.tools.marks import is_left_out, weight_of, why_not_here
from bench.tools.table import PRODUCT, Row, as_json, environment, markdown, ratios
from bench.tools.turns import LEAST, MOST, Budget, Replay, Way, take_turns
from uniad_fast.ops.geometry import Window, hidden_keys

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class FakeClock:
    """A clock that only the work moves on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds, done=None, name=""):
        def call():
            self.now += seconds
            if done is not None:
                done.append(name)
            return name

        return call


def report(name, *arguments):
    command = [sys.executable, "-m", f"bench.reports.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def pytest_of_bench(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    # A worker of the suite's own would be told to measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_turns_are_taken():
    clock, done = FakeClock(), []
    works = {Way(name): clock.work(seconds, done, name) for name, seconds in (("a", 1.0), ("b", 2.0))}
    measured = take_turns(works, Budget(12, clock))
    assert done == ["a", "b"] * 4  # to warm up, and three rounds
    assert measured.seconds == {Way("a"): [1.0] * 3, Way("b"): [2.0] * 3}
    assert measured.first == {Way("a"): "a", Way("b"): "b"} and not measured.cold


def test_the_budget_is_kept():
    """Groups share it; what one leaves, those after it have, and what it overdraws, they lack."""
    clock = FakeClock()
    budget = Budget(100, clock)
    budget.weight_to_come = 4
    rounds = []
    for seconds in (1.0, 0.01, 12.0, 100.0):
        measured = take_turns({Way("a"): clock.work(seconds)}, budget)
        rounds.append(len(measured.seconds[Way("a")]))
        budget.weight_to_come -= 1
    assert rounds[:2] == [24, MOST]  # a quarter of 100 s with the warm-up; as many as tell anything
    assert rounds[2] == LEAST  # its half of 74.7 s bears no more than two
    assert rounds[3] == 1 and measured.cold  # it is called once, whatever is left
    assert budget.left == 0


@pytest.mark.parametrize(("seconds", "rounds"), [(5.0, LEAST), (13.0, 1)])
def test_a_slow_group_takes_three_shares_at_most(seconds, rounds):
    clock = FakeClock()
    budget = Budget(1000, clock)
    budget.weight_to_come = 100
    assert len(take_turns({Way("a"): clock.work(seconds)}, budget).seconds[Way("a")]) == rounds


def test_heavy_groups_get_more():
    clock = FakeClock()
    budget = Budget(100, clock)
    budget.weight_to_come = 6
    assert weight_of(["heavy"]) == 8 and weight_of(["large"]) == 1
    assert [budget.share(), budget.share(4), budget.share(8)] == pytest.approx([100 / 6, 400 / 6, 100])


def test_pytest_benchmark_is_told_what_was_measured():
    clock = Replay()
    clock.tell([0.25, 0.125])
    assert [-clock() + clock() for _ in range(2)] == [0.25, 0.125]


ROWS = [
    Row("one", Way("public"), [4.0, 2.0, 9.0]),
    Row("one", Way("torch"), [2.0]),
    Row("one", Way("torch", "bfloat16"), [1.0]),
    Row("one", Way("cpu"), [0.5, 1.5]),
    Row("one", Way("cpu", "bfloat16"), [0.1], {"extra MB": 1234.5}),
    Row("one", Way("flex"), [], note="has no | dropout"),
    Row("one", Way(PRODUCT), [0.01]),
    Row("two", Way("prepared"), [3.0]),
]


def test_ratios_are_those_of_medians():
    assert ratios(ROWS[3], ROWS) == {"public": 4.0, "torch": 2.0}
    assert ratios(ROWS[4], ROWS) == {"public": 40.0, "torch": 10.0}  # public has no bfloat16
    assert ratios(ROWS[0], ROWS) == {"torch": 0.5}
    assert [ratios(row, ROWS) for row in ROWS[5:]] == [{}, {}, {}]


def test_the_table_says_it_to_people_and_to_programs():
    about = environment(CPU)
    assert about["threads"] == torch.get_num_threads() and about["torch"] in torch.__version__ and about["processor"]
    lines = markdown(ROWS, about).splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[2] == "|  | way | dtype | ms | times public | times torch | rounds | extra MB | note |"
    assert lines[4] == "| one | public | float32 | 4,000 |  | 0.50 | 3 |  |  |"
    assert lines[8] == "|  | cpu | bfloat16 | 100 | 40.00 | 10.00 | 1 | 1,234 |  |"
    assert lines[9].endswith("| has no / dropout |")
    content = json.loads(as_json(ROWS, about))
    assert content["environment"] == about
    assert [row["median"] for row in content["rows"]] == [4.0, 2.0, 1.0, 1.0, 0.1, None, 0.01, 3.0]
    assert content["rows"][4]["times"] == {"public": 40.0, "torch": 10.0}


def test_large_cases_are_left_out_and_gpus_are_waited_for():
    assert is_left_out(["large", "parametrize"], large=False) and not is_left_out(["large"], large=True)
    assert not is_left_out(["gpu"], large=False)
    assert "--device cpu" in why_not_here(["gpu"], "cpu")
    assert not why_not_here(["gpu"], "cuda:1") and not why_not_here(["large"], "cpu")


def test_a_run_ends_in_its_table(tmp_path):
    """The smallest that is measured; the harness' own JSON has what the table has."""
    table, own = tmp_path / "table.json", tmp_path / "own.json"
    result = pytest_of_bench(
        "bench/bench_jitter_project.py", "-k", "forward and not backward", "--benchmark-only", "--benchmark-quiet",
        "--budget=0.1", "--dtype=float32", "--threads=1", f"--table={table}", f"--benchmark-json={own}",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "1/1 jitter_project forward" in result.stdout and " elapsed, 0:00 left" in result.stdout
    assert "| cpu | float32 |" in result.stdout
    rows = json.loads(table.read_text())["rows"]
    assert [row["way"] for row in rows] == ["public", "torch", "cpu"]
    medians = {one["extra_info"]["way"]: one["stats"]["median"] for one in json.loads(own.read_text())["benchmarks"]}
    assert medians == pytest.approx({row["way"]: row["median"] for row in rows})


def test_large_selects():
    def collected(*options):
        result = pytest_of_bench("bench/bench_neighbor_masked_attention.py", "--collect-only", "-q", *options)
        assert result.returncode == 0, result.stdout
        return result.stdout

    assert "test_benchmark_memory" in collected("--large")
    quick = collected()
    assert "test_benchmark_memory" not in quick and "test_benchmark_forward[56x56_window29_batch1]" in quick


SMALL = AttentionCase("small", 2, 3, 16, (5, 7), (3, 4))


def test_flex_attention_is_asked_for_this_window():
    from torch.nn.attention.flex_attention import create_mask

    from bench.tools.competitors import mask_mod

    for case in (ATTENTION[0], SMALL):
        window = Window.of(case.feature_size, case.neighbor_size)
        seen = create_mask(mask_mod(window), None, None, window.tokens, window.tokens, device="cpu")[0, 0]
        assert torch.equal(seen, ~hidden_keys(window, CPU))


@pytest.mark.parametrize("name", ["public", "public, mask cached", "torch", "sdpa math", "flex", "reference"])
def test_competitors_do_the_same(name):
    """What of them runs without a GPU, FlexAttention uncompiled."""
    from bench.tools.competitors import attention, inputs

    tensors = inputs(SMALL, CPU, torch.float32, grad=False)
    ours = attention("reference", SMALL, 0.0, CPU, torch.float32)(*tensors)
    torch.testing.assert_close(attention(name, SMALL, 0.0, CPU, torch.float32)(*tensors), ours)


def test_a_mask_has_rows_that_begin_on_16_bytes():
    from bench.tools.competitors import padded_mask

    window = Window.of(SMALL.feature_size, SMALL.neighbor_size)
    mask = padded_mask(window, CPU, torch.bfloat16)
    assert mask.shape == (35, 35) and mask.stride(0) * mask.element_size() % 16 == 0
    assert torch.equal(mask == float("-inf"), hidden_keys(window, CPU))


def test_backends_are_named_and_what_they_can_not_do_is_said():
    from bench.tools.competitors import SDPA, names, why_not

    assert {name: backend.name for name, backend in SDPA.items()} == {
        "sdpa efficient": "EFFICIENT_ATTENTION",
        "sdpa cudnn": "CUDNN_ATTENTION",
        "sdpa math": "MATH",
    }
    assert names(CPU) == ["public", "torch", "cpu"]
    assert {*SDPA, "flex", "public", "public, mask cached", "torch", "triton"} == set(names(torch.device("cuda")))
    assert why_not("flex", torch.bfloat16, 0.1) and not why_not("flex", torch.bfloat16, 0.0)
    assert why_not("sdpa cudnn", torch.float32, 0.0) and not why_not("sdpa cudnn", torch.bfloat16, 0.1)
    assert not why_not("triton", torch.float32, 0.1)


def test_a_backend_that_refuses_is_a_note_and_a_broken_device_an_error():
    from bench.tools.device import refusal

    def fail(message):
        raise RuntimeError(message)

    assert refusal(lambda: None) == ""
    assert refusal(lambda: fail("No available kernel.\nAborting")) == "RuntimeError: No available kernel."
    with pytest.raises(RuntimeError, match="CUDA error"):
        refusal(lambda: fail("CUDA error: an illegal memory access"))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("compare_replaced --smoke", "MB more"),
        ("gpu_check --smoke --only p=0.3", "0 failed"),
        ("tune --smoke --only jitter", "of 2"),
        ("profile_step --steps 1 --smoke", "attention, backward"),
        ("pace --smoke", "x fast"),
    ],
)
def test_reports_run(command, expected):
    result = report(*command.split())
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout, result.stdout


@pytest.mark.skipif(not build.PAYS, reason="a processor without AVX2")
def test_a_report_as_on_a_processor_with_avx2_alone():
    result = report("as_avx2", "bench.reports.profile_step", "--steps", 1, "--smoke", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert "attention, backward" in result.stdout, result.stdout
    assert report("as_avx2").returncode == 1


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
