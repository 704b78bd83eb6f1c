"""What the report of a replacement says."""

from unittest import mock

import pytest
import torch
from torch import nn

from uniad_fast import replace_attention


@pytest.fixture(autouse=True)
def no_gpu_needed():
    """The originals say .cuda(), which here is where they are."""
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
        yield


def test_modules_that_can_not_be_replaced_are_listed():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.MultiheadAttention(16, 2),
            "bias_kv": nn.MultiheadAttention(16, 2, add_bias_kv=True),
            "zero": nn.MultiheadAttention(16, 2, add_zero_attn=True),
            "widths": nn.MultiheadAttention(16, 2, kdim=8, vdim=12),
            "own": Own(16, 2),
        }
    )
    report = replace_attention(model)
    assert report.replaced == ["plain"] and set(report.left_alone) == {"bias_kv", "zero", "widths", "own"}
    assert "kdim 8 and vdim 12" in str(report) and "a Own" in str(report)
    with pytest.raises(ValueError, match="can't replace bias_kv"):
        replace_attention(model, strict=True)
    assert str(replace_attention(nn.Linear(2, 2))) == "no nn.MultiheadAttention in this model"


@pytest.mark.filterwarnings("ignore:uniad_fast leaves")
def test_a_report_says_when_only_some_calls_are_served():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    report = replace_attention(attention)
    x = torch.randn(2, 12, 16)
    attention(x, x, x)
    assert "replaced" in str(report)
    attention(x, x, x, key_padding_mask=torch.zeros(2, 12, dtype=torch.bool))
    assert "in part" in str(report) and "but not where a key_padding_mask is passed" in str(report)
