"""Our attention inside somebody else's model: replace_attention, restore_attention, fast_attention."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import Projections
from ..ops.dispatch import check_impl
from ..ops.geometry import Size, Window, size_pair
from ..ops.neighbor_masked_attention import neighbor_masked_attention
from ..ops.noise import draw_seed
from .generated_masks import CachedMask, generates_masks
from .identify_mask import MaskMemory, Other
from .lazy_attention_weights import LazyWeights, attention_weights
from .replacement_report import ReplacementReport, Row


@dataclass
class _Settings:
    """What a replaced module has besides its parameters. All modules of a model share `memory`."""

    window: Window | None  # the only one to serve, or None for any; its feature_size alone may be given
    impl: str | None
    strict: bool
    memory: MaskMemory
    served: list[Window] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def leave(self, why: str) -> None:
        """Note, and say once, that a call takes the module's own path; under `strict`, ValueError."""
        if self.strict:
            raise ValueError(f"replace_attention(strict=True): {why}")
        if why not in self.left:
            self.left.append(why)
            warnings.warn(f"uniad_fast leaves attention calls to nn.MultiheadAttention: {why}", stacklevel=6)


class ReplacedAttention(nn.MultiheadAttention, Projections):  # type: ignore[misc]
    """An `nn.MultiheadAttention` whose neighbourhood masks are served by our op.

    `replace_attention` gives this class to modules that exist: their parameters, hooks and references stay.
    """

    uniad_fast: _Settings

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Any]:
        """As `nn.MultiheadAttention.forward`; the weights, where asked for, are computed if they are used."""
        window = self._window(query, key, value, key_padding_mask, attn_mask, is_causal)
        if isinstance(window, Other):
            self.uniad_fast.leave(window.why)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if window not in self.uniad_fast.served:
            self.uniad_fast.served.append(window)
        # One tensor stays one tensor, so that what is projected together is still seen.
        turned = {id(tensor): self._batch_first(tensor) for tensor in (query, key, value)}
        q, k, v = (turned[id(tensor)] for tensor in (query, key, value))
        out, weights = self._serve(q, k, v, window, need_weights, average_attn_weights, query.ndim == 2)
        if query.ndim == 2:
            return out[0], weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        _keep_out_of_graphs()
        super().__setstate__(state)

    def _batch_first(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor[None]
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Window | Other:
        """What the call's mask hides, or why the call can't be served."""
        if query.is_nested or key.is_nested or value.is_nested:
            return Other("a nested tensor is passed")
        if key_padding_mask is not None:
            return Other("a key_padding_mask is passed")
        if is_causal:
            return Other("is_causal is set")
        if query.shape != key.shape or key.shape != value.shape or query.ndim not in (2, 3):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
            return Other(f"query, key and value are not of one shape: {shapes}")
        tokens = query.shape[1 if self.batch_first and query.ndim == 3 else 0]
        if mask is None:
            return Window(1, tokens, -1, -1)
        if mask.shape != (tokens, tokens):
            return Other(f"the mask is {tuple(mask.shape)}, not [{tokens}, {tokens}]")
        only = self.uniad_fast.window
        found = self.uniad_fast.memory.identify(mask, only.feature_size if only else None)
        if isinstance(found, Window) and only and only.neighbor_size and found.reach != only.reach:
            return Other(f"the mask is that of {found}, not of {only}, which was asked for")
        return found

    def _serve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window,
        need_weights: bool,
        average: bool,
        unbatched: bool,
    ) -> tuple[Tensor, Any]:
        settings, dropout_p = self.uniad_fast, self.dropout_p
        q, k, v = self.project_all(query, key, value, settings.impl)
        seed = draw_seed(query.device) if dropout_p > 0 else None
        out = neighbor_masked_attention(
            q, k, v, window.feature_size, window.neighbor_size, dropout_p=dropout_p, seed=seed, impl=settings.impl
        )

        def compute() -> Tensor:
            settings.leave("the attention weights are used, so N x N of them are computed after all")
            weights = attention_weights(q, k, window, dropout_p, seed, average)
            return weights[0] if unbatched else weights

        return self.merge_heads(out, settings.impl), LazyWeights(compute) if need_weights else None


def _keep_out_of_graphs() -> None:
    """Which mask it is must be asked of the tensor itself, outside of compiled graphs: those end at each call.

    Not a decorator, which would import the whole compiler with this package.
    """
    if not hasattr(ReplacedAttention.forward, "_torchdynamo_disable"):
        ReplacedAttention.forward = torch.compiler.disable(ReplacedAttention.forward)  # type: ignore[method-assign]


