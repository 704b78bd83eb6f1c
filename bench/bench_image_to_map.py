"""Image to map: the paper's backbone and the demo's with the whole network, by every engine and precision installed.

pytest bench/bench_image_to_map.py --benchmark-only

The ways of a case take turns. *public* is timm's extractor in its own memory format and the public network in float32;
*openvino by hand* is the whole graph converted in one call, which is what a user would do without this package.
"""

import pytest
import torch

from bench.tools.image_to_map import detector, ways
from bench.tools.timing import interleaved

_ROUNDS = 7
_SMALL = ("tf_efficientnet_lite0", 64)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_b4", "tf_efficientnet_lite0"])
def test_benchmark_image_to_map(benchmark, backbone, batch, device, request, tmp_path):
    if device.type != "cpu":
        pytest.skip("engines run on the processor")
    smoke = request.config.getoption("--benchmark-disable")
    if smoke and (batch, backbone) != (1, _SMALL[0]):
        pytest.skip("one case is enough to see that all ways run")
    found = detector(*(_SMALL if smoke else (backbone, 224)))
    images = torch.rand(batch, 3, *found.settings.image_size)
    works = {name: lambda way=way: way(images) for name, way in ways(found, tmp_path).items()}
    benchmark.group = f"image to map, {backbone}, batch {batch}"
    times = benchmark.pedantic(interleaved, (works, 1 if smoke else _ROUNDS), rounds=1)
    benchmark.extra_info["ways"] = {name: seconds / batch for name, seconds in times.items()}
    assert {"public", "as loaded", "torch float32 + own network"} <= times.keys()
