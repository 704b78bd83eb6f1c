"""From an image to its map, by every engine: detectors of the paper's size with random weights, which cost the same."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from bench.tools.turns import Way
from uniad_fast.deploy.engine_files import EngineFiles
from uniad_fast.deploy.graph import ResidualGraph
from uniad_fast.deploy.plans import plans_here, runner
from uniad_fast.deploy.runtimes import openvino_model, openvino_request
from uniad_fast.detect.detector import AnomalyDetector
from uniad_fast.detect.fitting import new_model, new_pipeline
from uniad_fast.detect.settings import DetectorSettings
from uniad_fast.detect.trained import Trained
from uniad_fast.models.backbone import Backbone
from uniad_fast.models.efficientnet_features import EfficientNetFeatures, default_levels
from uniad_fast.testing import PublicUniAD

ToMaps = Callable[[Tensor], object]
"""images [B, 3, h, w] in [0, 1] -> anomaly maps."""
_CALIBRATION = 16  # images for int8: speed does not hang on them


def detector(backbone: str, image_size: int) -> AnomalyDetector:
    """One that has learnt nothing, with the score of the paper."""
    torch.manual_seed(0)
    features = EfficientNetFeatures(backbone, default_levels())
    features.pretrained_cfg = timm.get_pretrained_cfg(backbone).to_dict()
    settings = DetectorSettings(backbone, image_size, residual_score="l2")
    frozen = Backbone(backbone, features, default_levels())
    model = new_model(settings, frozen, frozen.feature_size(image_size), None)
    return AnomalyDetector.of(Trained(settings, new_pipeline(settings, frozen, model)))


def ways(detector: AnomalyDetector, folder: Path, engines: bool = True) -> dict[Way, ToMaps]:
    """Every way that is installed: the public code's, this package's plans, and OpenVINO on the whole exported by hand.

    folder: for the graphs. engines: those besides PyTorch too, whose graphs take a minute to make.
    """
    pipeline = detector.pipeline
    found: dict[Way, ToMaps] = {Way("public"): _public(detector), Way("as loaded", "auto"): pipeline.measure}
    for plan in plans_here():
        if not engines and plan.engine != "torch":
            continue
        measure = runner(plan, pipeline, EngineFiles(detector, folder))
        own = " + own network" if plan.part == "features" else ""
        found[Way(plan.engine + own, plan.precision)] = lambda images, measure=measure: pipeline.enlarge(
            measure(images, None).score_maps
        )
    if engines and find_spec("openvino") is not None:
        found |= _by_hand(detector)
        if find_spec("nncf") is not None:
            found[Way("openvino", "int8")] = _int8(detector, folder)
    return found


def _public(detector: AnomalyDetector) -> ToMaps:
    """timm's extractor as it comes and the public network, its mask rebuilt in each forward, in float32."""
    pipeline, settings = detector.pipeline, detector.settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = timm.create_model(settings.backbone, features_only=True, out_indices=default_levels()).eval()
    size, channels = pipeline.model.feature_size, pipeline.backbone.channels
    network = PublicUniAD(channels, 16, size, (7, 7)).eval()
    backbone = pipeline.backbone

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        stages = features((images - backbone.mean) / backbone.std)
        aligned = [nn.functional.interpolate(x, size, mode="bilinear", align_corners=True) for x in stages]
        return network({"feature_align": torch.cat(aligned, 1)})["pred"]

    return run


class _WholeGraph(nn.Module):
    """images -> anomaly maps, in stock operators."""

    def __init__(self, detector: AnomalyDetector) -> None:
        super().__init__()
        self.inner, self.pipeline = ResidualGraph(detector.pipeline), detector.pipeline

    def forward(self, images: Tensor) -> Tensor:
        _, residual = self.inner(images)
        scores = torch.linalg.vector_norm(residual, dim=2).unflatten(1, self.pipeline.model.feature_size)
        return self.pipeline.enlarge(scores)


def _by_hand(detector: AnomalyDetector) -> dict[Way, ToMaps]:
    import openvino

    size = detector.settings.image_size
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(_WholeGraph(detector).eval(), example_input=torch.zeros(1, 3, *size))
    found: dict[Way, ToMaps] = {}
    for precision in sorted({plan.precision for plan in plans_here()}):
        request = openvino_request(model, torch.get_num_threads(), precision)
        found[Way("openvino by hand", precision)] = lambda images, request=request: request.infer([images.numpy()])
    return found


def _int8(detector: AnomalyDetector, folder: Path) -> ToMaps:
    """Backbone and network as an int8 export has them."""
    import nncf

    size, pipeline = detector.settings.image_size, detector.pipeline
    images = np.random.default_rng(0).random((_CALIBRATION, 1, 3, *size), np.float32)
    model = openvino_model(EngineFiles(detector, folder).graph("network"))
    options = {"preset": nncf.QuantizationPreset.MIXED, "model_type": nncf.ModelType.TRANSFORMER}
    made = nncf.quantize(model, nncf.Dataset(list(images)), subset_size=_CALIBRATION, **options)
    request = openvino_request(made, torch.get_num_threads())

    def run(images: Tensor) -> Tensor:
        request.infer({"images": images.numpy()})
        tokens, residual = (torch.from_numpy(request.get_output_tensor(k).data) for k in range(2))
        grid = residual.transpose(1, 2).unflatten(2, pipeline.model.feature_size)
        return pipeline.enlarge(pipeline.measure_residual(tokens, grid).score_maps)

    return run
