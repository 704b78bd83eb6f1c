"""The public code's initializers: they touch Linear, Conv and BatchNorm only, biases become zero."""

from collections.abc import Callable

from torch import Tensor, nn

_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "msra_normal": lambda weight: nn.init.kaiming_normal_(weight, a=1),
    "msra_uniform": lambda weight: nn.init.kaiming_uniform_(weight, a=1),
}
_METHODS |= {"kaiming_normal": _METHODS["msra_normal"], "kaiming_uniform": _METHODS["msra_uniform"]}


def initialize(model: nn.Module, method: str = "normal", std: float = 0.01) -> None:
    """Initialise every Linear, Conv2d, ConvTranspose2d and BatchNorm2d of `model` in place.

    Args:
        method: "normal" (of deviation `std`), "xavier_normal", "xavier_uniform", "msra_normal" or "msra_uniform"
            ("kaiming" is another name for "msra").

    Raises:
        ValueError: unknown method.
    """
    methods = {"normal": lambda weight: nn.init.normal_(weight, std=std), **_METHODS}
    if method not in methods:
        raise ValueError(f"initializer method must be one of {', '.join(methods)}, got {method!r}")
    fill = methods[method]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fill(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
