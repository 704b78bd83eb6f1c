"""A detector as a web service: a request's images in, verdicts out, bounded in every direction.

More than it can hold is refused with a status and a reason, and never ends it. `service_app.create_app` makes an
application of it for any ASGI server, `uniad-fast serve` runs that in uvicorn.
"""

import asyncio
import base64
import io
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import HTTPException, Request
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from torch import Tensor

from ..data.images import decode, pixels_of, to_tensor
from ..detect.detector import AnomalyDetector
from ..detect.heatmap import heat_map
from ..detect.settings import DetectorSettings
from ..errors import UniadFastError
from ..printable import printable
from .micro_batches import MicroBatches, QueueFull, Scored, UnknownClass
from .service_metrics import ServiceMetrics
from .service_schema import ImageResult, RegionResult, Results

_LOG = logging.getLogger("uniad_fast.service")
RAW = "application/octet-stream"
_TOO_MANY = {"Retry-After": "1"}
_PICTURES = 2  # of the largest, which may be decoded at a time
_PAUSE = 0.005  # seconds


@dataclass(frozen=True)
class Limits:
    """What a service holds at most.

    Attributes:
        batch: images measured at a time.
        wait: seconds that a batch waits for further images.
        queue: images that wait to be measured.
        body: bytes of a request.
        bodies: bytes of all requests that are being answered.
        pixels: of an image, by its header.
        seconds: from a request's first byte to its answer.
    """

    batch: int = 16
    wait: float = 0.005
    queue: int = 64
    body: int = 32 * 2**20
    bodies: int = 256 * 2**20
    pixels: int = 50_000_000
    seconds: float = 30.0


