"""Tiles of the Triton kernels: each runs, and the right one is chosen."""

import pytest
import torch
from triton_cases import DEVICE, assert_agree, attention_inputs, run

pytest.importorskip("triton")
from uniad_fast.kernels.gpu import launch, tiles  # noqa: E402

TABLES = (tiles.ATTENTION, tiles.ATTENTION_HOPPER, tiles.ATTENTION_BLACKWELL, tiles.ATTENTION_AMD)
WHOLE = [tiles.TileConfig(*t, 1, whole=True) for t in ((64, 256, 4), (128, 256, 8), (64, 128, 4))]
ALL_TILES = sorted({tile for table in TABLES for tile in table.values()}, key=repr)
if DEVICE.type == "cpu":  # Triton's interpreter knows no warps, stages or precisions
    ALL_TILES = list({(tile.block_m, tile.block_n): tile for tile in ALL_TILES}.values())


@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda t: f"{t.block_m}x{t.block_n}x{t.num_warps}")
def test_every_tile_runs(tile, monkeypatch):
    """Tokens that fill no block, and blocks that are hidden, visible and mixed."""
    monkeypatch.setattr(launch, "attention_tile", lambda *_: tile)
    feature_size, neighbor_size = (2, 65), (1, 129)
    tensors = attention_inputs(feature_size, batch=1, heads=1)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=0.1, seed=5)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=0.1, seed=5)


@pytest.mark.parametrize(
    ("feature_size", "neighbor_size"), [((14, 14), (7, 7)), ((2, 65), (1, 129)), ((5, 13), (9, 25)), ((16, 16), None)]
)
@pytest.mark.parametrize(("p", "tile"), [(0.0, WHOLE[0]), (0.2, WHOLE[0]), (0.2, WHOLE[1])])
def test_whole_sequences(feature_size, neighbor_size, p, tile, monkeypatch):
    """One program a head. float32 is too wide for it on a chip; here it holds outputs, and gradients from its sums."""
    monkeypatch.setattr(launch, "whole_sequence_tile", lambda *_: tile)
    monkeypatch.setattr(launch, "attention_tile", lambda *_: tiles.TileConfig(64, 64, 4, 1))
    tensors = attention_inputs(feature_size, batch=2, heads=1, query_batch=1)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=p, seed=5)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=p, seed=5)


def test_whole_sequences_serve_what_fits():
    chosen = tiles.whole_sequence_tile
    assert chosen(196, 2, 32, True, "sm_90") == chosen(256, 2, 32, False, "gfx942") == WHOLE[0]
    assert chosen(196, 2, 32, False, "sm_80") == chosen(256, 2, 32, True, "sm_86") == WHOLE[1]
    assert chosen(100, 2, 16, True, "sm_80") == WHOLE[2]
    assert chosen(256, 2, 32, False, "sm_89") is None
    for tokens, element_size, head_dim, chip in (
        (64, 2, 32, "sm_90"), (257, 2, 32, "sm_90"), (196, 4, 32, "sm_80"), (196, 2, 64, "gfx942"),
        (196, 2, 32, "sm_100"), (196, 2, 32, "sm_103"), (196, 2, 32, "sm_120"),
    ):  # fmt: skip
        assert chosen(tokens, element_size, head_dim, True, chip) is None


def test_each_chip_has_its_own_tiles():
    """Products by four warps, with accumulators of their own, and by waves of 64; others are as Ampere's."""
    kernels = "query_gradient_kernel", "key_value_gradient_kernel"
    expected = {
        "sm_80": ((64, 16, 4), (16, 16, 2)), "sm_90": ((64, 16, 4), (16, 64, 4)), "sm_100": ((64, 32, 8), (16, 64, 4)),
        "gfx942": ((64, 32, 8), (16, 16, 4)),
    }  # fmt: skip
    expected |= dict.fromkeys(("sm_103", "sm_110", ""), expected["sm_100"])
    expected |= dict.fromkeys(("sm_75", "sm_86", "sm_89", "sm_120"), expected["sm_80"])
    for chip, shapes in expected.items():
        for kernel, shape in zip(kernels, shapes, strict=True):
            tile = tiles.attention_tile(kernel, 4, 32, chip)
            assert (tile.block_m, tile.block_n, tile.num_warps) == shape, (chip, kernel)


