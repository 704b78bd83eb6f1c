"""Gradients of packed projections: the same bits as joined ones, written in place where each part has one reader."""

import pytest
import torch
from uniad_fast.kernels.cpu import build

from uniad_fast import UniAD, neighbor_masked_attention
from uniad_fast.models import attention, transformer
from uniad_fast.ops import packed_heads
from uniad_fast.ops.packed_heads import GradientMemory, in_heads, views_of

GRID, HEADS, WIDTH = (3, 5), 2, 16

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no kernels here")


def attend(query, key, value, impl="cpu"):
    return neighbor_masked_attention(query, key, value, GRID, (3, 3), impl=impl)


def projected(parts=3, batch=2):
    return torch.randn(batch, GRID[0] * GRID[1], parts * WIDTH, requires_grad=True)


def joined(whole, parts):
    """The parts as autograd joins them."""
    return list(views_of(whole, parts, HEADS))


@pytest.fixture
def joins(monkeypatch):
    """Grows whenever gradients are copied together."""
    calls, join = [], packed_heads._copied_together
    monkeypatch.setattr(packed_heads, "_copied_together", lambda *a: (calls.append(1), join(*a))[1])
    return calls


def test_parts_are_views_in_heads():
    whole = projected()
    for part, plain in zip(in_heads(whole, 3, HEADS), whole.chunk(3, -1), strict=True):
        assert torch.equal(part, plain.unflatten(-1, (HEADS, -1)).transpose(1, 2))
        assert part.data_ptr() == plain.data_ptr()


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_gradients_are_those_of_parts_joined(impl, joins):
    whole = projected()
    ours, theirs = (torch.autograd.grad(attend(*split(whole), impl).sin().sum(), whole)[0]
                    for split in (lambda w: in_heads(w, 3, HEADS), lambda w: joined(w, 3)))  # fmt: skip
    assert torch.equal(ours, theirs)
    assert len(joins) == (impl == "torch")  # which knows nothing of the memory


def test_a_part_that_is_read_twice(joins):
    whole = projected()
    results = []
    for split in (lambda w: in_heads(w, 3, HEADS), lambda w: joined(w, 3)):
        query, key, value = split(whole)
        out = attend(query, key, value) + attend(query, key, value.detach()).sin() + attend(key, key, value).cos()
        results.append(torch.autograd.grad(out.sum(), whole)[0])
    torch.testing.assert_close(*results)


def test_one_pass_after_another(joins):
    whole = projected()
    parts = in_heads(whole, 3, HEADS)
    out = attend(*parts).sin().sum()
    first = torch.autograd.grad(out, whole, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(out, whole, retain_graph=True)[0]
    assert torch.equal(first, kept) and torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert not joins


def test_gradients_of_parts_alone_stay_whosever_they_are():
    """Asked for by themselves, they lie in the memory; a whole backward pass afterwards must not write there."""
    whole = projected()
    parts = in_heads(whole, 3, HEADS)
    out = attend(*parts).sin().sum()
    alone = torch.autograd.grad(out, parts[1:2], retain_graph=True)[0]
    kept = alone.clone()
    for _ in range(2):
        gradient = torch.autograd.grad(out, whole, retain_graph=True)[0]
        assert torch.equal(alone, kept)
        torch.testing.assert_close(views_of(gradient, 3, HEADS)[1], kept)


def test_a_part_that_nobody_reads():
    whole = projected()
    query, key, value, _ = in_heads(projected_of_four := torch.cat([whole, whole[..., :WIDTH]], -1), 4, HEADS)
    gradient = torch.autograd.grad(attend(query, key, value).sum(), projected_of_four)[0]
    assert not gradient[..., 3 * WIDTH :].any() and gradient[..., : 3 * WIDTH].any()


def test_a_hook_sees_and_changes_a_part(joins):
    whole = projected()
    parts = in_heads(whole, 3, HEADS)
    parts[0].register_hook(lambda gradient: 2 * gradient)
    gradient = torch.autograd.grad(attend(*parts).sin().sum(), whole)[0]
    plain = torch.autograd.grad(attend(*joined(whole, 3)).sin().sum(), whole)[0]
    assert torch.equal(gradient[..., :WIDTH], 2 * plain[..., :WIDTH])
    assert torch.equal(gradient[..., WIDTH:], plain[..., WIDTH:])


def test_a_query_for_the_whole_batch(joins):
    keys, query = projected(2, batch=3), projected(2, batch=1)
    parts, (shared, _) = in_heads(keys, 2, HEADS), in_heads(query, 2, HEADS)
    ours = torch.autograd.grad(attend(shared, *parts).sin().sum(), (query, keys))
    plain = joined(keys, 2)
    theirs = torch.autograd.grad(attend(joined(query, 2)[0], *plain).sin().sum(), (query, keys))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_gradient_that_is_differentiated_again(impl):
    """The kernels can't be, and say so; the definition can."""
    whole = projected()
    out = attend(*in_heads(whole, 3, HEADS), impl)
    (gradient,) = torch.autograd.grad(out.square().sum(), whole, create_graph=True)
    if impl == "reference":
        assert torch.autograd.grad(gradient.square().sum(), whole)[0].any()
        return
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (out.sum() + gradient.square().sum()).backward()


def test_memory_is_given_out_once():
    memory = GradientMemory(projected(), 3, HEADS)
    assert memory.take(1) is not None and memory.take(1) is None and memory.take(0) is not None


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_network_has_the_same_gradients_and_joins_none(bfloat16, joins, monkeypatch):
    torch.manual_seed(0)
    model = UniAD(
        inplanes=[12], instrides=[4], feature_size=GRID, feature_jitter=None, save_recon=None, hidden_dim=32,
        pos_embed_type="learned", neighbor_mask={"neighbor_size": (3, 3), "mask": [True] * 3}, nhead=2,
        initializer={"method": "xavier_uniform"}, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=48,
        dropout=0.1, impl="cpu",
    )  # fmt: skip
    x = torch.randn(3, 15, 12)

    def gradients():
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = model.reconstruct(x)
        return torch.autograd.grad(out.float().square().mean(), list(model.parameters()))

    ours = gradients()
    assert not joins
    for module in (attention, transformer):
        monkeypatch.setattr(module, "in_heads", lambda *a: list(views_of(*a)))
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))
