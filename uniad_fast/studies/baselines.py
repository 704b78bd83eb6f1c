"""The networks that the paper's section 3.1 compares: MLP, CNN and plain Transformer, with `UniAD`'s interface.

They learn to copy what they see, defects included. The paper gives their kinds; depth and width here are chosen so that
each has about the parameters of its neighbours, and are written down with the results.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..models.initializers import initialize
from ..models.reconstructor import Reconstructor
from ..models.uniad import UniAD


class MLP(Reconstructor):
    """Fully connected layers on each token alone, with ReLU between them.

    Args:
        inplanes, instrides, feature_size: as in `Reconstructor`.
        num_layers: of them; one alone is the linear map of the paper's analysis (section 3.1).
        hidden_dim: width between them.

    Raises:
        ValueError: `num_layers` is below 1.
    """

    def __init__(
        self,
        inplanes: Sequence[int] | int,
        instrides: Sequence[int] | int,
        feature_size: tuple[int, int],
        num_layers: int = 3,
        hidden_dim: int = 512,
    ) -> None:
        super().__init__(inplanes, instrides, feature_size)
        widths = _widths(self.inplanes, num_layers, hidden_dim)
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        initialize(self, method="xavier_uniform")

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C_org] -> their reconstruction, same shape."""
        return self.layers(tokens)


class CNN(Reconstructor):
    """Convolutions on the grid, with BatchNorm and ReLU between them.

    Args:
        inplanes, instrides, feature_size: as in `Reconstructor`.
        kernel_size: odd; 1 sees a token alone, 3 its neighbours too.
        num_layers: of them; one alone is linear.
        hidden_dim: channels between them.

    Raises:
        ValueError: `kernel_size` is even, or `num_layers` below 1.
    """

    def __init__(
        self,
        inplanes: Sequence[int] | int,
        instrides: Sequence[int] | int,
        feature_size: tuple[int, int],
        kernel_size: int = 3,
        num_layers: int = 3,
        hidden_dim: int = 256,
    ) -> None:
        super().__init__(inplanes, instrides, feature_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        layers: list[nn.Module] = []
        for inner, outer in pairwise(_widths(self.inplanes, num_layers, hidden_dim)):
            layers += [nn.Conv2d(inner, outer, kernel_size, padding=kernel_size // 2), nn.BatchNorm2d(outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2])
        initialize(self, method="xavier_uniform")

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C_org] -> their reconstruction, same shape."""
        grid = tokens.transpose(1, 2).unflatten(2, self.feature_size)
        return self.layers(grid).flatten(2).transpose(1, 2)


class PlainTransformer(UniAD):
    """The Transformer without the paper's three changes: full attention, one learned query or none, no jitter.

    Args:
        inplanes, instrides, feature_size: as in `Reconstructor`.
        query_embedding: "first", a learned query goes into the decoder's first layer; "none", the encoder's output.
        options: further arguments of `UniAD`; width, heads and layers are the paper's by default.
    """

    def __init__(
        self,
        inplanes: Sequence[int] | int,
        instrides: Sequence[int] | int,
        feature_size: tuple[int, int],
        query_embedding: str = "first",
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "hidden_dim": 256,
            "pos_embed_type": "learned",
            "save_recon": None,
            "initializer": {"method": "xavier_uniform"},
            "nhead": 8,
            "num_encoder_layers": 4,
            "num_decoder_layers": 4,
            "dim_feedforward": 1024,
        }
        super().__init__(
            inplanes, instrides, feature_size, None, None, query_embedding=query_embedding, **(defaults | options)
        )


def _widths(ends: int, num_layers: int, between: int) -> list[int]:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    return [ends, *[between] * (num_layers - 1), ends]
