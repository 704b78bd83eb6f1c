"""uniad-fast serve: a detector that stays up."""

import logging
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..packages import require
from ..printable import printable
from ..signals import stop_if_asked
from .options import EngineName, EnginePrecision, say


def serve(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote. SIGHUP loads it again.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; other than this machine's own, a token is wanted.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the token that requests must bring.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images measured at a time, at most.")] = 16,
    wait: Annotated[float, typer.Option(min=0, max=10, help="Seconds that a batch waits for further images.")] = 0.005,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Images that may wait.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 32 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image.")] = 50_000_000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.")] = 30.0,
    engine: EngineName = "auto",
    engine_precision: EnginePrecision = "float32",
) -> None:
    """Answer POST /score with verdicts, until a signal stops it; logs are JSON lines on stdout.

    Exit code: 0 stopped by a signal, 2 an error.
    """
    require("fastapi", "uvicorn", "prometheus_client", "multipart")
    import uvicorn

    from ..data.images import allow_pixels
    from ..deploy.service import Limits, Service
    from ..deploy.service_app import LOOPBACK, create_app

    token = _token(token_file)
    if token is None and host not in LOOPBACK:
        raise UniadFastError(f"whoever reaches {host} could use it: give --token-file, or listen at 127.0.0.1")
    allow_pixels(max(max_pixels, 178_956_970))  # what has more is refused by its header
    limits = Limits(
        batch=batch_size, wait=wait, queue=queue, body=max_body, bodies=max(8 * max_body, 2**26), pixels=max_pixels,
        seconds=timeout,
    )  # fmt: skip
    _log_to_stdout()
    service = Service(bundle, limits, partial(_prepare, [], engine, batch_size, engine_precision))
    app = create_app(service, token, [*LOOPBACK, "[::1]"] if host in LOOPBACK else None)
    stop_if_asked()
    bound = _listening(host, port)
    at = f"[{host}]" if ":" in host else host
    say(f"listening at http://{at}:{bound.getsockname()[1]}, with a page to drop images on", err=True)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(timeout) + 1, timeout_keep_alive=10,
        backlog=512, server_header=False,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[bound])


def _log_to_stdout() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _prepare(
    before: list[AnomalyDetector], engine: str, batch_size: int, precision: str, detector: AnomalyDetector
) -> None:
    """Set a detector's engine. Of all but the first, one that can't be set is only logged: somebody waits."""
    from ..deploy.engines import use_engine
    from ..deploy.service import log

    try:
        use_engine(detector, engine, batch=batch_size, precision=precision)
    except UniadFastError as error:
        if not before:
            raise
        log("engine not used", reason=printable(error))
    before[:] = [detector]


def _listening(host: str, port: int) -> socket.socket:
    """Bound before anything is said of it: an address that is taken is an error like any other."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UniadFastError(f"{host}, port {port}: {error.strerror or error}") from None
    return found


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < 16 or not token.isascii():
        raise UniadFastError(f"{path}: a token has at least 16 ASCII characters, this one {len(token)}")
    return token
