"""replace_attention on models of others: same numbers, same objects, and what is not ours is left alone."""

import copy
import io
import pickle
import warnings
from unittest import mock

import pytest
import torch
import zoo
from torch import nn

from uniad_fast import fast_attention, replace_attention, restore_attention
from uniad_fast.ops.geometry import Window, hidden_keys

MODELS = {
    "encoder_decoder": (lambda p: zoo.EncoderDecoder(dropout=p), (35, 2, 32), 6, 0),
    "flags": (lambda p: zoo.EncoderDecoder((True, False, True), dropout=p), (35, 2, 32), 6, 0),
    "wrapped": (lambda p: zoo.Wrapped(zoo.EncoderDecoder(dropout=p)), (35, 2, 32), 6, 0),
    "shared": (lambda p: zoo.SharedAttention(p), (35, 2, 32), 1, 0),
    "bool": (lambda p: zoo.BoolMasks(p), (35, 2, 256), 2, 0),
    "batch_first": (lambda p: zoo.BatchFirst(p), (2, 35, 32), 2, 1),
    "three_heads": (lambda p: zoo.ThreeHeads(p), (400, 1, 96), 1, 0),
    "prompts": (lambda p: zoo.Prompts(p), (35, 2, 32), 3, 1),
}
CASES = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def no_gpu_needed():
    """The originals say .cuda(), which here is where they are."""
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
        yield


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def run(model, tokens, weight):
    tokens = tokens.clone().requires_grad_()
    out = quietly(model, tokens)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((out * weight).sum(), [tokens, *parameters], allow_unused=True)
    return {"out": out, **dict(zip(("tokens", *names), gradients, strict=True))}


@CASES
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_outputs_and_gradients_agree(name, training):
    make, shape, replaced, left_calls = MODELS[name]
    model, tokens = make(0.0).train(training), torch.randn(shape)
    weight = torch.randn_like(quietly(model, tokens))
    before = run(model, tokens, weight)
    report = replace_attention(model)
    after = run(model, tokens, weight)
    assert len(report.replaced) == replaced and not report.left_alone
    for key, value in before.items():
        if value is None:
            assert after[key] is None, key
        else:
            torch.testing.assert_close(after[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert sum(len(row.module.uniad_fast.left) for row in report.rows) == left_calls, str(report)


@CASES
def test_restore_gives_back_the_objects(name):
    make, shape, *_ = MODELS[name]
    model = make(0.1)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    classes, states = [type(m) for _, m in modules], [set(m.__dict__) for _, m in modules]
    calls = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for _, m in modules if "attn" in _]
    state = copy.deepcopy(model.state_dict())
    replace_attention(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    model.load_state_dict(state)
    quietly(model, torch.randn(shape))
    assert bool(calls) == bool(handles)
    restore_attention(model)
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert [type(m) for m in model.modules()] == classes and [set(m.__dict__) for m in model.modules()] == states


@CASES
def test_dropout_in_training_and_none_in_eval(name):
    make, shape, *_ = MODELS[name]
    model, tokens = make(0.3), torch.randn(shape)
    replace_attention(model)
    outs = [quietly(model, tokens) for _ in range(2)]
    assert not torch.equal(*outs)
    model.eval()
    assert torch.equal(quietly(model, tokens), quietly(model, tokens))


CALLS = {
    "key_padding_mask": dict(key_padding_mask=torch.zeros(2, 20, dtype=torch.bool)),
    "is not|no neighbourhood": dict(attn_mask=torch.triu(torch.ones(20, 20, dtype=torch.bool), diagonal=1)),
    r"the mask is \(4, 20, 20\)": dict(attn_mask=torch.zeros(4, 20, 20)),
}


@pytest.mark.parametrize("message", CALLS)
def test_other_calls_take_the_old_path_and_say_so_once(message):
    attention = nn.MultiheadAttention(16, 2, dropout=0.0)
    tokens = torch.randn(20, 2, 16)
    expected, weights = attention(tokens, tokens, tokens, **CALLS[message])
    report = replace_attention(attention)
    with pytest.warns(UserWarning, match=message) as caught:
        for _ in range(3):
            out, again = attention(tokens, tokens, tokens, **CALLS[message])
    assert len(caught) == 1 and "left alone" in str(report)
    torch.testing.assert_close((out, again), (expected, weights))
    replace_attention(attention, strict=True)
    with pytest.raises(ValueError, match=message):
        attention(tokens, tokens, tokens, **CALLS[message])


@pytest.mark.parametrize("average", [True, False])
def test_weights_that_are_used_are_computed(average):
    attention = nn.MultiheadAttention(16, 2)
    mask, tokens = zoo.neighbor_mask(4, 5, 3, 3), torch.randn(20, 2, 16)
    attention.eval()
    _, expected = attention(tokens, tokens, tokens, attn_mask=mask, average_attn_weights=average)
    replace_attention(attention)
    _, weights = attention(tokens, tokens, tokens, attn_mask=mask, average_attn_weights=average)
    with pytest.warns(UserWarning, match="attention weights are used"):
        torch.testing.assert_close(weights * 1, expected)
    assert weights.shape == expected.shape and torch.equal(torch.stack([weights])[0], weights.tensor())
    assert attention(tokens, tokens, tokens, attn_mask=mask, need_weights=False)[1] is None
    replace_attention(attention, strict=True)
    _, weights = attention(tokens, tokens, tokens, attn_mask=mask)
    with pytest.raises(ValueError, match="attention weights are used"):
        weights.sum()


def test_used_weights_are_those_of_the_output():
    """In training too: the same are dropped."""
    attention = nn.MultiheadAttention(16, 2, dropout=0.5, bias=False)
    with torch.no_grad():
        attention.in_proj_weight[32:].copy_(torch.eye(16))
        attention.out_proj.weight.copy_(torch.eye(16))
    tokens = torch.randn(20, 1, 16)
    replace_attention(attention)
    out, weights = attention(
        tokens, tokens, tokens, attn_mask=zoo.neighbor_mask(4, 5, 3, 3), average_attn_weights=False
    )
    heads = quietly(lambda: weights.tensor())[0] @ tokens[:, 0].unflatten(-1, (2, 8)).transpose(0, 1)
    torch.testing.assert_close(out[:, 0], heads.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-5)


def test_a_window_that_is_asked_for_is_the_only_one():
    attention = nn.MultiheadAttention(16, 2)
    tokens = torch.randn(20, 1, 16)
    replace_attention(attention, feature_size=(4, 5), neighbor_size=(2, 3), strict=True)
    attention(tokens, tokens, tokens, attn_mask=zoo.neighbor_mask(4, 5, 3, 3))
    for mask in (zoo.neighbor_mask(4, 5, 1, 3), zoo.neighbor_mask(5, 4, 3, 3)):
        with pytest.raises(ValueError, match="which was asked for|on the grid 4x5"):
            attention(tokens, tokens, tokens, attn_mask=mask)
    with pytest.raises(ValueError, match="of no use without a feature_size"):
        replace_attention(attention, neighbor_size=(3, 3))


def test_unbatched_input():
    attention, mask, tokens = nn.MultiheadAttention(16, 2).eval(), zoo.neighbor_mask(4, 5, 3, 3), torch.randn(20, 16)
    expected = attention(tokens, tokens, tokens, attn_mask=mask)
    replace_attention(attention)
    out, weights = attention(tokens, tokens, tokens, attn_mask=mask)
    torch.testing.assert_close((out, quietly(lambda: weights.tensor())), expected)


def test_the_context_manager_gives_back():
    model = zoo.ThreeHeads()
    with pytest.raises(RuntimeError), fast_attention(model) as report:
        assert report.replaced == ["attn"] and type(model.attn) is not nn.MultiheadAttention
        raise RuntimeError
    assert type(model.attn) is nn.MultiheadAttention and "generate_mask" not in model.__dict__


def test_copies_and_pickles_of_replaced_models():
    model, tokens = zoo.EncoderDecoder(dropout=0.0), torch.randn(35, 2, 32)
    replace_attention(model)
    expected = model(tokens)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in others:
        assert torch.equal(other(tokens), expected)
        assert other.__dict__["generate_mask"]._owner is other
    restore_attention(model)
    assert torch.equal(others[0](tokens), expected)


def test_compiled_models():
    model, tokens = zoo.BoolMasks(dropout=0.0), torch.randn(35, 2, 256)
    expected = model(tokens)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(tokens), expected)
    replace_attention(compiled)
    torch.testing.assert_close(compiled(tokens), expected, rtol=1e-4, atol=1e-5)
    assert model.self_attn.uniad_fast.served == [Window(5, 7, 1, 2)]


def test_an_optimiser_from_before_still_trains_it():
    model, tokens = zoo.ThreeHeads(), torch.randn(400, 1, 96)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_attention(model)
    before = model.attn.in_proj_weight.clone()
    model(tokens).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.attn.in_proj_weight)


