"""Attention by Triton's kernels, by the definition and by stock operations: for tests of the kernels."""

import torch

from uniad_fast import neighbor_masked_attention
from uniad_fast.ops import noise
from uniad_fast.ops.geometry import Window, hidden_keys
from uniad_fast.testing import assert_within_budget

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention_inputs(feature_size, batch=2, heads=2, head_dim=16, dtype=torch.float32, query_batch=None):
    tokens = feature_size[0] * feature_size[1]
    shapes = [(query_batch or batch, heads, tokens, head_dim)] + 2 * [(batch, heads, tokens, head_dim)]
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


def run(tensors, feature_size, neighbor_size, impl, p=0.0, seed=None, **options):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = neighbor_masked_attention(*tensors, feature_size, neighbor_size, dropout_p=p, seed=seed, impl=impl, **options)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, tensors, weight)]


def plain_low_precision(tensors, feature_size, neighbor_size, p, seed):
    """Attention by stock operations in the tensors' own dtype, with the reference's draws."""
    query, key, value = (t.detach().requires_grad_() for t in tensors)
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    hidden = hidden_keys(Window.of(feature_size, neighbor_size), DEVICE)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden.all(1, keepdim=True), 0)
    if p > 0:
        keep = noise.keep_mask(seed, (weights.shape[0] * weights.shape[1], *weights.shape[2:]), p, DEVICE)
        weights = weights * keep.view_as(weights) / (1 - p)
    out = weights @ value
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out, *(g.nan_to_num() for g in torch.autograd.grad(out, (query, key, value), weight))]


def assert_agree(tensors, ours, feature_size, neighbor_size, low_precision=False, **options):
    """`ours` within the budget of the reference in float64, the plain way being the reference in the same dtype.

    low_precision: the plain way is stock operations that round every intermediate; the reference computes in float32.
    """
    truth = run([t.double() for t in tensors], feature_size, neighbor_size, "reference", **options)
    if low_precision:
        plain = plain_low_precision(tensors, feature_size, neighbor_size, **options)
    else:
        plain = run(tensors, feature_size, neighbor_size, "reference", **options)
    for name, mine, true, theirs in zip(("out", "dq", "dk", "dv"), ours, truth, plain, strict=True):
        assert_within_budget(mine, true, theirs, name)
