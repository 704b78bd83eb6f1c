"""A network as a recipe begins with it."""

from torch import nn

from ..models.architecture import PAPER_ARCHITECTURE, Architecture
from ..models.layers import DecoderLayer
from ..models.uniad import UniAD
from .recipes import Recipe

Size = tuple[int, int]


def build_model(
    channels: int,
    stride: int,
    feature_size: Size,
    recipe: Recipe,
    impl: str | None = None,
    architecture: Architecture = PAPER_ARCHITECTURE,
) -> UniAD:
    """The network for a feature map, with the recipe's dropout, jitter and initial queries."""
    model = UniAD(
        inplanes=[channels],
        instrides=[stride],
        feature_size=feature_size,
        feature_jitter={"scale": recipe.jitter_scale, "prob": recipe.jitter_prob},
        save_recon=None,
        initializer={"method": "xavier_uniform"},
        dropout=recipe.dropout,
        impl=impl,
        **architecture.kwargs(feature_size),
    )
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            nn.init.normal_(module.learned_embed.weight, std=recipe.query_std)
    if recipe.zero_blocks:
        zero_blocks(model)
    return model


def zero_blocks(model: UniAD) -> None:
    """Let every attention and FFN give zero, whose biases are zero already: layers are their residual connections."""
    for name, parameter in model.transformer.named_parameters():
        if name.endswith(("out_proj.weight", "linear2.weight")):
            nn.init.zeros_(parameter)
