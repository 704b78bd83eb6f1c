"""Which class an image is of: told where it is plain, and not where it is not."""

import numpy as np
import torch

from uniad_fast.detect.class_recognizer import UNSURE, ClassRecognizer, fit_recognizer, pooled


def vectors(rng, means, images, deviation=1.0):
    labels = np.repeat(np.arange(len(means)), images)
    return torch.from_numpy(np.asarray(means)[labels] + deviation * rng.normal(size=(len(labels), 4))).float(), labels


def test_classes_far_apart_are_told_and_others_are_not():
    rng = np.random.default_rng(0)
    means = 12 * np.eye(4)[:3]
    x, labels = vectors(rng, means, 30)
    recognizer = ClassRecognizer(3, 2)
    assert fit_recognizer(recognizer, x, labels) == (0, 0, 90)
    new, truth = vectors(rng, means, 50)
    assert (recognizer.decide(new).numpy() == truth).all()
    between = torch.from_numpy((means[0] + means[1]) / 2).float()[None]
    assert recognizer.decide(between).item() == UNSURE


def test_classes_that_are_one_are_not_told_apart():
    rng = np.random.default_rng(0)
    x, labels = vectors(rng, np.zeros((2, 4)), 200)
    wrong, unsure, seen = fit_recognizer(ClassRecognizer(2, 2), x, labels)
    assert seen == 400 and unsure > 390 and wrong < 5


def test_frequent_classes_have_no_advantage():
    rng = np.random.default_rng(0)
    x = torch.cat([vectors(rng, [[0, 0, 0, 0]], 500)[0], vectors(rng, [[10, 0, 0, 0]], 5)[0]])
    recognizer = ClassRecognizer(2, 2)
    recognizer.fit(x, [0] * 500 + [1] * 5)
    assert recognizer.decide(torch.tensor([[10.0, 0, 0, 0]])).item() == 1
    middle = torch.tensor([[5.0, 0, 0, 0]]) @ recognizer.weight.T + recognizer.bias
    assert abs((middle[0, 0] - middle[0, 1]).item()) < 8


def test_pooled_features_and_channels_that_say_nothing():
    features = torch.rand(3, 7, 4)
    found = pooled(features)
    torch.testing.assert_close(found[:, :4], features.mean(1))
    torch.testing.assert_close(found[:, 4:], features.std(1, correction=0))
    features[..., 0] = 5.0
    recognizer = ClassRecognizer(2, 4)
    recognizer.fit(pooled(features), [0, 1, 1])
    assert recognizer(features).tolist() == [0, 1, 1] and recognizer.weight.isfinite().all()


def test_a_class_of_one_image():
    x, labels = vectors(np.random.default_rng(0), 12 * np.eye(4)[:2], 20)
    recognizer = ClassRecognizer(3, 2)
    x = torch.cat([x, torch.full((1, 4), -9.0)])
    wrong, unsure, seen = fit_recognizer(recognizer, x, [*labels, 2])
    assert wrong == 0 and unsure == 0 and seen < 41
    assert recognizer.decide(x[-1:]).item() == 2
