"""
An address for other programs: pictures as OpenAI's image API gives them. What requests mean is in `openai_images.py`, how
they share calls of the pipeline in `batching.py`.
"""

import asyncio
import copy
import hmac
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..pipelines.pipeline_base import PaellaPipelineBase
from . import openai_images as openai
from .batching import Batcher, Job, QueueFullError
from .metrics import Metrics
from .openai_images import APIError, EditRequest, GenerationRequest, ImageRequest, Limits, VariationRequest
from .rows import pipeline_class

logger = logging.getLogger(__name__)

LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]
KINDS: dict[str, type[ImageRequest]] = {
    "generations": GenerationRequest,
    "edits": EditRequest,
    "variations": VariationRequest,
}


@dataclass(frozen=True)
class Settings:
    """
    How a server works.

    Args:
        model (`str`): The name by which clients know the model.
        batch_size (`int`): The most pictures in a call of the pipeline, at the model's own size.
        exact (`bool`): Whether the bits of a picture must not depend on what is drawn with it, see [`draw`].
        max_waiting (`int`): The most pictures that wait.
        limits ([`Limits`]): What a request may ask for.
        api_key (`str`, *optional*): What clients must send. Without it, only this machine's own names are answered.
        cors_origins (`tuple[str, ...]`): Addresses of pages on which browsers may call the server.
    """

    model: str
    batch_size: int = 8
    exact: bool = False
    max_waiting: int = 64
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()


def create_app(pipe: PaellaPipelineBase, settings: Settings) -> FastAPI:
    """
    The server as an ASGI application, which draws in a thread of its own while it runs.

    Args:
        pipe ([`PaellaPipelineBase`]): Whose components draw, for every task.
        settings ([`Settings`]): How.
    """
    if settings.limits.pictures > settings.max_waiting:
        raise ValueError(
            f"`max_waiting` must be at least the most pictures of a request, {settings.limits.pictures}, got "
            f"{settings.max_waiting}."
        )
    metrics = Metrics()
    batcher = Batcher(settings.batch_size, settings.max_waiting, settings.exact, metrics.observe_call)
    metrics.watch_queue(batcher)
    images = Images(pipe, settings, batcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="paella-diffusers", openapi_url=None, lifespan=lifespan)  # its pages would load from elsewhere
    app.state.batcher = batcher
    for error in (APIError, QueueFullError, ValueError, HTTPException, ClientDisconnect):
        app.add_exception_handler(error, _answer_error)
    if settings.api_key is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)  # names that others point at this machine
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestLog, metrics=metrics)

    @app.get("/health")
    async def health():
        return JSONResponse({"status": "ok" if batcher.is_alive else "stopped"}, 200 if batcher.is_alive else 503)

    router = APIRouter(dependencies=[Depends(partial(_authorise, settings))])

    @router.get("/metrics")
    async def read_metrics():
        return Response(metrics.text(), media_type=metrics.media_type)

    @router.get("/v1/models")
    async def models():
        return {"object": "list", "data": [images.about_model]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str):
        images.check_model(model)
        return images.about_model

    @router.post("/v1/images/{kind}")
    async def draw(kind: str, request: Request):
        if kind not in KINDS:
            raise HTTPException(404)
        return await images.respond(KINDS[kind], request)

    app.include_router(router)
    return app


