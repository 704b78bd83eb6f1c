"""The C++ kernels beyond what every impl is held to: instruction sets, threads, memory."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from uniad_fast.kernels.cpu import build, launch

from uniad_fast import UniAD, jitter_project, neighbor_masked_attention
from uniad_fast.ops import dispatch
from uniad_fast.ops.dropout import dropout, dropout_add_norm
from uniad_fast.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_all(dtype, impl, feature_size=(7, 13), neighbor_size=(3, 5), head_dim=20, exact=False):
    """Outputs and gradients of every op, with noise, on small inputs that fill no vector; `exact` in float64."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        tensor = torch.randn(shape, generator=generator).to(dtype)
        return (tensor.double() if exact else tensor).requires_grad_()

    tokens = feature_size[0] * feature_size[1]
    cases = {
        "attention": (
            lambda q, k, v: neighbor_masked_attention(
                q, k, v, feature_size, neighbor_size, dropout_p=0.2, seed=5, impl=impl
            ),
            [make(1, 2, tokens, head_dim), *(make(2, 2, tokens, head_dim) for _ in range(2))],
        ),
        "jitter": (
            lambda t, w, b: jitter_project(t, w, b, scale=4.0, prob=0.7, seed=5, impl=impl),
            [make(2, tokens, 37), make(21, 37), make(21)],
        ),
        "norm": (
            lambda x, r: dropout_add_norm(
                x, r, torch.linspace(0.5, 2, 70), torch.ones(70), dropout_p=0.2, seed=5, impl=impl
            ),
            [make(3, 11, 70), make(1, 11, 70)],
        ),
        "relu": (lambda x: dropout(x, 0.2, relu=True, seed=5, impl=impl), [make(9, 130)]),
        "dropout": (lambda x: dropout(x, 0.2, seed=5, impl=impl), [make(9, 130)]),
    }
    results = {}
    for name, (function, tensors) in cases.items():
        out = function(*tensors)
        weight = torch.randn(out.shape, generator=generator).to(out.dtype)
        results |= {name: out, **{f"{name} gradient {i}": g for i, g in enumerate(gradients(out, tensors, weight))}}
    return results


def gradients(out, tensors, weight):
    return torch.autograd.grad(out, tensors, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", build.paths())
def test_every_instruction_set_within_budget(path, dtype, monkeypatch):
    """What plain PyTorch makes of it is the definition, run in that dtype."""
    monkeypatch.setattr(launch, "load", lambda: build.load(path))
    truth, plain = run_all(dtype, "reference", exact=True), run_all(dtype, "reference")
    for name, ours in run_all(dtype, "cpu").items():
        assert_within_budget(ours, truth[name], plain[name], f"{path} {name}")


def test_the_processors_own_path_is_among_those_tested():
    assert build.paths() and build.load() is build.load()


@pytest.mark.parametrize("normalize_before", [False, True])
def test_a_training_step_of_uniad_is_the_references(normalize_before):
    """The paper's grid, dropout 0.1 and jitter on, from one torch.manual_seed: loss and every parameter's gradient."""
    options = dict(
        inplanes=[24], instrides=[16], feature_size=(14, 14), feature_jitter={"scale": 20.0, "prob": 1.0},
        neighbor_mask={"neighbor_size": (7, 7), "mask": [True] * 3}, hidden_dim=32, pos_embed_type="learned",
        save_recon=None, initializer={"method": "xavier_uniform"}, nhead=2, num_encoder_layers=2,
        num_decoder_layers=2, dim_feedforward=64, dropout=0.1, normalize_before=normalize_before,
    )  # fmt: skip
    ours, definition = (UniAD(**options, impl=impl) for impl in ("cpu", "reference"))
    definition.load_state_dict(ours.state_dict())
    x, results = torch.randn(3, 24, 14, 14), []
    for model in (ours, definition):
        torch.manual_seed(7)
        loss = torch.nn.functional.mse_loss(model({"feature_align": x})["feature_rec"], x)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for name, mine, other in zip(("loss", *dict(ours.named_parameters())), *results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 + 1e-4 * other.abs().max().item(), msg=name)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype, threads):
    """1,600 tokens are two tasks a head, and the query's gradient is summed over them."""
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(run_all(dtype, "cpu", (40, 40), (9, 9)))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("path", build.paths())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, (1e-4, 2e-6)), (torch.bfloat16, (2e-2, 2e-3))], ids=str
)
def test_more_keys_than_a_chunk(dtype, tolerance, path, monkeypatch):
    """Online softmax over several chunks, tasks of more than one, a window in all of them."""
    feature_size, neighbor_size = (36, 36), (21, 9)
    monkeypatch.setattr(launch, "load", lambda: build.load(path))
    tensors = [torch.randn(1, 2, 36 * 36, 32).to(dtype) for _ in range(3)]
    weight = torch.randn(1, 2, 36 * 36, 32)

    def run(tensors, impl):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = neighbor_masked_attention(*tensors, feature_size, neighbor_size, dropout_p=0.1, seed=3, impl=impl)
        return [out, *gradients(out, tensors, weight.to(out.dtype))]

    truth = run([t.double() for t in tensors], "reference")
    for ours, true in zip(run(tensors, "cpu"), truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=tolerance[0], atol=tolerance[1])


