"""uniad_fast: UniAD, the one-model-for-all-classes anomaly detector, fast."""

from typing import TYPE_CHECKING, Any

from .interop.replace import fast_attention, replace_attention, restore_attention
from .models.attention import NeighborMaskedAttention
from .models.uniad import UniAD
from .ops.functional import jitter_project, neighbor_masked_attention

if TYPE_CHECKING:
    from .detect.detector import AnomalyDetector as AnomalyDetector
    from .detect.detector import Prediction as Prediction

__all__ = [
    "AnomalyDetector",
    "NeighborMaskedAttention",
    "Prediction",
    "UniAD",
    "fast_attention",
    "jitter_project",
    "neighbor_masked_attention",
    "replace_attention",
    "restore_attention",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The detector brings Pillow and timm along, which those who only want the ops need not pay for.
    if name in ("AnomalyDetector", "Prediction"):
        from .detect import detector

        return getattr(detector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