def run(pipe: PaellaPipelineBase, settings: Settings, listener: socket.socket) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM. Requests that have arrived are answered then, others refused."""
    log = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["formatters"]["default"]["fmt"] = "%(asctime)s %(levelprefix)s %(message)s"
    log["loggers"][__package__] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config = uvicorn.Config(
        create_app(pipe, settings),
        log_config=log,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.limits.seconds) + 10,
    )
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 with the model {settings.model}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


class Images:
    """The three addresses that draw."""

    def __init__(self, pipe: PaellaPipelineBase, settings: Settings, batcher: Batcher):
        self.pipe = pipe
        self.batcher = batcher
        self.limits: Limits = settings.limits
        self.about_model: dict[str, Any] = {
            "id": settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "paella-diffusers",
        }
        self._pipelines: dict[tuple[type, str | None], PaellaPipelineBase] = {}

    async def respond(self, kind: type[ImageRequest], request: Request) -> Response:
        """Read a request, wait for its pictures, and answer; or answer by events as they come."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        with self.batcher.reserve():
            async with _until(deadline):
                values, uploads = await read_body(request, kind, self.limits)
            wanted = openai.read_request(kind, values)
            self.check_model(wanted.model)
            pictures = {}
            if kind is not GenerationRequest:
                pictures = await asyncio.to_thread(openai.read_pictures, kind, uploads, self.limits)
        rows = wanted.rows(self.pipe, self.limits, pictures)
        pipe = self.pipeline(pipeline_class(rows[0].arguments), wanted.scheduler)
        if wanted.stream:
            return EventStream(self.batcher, cast(GenerationRequest, wanted), Job(rows[0], pipe), deadline)
        jobs = [Job(row, pipe) for row in rows]
        self.batcher.submit(jobs)
        try:
            async with _until(deadline):
                results = asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
                drawn = await _unless_gone(request, results)
        finally:
            for job in jobs:
                job.result.cancel()  # changes nothing if it is drawn
        return JSONResponse(await asyncio.to_thread(openai.answer, wanted, rows, drawn))

    def pipeline(self, kind: type[PaellaPipelineBase], scheduler: str | None) -> PaellaPipelineBase:
        """The pipeline of a task with a scheduler, or the model's own; all share the models."""
        if (kind, scheduler) not in self._pipelines:
            options = {}
            if scheduler is not None:
                own = self.pipe.scheduler
                known = {cls.__name__: cls for cls in [type(own), *sorted(own.compatibles, key=str)]}
                if scheduler not in known:
                    message = f"'scheduler' is one of {', '.join(known)}, got {scheduler!r:.80}."
                    raise APIError(400, message, "scheduler")
                options["scheduler"] = known[scheduler].from_config(own.config)
            self._pipelines[kind, scheduler] = kind.from_pipe(self.pipe, **options)
            self._pipelines[kind, scheduler].set_progress_bar_config(disable=True)
        return self._pipelines[kind, scheduler]

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name."""
        if name not in (None, self.about_model["id"]):
            message = f"The model '{name:.80}' does not exist: this server has '{self.about_model['id']}'."
            raise APIError(404, message, "model", "model_not_found")


class EventStream(StreamingResponse):
    """A picture and its previews as server-sent events. A client that leaves, at any moment, takes its job with it."""

    def __init__(self, batcher: Batcher, wanted: GenerationRequest, job: Job, deadline: float):
        self.wanted = wanted
        self.job = job
        self.deadline = deadline
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job.preview_steps = preview_steps(wanted.steps or job.pipe.default_num_inference_steps, wanted.partial_images)
        job.on_preview = partial(loop.call_soon_threadsafe, self.queue.put_nowait)
        job.result.add_done_callback(partial(loop.call_soon_threadsafe, self.queue.put_nowait))
        batcher.submit([job])
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.result.cancel()

    async def events(self) -> AsyncIterator[str]:
        try:
            async with _until(self.deadline):
                index = 0
                while (item := await self.queue.get()) is not self.job.result:
                    yield _event(await asyncio.to_thread(openai.partial_event, self.wanted, index, item))
                    index += 1
                drawn = self.job.result.result()
                yield _event(await asyncio.to_thread(openai.completed_event, self.wanted, self.job.row, drawn))
        except Exception as error:
            yield _event({"type": "error", **_api_error(error).body})


def preview_steps(num_steps: int, count: int) -> frozenset[int]:
    """The steps, counted from 0, after which previews are sent: evenly, and none after the last."""
    return frozenset(index * num_steps // (count + 1) - 1 for index in range(1, count + 1)) - {-1}


def _event(content: Mapping[str, Any]) -> str:
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n"


# --------------------------------------------------------------------------------------------------------------- requests


async def read_body(
    request: Request, kind: type[ImageRequest], limits: Limits
) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """A request's values and files, of a bounded number of bytes; nothing of it is logged."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    expected = "application/json" if kind is GenerationRequest else "multipart/form-data"
    if media_type != expected:
        raise APIError(415, f"The content type must be {expected}, got {media_type!r:.80}.", code="unsupported_media_type")
    request = _bounded(request, limits.body_bytes)
    if kind is GenerationRequest:
        try:
            values = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise APIError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
        if not isinstance(values, dict):
            raise APIError(400, "The body must be a JSON object.", code="invalid_json")
        return values, []
    try:
        async with request.form(max_files=20, max_fields=100) as form:
            values = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
            uploads = [(name, await v.read()) for name, v in form.multi_items() if isinstance(v, UploadFile)]
    except HTTPException as error:
        raise APIError(400, f"The form cannot be read: {error.detail}", code="invalid_form") from None
    return values, uploads


