"""Backbone and network of an OpenVINO model in int8, calibrated by NNCF on good images."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.image_batches import read_batches
from ..errors import UniadFastError
from ..image_size import Size
from .graph import INNER

_IMAGES = 256


def quantized(model: Any, image_size: Size, good: Sequence[str | os.PathLike]) -> Any:
    """A copy of an `openvino.Model` of `DetectorGraph` with the outputs `INNER`, which it has no more.

    Resize and scores stay as they are: the one would lose levels of grey, the others are squares of small numbers.

    Args:
        good: files; some hundred are picked evenly.

    Raises:
        UniadFastError: none of them can be read, or NNCF can't do it.
    """
    import nncf

    picked = good[:: max(1, len(good) // _IMAGES)]
    images = [one for batch in read_batches(picked, image_size) for one in batch.images.numpy()]
    if not images:
        raise UniadFastError("none of the good images to calibrate int8 on can be read")
    before, behind = (_ancestors(model.output(name).get_node()) for name in INNER)
    inside = behind - before
    outside = [node.get_friendly_name() for node in model.get_ops() if node.get_friendly_name() not in inside]
    is_uint8 = model.input("images").get_element_type().get_type_name() == "u8"

    def as_input(image: np.ndarray) -> dict[str, np.ndarray]:
        return {"images": np.round(image * 255).astype(np.uint8)[None] if is_uint8 else image[None]}

    try:
        made = nncf.quantize(
            model,
            nncf.Dataset(images, as_input),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=outside, validate=False),
        )
    except Exception as error:  # it raises whatever comes, of networks that it has no rules for
        raise UniadFastError(f"NNCF can't quantize this backbone ({type(error).__name__}: {error})") from None
    for name in INNER:
        made.remove_result(made.output(name).get_node())
    return made


def _ancestors(node: Any) -> set[str]:
    """Friendly names of all nodes that it is computed from."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one.get_friendly_name() in found:
            continue
        found.add(one.get_friendly_name())
        waiting += [one.input_value(k).get_node() for k in range(one.get_input_size())]
    return found