class Service:
    """A loaded bundle behind a queue, for `create_app`.

    Args:
        bundle: folder that train wrote; read again by `reload`.
        prepare: gets each detector that is loaded, for instance to set its engine.

    Raises:
        UniadFastError: it is no bundle, or has no threshold.
    """

    def __init__(
        self, bundle: Path, limits: Limits | None = None, prepare: Callable[[AnomalyDetector], object] | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = ServiceMetrics()
        self._bundle, self._prepare = bundle, prepare
        self.batches = MicroBatches(
            self._loaded(), self.limits.batch, self.limits.wait, self.limits.queue, self.metrics.batch.observe
        )
        self.pool = ThreadPoolExecutor(thread_name_prefix="decode")
        self.metrics.waiting.set_function(lambda: self.batches.waiting)
        self.bytes_held = self.pixels_held = 0
        self.accepts = True

    def _loaded(self) -> AnomalyDetector:
        detector = AnomalyDetector.load(self._bundle)
        if not detector.is_calibrated:
            raise UniadFastError(f"{self._bundle} has no threshold: set one first with uniad-fast calibrate")
        if self._prepare is not None:
            self._prepare(detector)
        height, width = detector.settings.image_size
        detector.predict(Image.new("RGB", (width, height)))  # the first call builds and loads what later ones use
        return detector

    def reload(self) -> bool:
        """Load the bundle again, and answer by it from then on; what is being answered is not disturbed.

        Returns:
            Whether it could be loaded; else the detector stays, and the log says why.
        """
        try:
            self.batches.exchange(self._loaded())
        except Exception as error:  # a service goes on with what it has
            self.metrics.reloads.labels(outcome="failed").inc()
            log("reload failed", reason=printable(error))
            return False
        self.metrics.reloads.labels(outcome="done").inc()
        log("reloaded", bundle=str(self._bundle))
        return True

    def close(self) -> None:
        """Answer what has been accepted, and stop the threads."""
        self.accepts = False
        self.batches.stop()
        self.pool.shutdown()

    async def answer(self, request: Request, class_name: str | None, with_map: bool, regions: bool) -> Results:
        """The verdicts on a request's images.

        Raises:
            HTTPException: 400, 404, 413, 415, 422, 429, 503, with a reason; for one bad image the whole form.
        """
        if not self.accepts:
            raise HTTPException(503, "the service is stopping")
        held = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                body, held = await self._read(request)
                images = await _images_of(request, body, self.limits.queue)
                tasks = [self._score(name, content, class_name, with_map, regions) for name, content in images]
                found = await asyncio.gather(*tasks, return_exceptions=True)
        except ClientDisconnect:
            raise HTTPException(400, "the request ended before its body did") from None
        except TimeoutError:
            raise HTTPException(503, f"no answer within {self.limits.seconds:g} seconds", _TOO_MANY) from None
        finally:
            self.bytes_held -= held
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return Results(results=[one for one in found if isinstance(one, ImageResult)])

    async def _read(self, request: Request) -> tuple[bytes, int]:
        """The request's body, and how many bytes of it are counted as held."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.limits.body:
            raise HTTPException(413, f"the request has {declared} bytes, and {self.limits.body} are the most")
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                self.bytes_held += len(part)
                if size > self.limits.body:
                    raise HTTPException(413, f"the request has more than {self.limits.body} bytes")
                if self.bytes_held > self.limits.bodies:
                    raise HTTPException(429, "too many bytes are being read already", _TOO_MANY)
                parts.append(part)
        except BaseException:
            self.bytes_held -= size
            raise
        return b"".join(parts), size

    async def _score(
        self, name: str, content: bytes, class_name: str | None, with_map: bool, regions: bool
    ) -> ImageResult:
        loop = asyncio.get_running_loop()
        settings = self.batches.detector.settings
        pixels = await self._let_in(name, content)
        try:
            read = await loop.run_in_executor(self.pool, _decoded, name, content, settings, with_map)
            scored = await asyncio.wrap_future(self.batches.submit(read.image, read.size, class_name))
        except QueueFull as error:
            raise HTTPException(429, str(error), _TOO_MANY) from None
        except UnknownClass as error:
            raise HTTPException(404, str(error)) from None
        except UniadFastError as error:
            raise HTTPException(422, str(error)) from None
        finally:
            self.pixels_held -= pixels
        prediction = scored.prediction
        if not math.isfinite(prediction.score):
            raise HTTPException(422, f"{printable(name)}: its score is {prediction.score}")
        self.metrics.judged(prediction)
        drawn = None
        if read.picture is not None:
            drawn = await loop.run_in_executor(self.pool, _drawn, read.picture, scored)
        return ImageResult(
            image=name.encode("utf-8", "backslashreplace").decode(),  # half a character is no JSON
            **{"class": prediction.class_name},
            score=prediction.score,
            label=int(bool(prediction.label)),
            threshold=scored.detector.calibration.threshold.value,
            heat_map=drawn,
            regions=[RegionResult(**one.to_json()) for one in prediction.regions] if regions else None,
            note=read.note,
        )

    async def _let_in(self, name: str, content: bytes) -> int:
        """The pixels of an image by its header, counted until it is measured, as soon as those of others leave room.

        Raises:
            HTTPException: it is empty, or has too many.
        """
        if not content:
            raise HTTPException(422, f"{printable(name)}: it is empty")
        pixels = pixels_of(content)
        if pixels > self.limits.pixels:
            raise HTTPException(
                413, f"{printable(name)}: it has {pixels} pixels, and {self.limits.pixels} are the most"
            )
        while self.pixels_held and self.pixels_held + pixels > _PICTURES * self.limits.pixels:
            await asyncio.sleep(_PAUSE)
        self.pixels_held += pixels
        return pixels


class _Read(NamedTuple):
    """An image for the detector: [3, h, w], or the picture for one that looks at tiles; the (height, width) that it
    had, the picture to draw on, a remark.
    """

    image: Tensor | Image.Image
    size: tuple[int, int]
    picture: Image.Image | None
    note: str | None


def _decoded(name: str, content: bytes, settings: DetectorSettings, keep: bool) -> _Read:
    picture = decode(content, name)
    size = (picture.height, picture.width)
    image = to_tensor(picture, settings.image_size) if settings.overlap is None else picture
    return _Read(image, size, picture if keep else None, picture.info.get("note"))


async def _images_of(request: Request, body: bytes, most: int) -> list[tuple[str, bytes]]:
    """(name, content) of each image in a request."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind.startswith("image/") or kind == RAW:
        return [("image", body)]
    if kind != "multipart/form-data":
        raise HTTPException(
            415, f"send an image, or a form of images, not {printable(kind) or 'something without type'}"
        )

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        parser = MultiPartParser(request.headers, stream(), max_files=most, max_fields=most)  # type: ignore[arg-type]
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        raise HTTPException(422, f"no multipart form: {printable(error)}") from None
    uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not uploads:
        raise HTTPException(422, "the form has no file")
    return [(upload.filename or "image", await upload.read()) for upload in uploads]


def _drawn(picture: Image.Image, scored: Scored) -> str:
    buffer = io.BytesIO()
    drawn = heat_map(picture, scored.prediction.anomaly_map, scored.detector.calibration.color_range)
    drawn.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def log(event: str, **facts: Any) -> None:
    """A JSON line: time, event and facts."""
    _LOG.info(json.dumps({"time": round(time.time(), 3), "event": event} | facts))
