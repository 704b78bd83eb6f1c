"""uniad_fast: UniAD, the one-model-for-all-classes anomaly detector, fast."""

from typing import TYPE_CHECKING, Any

from .interop.replace import fast_attention, replace_attention, restore_attention
from .models.attention import NeighborMaskedAttention
from .models.uniad import UniAD
from .ops.jitter_project import jitter_project
from .ops.neighbor_masked_attention import neighbor_masked_attention

if TYPE_CHECKING:
    from .detect.detector import AnomalyDetector as AnomalyDetector
    from .detect.prediction import Prediction as Prediction

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
    if name == "AnomalyDetector":
        from .detect.detector import AnomalyDetector

        return AnomalyDetector
    if name == "Prediction":
        from .detect.prediction import Prediction

        return Prediction
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
