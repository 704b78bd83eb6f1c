"""NeighborMaskedAttention: nn.MultiheadAttention with a dense mask, call by call."""

import copy

import pytest
import torch
from torch import nn

from uniad_fast import NeighborMaskedAttention
from uniad_fast.ops.geometry import Window, hidden_keys

GRID, WINDOW, TOKENS = (4, 6), (3, 3), 24


def pair(window=WINDOW, **options):
    ours = NeighborMaskedAttention(16, 4, GRID, window, **options)
    options.pop("impl", None)
    theirs = nn.MultiheadAttention(16, 4, **options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("batch_first", [False, True], ids=["token_first", "batch_first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("same", ["all", "key_value", "query_key", "none"])
@pytest.mark.parametrize("window", [WINDOW, None], ids=str)
def test_same_numbers_and_gradients(batch_first, bias, same, window):
    ours, theirs = pair(window, bias=bias, batch_first=batch_first)
    tensors = [torch.randn((3, TOKENS, 16) if batch_first else (TOKENS, 3, 16), requires_grad=True) for _ in range(3)]
    query, key, value = tensors
    key = query if same in ("all", "query_key") else key
    value = key if same in ("all", "key_value") else value
    mask = None if window is None else hidden_keys(Window.of(GRID, window), torch.device("cpu"))

    def run(module, **options):
        out, weights = module(query, key, value, **options)
        leaves = [*tensors, *(p for _, p in sorted(module.named_parameters()))]
        return out, weights, torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)

    out, weights, gradients = run(ours)
    expected, _, expected_gradients = run(theirs, attn_mask=mask)
    assert weights is None
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_unbatched_and_broadcast_query():
    ours, theirs = pair()
    mask = hidden_keys(Window.of(GRID, WINDOW), torch.device("cpu"))
    query, memory = torch.randn(TOKENS, 16), torch.randn(TOKENS, 3, 16)
    torch.testing.assert_close(ours(query, query, query)[0], theirs(query, query, query, attn_mask=mask)[0])
    one = ours(query[:, None], memory, memory)[0]
    torch.testing.assert_close(one, ours(query[:, None].expand(-1, 3, -1), memory, memory)[0])


def test_initial_values_are_those_of_nn_multihead_attention():
    torch.manual_seed(3)
    ours = NeighborMaskedAttention(64, 4, GRID, WINDOW)
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert ours.in_proj_weight.abs().max() <= bound and ours.in_proj_weight.std() > 0.5 * bound
    assert (ours.in_proj_bias == 0).all() and (ours.out_proj.bias == 0).all()


def test_dropout_in_training_only():
    ours, _ = pair(dropout=0.5)
    tokens = torch.randn(TOKENS, 2, 16)
    assert not torch.equal(ours(tokens, tokens, tokens)[0], ours(tokens, tokens, tokens)[0])
    ours.eval()
    assert torch.equal(ours(tokens, tokens, tokens)[0], ours(tokens, tokens, tokens)[0])


def test_it_copies_and_shows_itself():
    ours, _ = pair(impl="reference")
    assert "neighbor_size=(3, 3)" in repr(copy.deepcopy(ours)) and "impl='reference'" in repr(ours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 3, GRID, WINDOW), "16 and 3"),
        ((16, 4, (4, 0), WINDOW), r"\(4, 0\)"),
        ((16, 4, GRID, (5, 7)), r"neighbor_size \(5, 7\) covers the whole grid \(4, 6\)"),
        ((16, 4, GRID, WINDOW, 1.0), "1.0"),
    ],
)
def test_bad_construction_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborMaskedAttention(*arguments)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(TOKENS, 2, 16)] * 3, dict(attn_mask=torch.zeros(TOKENS, TOKENS)), "built in"),
        ([(TOKENS, 2, 16)] * 3, dict(key_padding_mask=torch.zeros(2, TOKENS)), "built in"),
        ([(TOKENS, 2, 8)] * 3, {}, r"\(24, 2, 8\)"),
        ([(TOKENS, 2, 16), (20, 2, 16), (20, 2, 16)], {}, "24 tokens"),
        ([(TOKENS, 2, 16), (TOKENS, 16), (TOKENS, 16)], {}, r"\(24, 2, 16\)"),
    ],
)
def test_bad_calls_are_named(shapes, options, message):
    module = NeighborMaskedAttention(16, 4, GRID, WINDOW)
    with pytest.raises(ValueError, match=message):
        module(*(torch.zeros(shape) for shape in shapes), **options)
