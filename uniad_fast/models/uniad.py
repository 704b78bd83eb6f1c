"""UniAD: reconstruct a frozen feature map, score where the reconstruction fails (paper, section 3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.geometry import Size, size_pair
from ..ops.jitter_project import jitter_project
from .initializers import initialize
from .layers import LayerOptions
from .position import position_embedding
from .reconstructor import Reconstructor
from .submodules import apply_linear, is_plain
from .training_pass import reconstruct as in_few_launches
from .transformer import Transformer
from .whole_network import reconstruct as in_one_call


class UniAD(Reconstructor):
    """The reconstruction network, drop-in for the public code's class of this name.

    B batch, C_org channels of the feature map, H x W its grid. Modules and parameters have the public names.

    Args:
        inplanes: channels of the feature map, [C_org] or C_org.
        instrides: stride of the feature map in the image, [stride] or stride; `pred` is enlarged by it.
        feature_size: (H, W).
        feature_jitter: {"scale", "prob"} (mapping or object), or None for none. In training only.
        neighbor_mask: {"neighbor_size", "mask"} (mapping or object): the hidden window, and whether it applies to
            the encoder, to the decoder's first and to its second attention; None for full attention.
        hidden_dim: width C of the transformer.
        pos_embed_type: "learned" or "sine".
        save_recon: {"save_dir"} or None, kept for the caller: see `uniad_fast.detect.reconstructions`.
        initializer: {"method", ...} as in `uniad_fast.models.initializers`; None is {"method": "normal", "std": 0.01}.
        nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, normalize_before:
            of the transformer.
        query_embedding: decoder layers with a learned query: "every" (the paper's layer-wise query decoder), "first",
            or "none". The latter two are the plain Transformer's decoder, in which a layer attends to what comes in,
            then to the encoder's output; what comes in first is the learned query, or the encoder's output.
        impl: implementation of both ops, see `uniad_fast.ops.neighbor_masked_attention`.

    Raises:
        ValueError: an argument is out of range, or the window leaves some query without a key.
    """

    def __init__(
        self,
        inplanes: Sequence[int] | int,
        instrides: Sequence[int] | int,
        feature_size: Size,
        feature_jitter: Any,
        neighbor_mask: Any,
        hidden_dim: int,
        pos_embed_type: str,
        save_recon: Any,
        initializer: Any,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
        *,
        query_embedding: str = "every",
        impl: str | None = None,
    ) -> None:
        super().__init__(inplanes, instrides, feature_size)
        self.jitter_scale, self.jitter_prob = 0.0, 0.0
        if feature_jitter:
            self.jitter_scale, self.jitter_prob = (_get(feature_jitter, name) for name in ("scale", "prob"))
        self.save_recon = save_recon
        self.impl = impl
        windows: list[Size | None] = [None, None, None]
        if neighbor_mask:
            window = size_pair("neighbor_size", _get(neighbor_mask, "neighbor_size"))
            flags = _get(neighbor_mask, "mask")
            if len(flags) != 3:
                raise ValueError(
                    f"neighbor_mask.mask must have 3 flags (encoder, decoder first, decoder second), got {flags!r}"
                )
            windows = [window if flag else None for flag in flags]

        self.pos_embed = position_embedding(pos_embed_type, self.feature_size, hidden_dim)
        self.transformer = Transformer(
            hidden_dim,
            nhead,
            self.feature_size,
            (windows[0], windows[1], windows[2]),
            (num_encoder_layers, num_decoder_layers),
            LayerOptions(dim_feedforward, dropout, activation, normalize_before),
            query_embedding,
            impl,
        )
        self.input_proj = nn.Linear(self.inplanes, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, self.inplanes)
        initialize(self, **(dict(_items(initializer)) if initializer else {}))

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C_org] -> their reconstruction, same shape; jittered first when training."""
        if (whole := in_one_call(self, tokens)) is not None:
            return whole
        if self.training and self.jitter_prob > 0:
            hidden = self._jitter_and_project(tokens)
        else:
            hidden = apply_linear(self.input_proj, tokens, self.impl)
        position = self.pos_embed()
        out = in_few_launches(self.transformer, hidden, position)
        if out is None:
            out = self.transformer(hidden, position)
        return apply_linear(self.output_proj, out, self.impl)

    def _jitter_and_project(self, tokens: Tensor) -> Tensor:
        noise: dict[str, Any] = {"scale": self.jitter_scale, "prob": self.jitter_prob, "impl": self.impl}
        if is_plain(self.input_proj, nn.Linear):
            return jitter_project(tokens, self.input_proj.weight, self.input_proj.bias, **noise)
        identity = torch.eye(self.inplanes, dtype=tokens.dtype, device=tokens.device)
        return self.input_proj(jitter_project(tokens, identity, **noise))


def _get(config: Any, name: str) -> Any:
    return config[name] if isinstance(config, Mapping) else getattr(config, name)


def _items(config: Any) -> Any:
    return config.items() if isinstance(config, Mapping) else vars(config).items()
