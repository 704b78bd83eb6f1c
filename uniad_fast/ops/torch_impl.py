"""impl="torch": the best that stock PyTorch does. The fair baseline, the export path, the way out without kernels.

Its noise comes from torch's generator (other draws than the kernels', same law).
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Window, additive_mask, queries_with_keys


def neighbor_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, dropout_p: float, scale: float,
    seed: int | Tensor | None,
) -> Tensor:  # fmt: skip
    """As `reference.neighbor_masked_attention`, by `scaled_dot_product_attention` with a cached dense mask."""
    query = query.expand(key.shape[0], -1, -1, -1)
    mask = None
    if window.neighbor_size is not None:
        mask = additive_mask(window, query.device, query.dtype)
    with _seeded(seed if dropout_p > 0 else None, query.device):
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    if window.leaves_a_query_without_key:
        out = torch.where(queries_with_keys(window, query.device), out, 0)
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
    with contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(total, (x.shape[-1],), weight.to(total.dtype), bias.to(total.dtype), eps)


def dropout(x: Tensor, dropout_p: float, relu: bool, seed: int | Tensor | None) -> Tensor:
    """As `reference.dropout`, with torch's generator."""
    with _seeded(seed, x.device):
        return F.dropout(x.relu() if relu else x, dropout_p)


def _seeded(seed: int | Tensor | None, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Torch's generators as `seed` sets them, put back afterwards; with None, as they are."""
    # Nothing is drawn on the meta device; and dynamo takes a generator's context into no graph before torch 2.7.
    return contextlib.nullcontext() if seed is None or device.type == "meta" else _generator_seeded(seed, device)


@contextlib.contextmanager
def _generator_seeded(seed: int | Tensor, device: torch.device) -> Iterator[None]:
    if _is_recorded():
        raise ValueError(
            "impl='torch' seeds torch's generator, which no tracer records: pass seed=None, or another impl, which "
            "draws from the seed itself"
        )
    # The device's own generator alone: torch.manual_seed would restart those of all devices.
    generator = _generator(device)
    state = generator.get_state()
    try:
        generator.manual_seed(int(seed) if isinstance(seed, int) else int(seed.sum()))  # of a part: key + first
        yield
    finally:
        generator.set_state(state)


def _is_recorded() -> bool:
    """Whether a tracer writes down the operators of this call, of which seeding a generator is none."""
    if torch.compiler.is_compiling():
        return False  # dynamo ends its graph there
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() == 0:
        return torch._C._get_tracing_state() is not None
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def _generator(device: torch.device) -> torch.Generator:
    """The one that torch's functions draw from on this device."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]
