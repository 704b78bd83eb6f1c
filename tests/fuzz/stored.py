"""What is written and read again, and damaged: bundles, checkpoints, configurations, notes of caches."""

import functools
import hashlib
import io
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from uniad_fast import AnomalyDetector, UniAD
from uniad_fast.data.feature_cache import cached_features
from uniad_fast.detect.calibration import Calibration
from uniad_fast.detect.fitting import new_model, new_pipeline
from uniad_fast.detect.public_config import ConfigError, read_config
from uniad_fast.detect.scales import Scale
from uniad_fast.detect.tail import Threshold
from uniad_fast.detect.trained import Recognition, Trained
from uniad_fast.errors import UniadFastError
from uniad_fast.interop import checkpoints as weights
from uniad_fast.models.architecture import Architecture
from uniad_fast.models.backbone import Backbone

from .damage import JUNK, changed, damaged, folder

# --- bundles, checkpoints, configurations ---------------------------------------------------------------------------


@functools.cache
def _detector() -> AnomalyDetector:
    import timm

    torch.manual_seed(0)
    file = Path(tempfile.mkdtemp(prefix="fuzz-")) / "weights.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    frozen = Backbone.pretrained("resnet10t", 32, file, (1, 2))
    shutil.rmtree(file.parent)
    architecture = Architecture(hidden_dim=8, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=8)
    detector = AnomalyDetector("resnet10t", 32, out_indices=(1, 2), architecture=architecture, device="cpu")
    model = new_model(detector.settings, frozen, frozen.feature_size(32), None)
    pipeline = new_pipeline(detector.settings, frozen, model, 2).eval()
    scale = Scale((3.0, 4.0, 5.0), (1.0, 1.0, 2.0))
    threshold, good_scores = Threshold(3.5, 0.1, (0.05, 0.2), False), ((0.5,) * 9, (1.0,) * 3)
    calibration = Calibration(threshold, 4.5, (0.0, 2.0), scale, scale, (9, 3, 12), good_scores)
    recognition = Recognition(12, 0, 1)
    detector._trained = Trained(detector.settings, pipeline, calibration, ("cup", "lid"), recognition, {"torch": "2"})
    return detector


@functools.cache
def _bundle() -> tuple[bytes, bytes]:
    with folder() as root:
        _detector().save(root / "b")
        return (root / "b/config.json").read_bytes(), (root / "b/model.safetensors").read_bytes()


@st.composite
def bundle_cases(draw):
    """(config.json, model.safetensors, whether either is not what was written)."""
    config, tensors = _bundle()
    part = draw(
        st.sampled_from(["config", "config with its checksum", "bytes of config", "bytes of tensors", "nothing"])
    )
    if part.startswith("config"):
        content = changed(draw, json.loads(config))
        if part != "config" and isinstance(content, dict):
            content.pop("config_sha256", None)
            content["config_sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content).encode(), tensors, part == "config" and content != json.loads(config)
    if part == "bytes of config":
        other = damaged(draw, config)
        return other, tensors, other != config
    if part == "bytes of tensors":
        other = damaged(draw, tensors)
        if draw(st.booleans()):
            return config, other, other != tensors
        content = json.loads(config) | {"sha256": hashlib.sha256(other).hexdigest()}
        content.pop("config_sha256")
        content["config_sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content).encode(), other, False
    return config, tensors, False


def check_bundle(case) -> None:
    config, tensors, differs = case
    with folder() as root:
        (root / "config.json").write_bytes(config)
        (root / "model.safetensors").write_bytes(tensors)
        try:
            detector = AnomalyDetector.load(root, "cpu")
        except UniadFastError as error:
            assert str(error)
            return
    if differs:  # spaces and the like, which change no value
        assert detector.calibration == _detector().calibration
    try:
        score, _, anomaly_map = detector.predict(np.full((40, 40, 3), 90, np.uint8))
    except UniadFastError:  # whoever writes a bundle's tensors can make scores that are not finite
        assert not differs and (config, tensors) != _bundle()
        return
    assert np.isfinite(score) and np.isfinite(anomaly_map).all()
    if differs or (config, tensors) == _bundle():
        assert score == _detector().predict(np.full((40, 40, 3), 90, np.uint8)).score


@functools.cache
def _network() -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in _detector().pipeline.model.state_dict().items()}


@st.composite
def checkpoint_cases(draw):
    """(content of a torch file, whether it is a network as it should be)."""
    state: dict[Any, Any] = {name: t.clone() for name, t in _network().items()}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(_network())))
        how = draw(st.sampled_from(["drop", "reshape", "dtype", "nan", "junk", "add", "rename", "sparse"]))
        if name not in state:
            continue
        if how == "drop":
            del state[name]
        elif how == "reshape":
            state[name] = torch.zeros(draw(st.lists(st.integers(0, 3), max_size=3)))
        elif how == "dtype":
            state[name] = torch.zeros(
                _network()[name].shape, dtype=draw(st.sampled_from([torch.int64, torch.complex64, torch.bool]))
            )
        elif how == "nan":
            state[name] = torch.full_like(_network()[name], float("nan"))
        elif how == "junk":
            state[name] = draw(JUNK)
        elif how == "add":
            state[draw(st.one_of(st.text(max_size=5), st.integers(0, 3)))] = torch.zeros(2)
        elif how == "rename":
            state[f"transformer.encoder.layers.{draw(st.integers(0, 10**6))}.x"] = state.pop(name)
        else:
            state[name] = _network()[name].to_sparse()
    buffer = io.BytesIO()
    torch.save(draw(st.sampled_from([state, {"state_dict": state, "arch": draw(JUNK)}, {"net": state}])), buffer)
    content = buffer.getvalue()
    if draw(st.integers(0, 3)) == 0:
        content = damaged(draw, content)
        return content, False
    whole = state.keys() == _network().keys() and all(
        isinstance(t, torch.Tensor)
        and t.dtype == _network()[n].dtype
        and t.layout == torch.strided
        and torch.equal(t, _network()[n])
        for n, t in state.items()
    )
    return content, whole


