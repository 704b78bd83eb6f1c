"""Feature extraction: images through the frozen backbone to the concatenated feature map.

*public* is timm's extractor as it comes; *prepared* is this package's, ready for many images.
"""

import pytest
import timm
import torch

from bench.tools.harness import name_of
from bench.tools.turns import Way, Work
from uniad_fast.models.backbone import Backbone
from uniad_fast.models.efficientnet_features import EfficientNetFeatures, default_levels
from uniad_fast.models.prepared import prepared

BATCH = 8


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b4"])
def test_benchmark_features(turns, run, name):
    levels = default_levels()
    batch, side = (1, 64) if run.smoke else (BATCH, 224)
    # Random weights: the same work.
    public = Backbone(name, timm.create_model(name, features_only=True, out_indices=levels), levels).to(run.device)
    own = Backbone(name, EfficientNetFeatures(name, levels), levels).to(run.device)
    images = torch.rand(batch, 3, side, side, device=run.device)
    works: dict[Way, Work] = {Way("public"): lambda: public(images)}
    for dtype in run.dtypes:
        if dtype != torch.float16:
            ready = prepared(own, name_of(dtype))
            works[Way("prepared", name_of(dtype))] = lambda ready=ready: ready(images)
    group = f"features of an image, {name}, {side} x {side}, batch {batch}"
    for out in turns(group, works, units=batch, capturable=works).values():
        assert out.shape == (batch, public.channels, *public.feature_size(side)) and out.isfinite().all()
