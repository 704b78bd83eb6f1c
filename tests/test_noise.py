"""The bits are pinned: published Philox vectors, and our element map spelled out by hand."""

from collections.abc import Callable

import pytest
import torch
from op_cases import device_of
from torch import Tensor

from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.interop.lazy_attention_weights import attention_weights
from uniad_fast.ops import noise
from uniad_fast.ops.checks import seed_of
from uniad_fast.ops.dropout import dropout, dropout_add_norm
from uniad_fast.ops.geometry import Window

CPU = torch.device("cpu")


# Known answers of philox4x32_10 from the Random123 distribution (kat_vectors): counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = noise.philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def philox(counter, seed):
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    return [int(w) for w in noise.philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))]


def test_keep_mask_is_the_documented_map():
    seed, p, shape = 0x1234_5678_9ABC_DEF0, 0.3, (3, 5, 150)
    keep = noise.keep_mask(seed, shape, p, CPU)
    assert keep.shape == shape
    for plane, row, col in [(0, 0, 0), (1, 2, 7), (2, 4, 8), (0, 3, 63), (1, 0, 64), (2, 1, 101), (2, 4, 149)]:
        words = philox((8 * (col // 64) + col % 8, row, plane, noise.KEEP), seed)
        slot = col % 64 // 8
        bits = words[slot // 2] >> (16 * (slot % 2)) & 0xFFFF
        assert bool(keep[plane, row, col]) == (bits >= round(p * 65536)), (plane, row, col)


def test_jitter_is_the_documented_map():
    import math

    seed, shape = -7, (4, 10)
    normals = noise.jitter_normals(seed, shape, torch.float64, CPU)
    assert normals.shape == shape
    for token, channel in [(0, 0), (1, 1), (2, 6), (3, 9), (3, 7)]:
        words = philox((channel // 4, token, 0, noise.JITTER), seed)
        u = [((word >> 8) + 1) / 2**24 for word in words]
        pair = channel % 4 // 2
        wave = math.cos if channel % 2 == 0 else math.sin
        expected = math.sqrt(-2 * math.log(u[2 * pair])) * wave(2 * math.pi * u[2 * pair + 1])
        assert float(normals[token, channel]) == pytest.approx(expected, rel=1e-12)


def test_an_element_does_not_depend_on_the_shape_around_it():
    small, large = (noise.keep_mask(5, shape, 0.5, CPU) for shape in ((2, 3, 40), (4, 9, 300)))
    assert torch.equal(small, large[:2, :3, :40])
    assert torch.equal(
        noise.jitter_normals(5, (3, 7), torch.float32, CPU),
        noise.jitter_normals(5, (9, 64), torch.float32, CPU)[:3, :7],
    )


def test_seeds_and_planes_draw_differently_and_a_tensor_is_its_number():
    first, other = (noise.keep_mask(seed, (2, 64, 64), 0.5, CPU) for seed in (1, 1 + 2**32))
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, noise.keep_mask(torch.tensor(1), (2, 64, 64), 0.5, CPU))


def test_laws_of_the_draws():
    keep = noise.keep_mask(3, (4, 300, 300), 0.1, CPU).double()
    assert abs(keep.mean() - 0.9) < 4 * (0.09 / keep.numel()) ** 0.5
    rows = keep.flatten(1) - keep.mean()
    for lag in (1, 7, 8, 64):  # neighbours in a call, in a slot, in a block
        correlation = (rows[:, lag:] * rows[:, :-lag]).mean() / keep.var()
        assert abs(correlation) < 4 / keep.numel() ** 0.5
    normals = noise.jitter_normals(3, (1000, 272), torch.float64, CPU)
    assert abs(normals.mean()) < 4 / normals.numel() ** 0.5
    assert abs(normals.var() - 1) < 4 * (2 / normals.numel()) ** 0.5
    assert abs((normals**4).mean() - 3) < 0.1
    jittered = noise.jittered_tokens(3, 20_000, 0.25, CPU).double().mean()
    assert abs(jittered - 0.25) < 4 * (0.1875 / 20_000) ** 0.5


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_a_certain_token_is_certain(prob):
    assert (noise.jittered_tokens(9, 5000, prob, CPU) == bool(prob)).all()


# A batch in parts gets the noise of the whole batch: what processes that share one rely on.
BATCH, HEADS, GRID, WIDTH = 5, 2, (3, 5), 24
KEY = 2**40 + 77
PARTS = ((0, 2), (2, 3), (3, 5))  # of the batch: first image, last + 1


def _attention(x: Tensor, seed: object, impl: str) -> Tensor:
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return neighbor_masked_attention(heads, heads, heads, GRID, (1, 3), dropout_p=0.3, seed=seed, impl=impl)


def _shared_query(x: Tensor, seed: object, impl: str) -> Tensor:
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    query = torch.linspace(-1, 1, heads[0].numel(), device=x.device).view_as(heads[:1]).to(x.dtype)
    return neighbor_masked_attention(query, heads, heads, GRID, None, dropout_p=0.3, seed=seed, impl=impl)


def _jitter(x: Tensor, seed: object, impl: str) -> Tensor:
    weight = torch.linspace(-1, 1, 20 * WIDTH, device=x.device).view(20, WIDTH).to(x.dtype)
    return jitter_project(x, weight, scale=9.0, prob=0.6, seed=seed, impl=impl)


def _norm(x: Tensor, seed: object, impl: str) -> Tensor:
    ones = torch.ones(WIDTH, device=x.device)
    return dropout_add_norm(x, torch.ones_like(x[:1]), ones, ones, dropout_p=0.3, seed=seed, impl=impl)


def _relu(x: Tensor, seed: object, impl: str) -> Tensor:
    return dropout(x, 0.3, relu=True, seed=seed, impl=impl)


def _dropout(x: Tensor, seed: object, impl: str) -> Tensor:
    return dropout(x, 0.3, seed=seed, impl=impl)


def _gradients(call: Callable[..., Tensor], x: Tensor, seed: object, impl: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = call(x, seed, impl)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), gradient


@pytest.mark.parametrize("call", [_attention, _shared_query, _jitter, _norm, _relu, _dropout], ids=lambda f: f.__name__)
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_parts_have_the_noise_of_the_whole(call, impl):
    device = device_of(impl)
    shape, generator = (BATCH, GRID[0] * GRID[1], WIDTH), torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(device)
    out, gradient = _gradients(call, x, KEY, impl)
    for begin, end in PARTS:
        seed = torch.tensor([KEY, begin], device=device)
        found = _gradients(call, x[begin:end], seed, impl)
        torch.testing.assert_close(found[0], out[begin:end], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], gradient[begin:end], rtol=1e-4, atol=1e-5)
    # The first image's noise is not the third's, or all of this would say nothing.
    other, _ = _gradients(call, x[2:3], torch.tensor([KEY, 0], device=device), impl)
    assert not torch.allclose(other, out[2:3])


def test_a_seed_is_drawn_for_a_part_alone_inside_the_block():
    device = torch.device("cpu")
    torch.manual_seed(3)
    whole = noise.draw_seed(device)
    torch.manual_seed(3)
    with noise.part_of_batch(7):
        assert noise.draw_seed(device).tolist() == [int(whole), 7]
        assert noise.draw_for_torch(device) is not None
    assert noise.draw_seed(device).shape == () and noise.draw_for_torch(device) is None


@pytest.mark.parametrize("first", [None, 3])
def test_seeds_drawn_together_are_those_drawn_one_by_one(first, monkeypatch):
    monkeypatch.setattr(noise, "_first_image", first)
    rows, device = [8, 196, 196, 8, 2], torch.device("cpu")
    torch.manual_seed(3)
    expected, state = [seed_of(None, device, r, "cpu").tolist() for r in rows], torch.get_rng_state()
    torch.manual_seed(3)
    assert [seed.tolist() for seed in noise.draw_seeds(device, rows)] == expected
    assert torch.equal(torch.get_rng_state(), state) and noise.draw_seeds(device, []) == []


def test_stock_pytorch_draws_another_noise_for_each_part():
    x = torch.ones(2, 4, 512)
    masks = []
    for first in (0, 2):
        torch.manual_seed(0)
        with noise.part_of_batch(first):
            masks.append(dropout(x, 0.5, impl="torch") > 0)
    assert not torch.equal(*masks)


def test_attention_weights_of_a_part_are_those_that_acted():
    query, key = torch.randn(2, 3, HEADS, 15, 8)
    window = Window.of(GRID, (1, 3))
    whole = attention_weights(query, key, window, 0.4, torch.tensor(KEY), average=False)
    part = attention_weights(query[1:], key[1:], window, 0.4, torch.tensor([KEY, 1]), average=False)
    torch.testing.assert_close(part, whole[1:])


@pytest.mark.parametrize("seed", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)])
def test_a_seed_of_another_shape_is_refused(seed):
    with pytest.raises(ValueError, match=r"int64 \[\] or \[2\]"):
        dropout(torch.ones(2, 3), 0.5, seed=seed)
