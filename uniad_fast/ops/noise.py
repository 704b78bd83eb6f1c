"""Counter-based noise: the one place that says which random bits belong to which element.

Every draw is Philox-4x32-10 (Salmon et al., SC 2011), keyed by a 64-bit seed and counted by the
element's own index, so that it depends on nothing else: not the tile, the thread, the device or the
implementation. The kernels draw the same bits; this file is the definition they are tested against.

    key      (seed & 0xffffffff, seed >> 32)
    counter  (column group, row, plane, stream)        four 32-bit words, the last one names the use

Stream KEEP: 16 bits an element, eight elements a call. An element is (plane, row, col); for attention
weights plane = batch * heads + head, row = query, col = key. A call serves the eight columns of one block
of 64 that are equal modulo 8:

    column group = 8 * (col // 64) + col % 8,     slot = col % 64 // 8
    bits = 16-bit half `slot % 2` (0 is the low one) of output word `slot // 2`
    kept  when  bits >= round(p * 65536)

Columns 2t, 2t+1 of every run of eight are what one thread of a 16x8 matrix instruction holds, and eight
neighbouring columns are one byte of a vector mask: neither has to shuffle.

Stream JITTER: 32 bits an element, four neighbouring channels a call. An element is (token, channel):

    column group = channel // 4,  row = token,  plane = 0
    u_i = ((word_i >> 8) + 1) / 2**24  in (0, 1]
    channels 4g, 4g+1 = sqrt(-2 ln u_0) * (cos, sin)(2 pi u_1);  4g+2, 4g+3 the same from u_2, u_3

Stream JITTER_TOKEN: one call a token, counter (0, token, 0, stream); the token is jittered when
(word_0 >> 8) < round(prob * 2**24).

A seed is a number, or two: [key, first], where the elements are those of a part of a batch whose planes, rows or tokens
are numbered from `first` on. So a batch that several processes share has the noise that one process draws for it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

KEEP, JITTER, JITTER_TOKEN = 0, 1, 2

_WORD = 0xFFFFFFFF
_SEEDS = 2**63 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 of four counter words under a two-word key.

    All words are int64 tensors holding values in [0, 2**32), broadcast against each other; so are the
    four results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps to a negative int64, but its bit pattern is the unsigned product's.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
        )
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = k0 + _KEY_INCREMENTS[0] & _WORD, k1 + _KEY_INCREMENTS[1] & _WORD
    return c0, c1, c2, c3


_first_image: int | None = None  # no context variable: dynamo traces none


@contextlib.contextmanager
def part_of_batch(first: int) -> Iterator[None]:
    """Inside, a batch is part of a larger one, from its image number `first` on, and gets that part's noise.

    Every process that has a part draws the same seeds: their generators of torch's must be in the same state. "torch"
    alone draws another noise for each part than for the whole.
    """
    global _first_image
    before, _first_image = _first_image, first
    try:
        yield
    finally:
        _first_image = before


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator of `device`: an int64 tensor there, [] or of a part of a batch [2] (no
    synchronisation).
    """
    key = torch.randint(0, _SEEDS, (), dtype=torch.int64, device=device)
    return key if _first_image is None else torch.stack((key, torch.full_like(key, _first_image)))


def draw_seeds(device: torch.device, rows: Sequence[int]) -> list[Tensor]:
    """As many seeds as `draw_seed` and `checks.seed_of` give one after the other, by one draw: on a CPU the same ones.

    rows: planes, rows or tokens of an image that each seed is for.
    """
    keys = torch.randint(0, _SEEDS, (len(rows),), dtype=torch.int64, device=device)
    if _first_image is None:
        return list(keys.unbind())
    pairs = {r: torch.stack((keys, torch.full_like(keys, _first_image * r)), 1) for r in set(rows)}
    return [pairs[r][i] for i, r in enumerate(rows)]


def draw_for_torch(device: torch.device) -> Tensor | None:
    """A seed for a part of a batch, whose noise must not be another part's; None, for torch's generator as it is."""
    return None if _first_image is None else draw_seed(device)


def keep_mask(
    seed: int | Tensor, shape: tuple[int, int, int], p: float, device: torch.device, part_axis: int = 0
) -> Tensor:
    """Dropout decisions of stream KEEP: bool [planes, rows, cols], True where the element is kept.

    part_axis: of which the seed of a part of a batch says where it begins, 0 (planes) or 1 (rows).
    """
    planes, rows, cols = shape
    key, first = _key_and_first(seed, device)
    first_plane, first_row = (first, 0) if part_axis == 0 else (0, first)
    col = torch.arange(cols, device=device)
    words = philox_4x32(
        (
            8 * (col // 64) + col % 8,
            first_row + torch.arange(rows, device=device)[:, None],
            first_plane + torch.arange(planes, device=device)[:, None, None],
            torch.tensor(KEEP, device=device),
        ),
        key,
    )
    slot = col % 64 // 8
    word = torch.stack(words)[slot // 2, ..., col]  # [cols, planes, rows]
    bits = (word >> 16 * (slot % 2)[:, None, None]) & 0xFFFF
    return (bits >= keep_threshold(p)).permute(1, 2, 0)


def keep_threshold(p: float) -> int:
    """The 16-bit threshold of dropout probability `p`: an element is dropped when its bits are below."""
    return round(p * 65536)


def drawable(p: float) -> float:
    """The nearest probability in [0, 1) that 16 bits can draw: a multiple of 2^-16, at most 1 - 2^-16."""
    return min(keep_threshold(p), 65535) / 65536


def jitter_normals(seed: int | Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normals of stream JITTER: [tokens, channels] in `dtype` (float32 or float64)."""
    tokens, channels = shape
    key, first = _key_and_first(seed, device)
    words = philox_4x32(
        (
            torch.arange(math.ceil(channels / 4), device=device),
            first + torch.arange(tokens, device=device)[:, None],
            torch.zeros((), dtype=torch.int64, device=device),
            torch.tensor(JITTER, device=device),
        ),
        key,
    )
    u = [((word >> 8) + 1).to(dtype) / 2**24 for word in words]
    normals = []
    for radius_u, angle_u in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2 * torch.log(radius_u))
        angle = 2 * math.pi * angle_u
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(-2)[:, :channels]


def jittered_tokens(seed: int | Tensor, tokens: int, prob: float, device: torch.device) -> Tensor:
    """Decisions of stream JITTER_TOKEN: bool [tokens], True where the token gets noise."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key, first = _key_and_first(seed, device)
    word, *_ = philox_4x32(
        (zero, first + torch.arange(tokens, device=device), zero, torch.tensor(JITTER_TOKEN, device=device)),
        key,
    )
    return (word >> 8) < round(prob * 2**24)


def _key_and_first(seed: int | Tensor, device: torch.device) -> tuple[tuple[Tensor, Tensor], int | Tensor]:
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    key, first = (seed, 0) if seed.ndim == 0 else seed.unbind()
    return (key & _WORD, key >> 32 & _WORD), first
