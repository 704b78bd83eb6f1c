"""The service under load: good images among hostile ones, by several clients at once; beside `predict` and `score`.

python -m bench.reports.service_load BUNDLE IMAGES [--clients 8] [--seconds 60] [--engine NAME]

A server in a process of its own, on loopback. One request in four is hostile: junk, a truncated image, too many
pixels, too many bytes, a wrong type. Memory is that of the server, after a tenth of the time and at the end.
"""

import argparse
import http.client
import io
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.image_files import list_images

_RUN = [sys.executable, "-c", "from uniad_fast.cli.main import main; main()"]
_TOLERANCE = 0.05  # of a score, against `predict`


def hostile(good: bytes) -> list[tuple[bytes, str]]:
    """(body, content type) of requests that are to be refused."""
    buffer = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(buffer, "PNG")
    return [
        (b"junk", "image/png"),
        (good[: len(good) // 2], "image/png"),
        (buffer.getvalue(), "image/png"),
        (bytes(40_000_000), "image/png"),
        (good, "text/html"),
        (b"", "image/jpeg"),
    ]


def resident(process: subprocess.Popen) -> int:
    """Bytes of the process in memory."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


class Client(threading.Thread):
    """Asks again and again; `latencies` are of good images, `wrong` what was answered otherwise than it should be."""

    def __init__(self, address: str, images: dict[Path, float], number: int, until: float, with_hostile: bool) -> None:
        super().__init__()
        self._address, self._until = address, until
        paths = list(images)[number:] + list(images)[:number]
        self._good = [(path.read_bytes(), images[path]) for path in paths]
        self._hostile = itertools.cycle(hostile(self._good[0][0])) if with_hostile else None
        self.latencies: list[float] = []
        self.refused = self.busy = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)  # a client that costs little beside a server
        for number, (content, expected) in enumerate(itertools.cycle(self._good)):
            if time.monotonic() > self._until:
                return
            if self._hostile is not None and number % 4 == 3:
                self._refused(*next(self._hostile))
            began = time.perf_counter()
            status, answer = self._ask(connection, content, "image/png")
            if status == 429:
                self.busy += 1
                time.sleep(0.05)
                continue
            self.latencies.append(time.perf_counter() - began)
            found = answer["results"][0]["score"] if status == 200 else float("nan")
            if not abs(found - expected) <= _TOLERANCE * max(1, abs(expected) / 10):
                self.wrong.append(f"{status}: {found} instead of {expected}")

    @staticmethod
    def _ask(connection: http.client.HTTPConnection, content: bytes, kind: str) -> tuple[int, dict[str, Any]]:
        connection.request("POST", "/score", content, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def _refused(self, content: bytes, kind: str) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            status, answer = self._ask(connection, content, kind)
        except OSError:  # it closes on whoever goes on sending what has been refused
            self.refused += 1
            return
        finally:
            connection.close()
        if 400 <= status < 500 and answer["detail"]:
            self.refused += 1
        else:
            self.wrong.append(f"{status} for {kind} of {len(content)} bytes")


def under_load(
    address: str, images: dict[Path, float], clients: int, seconds: float, with_hostile: bool
) -> list[Client]:
    until = time.monotonic() + seconds
    asking = [Client(address, images, number, until, with_hostile) for number in range(clients)]
    for one in asking:
        one.start()
    return asking


def report(what: str, asking: list[Client], seconds: float) -> float:
    latencies = sorted(itertools.chain.from_iterable(one.latencies for one in asking))
    rate = len(latencies) / seconds
    wrong = [problem for one in asking for problem in one.wrong]
    half, most = latencies[len(latencies) // 2] * 1e3, latencies[int(len(latencies) * 0.99)] * 1e3
    print(
        f"{what}: {len(latencies)} images, {rate:.1f} a second, p50 {half:.0f} ms, p99 {most:.0f} ms; "
        f"{sum(one.refused for one in asking)} refused, {sum(one.busy for one in asking)} told to come again, "
        f"{len(wrong)} wrong {wrong[:3]}",
        flush=True,
    )
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--engine", default="torch")
    options = parser.parse_args()
    paths = list_images(options.images)[:200]
    detector = AnomalyDetector.load(options.bundle)
    expected = {path: prediction.score for path, prediction in zip(paths, detector.predict(paths), strict=True)}
    detector.predict(paths[0])
    times = []
    for path in paths[:50]:
        began = time.perf_counter()
        detector.predict(path)
        times.append(time.perf_counter() - began)
    print(f"predict in a loop: p50 {statistics.median(times) * 1e3:.0f} ms, {1 / statistics.mean(times):.1f} a second")
    rate = loaded(options, expected)
    with tempfile.TemporaryDirectory() as folder:
        score = [*_RUN, "score", options.bundle, *paths, "-o", folder, "--no-heat-maps", "-q"]
        score += ["--engine", options.engine]
        text = subprocess.run(list(map(str, score)), capture_output=True, text=True).stdout
    pace = next(line for line in text.splitlines() if " a second" in line)
    print(f"score: {pace}\nservice / score: {rate / float(pace.split(' s, ')[1].split()[0]):.2f}")


def loaded(options: argparse.Namespace, expected: dict[Path, float]) -> float:
    """Images a second that the service answers to good clients, after it has answered all kinds of them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [*_RUN, "serve", options.bundle, "--port", port, "--engine", options.engine]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.2)
        address = f"127.0.0.1:{port}"
        asking = under_load(address, expected, options.clients, options.seconds, True)
        time.sleep(options.seconds / 10)
        before = resident(server)
        for one in asking:
            one.join()
        report(f"{options.clients} clients, hostile ones among them", asking, options.seconds)
        after = resident(server)
        print(f"memory {before / 2**20:.0f} MiB, at the end {after / 2**20:.0f} ({after / before - 1:+.1%})")
        asking = under_load(address, expected, options.clients, options.seconds / 3, False)
        for one in asking:
            one.join()
        return report(f"{options.clients} clients, good images alone", asking, options.seconds / 3)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
