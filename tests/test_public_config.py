"""The public code's configuration builds our detector, and our network builds under the public code's builder."""

import importlib

import pytest
import torch
import yaml

from uniad_fast import AnomalyDetector, UniAD
from uniad_fast.detect.public_config import ConfigError, read_config

TEXT = """
dataset:
  input_size: [64, 64] # [h,w]
  pixel_mean: [0.4, 0.5, 0.6]
  pixel_std: [0.2, 0.25, 0.3]
  batch_size: 4
trainer:
  max_epoch: 2
  clip_max_norm: 0.2
  lr_scheduler: {type: StepLR, kwargs: {step_size: 800, gamma: 0.1}}
  optimizer: {type: AdamW, kwargs: {lr: 0.0003, betas: [0.9, 0.999], weight_decay: 0.001}}
net:
  - name: backbone
    type: models.backbones.resnet18
    frozen: True
    kwargs: {pretrained: True, outlayers: [1, 2, 3]}
  - name: neck
    prev: backbone
    type: models.necks.MFCN
    kwargs: {outstrides: [16]}
  - name: reconstruction
    prev: neck
    type: models.reconstructions.UniAD
    kwargs:
      pos_embed_type: learned
      hidden_dim: 32
      nhead: 4
      num_encoder_layers: 2
      num_decoder_layers: 1
      dim_feedforward: 64
      dropout: 0.2
      activation: gelu
      normalize_before: False
      feature_jitter: {scale: 10.0, prob: 0.5}
      neighbor_mask: {neighbor_size: [3, 1], mask: [True, False, True]}
      save_recon: {save_dir: result_recon}
      initializer: {method: xavier_uniform}
"""


def changed(path, value):
    """The configuration with one entry replaced."""
    config = yaml.safe_load(TEXT)
    *parents, last = path
    place = config
    for step in parents:
        place = place[step]
    place[last] = value
    return config


def test_a_detector_is_built_and_trained_as_it_says(tmp_path, made_up_classes):
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text(TEXT)
    detector = AnomalyDetector.from_config(
        tmp_path / "config.yaml", backbone_weights=tmp_path / "w.pth", cache_dir=tmp_path / "cache"
    )
    recipe = detector.settings.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (2, 4, 0.0003)
    assert (recipe.weight_decay, recipe.clip, recipe.dropout) == (0.001, 0.2, 0.2)
    detector.fit(made_up_classes, quiet=True)
    model = detector.pipeline.model
    assert isinstance(model, UniAD) and model.inplanes == 64 + 128 + 256 and model.feature_size == (4, 4)
    assert (model.jitter_scale, model.jitter_prob) == (10.0, 0.5)
    encoder, decoder = model.transformer.encoder.layers, model.transformer.decoder.layers
    assert len(encoder) == 2 and len(decoder) == 1 and encoder[0].activation == "gelu"
    windows = [encoder[0].self_attn, decoder[0].self_attn, decoder[0].multihead_attn]
    assert [attention.neighbor_size for attention in windows] == [(3, 1), None, (3, 1)]
    assert encoder[0].self_attn.num_heads == 4
    assert detector.pipeline.backbone.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    detector.save(tmp_path / "bundle")
    image = next((made_up_classes / "class0/test/good").iterdir())
    again = AnomalyDetector.load(tmp_path / "bundle").predict(image)
    assert again.score == pytest.approx(detector.predict(image).score, rel=1e-5)


def test_the_published_choices():
    config = changed(("net", 0), {"name": "backbone", "type": "models.backbones.efficientnet_b4", "kwargs": {}})
    config["net"][0]["kwargs"]["outlayers"] = [1, 2, 3, 4]
    config["net"][2]["kwargs"]["neighbor_mask"] = None
    config["net"][2]["kwargs"]["feature_jitter"] = None
    config["net"][2]["type"] = "uniad_fast.UniAD"
    read = read_config({"net": config["net"]})
    assert read.backbone == "tf_efficientnet_b4" and read.out_indices == (0, 1, 2, 3) and read.image_size == (224, 224)
    assert read.architecture.mask == (False,) * 3 and read.recipe.jitter_scale == 0
    assert read.normalization[0] == (0.485, 0.456, 0.406) and read.recipe.epochs == 1000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("net", 2, "type"), "models.reconstructions.Other", "reconstruction.type must be one of .* got .*Other"),
        (("net", 0, "type"), "models.backbones.vgg", "backbone.type 'models.backbones.vgg' is not known"),
        (("net", 1, "kwargs", "outstrides"), [32], r"outstrides must be \[16\], got \[32\]"),
        (("net", 2, "kwargs", "surplus"), 3, "reconstruction.kwargs.*'surplus'"),
        (("dataset", "input_size"), [64, 9], r"from 32 to 4096 pixels each, got \(64, 9\)"),
        (("trainer", "optimizer", "type"), "SGD", "must be AdamW, got 'SGD'"),
        (("net",), [], "'backbone' is missing"),
        (("net",), None, "net must be a list of networks"),
    ],
)
def test_what_cannot_be_followed_is_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        AnomalyDetector.from_config(changed(path, value))


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match="no configuration file at"):
        read_config(path)
    hostile = "!!python/object/apply:os.system ['exit 1']"
    for text, message in (("a: [", "not a YAML file"), ("- 1", "holds no mapping"), (hostile, "not a YAML file")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(path)


class AttributeDict(dict):
    """What the public code makes of its configuration."""

    __getattr__ = dict.__getitem__


def as_attributes(value):
    if isinstance(value, dict):
        return AttributeDict({name: as_attributes(item) for name, item in value.items()})
    return [as_attributes(item) for item in value] if isinstance(value, list) else value


def test_our_network_under_the_public_builder():
    """It takes module and class from the type, and adds what follows from backbone and neck to the arguments."""
    part = as_attributes(yaml.safe_load(TEXT))["net"][2]
    part["type"] = "uniad_fast.UniAD"
    kwargs = part["kwargs"]
    kwargs["feature_size"], kwargs["inplanes"], kwargs["instrides"] = [4, 4], [24], [16]
    module, name = part["type"].rsplit(".", 1)
    network = getattr(importlib.import_module(module), name)(**kwargs)
    batch = {"image": torch.zeros(2, 3, 64, 64), "clsname": ["a", "b"], "filename": ["a/1.png", "b/1.png"]}
    out = network({**batch, "feature_align": torch.randn(2, 24, 4, 4)})
    assert out["pred"].shape == (2, 1, 64, 64) and out["feature_rec"].shape == (2, 24, 4, 4)
    loss = torch.nn.functional.mse_loss(out["feature_rec"], out["feature_align"])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
