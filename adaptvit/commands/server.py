"""The endpoints of `adaptvit serve`, made with FastAPI on uvicorn: what is posted is decoded and waits in `Batches`.

POST /predict    an encoded image -> its classes, what it cost, and at what budget
GET /health      whether it answers, how many wait, the budget
GET /metrics     in Prometheus's format
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from adaptvit.commands.batches import Batches, ServeConfig
from adaptvit.extras import needed
from adaptvit.measure.predictor import Predictor
from adaptvit.process import fault
from adaptvit.terminal import say

with needed("serving"):
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Gauge,
        Histogram,
        ProcessCollector,
        generate_latest,
    )
    from prometheus_client import Counter as Count
    from starlette.requests import ClientDisconnect

LARGEST = 32 * 2**20
"""Bytes of an image."""
UPLOAD_S = 30
"""Seconds that an image may take to arrive."""
LEAVE_S = 60
"""Seconds in which requests are answered that are there when the server is stopped."""
WAITS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
"""Seconds that answers are counted by."""


class Figures:
    """What `/metrics` tells."""

    def __init__(self, batches: Batches) -> None:
        self.registry, self.batches = CollectorRegistry(), batches
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Count("adaptvit_requests", "Images asked about, by status of the answer", ["status"], **own)
        self.seconds = Histogram(
            "adaptvit_request_seconds", "From a request's header to its answer", buckets=WAITS, **own
        )
        self.images = Histogram(
            "adaptvit_batch_images", "Images that ran together", buckets=[2**power for power in range(9)], **own
        )
        self.macs = Count("adaptvit_macs", "Executed multiply-accumulates", **own)
        self.dense = Count("adaptvit_dense_macs", "Those of the ViT without this library, on the same images", **own)
        waiting = Gauge("adaptvit_waiting", "Images that wait for the model", **own)
        waiting.set_function(batches.queue.qsize)
        budget = Gauge("adaptvit_budget", "Share of the dense MACs that images cost; 1 where it is not set", **own)
        budget.set_function(lambda: batches.budget or 1.0)
        ProcessCollector(registry=self.registry)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count a batch."""
        self.images.observe(len(rows))
        self.macs.inc(sum(int(row["macs"]) for row in rows))
        self.dense.inc(len(rows) * self.batches.predictor.dense_macs)


async def body_of(request: Request) -> bytes:
    """What is posted.

    Raises:
        HTTPException: it is empty, too large, not an image by its own account, or does not arrive in time.
    """
    told = f"an image has at most {LARGEST // 2**20} MB"
    if int(request.headers.get("content-length", "0")) > LARGEST:
        raise HTTPException(413, f"{told}, this one {request.headers['content-length']} bytes")
    kind = request.headers.get("content-type", "")
    if kind.startswith(("multipart/", "application/json")):
        raise HTTPException(415, f"the body is the image's own bytes, not {kind.partition(';')[0]}")
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_S):
            async for part in request.stream():
                content += part
                if len(content) > LARGEST:
                    raise HTTPException(413, told)
    except TimeoutError:
        raise HTTPException(408, f"an image arrives within {UPLOAD_S} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended before the image") from None
    if not content:
        raise HTTPException(400, "the body is empty: post an image's bytes")
    return bytes(content)


def application(config: ServeConfig) -> FastAPI:
    """The endpoints around an opened model, which has run once.

    Raises:
        FileNotFoundError, ValueError: what `open_model` says of the model, or its curve of the budget.
    """
    predictor = Predictor(
        config.model, config.dtype, batch_size=config.batch_size, device=config.device, top=config.top
    )
    model = ThreadPoolExecutor(1, "model")
    decoders = ThreadPoolExecutor(os.cpu_count(), "decoder")
    batches = Batches(predictor, config.shares, config.seconds, model)
    figures = Figures(batches)
    batches.tell = figures.add
    places = asyncio.Semaphore(config.waiting)
    _warm(batches)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batches.run())
        yield
        running.cancel()  # after the last answer, of which uvicorn has waited
        for pool in (model, decoders):
            pool.shutdown()

    app = FastAPI(title="adaptvit", description=__doc__, docs_url=None, redoc_url=None, lifespan=lifespan)

    async def answer(request: Request) -> dict[str, Any]:
        if places.locked():
            raise HTTPException(
                503, f"{config.waiting} requests are being answered: ask again later", {"Retry-After": "1"}
            )
        async with places:
            content = await body_of(request)
            try:
                pixels = await asyncio.get_running_loop().run_in_executor(decoders, predictor.prepare, content)
            except Exception as error:  # Pillow raises half a dozen kinds
                raise HTTPException(422, " ".join((str(error) or fault(error)).split())) from None
            try:
                row = await batches.answer(pixels)
            except Exception as error:
                raise HTTPException(500, f"the model failed: {fault(error)}") from error
        if row["error"] is not None:
            raise HTTPException(500, row["error"])
        return {
            "class": _plain(row["class"]),
            "probability": float(row["probability"]),
            "top": [{"class": _plain(name), "probability": float(likely)} for name, likely in row["top"]],
            "macs": int(row["macs"]),
            "share": int(row["macs"]) / predictor.dense_macs,
            "tokens": row["tokens"].tolist(),
        }

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        loop, status = asyncio.get_running_loop(), 500
        start = loop.time()
        try:
            told = await answer(request)
            status = 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            figures.requests.labels(status).inc()
        figures.seconds.observe(loop.time() - start)
        return told

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batches.queue.qsize(), "budget": batches.budget}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _plain(name: str | np.integer) -> str | int:
    return name if isinstance(name, str) else int(name)


def _warm(batches: Batches) -> None:
    """Decode and run an image twice, of which the first pass is slower, so that the first request waits for nothing."""
    empty = BytesIO()
    Image.new("RGB", (256, 256), "grey").save(empty, "PNG")
    pixels = batches.predictor.prepare(empty.getvalue())[None]
    for _ in range(2):
        start = time.perf_counter()
        rows = batches.compute(pixels)
        batches.pace = 0.0
        batches.measured(rows, time.perf_counter() - start)


def serve_model(config: ServeConfig) -> None:
    """Answer until stopped; who has asked by then is answered.

    Raises:
        KeyboardInterrupt: Ctrl+C or SIGTERM came, and everything was answered.
        OSError: the port is taken.
        And what `application` raises.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise OSError(
            f"port {config.port} of {config.host} cannot be listened at: {os.strerror(error.errno or 0)}"
        ) from error
    with closing(listening):
        app = application(config)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=LEAVE_S)
        )
        say(f"http://{config.host}:{listening.getsockname()[1]}/predict answers images; Ctrl+C stops it")
        server.run([listening])
