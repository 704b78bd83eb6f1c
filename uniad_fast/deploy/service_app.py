"""The web application around a `Service`: routes, token, log, and a page to drop an image on."""

import asyncio
import contextlib
import functools
import hmac
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..printable import printable
from .service import RAW, Service, log
from .service_schema import Problem, Results

_OPEN = ("/", "/healthz", "/readyz")  # without a token: a page that asks for it, and whether the process is well
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(service: Service, token: str | None = None, hosts: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        token: that requests must bring as `Authorization: Bearer TOKEN`; None asks for none.
        hosts: names that it may be called by, so that no web page reaches it under another; None for all.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):  # not everywhere
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, service.reload))
        log("started")
        yield
        await loop.run_in_executor(None, service.close)
        log("stopped")

    app = FastAPI(title="uniad_fast", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.middleware("http")(functools.partial(_watch, service, token))
    _add_routes(app, service)
    return app


async def _watch(
    service: Service, token: str | None, request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Ask for the token, count, time and log."""
    began = time.perf_counter()
    given = request.headers.get("authorization", "")
    path = request.scope["path"]  # a URL would be made of what the client calls the host
    is_open = token is None or path in _OPEN
    if is_open or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        try:
            response = await call_next(request)
        except Exception as error:  # counted and logged as any other answer
            log("fault", path=path, error=f"{type(error).__name__}: {printable(error)}")
            response = JSONResponse({"detail": "a fault of this service, which its log describes"}, 500)
    else:
        wanted = {"WWW-Authenticate": "Bearer"}
        response = JSONResponse({"detail": "this service wants a token"}, 401, wanted)
    seconds = time.perf_counter() - began
    service.metrics.requests.labels(status=str(response.status_code)).inc()
    if path == "/score":
        service.metrics.latency.observe(seconds)
        log("request", path="/score", status=response.status_code, ms=round(seconds * 1000, 1))
    return response


def _add_routes(app: FastAPI, service: Service) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": what}
        for status, what in (
            (400, "the body is cut off, or the host is not served"),
            (401, "a token is wanted"),
            (404, "no such class"),
            (413, "too large"),
            (415, "neither an image nor a form of images"),
            (422, "no readable image, or a wrong parameter"),
            (429, "too much at once: try again"),
            (503, "stopping, or no answer in time"),
        )
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"images": {"type": "array", "items": binary["schema"]}}}}
    body = {"required": True, "content": {"image/*": binary, RAW: binary, "multipart/form-data": form}}

    @app.post("/score", responses=refusals, openapi_extra={"requestBody": body})
    async def score(
        request: Request,
        class_name: Annotated[str | None, Query(alias="class", description="of all images")] = None,
        map: Annotated[Literal["png", "none"], Query(description="png: heat maps too")] = "none",
        regions: Annotated[Literal["0", "1"], Query(description="1: regions too")] = "0",
    ) -> Results:
        """Score an image (the body), or several (files of a multipart form)."""
        return await service.answer(request, class_name, map == "png", regions == "1")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: refusals[503]})
    async def readyz() -> dict[str, str]:
        """It takes images."""
        if not service.accepts:
            raise HTTPException(503, "the service is stopping")
        return {"status": "ok"}

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: refusals[401]}, response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = files(__package__).joinpath("service_page", "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)
