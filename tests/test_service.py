"""The service: right answers, refusals with a reason, and nothing lost when it stops or takes another bundle."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import schemathesis
from conftest import call, saved_anew
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from uniad_fast import AnomalyDetector
from uniad_fast.deploy.service import Limits, Service
from uniad_fast.deploy.service_app import create_app

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def service(bundle):
    return Service(bundle, Limits(body=200_000, pixels=300_000, queue=8))


@pytest.fixture(scope="module")
def app(service):
    return create_app(service)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def paths(made_up_classes):
    return sorted(made_up_classes.glob("*/test/*/00[01].png"))


@pytest.fixture(scope="module")
def predictions(bundle, paths):
    return AnomalyDetector.load(bundle).predict(paths)


def score(client, content, **options):
    headers = options.pop("headers", PNG)
    return client.post("/score", content=content, headers=headers, params=options)


def test_one_image_says_what_predict_says(client, paths, predictions):
    for path, expected in zip(paths, predictions, strict=True):
        answer = score(client, path.read_bytes(), regions=1)
        assert answer.status_code == 200
        (found,) = answer.json()["results"]
        assert found.keys() == {"image", "class", "score", "label", "threshold", "heat_map", "regions", "note"}
        assert found["score"] == pytest.approx(expected.score, abs=0.02, rel=1e-3)
        assert (found["class"], found["label"]) == (expected.class_name, int(expected.label))
        assert len(found["regions"]) == len(expected.regions)


def test_several_images_a_class_and_maps(client, paths, predictions, bundle):
    files = [("images", (path.name, path.read_bytes())) for path in paths[:5]]
    found = client.post("/score", files=files).json()["results"]
    assert [one["image"] for one in found] == [path.name for path in paths[:5]]
    for one, expected in zip(found, predictions, strict=False):
        assert one["score"] == pytest.approx(expected.score, abs=0.02, rel=1e-3)
        assert one["heat_map"] is None and one["regions"] is None
    told = score(client, paths[0].read_bytes(), **{"class": "class3", "map": "png"}).json()["results"][0]
    assert told["class"] == "class3"
    with Image.open(io.BytesIO(base64.b64decode(told["heat_map"]))) as drawn, Image.open(paths[0]) as image:
        assert drawn.size == image.size


def png(size, **options):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_what_is_refused_and_why(client, paths):
    good = paths[0].read_bytes()
    for content, headers, status, reason in (
        (b"junk", PNG, 422, "no image, or of a format"),
        (b"", PNG, 422, "it is empty"),
        (good[: len(good) // 2], PNG, 422, "image: "),
        (png((600, 501)), PNG, 413, "300600 pixels, and 300000 are the most"),
        (bytes(200_001), PNG, 413, "200001 bytes, and 200000 are the most"),
        (good, {"Content-Type": "text/html"}, 415, "not text/html"),
        (good, {"Content-Type": "\x1b[31m"}, 415, "not \\x1b[31m"),
        (good, {"Content-Type": "multipart/form-data"}, 422, "no multipart form"),
        (good, {"Content-Type": "multipart/form-data; boundary=x"}, 422, ""),
    ):
        answer = score(client, content, headers=headers)
        assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    answer = score(client, good, **{"class": "no such"})
    assert answer.status_code == 404 and "knows no class 'no such'" in answer.json()["detail"]
    assert score(client, good, map="jpg").status_code == 422
    mixed = [("images", ("good.png", good)), ("images", ("bad\n.png", b"junk"))]
    answer = client.post("/score", files=mixed)
    assert answer.status_code == 422 and "bad" in answer.json()["detail"]
    assert client.post("/score", files=[("images", ("a.png", good))] * 9).status_code == 422  # more than may wait
    assert client.post("/score", data={"a": "b"}, files={"c": (None, "d")}).status_code == 422
    chunks = (bytes(50_000) for _ in range(6))
    assert score(client, chunks).status_code == 413  # whose length nobody has declared
    assert score(client, good).status_code == 200


def test_few_pixels_are_decoded_at_a_time(service, client, paths):
    """A form of pictures that are small as files and large as pixels is answered, some at a time."""
    most, held = [], service.pixels_held
    assert held == 0
    submit = service.batches.submit

    def noted(*arguments):
        most.append(service.pixels_held)
        return submit(*arguments)

    service.batches.submit = noted
    try:
        files = [("images", (f"{k}.png", png((500, 500)))) for k in range(7)]
        answer = client.post("/score", files=files)
    finally:
        del service.batches.submit
    assert answer.status_code == 200 and len(answer.json()["results"]) == 7
    assert 250_000 <= max(most) <= 2 * service.limits.pixels and service.pixels_held == 0


def test_health_metrics_and_page(client, service):
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    text = client.get("/metrics").text
    assert re.search(r'^uniad_fast_verdicts_total\{class_name="class0",verdict="(good|defective)"\} [1-9]', text, re.M)
    assert re.search(r'^uniad_fast_requests_total\{status="422"\} [1-9]', text, re.M)
    share = float(re.search(r"^uniad_fast_window_share_above_threshold (\S+)", text, re.M)[1])
    window = service.metrics._window
    assert share == pytest.approx(sum(defective for _, defective in window) / len(window)) and 0 < share < 1
    assert service.bytes_held == 0
    page = client.get("/")
    assert "drop an image here" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    assert client.get("/openapi.json").json()["paths"].keys() == {"/score", "/healthz", "/readyz", "/metrics"}


def test_a_token_and_a_host_are_asked_for(service, paths):
    app = create_app(service, "s" * 16, ["localhost"])
    client = TestClient(app, base_url="http://localhost")  # without its start and end: the service is others' too
    assert score(client, paths[0].read_bytes()).status_code == 401
    wrong = {**PNG, "Authorization": "Bearer nonsense\xff".encode("latin-1")}
    assert score(client, paths[0].read_bytes(), headers=wrong).status_code == 401
    right = {**PNG, "Authorization": f"Bearer {'s' * 16}"}
    assert score(client, paths[0].read_bytes(), headers=right).status_code == 200
    assert client.get("/metrics").status_code == 401 and client.get("/healthz").status_code == 200
    assert client.get("/").status_code == 200  # the page asks for it
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_the_description_holds(app, client):
    """But for one check: that bytes are an image is nothing that a schema can say."""
    for operation in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def holds(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        holds()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def server(bundle, tmp_path):
    """(process, address, folder of its bundle) of a service in a process of its own."""
    own, port = tmp_path / "bundle", free_port()
    shutil.copytree(bundle, own)
    code = "from uniad_fast.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", own, "--port", port, "--engine", "torch"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                break
        except httpx.TransportError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    yield process, address, own
    process.kill()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_reload_and_a_stop_lose_nothing(server, paths, made_up_classes, tmp_path):
    process, address, own = server
    before = AnomalyDetector.load(own)
    answers, problems, stopping = [], [], threading.Event()

    def ask(number):
        content = paths[number].read_bytes()
        with httpx.Client(timeout=30) as client:
            while not stopping.is_set():
                try:
                    answers.append(client.post(f"{address}/score", content=content, headers=PNG))
                except httpx.TransportError as error:
                    if not stopping.is_set():  # afterwards it listens no more, and lets idle connections go
                        problems.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while len(answers) < 4 and process.poll() is None:
        time.sleep(0.1)
    first = len(answers)
    before.calibrate(saved_anew(made_up_classes, tmp_path / "anew"), false_alarm_rate=0.3, quiet=True).save(own)
    process.send_signal(signal.SIGHUP)
    expected = before.calibration.threshold.value
    deadline = time.monotonic() + 30
    while answers[-1].json()["results"][0]["threshold"] != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answers[-1].json()["results"][0]["threshold"] == expected
    time.sleep(0.5)
    stopping.set()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert len(answers) > first > 3 and not problems
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert sum(answer.status_code == 503 for answer in answers) <= len(threads)
    lines = [json.loads(line) for line in process.stdout.read().splitlines()]
    events = [line["event"] for line in lines]
    answered = sum(line.get("status") == 200 for line in lines)
    assert answered == sum(answer.status_code == 200 for answer in answers)  # whatever it has scored has arrived
    assert events[0] == "started" and "reloaded" in events and events[-1] == "stopped"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_bundle_that_is_none_changes_nothing(server, paths):
    process, address, own = server
    (own / "config.json").write_text("{")
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert httpx.post(f"{address}/score", content=paths[0].read_bytes(), headers=PNG).status_code == 200
    assert 'outcome="failed"} 1.0' in httpx.get(f"{address}/metrics").text
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as cut:
        cut.sendall(
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"
        )
    assert httpx.post(f"{address}/score", content=paths[0].read_bytes(), headers=PNG).status_code == 200


def test_what_can_not_be_served(bundle, tmp_path):
    assert "give --token-file" in call("serve", bundle, "--host", "0.0.0.0", code=2)
    (tmp_path / "token").write_text("short\n")
    assert "at least 16 ASCII characters" in call("serve", bundle, "--token-file", tmp_path / "token", code=2)
    assert call("serve", tmp_path / "nothing", code=2)
    assert os.path.exists(bundle)
