"""UniAD of the paper's size: inference, and a training step with dropout 0.1 and jitter, beside the public way.

*public* computes in float32, as it is published; *autocast* is what it does in the narrower dtype. `times floor` is a
row's time over that of its products alone, at the rate of a square one that takes turns with it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.tools.cases import MODEL, MODEL_BATCHES, ModelCase
from bench.tools.harness import Run, name_of, products
from bench.tools.marks import cases
from bench.tools.turns import Way, Work
from uniad_fast import UniAD
from uniad_fast.ops.geometry import Size
from uniad_fast.testing import PublicUniAD

_PUBLIC, _CACHED = "public", "public, mask cached"


class CachedMask(PublicUniAD):
    """The public way, but for the mask: made once, and kept where the tokens are."""

    kept: torch.Tensor | None = None

    def generate_mask(self, feature_size: Size, neighbor_size: Size) -> torch.Tensor:
        if self.kept is None:
            self.kept = super().generate_mask(feature_size, neighbor_size).to(self.input_proj.weight.device)
        return self.kept


def build(case: ModelCase, name: str, device: torch.device) -> nn.Module:
    """The network by one of the public ways, or with that `impl`; all have the same weights."""
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
        impl=None if name.startswith(_PUBLIC) else name,
    )
    if not name.startswith(_PUBLIC):
        return ours.to(device)
    kind = CachedMask if name.startswith(_CACHED) else PublicUniAD
    public = kind(case.channels, 16, case.feature_size, case.neighbor_size)
    public.load_state_dict(ours.state_dict())
    return public.to(device)


def feature(case: ModelCase, device: torch.device) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(case.batch, case.channels, *case.feature_size, device=device)


def ways_of(run: Run) -> dict[Way, torch.dtype]:
    """Who is measured in what. Ways in another dtype than a public one's own are called after that."""
    cuda = run.device.type == "cuda"
    public = [_PUBLIC, *[_CACHED] * cuda]
    found = {Way(name): torch.float32 for name in public}
    for dtype in run.dtypes:
        if dtype != torch.float32 and (cuda or run.large):
            found |= {Way(f"{name}, autocast", name_of(dtype)): dtype for name in public}
        found |= {Way(name, name_of(dtype)): dtype for name in ("torch", "triton" if cuda else "cpu")}
    return found


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Its cache of casts must not outlive a captured graph, so that a GPU has none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=device.type != "cuda")


@pytest.mark.parametrize("case", [*cases(MODEL), *cases(MODEL_BATCHES, "gpu")])
def test_benchmark_inference(turns, run, case):
    case = run.sized(case)
    x = feature(case, run.device)
    works: dict[Way, Work] = {}
    for way, dtype in ways_of(run).items():
        model = build(case, way.name, run.device).eval()

        @torch.inference_mode()
        def work(model=model, dtype=dtype) -> torch.Tensor:
            with autocast(run.device, dtype):
                return model({"feature_align": x})["pred"]

        works[way] = work
    capturable = [way for way in works if not way.name.startswith(_PUBLIC) or way.name.startswith(_CACHED)]
    works |= {} if run.smoke else products(run.dtypes, run.device)
    first = turns(f"UniAD inference, {case.name}", works, flops=case.forward_flops, capturable=capturable)
    for way in ways_of(run):
        torch.testing.assert_close(first[way], first[Way("public")], rtol=3e-2, atol=3e-2)


@pytest.mark.heavy
@pytest.mark.parametrize("case", [*cases(MODEL[:1]), *cases(MODEL[1:], "large"), *cases(MODEL_BATCHES, "gpu")])
def test_benchmark_training_step(turns, run, case):
    case = run.sized(case)
    x = feature(case, run.device)
    works: dict[Way, Work] = {}
    for way, dtype in ways_of(run).items():
        model = build(case, way.name, run.device).train()
        own = not way.name.startswith(_PUBLIC)
        faster = {"fused": True, "capturable": run.device.type == "cuda"} if own else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **faster)

        def work(model=model, optimizer=optimizer, dtype=dtype) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with autocast(run.device, dtype):
                reconstruction = model({"feature_align": x})["feature_rec"]
            loss = F.mse_loss(reconstruction.float(), x)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            return loss.detach()

        works[way] = work
    capturable = [way for way in works if not way.name.startswith(_PUBLIC)]
    works |= {} if run.smoke else products(run.dtypes, run.device)
    first = turns(f"UniAD training step, {case.name}", works, flops=3 * case.forward_flops, capturable=capturable)
    for way in ways_of(run):  # the same weights and data, their own noise
        torch.testing.assert_close(first[way], first[Way("public")], rtol=0.1, atol=0.0)
