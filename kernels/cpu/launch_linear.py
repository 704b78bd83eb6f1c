"""From a linear layer's tensors on a CPU to the C++ kernels for its products in float32 and bfloat16."""

import ctypes

import torch
from torch import Tensor

from ..layout import ReluDropout, contiguous, keep_threshold, noise_numbers, unit_last_stride
from .build import load

__all__ = ["has_pairs", "output", "token_gradient", "weight_gradient"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Layer(ctypes.Structure):
    """`Layer` of linear.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "ins", "outs", "token_stride", "gradient_stride")]


class _Dropout(ctypes.Structure):
    """`Dropout` of linear.cpp."""

    _fields_ = [
        ("keep_scale", ctypes.c_float),
        ("keep_threshold", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("seed", "first_row")),
    ]


def has_pairs() -> bool:
    """Whether the kernels are compiled to multiply pairs of bfloat16, which tensors of it need."""
    return bool(load().uniad_linear_has_pairs())


def output(tokens: Tensor, weight: Tensor, bias: Tensor | None, ending: ReluDropout | None = None) -> Tensor:
    """tokens [R, I] times weight [O, I], plus bias [O], and then dropout(relu()) if asked for: [R, O].

    tokens and the result in float32, or in bfloat16 where the kernels have pairs; weight and bias in float32.

    Raises:
        ValueError: the tensors are in another dtype, or do not fit each other.
    """
    _check(tokens.dtype, {"RI": tokens}, {"OI": weight} | ({} if bias is None else {"O": bias}))
    tokens, weight = _whole_words(tokens), contiguous(weight)
    bias = None if bias is None else contiguous(bias)
    rows, (outs, ins) = tokens.shape[0], weight.shape
    out = _empty(tokens.dtype, rows, outs)
    if out.numel():
        layer = _Layer(rows, ins, outs, tokens.stride(0), 0)
        _call(load().uniad_linear_output, tokens.dtype, layer, tokens, weight, bias, _dropout(ending), out)
    return out


def token_gradient(
    out_gradient: Tensor, weight: Tensor, ending: ReluDropout | None = None, activated: Tensor | None = None
) -> Tensor:
    """out_gradient [R, O] times weight [O, I]: [R, I], or the gradient to what `ending` made `activated` [R, I] of.

    out_gradient, activated and the result in float32, or in bfloat16 where the kernels have pairs; weight in float32.

    Raises:
        ValueError: the tensors are in another dtype, or do not fit each other.
    """
    narrow = {"RO": out_gradient} | ({} if activated is None else {"RI": activated})
    _check(out_gradient.dtype, narrow, {"OI": weight})
    out_gradient, weight = _whole_words(out_gradient), contiguous(weight)
    activated = None if activated is None else contiguous(activated)
    rows, (outs, ins) = out_gradient.shape[0], weight.shape
    gradient = _empty(out_gradient.dtype, rows, ins)
    if gradient.numel():
        layer = _Layer(rows, ins, outs, 0, out_gradient.stride(0))
        function = load().uniad_linear_token_gradient
        _call(function, gradient.dtype, layer, out_gradient, weight, _dropout(ending), activated, gradient)
    return gradient


def weight_gradient(tokens: Tensor, out_gradient: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(out_gradient^T tokens [O, I], out_gradient summed over rows [O] or None), float32.

    tokens [R, I] and out_gradient [R, O] in float32, or in bfloat16 where the kernels have pairs.

    Raises:
        ValueError: the tensors are in another dtype, or do not fit each other.
    """
    _check(tokens.dtype, {"RI": tokens, "RO": out_gradient}, {})
    tokens, out_gradient = unit_last_stride(tokens), unit_last_stride(out_gradient)
    (rows, ins), outs = tokens.shape, out_gradient.shape[1]
    weight = _empty(torch.float32, outs, ins)
    bias = _empty(torch.float32, outs) if with_bias else None
    layer = _Layer(rows, ins, outs, tokens.stride(0), out_gradient.stride(0))
    _call(load().uniad_linear_weight_gradient, tokens.dtype, layer, tokens, out_gradient, weight, bias)
    return weight, bias


def _check(dtype: torch.dtype, tensors: dict[str, Tensor], floats: dict[str, Tensor]) -> None:
    """ValueError unless each has the axes of its name, of one length wherever an axis has one letter, and its dtype.

    tensors: in `dtype`, which is one of the kernels'. floats: in float32.
    """
    sizes: dict[str, int] = {}
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and has_pairs())
    for axes, tensor in (tensors | floats).items():
        fits = known and tensor.dtype == (dtype if axes in tensors else torch.float32) and tensor.ndim == len(axes)
        if not fits or any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, tensor.shape, strict=True)):
            got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (tensors | floats).values())
            kinds = "float32 or bfloat16" if has_pairs() else "float32"
            names = f"{', '.join(tensors)} in {kinds}" + (f" and {', '.join(floats)} in float32" if floats else "")
            raise ValueError(f"a product needs {names}, got {got}")


def _whole_words(rows: Tensor) -> Tensor:
    """Rows that can be read two numbers of bfloat16 at a time: copied where they begin or end inside of two."""
    rows = unit_last_stride(rows)
    if rows.dtype == torch.float32 or not (rows.shape[1] % 2 or rows.stride(0) % 2 or rows.data_ptr() % 4):
        return rows
    return torch.nn.functional.pad(rows, (0, rows.shape[1] % 2)).clone()


def _dropout(ending: ReluDropout | None) -> "_Dropout | None":
    if ending is None:
        return None
    dropout_p, seed = ending
    return _Dropout(1 / (1 - dropout_p), keep_threshold(dropout_p), *noise_numbers(seed))


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _call(function: ctypes._CFuncPtr, dtype: torch.dtype, *arguments: "Tensor | ctypes.Structure | None") -> None:
    """Call a kernel with pointers to tensors and structures, which are held here until it returns."""
    function(_DTYPES[dtype], *(_pointer(argument) for argument in arguments))


def _pointer(argument: "Tensor | ctypes.Structure | None") -> object:
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