def check_checkpoint(case) -> None:
    content, whole = case
    with folder() as root:
        (root / "c.pth").write_bytes(content)
        try:
            found = weights.load_network(root / "c.pth", weights.NotInTensors(2))
        except UniadFastError as error:
            assert not whole, error
            return
    assert isinstance(found, UniAD)
    assert all(p.isfinite().all() for p in found.parameters())
    if whole:
        assert all(torch.equal(t, _network()[name]) for name, t in found.state_dict().items())


_CONFIGURATION = yaml.safe_load("""
dataset: {input_size: [64, 64], pixel_mean: [0.4, 0.5, 0.6], pixel_std: [0.2, 0.25, 0.3], batch_size: 4, hflip: False}
evaluator: {key_metric: mean_pixel_auc}
trainer:
  max_epoch: 1000
  clip_max_norm: 0.1
  lr_scheduler: {type: StepLR, kwargs: {step_size: 800, gamma: 0.1}}
  optimizer: {type: AdamW, kwargs: {lr: 0.0001, betas: [0.9, 0.999], weight_decay: 0.0001}}
net:
  - {name: backbone, type: models.backbones.efficientnet_b4, kwargs: {pretrained: True, outlayers: [1, 2, 3, 4]}}
  - {name: neck, prev: backbone, type: models.necks.MFCN, kwargs: {outstrides: [16]}}
  - name: reconstruction
    type: models.reconstructions.UniAD
    kwargs: {pos_embed_type: learned, hidden_dim: 32, nhead: 4, num_encoder_layers: 2, num_decoder_layers: 1,
             dim_feedforward: 64, dropout: 0.2, activation: gelu, normalize_before: False,
             feature_jitter: {scale: 10.0, prob: 0.5},
             neighbor_mask: {neighbor_size: [3, 1], mask: [True, False, True]},
             save_recon: {save_dir: x}, initializer: {method: xavier_uniform}}
""")


@st.composite
def configuration_cases(draw):
    """A configuration of the public code, or the text of one, with something changed."""
    if draw(st.booleans()):
        return changed(draw, _CONFIGURATION)
    return damaged(draw, yaml.safe_dump(_CONFIGURATION).encode())


def check_configuration(case) -> None:
    with folder() as root:
        source: Any = case
        if isinstance(case, bytes):
            source = root / "config.yaml"
            source.write_bytes(case)
        try:
            found = read_config(source)
        except ConfigError as error:
            assert str(error)
            return
    assert min(found.image_size) > 0 and np.isfinite(found.normalization).all() and min(found.normalization[1]) > 0
    assert all(t >= 0 for t in found.out_indices) and found.recipe.epochs > 0


# --- caches ---------------------------------------------------------------------------------------------------------


class _TinyBackbone:
    """Features that are worth nothing, in no time."""

    channels, mean = 3, torch.zeros(1)

    def feature_size(self, image_size: int) -> tuple[int, int]:
        return 2, 2

    def fingerprint(self) -> str:
        return "tiny"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2)


@functools.cache
def _images() -> Path:
    root = Path(tempfile.mkdtemp(prefix="fuzz-images-"))
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(root / f"{number}.png")
    (root / "2.png").write_text("no image")
    return root


@st.composite
def cache_cases(draw):
    """What is done to the file of a cache: {its name: its new content}."""
    with folder() as root:
        paths = sorted(_images().iterdir())
        cached_features(_TinyBackbone(), 16, paths, root, quiet=True)
        (shard,) = root.glob("*/*.safetensors")
        content = shard.read_bytes()
    if draw(st.booleans()):
        return {str(shard.relative_to(root)): damaged(draw, content)}
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if draw(st.booleans()):
        header = changed(draw, header)
    else:
        header["__metadata__"]["info"] = json.dumps(changed(draw, json.loads(header["__metadata__"]["info"])))
    text = json.dumps(header).encode()
    return {str(shard.relative_to(root)): len(text).to_bytes(8, "little") + text + content[8 + length :]}


def check_cache(contents) -> None:
    """Whatever lies there, the features are those of the images."""
    paths = sorted(_images().iterdir())
    with folder() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = cached_features(_TinyBackbone(), 16, paths, root / "other", quiet=True)
        expected = np.array(truth.tokens)
        for name, content in contents.items():
            (root / name).parent.mkdir()
            (root / name).write_bytes(content)
        found = cached_features(_TinyBackbone(), 16, paths, root, quiet=True)
        assert found.used == truth.used and [m.split(":")[0] for m in found.unreadable] == [str(paths[2])], contents
        np.testing.assert_array_equal(np.array(found.tokens), expected)
