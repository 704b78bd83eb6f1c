"""Tiles of the Triton kernels: each runs, and the right one is chosen."""

import pytest
import torch
from triton_cases import assert_agree, attention_inputs, run

pytest.importorskip("triton")
from uniad_fast.kernels.gpu import launch, tiles  # noqa: E402

ALL_TILES = sorted({*tiles.ATTENTION.values(), *tiles.ATTENTION_AMD.values()}, key=repr)


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
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_whole_sequences(feature_size, neighbor_size, p, monkeypatch):
    """One program a head. float32 is too wide for it on a chip; here it holds outputs, and gradients from its sums."""
    monkeypatch.setattr(launch, "whole_sequence_tile", lambda *_: tiles.TileConfig(64, 256, 4, 1, whole=True))
    tensors = attention_inputs(feature_size, batch=2, heads=1, query_batch=1)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=p, seed=5)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=p, seed=5)


def test_whole_sequences_serve_what_fits():
    assert tiles.whole_sequence_tile(196, 2, 32, blackwell=False) == tiles.TileConfig(64, 256, 4, 1, whole=True)
    assert tiles.whole_sequence_tile(100, 2, 16, blackwell=False).block_n == 128
    for tokens, element_size, head_dim, blackwell in (
        (64, 2, 32, False), (257, 2, 32, False), (196, 4, 32, False), (196, 2, 64, False), (196, 2, 32, True),
    ):  # fmt: skip
        assert tiles.whole_sequence_tile(tokens, element_size, head_dim, blackwell) is None


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
