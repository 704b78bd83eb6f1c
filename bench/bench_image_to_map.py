"""Image to map: the paper's backbone and the demo's with the whole network; by every engine and precision with --large.

*public* is timm's extractor in its own memory format and the public network in float32; *openvino by hand* is the
whole graph converted in one call, which is what a user would do without this package.
"""

import pytest
import torch

from bench.tools.image_to_map import detector, ways
from bench.tools.turns import Way

_SMALL = ("tf_efficientnet_lite0", 64)


@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.large)])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_b4", "tf_efficientnet_lite0"])
def test_benchmark_image_to_map(turns, run, backbone, batch, tmp_path):
    if run.device.type != "cpu":
        pytest.skip("engines run on the processor")
    if run.smoke and (batch, backbone) != (1, _SMALL[0]):
        pytest.skip("one case is enough to see that all ways run")
    found = detector(*(_SMALL if run.smoke else (backbone, 224)))
    images = torch.rand(batch, 3, *found.settings.image_size)
    measures = ways(found, tmp_path, engines=run.smoke or run.large)
    works = {way: lambda measure=measure: measure(images) for way, measure in measures.items()}
    turns(f"image to map, an image, {backbone}, batch {batch}", works, units=batch)
    assert {Way("public"), Way("as loaded", "auto"), Way("torch + own network")} <= works.keys()
