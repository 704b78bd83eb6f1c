"""Attention by everybody: the public way, stock PyTorch by each of its backends, FlexAttention, and ours."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.tools.cases import AttentionCase
from uniad_fast import neighbor_masked_attention
from uniad_fast.ops.geometry import Window, hidden_keys
from uniad_fast.testing import PublicUniAD

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

CACHED, FLEX = "public, mask cached", "flex"
SDPA = {
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
ONLY_ON_A_GPU = (CACHED, *SDPA, FLEX)
WITHOUT_GRAPH = ("public",)
"""Its mask is made on the CPU in each call, which a CUDA graph can't capture."""
_ALIGNED = 8  # elements: a mask's rows begin on 16 bytes, as the efficient backend wants them


def names(device: torch.device) -> list[str]:
    """Everybody who is worth timing there.

    The reference is the definition, written to be read, and Triton's interpreter is for tests: their time says nothing.
    """
    if device.type == "cuda":
        return ["public", "torch", *ONLY_ON_A_GPU, "triton"]
    return ["public", "torch", "cpu"]


def why_not(name: str, dtype: torch.dtype, dropout_p: float) -> str:
    """What it can't do by its own documentation, "" where nothing is known against it."""
    if name == FLEX and dropout_p:
        return "FlexAttention has no dropout"
    if name == "sdpa cudnn" and dtype == torch.float32:
        return "cuDNN's attention takes 16-bit floats only"
    return ""


def attention(name: str, case: AttentionCase, dropout_p: float, device: torch.device, dtype: torch.dtype) -> Attention:
    """A function of (query, key, value), each [B, H, N, D] on that device, in that dtype."""
    window = Window.of(case.feature_size, case.neighbor_size)
    if name in ("public", CACHED):
        return _public(case, dropout_p, device, dtype, cached=name == CACHED)
    if name in SDPA:
        return _backend(SDPA[name], padded_mask(window, device, dtype), dropout_p)
    if name == FLEX:
        return _flex(window, device)
    return lambda query, key, value: neighbor_masked_attention(
        query, key, value, case.feature_size, case.neighbor_size, dropout_p=dropout_p, impl=name
    )


def inputs(case: AttentionCase, device: torch.device, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """query, key, value [B, H, N, D], always the same."""
    torch.manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_(grad) for _ in range(3)]


def padded_mask(window: Window, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[N, N], 0 where a key is seen and -inf where hidden, as a view of rows that begin on 16 bytes."""
    columns = -(-window.tokens // _ALIGNED) * _ALIGNED
    mask = torch.zeros(window.tokens, columns, device=device, dtype=dtype)[:, : window.tokens]
    return mask.masked_fill_(hidden_keys(window, device), float("-inf"))


def mask_mod(window: Window) -> MaskMod:
    """FlexAttention's question about this window: does the query see the key?"""
    _, width, radius_row, radius_col = window

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, cols = query // width - key // width, query % width - key % width
        return (rows.abs() > radius_row) | (cols.abs() > radius_col)

    return seen


def _public(case: AttentionCase, dropout_p: float, device: torch.device, dtype: torch.dtype, cached: bool) -> Attention:
    """What `nn.MultiheadAttention` does by default: the weights are kept, and averaged over the heads."""
    masks = PublicUniAD(1, 1, case.feature_size, case.neighbor_size, hidden_dim=2, nhead=1, layers=0)

    def make() -> Tensor:
        return masks.generate_mask(case.feature_size, case.neighbor_size).to(device, dtype)

    kept = make() if cached else None

    def public(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = make() if kept is None else kept
        scores = torch.baddbmm(mask, query.flatten(0, 1) * query.shape[-1] ** -0.5, key.flatten(0, 1).transpose(1, 2))
        weights = F.dropout(scores.softmax(dim=-1), dropout_p)
        out = torch.bmm(weights, value.flatten(0, 1)).view_as(query)
        weights.view(*query.shape[:2], *weights.shape[1:]).mean(dim=1)
        return out

    return public


def _backend(backend: SDPBackend, mask: Tensor, dropout_p: float) -> Attention:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p)

    return run


def _flex(window: Window, device: torch.device) -> Attention:
    """Compiled on a GPU; uncompiled elsewhere, which is right and slow."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask_mod(window), None, None, window.tokens, window.tokens, device=device.type)
    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return lambda query, key, value: run(query, key, value, block_mask=blocks)
