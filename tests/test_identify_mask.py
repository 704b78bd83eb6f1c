"""Which mask is a neighbourhood's: exactly those, read once, built once."""

from unittest import mock

import pytest
import torch
import zoo
from torch import nn

from uniad_fast import replace_attention, restore_attention
from uniad_fast.interop.identify_mask import Other, identify_mask
from uniad_fast.ops.geometry import Window, hidden_keys


@pytest.fixture(autouse=True)
def no_gpu_needed():
    """The originals say .cuda(), which here is where they are."""
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
        yield


def test_the_mask_is_built_once_and_looked_at_once():
    model = zoo.EncoderDecoder()
    report = replace_attention(model)
    tokens = torch.randn(35, 2, 32)
    with mock.patch("uniad_fast.interop.identify_mask.identify_mask", wraps=identify_mask) as looks:
        outs = [model(tokens) for _ in range(3)]
    assert model.built == 1 and looks.call_count == 1 and len(outs) == 3
    assert report.cached_masks == [""]
    assert "encoder.0.self_attn" in str(report) and "5x7, 3x5 hidden" in str(report), str(report)


def test_a_mask_that_is_written_to_is_looked_at_again():
    attention = nn.MultiheadAttention(16, 2)
    mask, tokens = zoo.neighbor_mask(4, 5, 3, 3), torch.randn(20, 1, 16)
    expected = attention(tokens, tokens, tokens, attn_mask=mask)[0]
    replace_attention(attention)
    torch.testing.assert_close(attention(tokens, tokens, tokens, attn_mask=mask)[0], expected)
    mask.copy_(zoo.neighbor_mask(4, 5, 1, 5))
    with_replacement = attention(tokens, tokens, tokens, attn_mask=mask)[0]
    restore_attention(attention)
    torch.testing.assert_close(with_replacement, attention(tokens, tokens, tokens, attn_mask=mask)[0])


def test_a_caller_may_write_to_the_mask_it_was_given():
    model = zoo.ThreeHeads()
    replace_attention(model)
    model.generate_mask((20, 20), (9, 9)).zero_()
    assert torch.equal(model.generate_mask((20, 20), (9, 9)), zoo.neighbor_mask(20, 20, 9, 9))
    assert torch.equal(model.generate_mask((20, 20), (3, 3)), zoo.neighbor_mask(20, 20, 3, 3))


def test_a_generate_mask_of_another_meaning_is_left_alone():
    class Keeps(nn.Module):
        def generate_mask(self, feature_size, neighbor_size):
            return 1 - (zoo.neighbor_mask(*feature_size, *neighbor_size) != 0).float()

    model = nn.Sequential(Keeps(), nn.MultiheadAttention(16, 2))
    replace_attention(model)
    with mock.patch("uniad_fast.interop.generated_masks.identify_mask", wraps=identify_mask) as looks:
        masks = [model[0].generate_mask((4, 5), (3, 3)) for _ in range(3)]
    assert looks.call_count == 1 and masks[1] is not masks[2]
    assert all(torch.equal(mask, Keeps().generate_mask((4, 5), (3, 3))) for mask in masks)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (4, 9), (6, 6), (14, 14)])
@pytest.mark.parametrize("window", [(1, 1), (3, 5), (4, 2), (7, 7), (99, 3)])
def test_identification_is_exact(height, width, window):
    mask = zoo.neighbor_mask(height, width, *window)
    for given in (mask, mask.isinf(), mask.double()):
        found = identify_mask(given)
        assert isinstance(found, Window)
        assert torch.equal(zoo.neighbor_mask(*found.feature_size, *found.neighbor_size), mask)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        i, j = torch.randint(height * width, (2,), generator=generator).tolist()
        changed = mask.isinf()
        changed[i, j] = ~changed[i, j]
        found = identify_mask(changed)
        if isinstance(found, Window):  # on a grid so small that this is another neighbourhood's
            assert torch.equal(hidden_keys(found, changed.device), changed)
    assert isinstance(identify_mask(mask, (height, width)), Window)


def test_what_is_no_neighbourhood():
    causal = torch.triu(torch.ones(20, 20, dtype=torch.bool), diagonal=1)
    soft = zoo.neighbor_mask(4, 5, 3, 3)
    soft[2, 3] = -1e9
    nan = zoo.neighbor_mask(4, 5, 3, 3)
    nan[0, 19] = float("nan")
    for mask in (causal, soft, nan, torch.zeros(20, 20, dtype=torch.int64), torch.zeros(3, 20)):
        assert isinstance(identify_mask(mask), Other), mask
    assert isinstance(identify_mask(zoo.neighbor_mask(4, 5, 3, 3), (5, 4)), Other)
