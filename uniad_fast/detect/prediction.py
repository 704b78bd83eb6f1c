"""The verdict on one image."""

from typing import NamedTuple

from numpy.typing import NDArray


class Prediction(NamedTuple):
    """What the detector says of one image.

    score: image score, higher is more anomalous. label: True when the score is above the threshold, None where a
    detector has none (see `AnomalyDetector.calibrate`), or where the score is not finite.
    anomaly_map: float32 [image_size, image_size], a score for every pixel of the image as the network saw it.
    """

    score: float
    label: bool | None
    anomaly_map: NDArray
