"""UniAD of the paper's size: inference, and a training step with dropout 0.1 and jitter, beside the public way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.tools.cases import MODEL, ModelCase
from bench.tools.timing import IMPLEMENTED, note_device_figures, synchronized_clock
from uniad_fast import UniAD
from uniad_fast.testing import PublicUniAD

CASES = pytest.mark.parametrize("case", MODEL, ids=lambda case: case.name)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", IMPLEMENTED)


def build(case: ModelCase, implementation: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    ours = UniAD(
        inplanes=[case.channels],
        instrides=[16],
        feature_size=case.feature_size,
        feature_jitter={"scale": 20.0, "prob": 1.0},
        neighbor_mask={"neighbor_size": case.neighbor_size, "mask": [True] * 3},
        hidden_dim=256,
        pos_embed_type="learned",
        save_recon=None,
        initializer={"method": "xavier_uniform"},
        nhead=8,
        num_encoder_layers=4,
        num_decoder_layers=4,
        dim_feedforward=1024,
        impl=None if implementation == "public" else implementation,
    )
    if implementation != "public":
        return ours.to(device)
    public = PublicUniAD(case.channels, 16, case.feature_size, case.neighbor_size)
    public.load_state_dict(ours.state_dict())
    return public.to(device)


def feature(case: ModelCase, device: torch.device) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(case.batch, case.channels, *case.feature_size, device=device)


def note(benchmark, case: ModelCase, implementation: str, what: str) -> None:
    benchmark.group = f"UniAD {what} {case.name}"
    benchmark.extra_info.update(implementation=implementation, images=case.batch)


@CASES
@IMPLEMENTATIONS
@pytest.mark.benchmark(timer=synchronized_clock, min_rounds=3, warmup=True, warmup_iterations=1, max_time=2)
def test_benchmark_inference(benchmark, case, implementation, sized, device, dtype):
    case = sized(case)
    note(benchmark, case, implementation, "inference")
    model, x = build(case, implementation, device).eval(), feature(case, device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model({"feature_align": x})["pred"]

    pred = benchmark(run)
    note_device_figures(benchmark, run)
    with torch.inference_mode():
        expected = build(case, "torch", device).eval()({"feature_align": x})["pred"]
    torch.testing.assert_close(pred, expected, rtol=3e-2, atol=3e-2)


@CASES
@IMPLEMENTATIONS
@pytest.mark.benchmark(timer=synchronized_clock, min_rounds=3, warmup=True, warmup_iterations=1, max_time=2)
def test_benchmark_training_step(benchmark, case, implementation, sized, device, dtype):
    case = sized(case)
    note(benchmark, case, implementation, "training step")
    model, x = build(case, implementation, device).train(), feature(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            reconstruction = model({"feature_align": x})["feature_rec"]
        loss = F.mse_loss(reconstruction.float(), x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    first = step().item()
    last = benchmark(step)
    note_device_figures(benchmark, step)
    assert 0 < last.item() < 1.5 * first
