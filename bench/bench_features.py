"""Feature extraction: images through the frozen backbone to the concatenated feature map."""

import pytest
import timm
import torch

from bench.tools.timing import synchronized_clock
from uniad_fast.models.backbone import Backbone

BATCH = 8


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b4"])
@pytest.mark.benchmark(timer=synchronized_clock, min_rounds=3, warmup=True, warmup_iterations=1, max_time=2)
def test_benchmark_features(benchmark, name, device):
    levels = (0, 1, 2, 3)
    features = timm.create_model(name, features_only=True, out_indices=levels)  # random weights: the same work
    backbone = Backbone(name, features, levels).to(device)
    benchmark.group = f"features {name} 224x224 batch{BATCH}"
    benchmark.extra_info.update(implementation="timm", images=BATCH)
    out = benchmark(backbone, torch.rand(BATCH, 3, 224, 224, device=device))
    assert out.shape == (BATCH, backbone.channels, 14, 14) and out.isfinite().all()
