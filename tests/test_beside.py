"""What the network is worth, beside the features alone and a memory of them."""

import numpy as np
import pytest
import torch
from conftest import call

from uniad_fast import AnomalyDetector
from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import DataError
from uniad_fast.detect.beside import Memory, beside
from uniad_fast.detect.evaluation import evaluate


def test_a_memory_is_the_distance_to_the_nearest():
    rng = np.random.default_rng(0)
    remembered = torch.from_numpy(rng.normal(size=(50, 3))).float()
    residual = torch.from_numpy(rng.normal(size=(20, 5, 2, 4))).float()
    found = Memory(slice(2, 5), remembered)(residual)
    tokens = residual[:, 2:].permute(0, 2, 3, 1).reshape(-1, 3)
    truth = torch.cdist(tokens.double(), remembered.double()).amin(dim=1).view(20, 2, 4)
    np.testing.assert_allclose(found, truth, atol=1e-3)
    assert Memory(slice(0, 3), remembered)(remembered.T[None, :, None]).max() < 1e-3


def test_both_are_detectors_on_the_same_features(bundle, made_up_classes, tmp_path):
    detector = AnomalyDetector.load(bundle)
    detector.cache_dir = tmp_path
    dataset = load_dataset(made_up_classes)
    others = beside(detector, dataset.train, quiet=True)
    tokens = detector.pipeline.tokens(torch.rand(2, 3, 64, 64))
    without = others["without network"]
    feature = ((tokens - detector.pipeline.mean) / detector.pipeline.std).transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(without.pipeline.residual(tokens), -feature)
    assert without.classes == detector.classes and without.calibration.images == (8, 8, 8, 8, 8, 40)
    assert others["memory"].calibration.images == (4,)
    for other in others.values():
        evaluation = evaluate(other, dataset.test, quiet=True)
        assert evaluation.mean["image_auroc"] > 0.7, evaluation.mean
    with pytest.raises(DataError, match="9 readable good images"):
        beside(detector, dataset.train[:9], quiet=True)


def test_eval_prints_them(bundle, made_up_classes, tmp_path):
    output = call("eval", bundle, made_up_classes, "--beside", "--cache", tmp_path, "-q")
    lines = {line[:16].strip(): line for line in output.splitlines()}
    for name in ("this detector", "without network", "memory"):
        assert "of 20" in lines[name]