def test_a_chip_is_known_by_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    monkeypatch.setattr(torch.version, "hip", None)
    assert tiles.chip_of(torch.device("cuda", 1)) == "sm_103" and tiles.chip_of(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tiles.chip_of(torch.device("cuda", 1)) == "gfx"


def test_tokens_too_far_apart_for_a_tiles_offsets_are_copied(monkeypatch):
    tensors = attention_inputs((5, 13), batch=1, heads=1)
    expected = run(tensors, (5, 13), (3, 3), "triton", p=0.2, seed=5)
    monkeypatch.setattr(launch, "_FURTHEST", 7)  # as if 32 bits ended there
    copies = [launch._readable(t.detach()) for t in tensors]
    assert all(c.data_ptr() != t.data_ptr() and torch.equal(c, t) for c, t in zip(copies, tensors, strict=True))
    ours = run(tensors, (5, 13), (3, 3), "triton", p=0.2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


WHOLE_GRADIENTS = [tiles.TileConfig(64, 64, 4, 1), tiles.TileConfig(64, 32, 4, 1), tiles.TileConfig(128, 64, 8, 1)]


@pytest.mark.parametrize("tile", WHOLE_GRADIENTS, ids=lambda t: f"{t.block_m}x{t.block_n}")
@pytest.mark.parametrize(
    ("feature_size", "neighbor_size", "p"),
    [((14, 14), (7, 7), 0.2), ((2, 65), (1, 129), 0.0), ((5, 13), (9, 25), 0.2), ((8, 16), None, 0.2)],
)
def test_gradients_of_whole_sequences(tile, feature_size, neighbor_size, p, monkeypatch):
    """By one kernel, also where a head's width is no power of two and queries serve a whole batch."""
    monkeypatch.setattr(launch, "whole_sequence_gradient_tile", lambda *_: tile)
    monkeypatch.setattr(launch, "_aligned", lambda *_: True)
    monkeypatch.setattr(launch, "_blockwise_backward", None)
    tensors = attention_inputs(feature_size, batch=2, heads=1, query_batch=1, head_dim=24)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=p, seed=5)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=p, seed=5)


def test_gradients_of_a_part_of_a_batch_are_those_of_the_whole(monkeypatch):
    """Its noise begins where the part does."""
    monkeypatch.setattr(launch, "whole_sequence_gradient_tile", lambda *_: WHOLE_GRADIENTS[0])
    query, key, value = (t.detach() for t in attention_inputs((9, 9), batch=2, heads=2))
    arguments, seed = ((9, 9, 1, 1), 0.3, 0.25), torch.tensor([7, 0], device=query.device)
    out, stats = launch.attention_forward(query, key, value, *arguments, seed)
    whole = launch.attention_backward(out, query, key, value, out, stats, *arguments, seed)
    seed[1] = 2  # planes before the second picture's
    parts = [t[1:] for t in (out, query, key, value, out)]
    part = launch.attention_backward(*parts, stats[2:], *arguments, seed)
    assert all(torch.equal(a[1:], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("broken", [False, True])
def test_not_finite_gradients_of_whole_sequences(broken, monkeypatch):
    """As the kernels of blocks have them: a NaN in a key, a value that is infinite, a score beyond all others."""
    query, key, value = (t.detach() for t in attention_inputs((9, 9), batch=1, heads=1))
    key[0, 0, 3] *= 1e12
    if broken:
        key[0, 0, 40, 1], value[0, 0, 70, 2] = float("nan"), float("inf")
    arguments = ((9, 9, 1, 1), 0.0, 0.25, None)
    out, stats = launch.attention_forward(query, key, value, *arguments)
    gradients = []
    for tile in (None, WHOLE_GRADIENTS[0]):
        monkeypatch.setattr(launch, "whole_sequence_gradient_tile", lambda *_, tile=tile: tile)
        gradients.append(launch.attention_backward(torch.ones_like(out), query, key, value, out, stats, *arguments))
    for blocks, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, blocks, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert broken or whole.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "grid", "unaligned", "served"),
    [(torch.float16, (9, 9), False, True), (torch.float16, (9, 9), True, False), (torch.float32, (9, 9), False, False),
     (torch.float16, (8, 8), False, False)],
)  # fmt: skip
def test_the_backward_kernel_that_is_chosen_is_the_one_that_runs(dtype, grid, unaligned, served, monkeypatch):
    ran = []
    for name in ("_whole_backward", "_blockwise_backward"):
        launcher = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, f=launcher, n=name: (ran.append(n), f(*a))[1])
    tensors = attention_inputs(grid, dtype=dtype, batch=1, heads=1)
    if unaligned:
        tensors[1] = torch.nn.functional.pad(tensors[1].detach(), (1, 0))[..., 1:].requires_grad_()
    assert_agree(tensors, run(tensors, grid, (3, 3), "triton", p=0.2, seed=5), grid, (3, 3), p=0.2, seed=5)
    assert ran == ["_whole_backward" if served else "_blockwise_backward"]


