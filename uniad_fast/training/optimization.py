"""What a recipe's words mean in torch: its loss, its optimisers, its schedule."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from .recipes import Recipe

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}


def loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """(reconstruction, feature) -> scalar."""
    if recipe.loss not in _LOSSES:
        raise UniadFastError(f"loss must be one of {', '.join(_LOSSES)}, got {recipe.loss!r}")
    return _LOSSES[recipe.loss]


def check_optimizer(recipe: Recipe) -> None:
    """UniadFastError for an optimizer that there is not, or not in this torch."""
    if recipe.optimizer not in ("adamw", "muon"):
        raise UniadFastError(f"optimizer must be 'adamw' or 'muon', got {recipe.optimizer!r}")
    if recipe.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UniadFastError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}")


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Those that a step steps, each with parameters of its own; raises as `check_optimizer` does."""
    check_optimizer(recipe)
    rate, decay = recipe.learning_rate, recipe.weight_decay

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)

    parameters = dict(model.named_parameters())
    if recipe.optimizer == "adamw":
        return [adamw(list(parameters.values()))]
    # Muon is meant for matrices between hidden layers: not for embeddings, nor for the first layer and the last.
    outer = ("input_proj", "output_proj")
    hidden = {n for n, p in parameters.items() if p.ndim == 2 and "embed" not in n and not n.startswith(outer)}
    rest = adamw([p for n, p in parameters.items() if n not in hidden])
    if not hidden:  # a CNN's
        return [rest]
    matrices = [parameters[n] for n in parameters if n in hidden]
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), rest]


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule over `total` steps."""
    schedulers = torch.optim.lr_scheduler
    if recipe.schedule == "one_cycle":
        momentum = "betas" in optimizer.defaults
        return schedulers.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=max(total, 2), pct_start=recipe.warmup, cycle_momentum=momentum
        )
    if recipe.schedule == "step":
        return schedulers.StepLR(optimizer, step_size=max(1, round(0.8 * total)), gamma=0.1)
    if recipe.schedule == "constant":
        rise = max(1, round(recipe.warmup * total))
        return schedulers.LinearLR(optimizer, start_factor=1 / rise, total_iters=rise)
    raise UniadFastError(f"schedule must be 'step', 'one_cycle' or 'constant', got {recipe.schedule!r}")