@pytest.mark.parametrize("replaced_first", [True, False], ids=["replaced, then wrapped", "wrapped, then replaced"])
def test_distributed_training(tmp_path, replaced_first):
    """Under torch's own DistributedDataParallel every gradient is reduced once, and is what it was without."""
    tokens = torch.randn(35, 2, 32)
    alone = zoo.EncoderDecoder(dropout=0.0)
    expected = run(alone, tokens, torch.ones_like(tokens))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = copy.deepcopy(alone)
        if replaced_first:
            replace_attention(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if not replaced_first:
            assert len(replace_attention(wrapped).rows) == 6
        for _ in range(2):  # the second pass fails if the first left a gradient unreduced
            wrapped.zero_grad()
            quietly(wrapped, tokens).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_an_encoder_layers_fast_path_is_kept_off_the_attention():
    """In evaluation torch's layer computes its attention by itself, and the replaced one was never asked."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 12, 16)
    mask = torch.zeros(12, 12).masked_fill(hidden_keys(Window(3, 4, 0, 0), torch.device("cpu")), float("-inf"))
    with torch.no_grad():
        expected = model(x, mask=mask)
        report = replace_attention(model)
        assert str(report).count("replaced    not called yet") == 2
        torch.testing.assert_close(model(x, mask=mask), expected)
    assert str(report).count("replaced    3x4, 1x1 hidden") == 2
    again = pickle.loads(pickle.dumps(model))
    for each in (model, again):
        restore_attention(each)
        assert not any(module._forward_pre_hooks for module in each.modules())
    assert "restored" in str(report)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:uniad_fast leaves")
def test_nested_tensors_are_left_to_torch():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(7, 16)])
    with torch.no_grad():
        expected = attention(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0)
        report = replace_attention(attention)
        torch.testing.assert_close(
            attention(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0), expected
        )
    assert "left alone  a nested tensor is passed" in str(report)