def test_gradients_of_whole_sequences_serve_what_fits():
    chosen = tiles.whole_sequence_gradient_tile
    eight, four, narrow = (tiles.TileConfig(*t, 1, whole=True) for t in ((128, 64, 8), (64, 64, 4), (64, 32, 4)))
    expected = {
        eight: [("sm_86", 256), ("sm_89", 196), ("sm_90", 225), ("sm_100", 144), ("sm_100", 196), ("sm_103", 256)],
        four: [("sm_80", 196), ("gfx942", 196), ("", 196)],
        narrow: [("sm_80", 256), ("sm_100", 225), ("sm_120", 196)],
    }
    for tile, cases in expected.items():
        for chip, tokens in cases:
            assert chosen(tokens, 2, 32, chip) == tile, (chip, tokens)
    for tokens, element_size, head_dim in ((64, 2, 32), (257, 2, 32), (196, 4, 32), (196, 2, 64)):
        assert chosen(tokens, element_size, head_dim, "sm_90") is None


@pytest.fixture
def tf32_switches():
    """Torch's switches for products on a GPU, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("the newer names came with torch 2.9")
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield torch.backends, matmul
    torch.backends.fp32_precision, matmul.fp32_precision = before


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD has no TF32")
def test_tf32_is_used_where_either_of_torchs_switches_allows_it(tf32_switches):
    """Reading the older name after the newer one was set raises, and every launch with it."""
    backends, matmul = tf32_switches
    tile = tiles.TileConfig(64, 64, 4, 2)
    for everywhere, products, expected in (
        ("none", "none", "tf32x3"), ("tf32", "none", "tf32"), ("none", "tf32", "tf32"), ("tf32", "ieee", "tf32x3"),
        ("ieee", "tf32", "tf32"),
    ):  # fmt: skip
        backends.fp32_precision, matmul.fp32_precision = everywhere, products
        assert tiles.dot_precision(tile) == expected, (everywhere, products)
        assert tiles.dot_precision(tiles.TileConfig(64, 64, 4, 2, precision="ieee")) == "ieee"
    backends.fp32_precision = matmul.fp32_precision = "none"
    matmul.allow_tf32 = True
    assert tiles.dot_precision(tile) == "tf32"
    matmul.allow_tf32 = False
    assert tiles.dot_precision(tile) == "tf32x3"


def test_wholly_hidden_blocks_are_skipped_where_there_are_enough():
    assert tiles.skipping_pays(2, 128, 0, 126, 64, 64)
    assert not tiles.skipping_pays(14, 14, 3, 3, 64, 64)
    assert not tiles.skipping_pays(28, 28, 7, 7, 64, 64)


def test_a_skipped_block_is_not_loaded(monkeypatch):
    """Queries see the other row only: NaN in keys that are wholly hidden from them must not reach their output."""
    monkeypatch.setattr(launch, "attention_tile", lambda *_: tiles.TileConfig(64, 64, 4, 1))
    monkeypatch.setattr(launch, "whole_sequence_tile", lambda *_: None)
    arguments = ((2, 64, 0, 63), 0.0, 0.25, None)
    assert tiles.skipping_pays(2, 64, 0, 63, 64, 64)
    query, key, value = (t.detach() for t in attention_inputs((2, 64), batch=1, heads=1))
    expected, _ = launch.attention_forward(query, key, value, *arguments)
    poisoned = key.clone()
    poisoned[:, :, :64] = float("nan")
    out, _ = launch.attention_forward(query, poisoned, value, *arguments)
    assert torch.equal(out[:, :, :64], expected[:, :, :64]) and out[:, :, 64:].isnan().all()