def replace_attention(
    model: nn.Module,
    *,
    feature_size: Size | None = None,
    neighbor_size: Size | None = None,
    impl: str | None = None,
    strict: bool = False,
) -> ReplacementReport:
    """Serve every `nn.MultiheadAttention` of a model by our op, wherever a call's mask is a 2D neighbourhood's.

    The modules stay the objects they are: parameters, state-dict names, optimisers' references, hooks. What a call does
    is decided by its mask: none, or one of {0, -inf} or bool that hides exactly a neighbourhood, is served; any other
    takes the module's own path, with one warning that says why. A mask is looked at once, and remembered.
    `generate_mask(feature_size, neighbor_size)` methods, where their masks are of that kind, build each mask once.

    Args:
        model: changed in place.
        feature_size: (height, width) of the only grid to serve; None tries every grid of a mask's N tokens.
        neighbor_size: the only window to serve (needs `feature_size`); None serves any.
        impl: implementation of the op, see `uniad_fast.ops.neighbor_masked_attention`.
        strict: raise ValueError wherever something would be left alone.

    Returns:
        What is replaced, what is left alone, and why; prints as a table.

    Raises:
        ValueError: an argument is out of range; or under `strict`, a module can't be replaced.
    """
    check_impl(impl)
    if feature_size is not None:
        feature_size = size_pair("feature_size", feature_size)
    if neighbor_size is not None:
        neighbor_size = size_pair("neighbor_size", neighbor_size)
        if feature_size is None:
            raise ValueError(f"neighbor_size {neighbor_size} is of no use without a feature_size")
    _keep_out_of_graphs()
    only = None if feature_size is None else Window.of(feature_size, neighbor_size)
    memory = MaskMemory()
    rows = _rows(model)
    if strict and any(row.why_not for row in rows):
        listed = "; ".join(f"{row.path}: {row.why_not}" for row in rows if row.why_not)
        raise ValueError(f"replace_attention(strict=True): can't replace {listed}")
    for row in rows:
        if row.why_not is None:
            module: Any = row.module
            module.uniad_fast = _Settings(only, impl, strict, memory)
            module.__class__ = ReplacedAttention
    for layer in model.modules():
        # Its fast path in evaluation never calls the attention, unless something in it has a hook.
        attention = layer.self_attn if isinstance(layer, nn.TransformerEncoderLayer) else None
        if type(attention) is ReplacedAttention and _do_nothing not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_do_nothing)
    cached = []
    for path, module in model.named_modules():
        if generates_masks(module):
            module.__dict__["generate_mask"] = CachedMask(module)
            cached.append(path)
    return ReplacementReport(rows, cached)


def _rows(model: nn.Module) -> list[Row]:
    return [
        Row(path, module, _why_not(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]


def restore_attention(model: nn.Module) -> None:
    """Undo `replace_attention`: every module as it was."""
    for module in model.modules():
        if type(module) is ReplacedAttention:
            for number, hook in list(module._forward_pre_hooks.items()):
                if hook is _do_nothing:
                    del module._forward_pre_hooks[number]
            del module.uniad_fast
            setattr(module, "__class__", nn.MultiheadAttention)  # noqa: B010, mypy would take it for a mistake
        if isinstance(module.__dict__.get("generate_mask"), CachedMask):
            del module.__dict__["generate_mask"]


@contextlib.contextmanager
def fast_attention(model: nn.Module, **options: Any) -> Iterator[ReplacementReport]:
    """`replace_attention(model, **options)` inside a with block, `restore_attention` after it."""
    report = replace_attention(model, **options)
    try:
        yield report
    finally:
        restore_attention(model)


def _do_nothing(_module: nn.Module, _args: tuple) -> None:
    """A hook that makes torch's encoder layers call their attention. A function of this file, so that it pickles."""


def _why_not(module: nn.MultiheadAttention) -> str | None:
    if type(module) not in (nn.MultiheadAttention, ReplacedAttention):
        return f"it is a {type(module).__name__}, with a way of its own"
    if module.bias_k is not None:
        return "it has add_bias_kv"
    if module.add_zero_attn:
        return "it has add_zero_attn"
    if not module._qkv_same_embed_dim:
        return f"it has kdim {module.kdim} and vdim {module.vdim}, not embed_dim {module.embed_dim}"
    return None
