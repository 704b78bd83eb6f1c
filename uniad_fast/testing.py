"""What tests and benchmarks measure against: error budgets, and the public way of doing the same."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]

_ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_within_budget(ours: Tensor, truth: Tensor, plain: Tensor, name: str) -> None:
    """Error at most twice that of plain PyTorch in the same dtype, plus four roundings; everything finite.

    Four, because a result is rounded, and so are the two factors and the sum of the largest term in it; plain PyTorch
    on a small case is often exact to half of one.

    Args:
        ours: result under test, in its dtype.
        truth: the same in float64, from the same (rounded) inputs.
        plain: what stock PyTorch makes of it in that dtype.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    assert ours.isfinite().all(), f"{name}: {(~ours.isfinite()).sum()} of {ours.numel()} are not finite"
    if not ours.numel():
        return
    error = (ours.double() - truth).abs().max().item()
    theirs = (plain.double() - truth).abs().max().item()
    band = 4 * _ROUNDING[ours.dtype] * max(truth.abs().max().item(), 2.0**-14)
    assert error <= 2 * theirs + band, f"{name}: error {error:.3g}, plain PyTorch {theirs:.3g}, band {band:.3g}"


class PublicUniAD(nn.Module):
    """UniAD computed the way the public code computes it, under the same parameter names.

    Token first, `nn.MultiheadAttention` with its defaults (so the weights are materialised), the N x N mask rebuilt by
    a loop in every forward, the learned query repeated over the batch, one jitter decision a batch. Post-norm, relu,
    learned positions, all three masks: the configuration that is published.
    """

    def __init__(
        self,
        inplanes: int,
        stride: int,
        feature_size: Size,
        neighbor_size: Size,
        jitter_scale: float = 20.0,
        hidden_dim: int = 256,
        nhead: int = 8,
        layers: int = 4,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.neighbor_size = neighbor_size
        self.jitter_scale = jitter_scale
        self.stride = stride
        # Nameless containers, so that the parameters get the public names.
        self.pos_embed: Any = nn.Module()
        self.pos_embed.row_embed = nn.Embedding(feature_size[0], hidden_dim // 2)
        self.pos_embed.col_embed = nn.Embedding(feature_size[1], hidden_dim // 2)
        self.transformer: Any = nn.Module()
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            _PublicLayer(hidden_dim, nhead, dim_feedforward, dropout, None) for _ in range(layers)
        )
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList(
            _PublicLayer(hidden_dim, nhead, dim_feedforward, dropout, feature_size) for _ in range(layers)
        )
        self.transformer.decoder.norm = nn.LayerNorm(hidden_dim)
        self.input_proj = nn.Linear(inplanes, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, inplanes)

    def forward(self, input: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `UniAD.forward`."""
        feature = input["feature_align"]
        tokens = feature.flatten(2).permute(2, 0, 1)  # [N, B, C_org]
        if self.training:
            norms = tokens.norm(dim=2, keepdim=True) / tokens.shape[2]
            tokens = tokens + torch.randn_like(tokens) * norms * self.jitter_scale
        tokens = self.input_proj(tokens)
        height, width = self.feature_size
        row, col = self.pos_embed.row_embed.weight, self.pos_embed.col_embed.weight
        grid = torch.cat([col.expand(height, -1, -1), row[:, None].expand(-1, width, -1)], dim=-1).flatten(0, 1)
        position = torch.cat([grid[:, None]] * tokens.shape[1], dim=1)
        mask = self.generate_mask(self.feature_size, self.neighbor_size).to(tokens.device)
        for layer in self.transformer.encoder.layers:
            tokens = layer(tokens, None, mask, position)
        out = tokens
        for layer in self.transformer.decoder.layers:
            out = layer(out, tokens, mask, position)
        out = self.output_proj(self.transformer.decoder.norm(out))
        reconstruction = out.permute(1, 2, 0).unflatten(2, self.feature_size)
        difference = torch.sqrt(torch.sum((reconstruction - feature) ** 2, dim=1, keepdim=True))
        pred = F.interpolate(difference, scale_factor=self.stride, mode="bilinear", align_corners=True)
        return {"feature_rec": reconstruction, "feature_align": feature, "pred": pred}

    def generate_mask(self, feature_size: Size, neighbor_size: Size) -> Tensor:
        """[N, N], 0 where a key is seen and -inf where hidden, window by window."""
        height, width = feature_size
        radius_row, radius_col = (n // 2 for n in neighbor_size)
        mask = torch.zeros(height, width, height, width)
        for row in range(height):
            for col in range(width):
                rows = slice(max(row - radius_row, 0), row + radius_row + 1)
                cols = slice(max(col - radius_col, 0), col + radius_col + 1)
                mask[row, col, rows, cols] = float("-inf")
        return mask.view(height * width, height * width)


class _PublicLayer(nn.Module):
    """An encoder layer, or with a feature_size (of its learned queries) a decoder layer."""

    def __init__(
        self, hidden_dim: int, nhead: int, dim_feedforward: int, dropout: float, feature_size: Size | None
    ) -> None:
        super().__init__()
        self.is_decoder = feature_size is not None
        if feature_size is not None:
            self.learned_embed = nn.Embedding(feature_size[0] * feature_size[1], hidden_dim)
            self.multihead_attn = nn.MultiheadAttention(hidden_dim, nhead, dropout=dropout)
            self.norm3 = nn.LayerNorm(hidden_dim)
        self.self_attn = nn.MultiheadAttention(hidden_dim, nhead, dropout=dropout)
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, out: Tensor, memory: Tensor | None, mask: Tensor, position: Tensor) -> Tensor:
        if memory is None:
            attended = self.self_attn(out + position, out + position, out, attn_mask=mask)[0]
            out = self.norm1(out + self.dropout(attended))
            return self.norm2(out + self._feed_forward(out))
        query = torch.cat([self.learned_embed.weight[:, None]] * out.shape[1], dim=1)
        attended = self.self_attn(query + position, memory + position, memory, attn_mask=mask)[0]
        query = self.norm1(query + self.dropout(attended))
        attended = self.multihead_attn(query + position, out + position, out, attn_mask=mask)[0]
        query = self.norm2(query + self.dropout(attended))
        return self.norm3(query + self._feed_forward(query))

    def _feed_forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(tokens)))))