def _bounded(request: Request, most: int) -> Request:
    """The same request; reading more of its body than allowed is refused."""
    too_large = APIError(413, f"The request has more than {most} bytes, the most on this server.", code="too_large")
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large
    read = 0

    async def receive():
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > most:
            raise too_large
        return message

    return Request(request.scope, receive)


async def _authorise(settings: Settings, request: Request):
    """Refuse requests without the key; without a key, those that a page of another address makes a browser send."""
    if settings.api_key is not None:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.encode(), settings.api_key.encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "The API key is missing or wrong.", code="invalid_api_key", headers=headers)
    elif (origin := request.headers.get("origin")) is not None and origin not in settings.cors_origins:
        raise APIError(403, f"Pages of {origin:.80} may not call this server.", code="origin_not_allowed")


async def _unless_gone(request: Request, work: asyncio.Future) -> Any:
    """The result of `work`, which is cancelled if the client goes away first."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        watch.cancel()
        work.cancel()


@asynccontextmanager
async def _until(deadline: float):
    """A time limit, in seconds of the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        headers = {"x-should-retry": "false"}  # OpenAI's clients would ask again for what takes too long
        raise APIError(504, "The request took longer than allowed here.", code="timeout", headers=headers) from None


# ----------------------------------------------------------------------------------------------------------------- errors


async def _answer_error(request: Request, error: Exception) -> Response:
    error = _api_error(error)
    return JSONResponse(error.body, error.status, error.headers)


def _api_error(error: Exception) -> APIError:
    """Any error, as OpenAI's clients read it. Of those that nobody foresaw, nothing is told."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        return APIError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ValueError):  # an argument, refused by the pipeline
        return APIError(400, str(error))
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail), code="not_found", headers=error.headers)
    if isinstance(error, ClientDisconnect):
        return APIError(499, "The client has left.", code="client_disconnected")
    return APIError(500, "The server failed; its log says how.", code="internal_error")


# ------------------------------------------------------------------------------------------------------------------- log


class RequestLog:
    """ASGI middleware: a number for each request, in the log and in the answer; its address, status and time, no more."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, begun, status = uuid.uuid4().hex, time.monotonic(), None

        async def send_with_number(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_number)
        except Exception as error:  # unforeseen; Starlette would answer it later, without the number
            if status is not None:
                raise
            logger.exception("%s", number)
            answer = await _answer_error(Request(scope), error)
            await answer(scope, receive, send_with_number)
        finally:
            seconds, status = time.monotonic() - begun, status or 499  # the client left
            logger.info("%s %s %r %d %.3f s", number, scope["method"], scope["path"][:80], status, seconds)
            self.metrics.observe_request(scope["path"], status, seconds)
