"""impl="torch": the best that stock PyTorch does. The fair baseline, the export path, the way out without kernels.

Its noise comes from torch's generator (other draws than the kernels', same law).
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .neighborhood import Size, additive_mask, has_query_without_key, queries_with_keys


def neighbor_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_size: Size,
    neighbor_size: Size | None,
    dropout_p: float,
    scale: float,
    seed: int | Tensor | None,
) -> Tensor:
    """As `reference.neighbor_masked_attention`, by `scaled_dot_product_attention` with a cached dense mask."""
    query = query.expand(key.shape[0], -1, -1, -1)
    mask = None
    if neighbor_size is not None:
        mask = additive_mask(feature_size, neighbor_size, query.device, query.dtype)
    with _seeded(seed, query.device):
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    if neighbor_size is not None and has_query_without_key(feature_size, neighbor_size):
        out = torch.where(queries_with_keys(feature_size, neighbor_size, query.device), out, 0)
    return out


def jitter_project(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    prob: float,
    seed: int | Tensor | None,
) -> Tensor:
    """As `reference.jitter_project`, with torch's generator."""
    with _seeded(seed, tokens.device):
        noise = torch.randn_like(tokens)
        if prob < 1:
            noise = noise * (torch.rand_like(tokens[..., :1]) < prob)
    deviation = scale / tokens.shape[-1] * torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return F.linear(torch.addcmul(tokens, noise, deviation), weight, bias)


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    eps: float,
    seed: int | Tensor | None,
) -> Tensor:
    """As `reference.dropout_add_norm`, with torch's generator."""
    total = residual + dropout(x, dropout_p, False, seed)
    # Autocast would widen, and its result be narrowed again.
    known = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext():
        return F.layer_norm(total, (x.shape[-1],), weight.to(total.dtype), bias.to(total.dtype), eps)


def dropout(x: Tensor, dropout_p: float, relu: bool, seed: int | Tensor | None) -> Tensor:
    """As `reference.dropout`, with torch's generator."""
    with _seeded(seed, x.device):
        return F.dropout(x.relu() if relu else x, dropout_p)


@contextlib.contextmanager
def _seeded(seed: int | Tensor | None, device: torch.device) -> Iterator[None]:
    """Torch's generators as `seed` sets them, put back afterwards; with None, as they are."""
    if seed is None or device.type == "meta":  # on which nothing is drawn
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_forkable(device)):
        torch.manual_seed(int(seed))
        yield


def _forkable(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
