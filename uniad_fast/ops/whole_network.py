"""The CPU kernel that runs a whole network in evaluation; which networks those are is for `models.whole_network`."""

from collections.abc import Sequence

from torch import Tensor


def panel() -> int:
    """Queries that one word of a mask tells of."""
    from ..kernels.cpu import launch_reconstruct

    return launch_reconstruct.panel()


def has_pairs() -> bool:
    """Whether its linear layers multiply bfloat16, which they do by default where that is faster than float32."""
    from ..kernels.cpu import launch_reconstruct

    return launch_reconstruct.has_pairs()


def has_tiles() -> bool:
    """Whether it multiplies bfloat16 by tiles of the processor's."""
    from ..kernels.cpu import launch_reconstruct

    return launch_reconstruct.has_tiles()


def reconstruct(
    tokens: Tensor,
    position: Tensor,
    sizes: Sequence[int],
    network: Sequence[Tensor | float | None],
    in_bfloat16: bool = False,
) -> Tensor:
    """The network's output [B, N, C] of tokens [B, N, C], float32; see `kernels/cpu/launch_reconstruct.py`."""
    from ..kernels.cpu import launch_reconstruct

    return launch_reconstruct.reconstruct(tokens, position, launch_reconstruct.Sizes(*sizes), network, in_bfloat16)
