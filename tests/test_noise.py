"""The bits are pinned: published Philox vectors, and our element map spelled out by hand."""

import pytest
import torch

from uniad_fast.ops import noise

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
