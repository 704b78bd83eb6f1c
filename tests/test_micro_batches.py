"""Batches that form by time and size, and a queue with an end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from uniad_fast import AnomalyDetector
from uniad_fast.deploy.micro_batches import MicroBatches, QueueFull, UnknownClass
from uniad_fast.deploy.service import Limits, Service
from uniad_fast.deploy.service_app import create_app
from uniad_fast.errors import UniadFastError


def post(client, content):
    return client.post("/score", content=content, headers={"Content-Type": "image/png"})


class Slow:
    """A detector that takes its time."""

    def __init__(self, detector):
        self.real, self.settings, self.trained, self.pipeline = (
            detector,
            detector.settings,
            detector.trained,
            detector.pipeline,
        )
        self.calibration = detector.calibration
        self.free, self.sizes = threading.Event(), []

    def verdicts(self, batch, told):
        self.free.wait(10)
        self.sizes.append(len(batch.images))
        return self.real.verdicts(batch, told)


def test_batches_form_and_the_queue_ends(bundle):
    detector = Slow(AnomalyDetector.load(bundle))
    batches = MicroBatches(detector, most=4, wait=0.01, waiting=6)
    image = torch.zeros(3, 64, 64)
    first = batches.submit(image, (64, 64))
    time.sleep(0.2)  # taken, and being measured
    others = [batches.submit(image, (64, 64), "class1") for _ in range(6)]
    with pytest.raises(QueueFull, match="6 images are waiting already"):
        batches.submit(image, (64, 64))
    others[1].cancel()
    detector.free.set()
    assert first.result(10).prediction.score == pytest.approx(
        detector.real.predict(np.zeros((64, 64, 3), np.uint8)).score, abs=0.02
    )
    assert [one.result(10).prediction.class_name for one in others if not one.cancelled()] == ["class1"] * 5
    assert detector.sizes == [1, 3, 2] or sum(detector.sizes) == 6
    unknown = batches.submit(image, (64, 64), "nobody")
    with pytest.raises(UnknownClass, match="knows no class 'nobody'"):
        unknown.result(10)
    broken = batches.submit(torch.zeros(3, 8, 8), (8, 8))
    with pytest.raises(Exception, match=""):
        broken.result(10)
    last = [batches.submit(image, (64, 64)) for _ in range(3)]
    batches.stop()
    assert all(one.done() for one in last)


def test_one_images_fault_is_its_own(bundle):
    """An engine that can't be told a class fails for whoever told one, in the same batch as others."""

    class Untold(Slow):
        def verdicts(self, batch, told):
            if any(number is not None for number in told):
                raise UniadFastError("it can't be told")
            return super().verdicts(batch, told)

    detector = Untold(AnomalyDetector.load(bundle))
    detector.free.set()
    batches = MicroBatches(detector, most=4, wait=0.5)
    image = torch.zeros(3, 64, 64)
    asked = [batches.submit(image, (64, 64), name) for name in (None, "class1", None)]
    assert asked[0].result(20).prediction.score == pytest.approx(
        asked[2].result(20).prediction.score, abs=0.02, rel=1e-3
    )
    with pytest.raises(UniadFastError, match="it can't be told"):
        asked[1].result(20)
    batches.stop()
    with pytest.raises(QueueFull, match="nothing is measured any more"):
        batches.submit(image, (64, 64))


def test_too_much_at_once_is_told_so(bundle, made_up_classes):
    service = Service(bundle, Limits(queue=1, batch=1))
    slow = Slow(service.batches.detector)
    service.batches.detector = slow
    with TestClient(create_app(service)) as client, ThreadPoolExecutor(6) as pool:
        content = (made_up_classes / "class0/test/good/000.png").read_bytes()
        waiting = [pool.submit(post, client, content) for _ in range(6)]
        time.sleep(1)
        slow.free.set()
        answers = [one.result() for one in waiting]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and all(
        answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429
    )
