"""The C++ kernels' paths for ARM, compiled for it and run in an emulator, against the definition here."""

import os
import subprocess

import emulated
import pytest
import torch
from test_cpu import DTYPES, gradients, run_all
from test_launch_linear import all_products, exactly, made
from test_whole_network import CASES, by_layers, make, tokens_for, whole
from uniad_fast.kernels.cpu import build, launch, launch_linear, launch_reconstruct

from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.cli import doctor
from uniad_fast.files import locked
from uniad_fast.ops.dropout import dropout, dropout_add_norm
from uniad_fast.ops.products import OWN, TORCH
from uniad_fast.testing import assert_within_budget

PATHS = sorted(emulated.PROCESSORS)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    if problem := emulated.problem():
        pytest.skip(problem)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # what one worker compiles is for all of them
        folder = folder.parent
    with locked(folder / "arm.lock"):
        return {path: emulated.compile_kernels(path, folder) for path in PATHS}


@pytest.fixture(params=PATHS)
def path(request, drivers, tmp_path, monkeypatch):
    """The kernels of a path are what impl="cpu" calls."""
    library = emulated.Library(drivers[request.param], emulated.PROCESSORS[request.param], tmp_path)
    monkeypatch.setattr(torch.Tensor, "data_ptr", library.watched(torch.Tensor.data_ptr))
    for launcher in (launch, launch_linear, launch_reconstruct):
        monkeypatch.setattr(launcher, "load", lambda: library)
    monkeypatch.setattr(launch, "problem", lambda: None)
    monkeypatch.setattr(build, "remembered", lambda *_: None)  # how fast an emulator is says nothing about this machine
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [{}, {"feature_size": (1, 1), "neighbor_size": (2, 2), "head_dim": 1}, {"head_dim": 33, "neighbor_size": (15, 3)}],
    ids=["odd", "one token", "whole columns hidden"],
)
def test_every_op_within_budget(path, dtype, shape):
    """Forward and every gradient, with noise."""
    truth, plain = run_all(dtype, "reference", **shape, exact=True), run_all(dtype, "reference", **shape)
    for name, ours in run_all(dtype, "cpu", **shape).items():
        assert_within_budget(ours, truth[name], plain[name], f"{path} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 20, 11), (100, 33, 9), (5, 330, 40)], ids=str)
def test_products_of_a_linear_layer_within_budget(path, shape, dtype):
    assert launch_linear.has_pairs() == (path == "neon_bf16")
    if dtype == torch.bfloat16 and path != "neon_bf16":
        pytest.skip("it has no products of pairs")
    tensors = made(*shape, dtype)
    truth, plain = exactly(*tensors), all_products(TORCH, *tensors)
    for name, ours in all_products(OWN, *tensors).items():
        assert_within_budget(ours, truth[name], plain[name], f"{path} {name}")


def test_relu_and_dropout_at_the_end_of_a_product(path):
    tokens, weight, bias, _ = made(30, 20, 70)
    ending = 0.3, torch.tensor(7)
    apart = launch.dropout_forward(launch_linear.output(tokens, weight, bias), 0.3, True, ending[1])
    assert torch.equal(launch_linear.output(tokens, weight, bias, ending), apart) and (apart == 0).any()


def test_the_doctor_finds_nothing(path):
    """Among what it tries: arguments that are strided, and the gradients of a norm's weight and bias."""
    assert doctor.problem_with("cpu", torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_keys_than_a_chunk_and_more_tokens_than_a_task(path, dtype):
    """Online softmax over several chunks, the query's gradient in parts, blocks of keys that are hidden altogether."""
    size, window = (34, 31), (21, 41)
    inputs = [torch.randn(1, 1, 34 * 31, 8).to(dtype) for _ in range(4)]

    def run(impl, exact=False):
        *tensors, weight = (t.double() if exact else t for t in inputs)
        tensors = [t.clone().requires_grad_() for t in tensors]
        out = neighbor_masked_attention(*tensors, size, window, dropout_p=0.1, seed=3, impl=impl)
        return [out, *gradients(out, tensors, weight)]

    truth, plain = run("reference", exact=True), run("reference")
    for name, ours, true, other in zip(("out", "query", "key", "value"), run("cpu"), truth, plain, strict=True):
        assert_within_budget(ours, true, other, f"{path} {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_sixteen_bits_is_itself(path, dtype):
    """Widened and narrowed again, in vectors and alone; a NaN stays one."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for rows in (every.view(256, 256), every[:-1].view(-1, 3)):
        same = dropout(rows, 0.0, impl="cpu")
        numbers = ~rows.isnan()
        assert torch.equal(same.isnan(), ~numbers)
        assert torch.equal(same[numbers].view(torch.int16), rows[numbers].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 130])
def test_what_is_kept_and_how_it_is_rounded_is_the_definitions_to_the_bit(path, dtype, width):
    """Among numbers of all sizes: divided by 1 - p, some are too much for the dtype, and the smallest are subnormal."""
    # Where the definition divides, the kernel multiplies: by 2 it is the same, and 4/3 of 16 bits is never near a tie.
    p = 0.5 if dtype == torch.float32 else 0.25
    x = torch.randn(97, width) * torch.logspace(-46, 4 if dtype == torch.float16 else 37.7, 97)[:, None]
    ours, definition = (dropout(x.to(dtype), p, seed=11, impl=impl) for impl in ("cpu", "reference"))
    assert torch.equal(ours, definition) and (ours == 0).any(1).sum() > 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halfway_between_two_numbers_is_the_even_one(path, dtype):
    """Sums of tokens and half a unit, six of them: a vector and what is left of another."""
    unit = torch.finfo(dtype).eps
    tokens, weight = (1 + unit * torch.arange(64)).to(dtype)[:, None], torch.ones(6, 1, dtype=dtype)
    bias = torch.full((6,), unit / 2, dtype=dtype)
    ours, definition = (jitter_project(tokens, weight, bias, scale=0.0, seed=1, impl=i) for i in ("cpu", "reference"))
    assert torch.equal(ours, definition) and (ours == tokens).any() and (ours != tokens).any()


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1])
def test_a_nan_goes_through_whatever_its_bits_are(path, where, bits):
    tensors = {name: torch.randn(1, 1, 35, 8) for name in ("query", "key", "value")}
    tensors[where][0, 0, 17, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    ours, expected = (
        neighbor_masked_attention(*tensors.values(), (5, 7), (3, 3), impl=i) for i in ("cpu", "reference")
    )
    assert torch.equal(ours.isnan(), expected.isnan()) and expected.isnan().any()
    x = tensors[where].view(35, 8)
    for relu in (False, True):
        assert torch.equal(dropout(x, 0.0, relu=relu, impl="cpu").isnan(), x.isnan())
    assert dropout_add_norm(x, x, torch.ones(8), torch.ones(8), impl="cpu").isnan().all(1).equal(x.isnan().any(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", [4e2, 4e8, 4e30])
def test_large_scores_keep_their_weights(path, dtype, score):
    """One visible key has all the weight, so the value's gradient is 1; without one, the output is 0."""
    score = min(score, 1e4) if dtype == torch.float16 else score
    query = torch.full((1, 1, 2, 16), score / 4).to(dtype)
    key, value = torch.full_like(query, 1.0), torch.randn(1, 1, 2, 16).to(dtype).requires_grad_()
    out = neighbor_masked_attention(query, key, value, (1, 2), (1, 1), impl="cpu")
    assert torch.equal(out, value.detach().flip(2))
    assert torch.equal(torch.autograd.grad(out.sum(), value)[0], torch.ones_like(value))
    assert (neighbor_masked_attention(query, key, value, (1, 2), (1, 3), impl="cpu") == 0).all()


WHOLE = ["small", "one head", "two tokens", "whole panels", "half a panel more"]


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_network_within_budget(path, case):
    """In float32 and, where the path multiplies it, under autocast in bfloat16."""
    model = make(**CASES[case])
    tokens = tokens_for(model, 2)
    truth = by_layers(model, tokens, torch.float64)
    assert_within_budget(whole(model, tokens), truth, by_layers(model, tokens), f"{case} {path}")
    assert launch_reconstruct.has_pairs() == (path == "neon_bf16")
    if path == "neon_bf16":
        with torch.autocast("cpu", torch.bfloat16):
            ours, plain = whole(model, tokens), by_layers(model, tokens, impl="torch")
        assert_within_budget(ours, truth, plain, f"{case} {path} bfloat16")


def test_a_read_beside_a_tensor_ends_the_emulated_process(path):
    x = torch.zeros(4, 1024)
    rows = launch._rows(torch.empty(9, 1024, device="meta"), 1, 0.0, 0.0, None)
    with pytest.raises(AssertionError, match="exit code"):
        launch._call(launch.load().uniad_dropout_forward, x.dtype, rows, 0, x, torch.zeros(9, 1024))


def test_what_measures_pairs_of_bfloat16_runs(drivers, tmp_path):
    """A library that did not compile would leave a processor that has them without any kernel."""
    main = tmp_path / "main.cpp"
    main.write_text(
        'extern "C" double uniad_pairs_gain();\n'
        "int main() { double g = uniad_pairs_gain(); return g > 0 && g < 100 ? 7 : 1; }"
    )
    emulated._run(
        [emulated.COMPILER, "-O2", "-std=c++20", "-static", *build.PATHS["neon_bf16"], str(build._PAIR_RATE), str(main)]
        + ["-o", str(tmp_path / "main")]
    )
    done = subprocess.run([emulated.EMULATOR, "-cpu", "max", str(tmp_path / "main")], timeout=60)
    assert done.returncode == 7


CORTEX_A57 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
NEOVERSE_V1 = f"{CORTEX_A57} atomics fphp asimdhp asimdrdm jscvt fcma lrcpc dcpop sve asimdfhm i8mm bf16 dgh rng"


@pytest.mark.parametrize(
    ("features", "expected"), [(CORTEX_A57, ["neon"]), (NEOVERSE_V1, ["neon_bf16", "neon"])], ids=["plain", "bf16"]
)
def test_paths_of_a_processor(features, expected, monkeypatch):
    monkeypatch.setattr(build, "_processor", lambda: features)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.paths() == expected


def test_clang_is_told_of_the_processor_in_its_own_words(monkeypatch):
    assert build._flags(None, "Debian clang version 14.0.6") == ["-march=native"]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build._flags(None, "Debian clang version 14.0.6") == ["-mcpu=native"]
    assert build._flags(None, "g++ (Debian 12.2.0-14) 12.2.0") == ["-march=native"]
