"""How many kernels a training step launches: half as many as layer by layer, or fewer."""

import pytest

pytest.importorskip("triton")
from bench.reports.launches import count  # noqa: E402

# What a step launched when every layer was a few modules of torch's, counted by the same report. In bfloat16 there was
# a cast of each parameter and of its gradient besides.
LAYER_BY_LAYER = {
    "float32": dict(copy=161, product=159, sum=121, addition=99, kernel=94, draw=41, fill=23, clip=10, optimizer=6,
                    other=7),
}  # fmt: skip
LAYER_BY_LAYER["bfloat16"] = LAYER_BY_LAYER["float32"] | dict(cast=251)


@pytest.mark.parametrize(("precision", "most"), [("float32", 342), ("bfloat16", 362)])
def test_a_training_step_launches_at_most_half_of_what_it_did(precision, most):
    found = count(precision)
    assert found.by_kind.total() <= most <= sum(LAYER_BY_LAYER[precision].values()) / 2, found.by_name
    assert found.by_kind["kernel"] == LAYER_BY_LAYER[precision]["kernel"]
