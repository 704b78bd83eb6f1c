"""What multiplies: whatever is chosen, the numbers hold; and what was found once on a machine stays."""

import json
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from uniad_fast.kernels.cpu import build, launch_linear

from uniad_fast.ops import products
from uniad_fast.ops.linear import linear
from uniad_fast.ops.products import KINDS, ONEDNN, OWN, TILES, TORCH, Ways, bfloat16_gain, bfloat16_pays, fastest

WAYS = (OWN, TORCH, *[ONEDNN] * products.has_onednn())


@pytest.mark.parametrize("ways", [*(Ways(way, way, way) for way in WAYS), Ways(WAYS[-1], OWN, TORCH)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_hold_whoever_multiplies(ways, autocast, monkeypatch):
    """Autocast around the backward pass alone changes nothing."""
    if build.problem() is not None:
        pytest.skip("every product is torch's here")
    monkeypatch.setattr(products, "fastest", lambda *_: ways)
    made = [torch.randn(s) for s in ((3, 7, 20), (11, 20), (11,))]
    tensors = [t.requires_grad_() for t in made]
    weight = torch.randn(3, 7, 11)
    out = linear(*tensors, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = [out, *torch.autograd.grad(out, tensors, weight)]
    exact = [t.detach().double().requires_grad_() for t in made]
    truth = torch.nn.functional.linear(*exact)
    for mine, true in zip(ours, [truth, *torch.autograd.grad(truth, exact, weight.double())], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "uniad_fast"


def test_what_was_found_first_stays(folder):
    assert build.remembered("products", lambda: {"output": 2.5}) == {"output": 2.5}
    assert build.remembered("products", lambda: {"output": 0.5}) == {"output": 2.5}
    assert build.remembered("others", lambda: {"output": 0.5}) == {"output": 0.5}
    assert len(list(folder.iterdir())) == 2


def test_what_was_found_stays_where_no_file_can_have_two_names(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(build.os, "link", refuse)
    assert build.remembered("products", lambda: {"output": 2.5}) == {"output": 2.5}
    assert build.remembered("products", lambda: {"output": 0.5}) == {"output": 2.5}


def test_what_was_found_holds_for_these_kernels_alone(folder, monkeypatch, tmp_path):
    build.remembered("products", lambda: {"output": 2.5})
    other = tmp_path / "other.cpp"
    other.write_text("int other;")
    monkeypatch.setattr(build, "SOURCES", [*build.SOURCES, other])
    assert build.remembered("products", lambda: {"output": 0.5}) == {"output": 0.5}


def test_who_asks_together_gets_one_answer(folder):
    both, found = threading.Barrier(2), []

    def ask(number):
        def find():
            both.wait(10)  # neither has written yet
            return {"output": number}

        found.append(build.remembered("products", find))

    threads = [threading.Thread(target=ask, args=(number,)) for number in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2 and found[0] == found[1]


@pytest.mark.parametrize(
    "content", ["", '{"output": ', "[1, 2]", '{"output": "much"}', "{}", '{"output": NaN}', "[" * 100_000]
)
def test_a_damaged_file_is_found_anew(content, folder):
    build.remembered("products", lambda: {"output": 2.5})
    (path,) = folder.iterdir()
    path.write_text(content)
    assert build.remembered("products", lambda: {"output": 0.5}) == {"output": 0.5}
    assert json.loads(path.read_text()) == {"output": 0.5}


def test_nothing_is_measured_in_every_run_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert build.remembered("products", lambda: {"output": 0.5}) is None
    products._chosen.cache_clear()
    try:
        assert fastest(196, 3, 5) == (OWN, OWN, OWN) and fastest(31, 3, 5) == (TORCH, TORCH, TORCH)
    finally:
        products._chosen.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_what_is_measured_is_on_a_cpu_whatever_the_default(default, dtype, monkeypatch):
    if dtype == torch.bfloat16 and not launch_linear.has_pairs():
        pytest.skip("nothing is measured in bfloat16 here")
    made = []
    monkeypatch.setattr(products, "_seconds", lambda *ways: made.extend(way() for way in ways) or [1.0] * len(ways))
    kind, put = ("device", torch.set_default_device) if default == "meta" else ("dtype", torch.set_default_dtype)
    put(default)
    try:
        products._measured(3, 5, 7, dtype)
    finally:
        put(None if kind == "device" else torch.float32)
    parameters = [t for one in made if isinstance(one, tuple) for t in one]
    rows = [t for t in made if not isinstance(t, tuple)]
    assert len(parameters) == len(rows) == 2 * len(WAYS)
    assert {t.dtype for t in parameters} == {torch.float32} and {t.dtype for t in rows} == {dtype}
    assert all(t.device.type == "cpu" for t in (*parameters, *rows))


def test_the_fastest_one_is_found_and_touches_no_generator(folder, monkeypatch):
    """A library has to be faster by more than a measurement may be off."""
    before = torch.get_rng_state()
    found = products._measured(64, 5, 7, torch.float32)
    assert set(found) == {f"{kind} {way}" for kind in KINDS for way in WAYS[1:]}
    assert all(0.01 < ratio < 100 for ratio in found.values()) and torch.equal(before, torch.get_rng_state())
    measured = []

    def find(*shape):
        measured.append(shape)
        gains = {5: (2.0, 1.14, 0.5), 7: (1.0, 1.2, 1.16)}[shape[1]]
        return {f"{kind} {TORCH}": gain for kind, gain in zip(KINDS, gains, strict=True)} | {
            f"{KINDS[1]} {ONEDNN}": 1.5
        }

    monkeypatch.setattr(products, "_measured", find)
    products._chosen.cache_clear()
    try:
        assert fastest(196, 5, 7) == fastest(129, 5, 7) == (TORCH, ONEDNN, OWN)
        assert fastest(196, 7, 5) == (OWN, ONEDNN, TORCH)
        assert fastest(6272, 5, 7) == fastest(1568, 5, 7) == (TORCH, ONEDNN, OWN)
        assert measured == [(n, i, o, torch.float32) for n, i, o in ((256, 5, 7), (256, 7, 5), (2048, 5, 7))]
        products._chosen.cache_clear()
        assert fastest(256, 5, 7) == (TORCH, ONEDNN, OWN) and len(measured) == 3, "it was not remembered"
        monkeypatch.setattr(products, "in_tiles", lambda: False)
        assert fastest(256, 5, 7, torch.bfloat16) == (TORCH, ONEDNN, OWN) and measured[3] == (256, 5, 7, torch.bfloat16)
        monkeypatch.setattr(products, "in_tiles", lambda: True)
        assert fastest(2, 5, 7, torch.bfloat16) == (ONEDNN, TORCH, TILES) and len(measured) == 4
    finally:
        products._chosen.cache_clear()


@pytest.fixture
def first_asked(folder):
    bfloat16_gain.cache_clear()
    yield
    bfloat16_gain.cache_clear()


@pytest.mark.parametrize(("gain", "pays"), [(0.5, False), (1.0, False), (1.8, True)])
def test_bfloat16_pays_where_its_products_are_the_faster_ones(gain, pays, first_asked, monkeypatch):
    monkeypatch.setattr(products, "_seconds", lambda *_: [1.0, gain, gain + 1])
    assert bfloat16_gain() == gain and bfloat16_pays() == pays
    monkeypatch.setattr(products, "_seconds", lambda *_: [1.0, 3.0, 4.0])
    bfloat16_gain.cache_clear()
    assert bfloat16_gain() == gain, "it was not remembered"


@pytest.mark.parametrize("default", [torch.float64, "meta"], ids=str)
def test_bfloat16_is_compared_with_float32_whatever_the_default(default, first_asked, monkeypatch):
    made = []
    monkeypatch.setattr(products, "_seconds", lambda *ways: made.extend(way() for way in ways) or [1.0, 2.0, 2.5])
    kind, put = ("device", torch.set_default_device) if default == "meta" else ("dtype", torch.set_default_dtype)
    put(default)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), FakeTensorMode():
            assert bfloat16_gain() == 2.0
    finally:
        put(None if kind == "device" else torch.float32)
    assert [t.dtype for t in made] == [torch.bfloat16, *[torch.float32] * (len(WAYS) - 1)]
    assert all(type(t) is torch.Tensor and t.device.type == "cpu" for t in made)


def test_bfloat16_is_measured_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    bfloat16_gain.cache_clear()
    try:
        assert 0.001 < bfloat16_gain() < 100
    finally:
        bfloat16_gain.cache_clear()
