"""The compared networks: UniAD's interface, and that each sees what its kind sees and no more."""

import pytest
import torch
from torch import nn

from uniad_fast import UniAD
from uniad_fast.studies.baselines import CNN, MLP, PlainTransformer

GRID = (5, 6)
SMALL = dict(hidden_dim=16, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=32, dropout=0.0)
NETWORKS = {
    "MLP": lambda: MLP(12, 4, GRID, hidden_dim=16),
    "CNN 1x1": lambda: CNN(12, 4, GRID, kernel_size=1, hidden_dim=16),
    "CNN 3x3": lambda: CNN(12, 4, GRID, kernel_size=3, hidden_dim=16, num_layers=3),
    "first": lambda: PlainTransformer(12, 4, GRID, query_embedding="first", **SMALL),
    "none": lambda: PlainTransformer(12, 4, GRID, query_embedding="none", **SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_reconstructs_and_learns(name):
    network = NETWORKS[name]()
    feature = torch.randn(4, 12, *GRID)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        out = network({"feature_align": feature})
        loss = nn.functional.mse_loss(out["feature_rec"], feature)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert out["feature_rec"].shape == feature.shape and out["pred"].shape == (4, 1, 20, 24)
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match=r"got \(4, 11, 5, 6\)"):
        network({"feature_align": feature[:, :11]})


def locations_changed_by_one_token(network, row=2, col=3):
    """bool [H, W]: whose reconstruction moves with the token at (row, col)."""
    network.eval()
    tokens = torch.randn(1, GRID[0] * GRID[1], 12)
    other = tokens.clone()
    other[0, row * GRID[1] + col] += 1.0
    with torch.no_grad():
        moved = (network.reconstruct(tokens) - network.reconstruct(other)).abs().amax(dim=2)
    return moved.view(GRID) > 1e-6


@pytest.mark.parametrize("name", ["MLP", "CNN 1x1"])
def test_these_see_a_token_alone(name):
    changed = locations_changed_by_one_token(NETWORKS[name]())
    assert changed.sum() == 1 and changed[2, 3]


def test_a_wider_kernel_sees_its_neighbours():
    """Three 3 x 3 convolutions reach three locations far."""
    changed = locations_changed_by_one_token(CNN(12, 4, GRID, kernel_size=3, hidden_dim=16, num_layers=3))
    rows, cols = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    assert not changed[(cols - 3).abs() > 3].any() and not changed[(rows - 2).abs() > 3].any()
    assert changed[2, 2] and changed[1, 3] and changed[2, 3]


@pytest.mark.parametrize("name", ["first", "none"])
def test_the_plain_transformer_sees_everything(name):
    assert locations_changed_by_one_token(NETWORKS[name]()).all()


def test_learned_queries_are_where_the_switch_says():
    queries = {
        which: [n for n in PlainTransformer(12, 4, GRID, which, **SMALL).state_dict() if "learned_embed" in n]
        for which in ("first", "none")
    }
    assert queries == {"first": ["transformer.decoder.learned_embed.weight"], "none": []}
    every = UniAD(12, 4, GRID, None, None, pos_embed_type="learned", save_recon=None, initializer=None, **SMALL)
    assert sum("learned_embed" in name for name in every.state_dict()) == 2
    with pytest.raises(ValueError, match="'last'"):
        PlainTransformer(12, 4, GRID, "last", **SMALL)


@pytest.mark.parametrize("which", ["first", "none"])
def test_the_plain_decoder_is_pytorchs(which):
    """Without positions, layer by layer torch's own decoder on torch's own encoder, with the same parameters."""
    network = PlainTransformer(12, 4, GRID, which, **SMALL).eval()
    for parameter in network.pos_embed.parameters():
        nn.init.zeros_(parameter)
    own = network.transformer
    options = dict(d_model=16, nhead=4, dim_feedforward=32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2, enable_nested_tensor=False).eval()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 2, norm=nn.LayerNorm(16)).eval()
    encoder.load_state_dict(own.encoder.state_dict())
    decoder.load_state_dict({n: t for n, t in own.decoder.state_dict().items() if n != "learned_embed.weight"})
    tokens = torch.randn(3, 30, 12)
    with torch.no_grad():
        memory = encoder(network.input_proj(tokens))
        query = own.decoder.learned_embed.weight.expand(3, -1, -1) if which == "first" else memory
        expected = network.output_proj(decoder(query, memory))
        torch.testing.assert_close(network.reconstruct(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [MLP, CNN])
def test_one_layer_is_linear(network):
    only = network(12, 4, GRID, num_layers=1).eval()
    a, b = torch.randn(2, 2, 30, 12)
    zero = only.reconstruct(torch.zeros(2, 30, 12))
    total = only.reconstruct(a + b) - zero
    torch.testing.assert_close(total, (only.reconstruct(a) - zero) + (only.reconstruct(b) - zero))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        network(12, 4, GRID, num_layers=0)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2"):
        CNN(12, 4, GRID, kernel_size=2)