def test_strided_inputs_are_not_copied(monkeypatch):
    """Packed, token-first projections go in as they are."""
    packed = torch.randn(35, 2, 3, 4, 16)  # [N, B, (q, k, v), heads, head_dim]
    query, key, value = (packed[:, :, i].permute(1, 2, 0, 3) for i in range(3))
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    out = neighbor_masked_attention(query, key, value, (5, 7), (3, 3), impl="cpu")
    monkeypatch.undo()
    expected = neighbor_masked_attention(query, key, value, (5, 7), (3, 3), impl="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("path", build.paths())
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1])
def test_a_nan_goes_through_whatever_its_bits_are(bits, where, path, monkeypatch):
    monkeypatch.setattr(launch, "load", lambda: build.load(path))
    tensors = dict.fromkeys(("query", "key", "value")) | {
        n: torch.randn(1, 1, 35, 8) for n in ("query", "key", "value")
    }
    tensors[where][0, 0, 17, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = neighbor_masked_attention(*tensors.values(), (5, 7), (3, 3), impl="cpu")
    expected = neighbor_masked_attention(*tensors.values(), (5, 7), (3, 3), impl="reference")
    assert torch.equal(out.isnan(), expected.isnan()) and expected.isnan().any()


ROOT = Path(__file__).parents[1]


def test_memory_of_a_large_grid():
    """10,000 tokens, forward and backward: 100 million scores a head are 400 MB each, and none of them is kept."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.tools.peak import extra_bytes; "
        "import torch; from uniad_fast import neighbor_masked_attention as f; torch.set_num_threads(2); "
        "small = torch.ones(1, 3, 4, 32, requires_grad=True); f(small, small, small, (2, 2), (1, 1)).sum().backward(); "
        "q, k, v = (torch.randn(1, 3, 10000, 32, requires_grad=True) for _ in range(3)); "
        "step = lambda: f(q, k, v, (100, 100), (9, 9), dropout_p=0.1, impl='cpu').sum().backward(); "
        "print(extra_bytes(step) / 1e6)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 1 < float(done.stdout) < 200, done


def test_a_processor_without_wide_vectors_is_better_off_with_torch(monkeypatch):
    monkeypatch.setattr(build, "PAYS", False)
    assert dispatch.choose_impl(None, torch.ones(1)) == "torch" and dispatch.choose_impl("cpu", torch.ones(1)) == "cpu"


def test_the_default_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose_impl(None, torch.ones(1)) == "cpu"
        assert dispatch.choose_impl(None, torch.ones(1, dtype=torch.float64)) == "torch"
    with pytest.raises(ValueError, match="they take float32, float16 and bfloat16, not torch.float64"):
        dispatch.choose_impl("cpu", torch.ones(1, dtype=torch.float64))
