"""What "auto" means where, and that autocast follows it."""

import warnings

import pytest
import torch
from test_whole_network import make, tokens_for, whole
from uniad_fast.kernels.cpu import build, launch_reconstruct

from uniad_fast import neighbor_masked_attention
from uniad_fast.models import precision
from uniad_fast.models.precision import autocast, computes_in_bfloat16
from uniad_fast.ops import checks


@pytest.fixture(autouse=True)
def forget():
    yield
    checks.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(("has_it", "pays"), [(True, True), (True, False), (False, True)])
def test_auto_follows_the_processor(has_it, pays, monkeypatch):
    """Some have the instruction, and multiply float32 twice as fast."""
    checks.multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it)
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: pays)
    cpu = torch.device("cpu")
    assert computes_in_bfloat16("auto", cpu) == (has_it and pays)
    assert computes_in_bfloat16("bfloat16", cpu) and not computes_in_bfloat16("float32", cpu)
    with autocast("auto", cpu):
        product = torch.randn(2, 3) @ torch.randn(3, 2)
    assert product.dtype == (torch.bfloat16 if has_it and pays else torch.float32)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, auto, got 'float16'"):
        computes_in_bfloat16("float16", torch.device("cpu"))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_emulated_bfloat16_is_said_once(has_instructions, monkeypatch):
    """It is right, and takes twenty times float32's time."""
    monkeypatch.setattr(checks, "multiplies_bfloat16", lambda _: has_instructions)
    checks._warn_of_emulation.cache_clear()
    query, said = torch.randn(1, 1, 4, 16), []
    for dtype in (torch.float16, torch.bfloat16, torch.bfloat16):
        with torch.autocast("cpu", dtype), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            neighbor_masked_attention(query, query, query, (2, 2), None)
        said.append(len([w for w in caught if "no bfloat16 instructions" in str(w.message)]))
    checks._warn_of_emulation.cache_clear()
    assert said == [0, int(not has_instructions), 0]


@pytest.mark.parametrize("path", [path for path in build.paths() if path in ("avx512", "avx2", "portable")])
def test_autocast_where_no_product_is_of_bfloat16_rounds_float32s_result(path, monkeypatch):
    monkeypatch.setattr(launch_reconstruct, "load", lambda: build.load(path))
    assert not launch_reconstruct.has_pairs()
    model = make()
    tokens = tokens_for(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = whole(model, tokens)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, whole(model, tokens).bfloat16())
