"""The application: routes, limits, errors, metrics."""

import asyncio
import hmac
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response as AnyResponse

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor

from . import responses
from .batcher import Batcher, Closed, Job, QueueFull
from .schemas import ChatRequest, Common, CompletionRequest
from .writing import Answer, ClientLeft, PromptRefused, Writing

logger = logging.getLogger("uvicorn.error")
# As nginx has it: nobody is there to read the response.
CLIENT_LEFT = 499


def limit(default: float, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """What a server takes on; each is an option of `protogen serve`."""

    deadline_ms: float = limit(10.0, "milliseconds that a request waits for others to share its pass")
    pass_tokens: int = limit(8192, "tokens of a pass at most: prompts, answers and padding")
    queue: int = limit(256, "requests that are not answered yet, at most")
    body_bytes: int = limit(2**20, "bytes of a request at most")
    seconds: float = limit(60.0, "seconds until a request is answered, at most")


class Metrics:
    """What `/metrics` says, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = {"registry": self.registry, "namespace": "protogen"}
        self.requests = Counter("requests", "requests, by route and status", ["route", "status"], **own)
        self.seconds = Histogram("request_seconds", "until a request was answered, by route", ["route"], **own)
        sizes = [2**n for n in range(11)]
        self.pass_requests = Histogram("pass_requests", "requests that shared a pass", buckets=sizes, **own)
        self.pass_seconds = Histogram("pass_seconds", "time of a pass", **own)
        self.answers = Counter("answers", "answers written", **own)
        self.tokens = Counter("tokens", "tokens of prompts and answers", ["kind"], **own)
        self.waiting = Gauge("waiting_requests", "requests that are not answered yet", **own)


class Gate:
    """Refuses requests without the key or with too long a body, before the body is read; counts all of them."""

    def __init__(self, app, metrics: Metrics, key: str | None, body_bytes: int):
        self.app, self.metrics, self.key, self.body_bytes = app, metrics, key, body_bytes
        self.too_long = f"the body has more than {body_bytes} bytes."

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, num_read = time.monotonic(), CLIENT_LEFT, 0

        async def limited():
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self.body_bytes:
                raise HTTPException(413, self.too_long)
            return message

        async def noting_status(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, limited, noting_status)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)

    def _refusal(self, scope) -> AnyResponse | None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                return refusal(401, "the API key is missing or wrong.", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            return refusal(413, self.too_long)
        return None


def refusal(status: int, message: str, **fields) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse(responses.error_body(status, message, **fields), status, headers)


def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    return refusal(error.status_code, str(error.detail))


def on_failure(request: Request, error: Exception) -> JSONResponse:
    return refusal(500, "the server failed; its log has the place.")


def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong, without what was sent."""
    first = error.errors()[0]
    # A name may hold half a surrogate pair, which no response can.
    place = ".".join(str(part).encode(errors="replace").decode() for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return refusal(400, f"the body is not JSON: {first['ctx']['error']} at character {place}.")
    if first["type"] == "extra_forbidden":
        return refusal(422, f"{place} is not supported here.", param=place)
    return refusal(422, f"{place or 'body'}: {first['msg']}.", param=place or None)


def refusal_for(error: Exception) -> JSONResponse:
    """Why a job was not answered."""
    if isinstance(error, PromptRefused):
        return refusal(400, str(error), code="context_length_exceeded" if "tokens" in str(error) else None)
    if isinstance(error, ValueError):
        return refusal(422, str(error))
    if isinstance(error, TimeoutError):
        return refusal(504, "the answer was not ready in time; ask again later, or for less.")
    if isinstance(error, QueueFull):
        return refusal(429, "too many requests are waiting; ask again later.")
    if isinstance(error, Closed):
        return refusal(503, "the server is stopping.")
    # The message may hold what was asked, which logs do not.
    logger.error("%s in a pass:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return refusal(500, "the model failed; the server's log has the place.")


async def has_left(request: Request) -> None:
    """Returns when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def within(request: Request, job: Job, awaitable, seconds: float):
    """
    What an awaitable gives.

    Raises:
        TimeoutError: if the job is older than this many seconds.
        ClientLeft: if the client has left.
    """
    wanted, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(has_left(request))
    try:
        left = job.since + seconds - time.monotonic()
        await asyncio.wait({wanted, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise ClientLeft if gone.done() else TimeoutError
    finally:
        gone.cancel()
        if wanted is not job.answers:
            wanted.cancel()


class Server:
    """
    The model, its queue and its numbers, and what the routes do with them.

    Args:
        model (`ProtoGenForConditionalGeneration`), processor (`ProtoGenProcessor`)
        name (`str`): what requests call the model.
        limits (`Limits`)
    """

    def __init__(
        self, model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, name: str, limits: Limits
    ):
        self.name, self.limits, self.started = name, limits, int(time.time())
        self.metrics = Metrics()
        self.writing = Writing(model, processor, limits.pass_tokens)
        deadline = limits.deadline_ms / 1000
        self.batcher = Batcher(self.writing.read, self.write, deadline, limits.pass_tokens, limits.queue)
        self.metrics.waiting.set_function(lambda: len(self.batcher.taken))

    def write(self, jobs: list[Job]) -> list[list[Answer]]:
        self.metrics.pass_requests.observe(len(jobs))
        with self.metrics.pass_seconds.time():
            return self.writing.write(jobs)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(self.batcher.run())
        yield
        await self.batcher.close()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    def counted(self, job: Job, answers: list[Answer]) -> list[Answer]:
        self.metrics.answers.inc(len(answers))
        self.metrics.tokens.labels("prompt").inc(job.prompt_tokens)
        self.metrics.tokens.labels("answer").inc(sum(answer.num_tokens for answer in answers))
        return answers

    async def complete(self, request: Request, body: Common) -> AnyResponse:
        """Answers a request, at once or as a stream."""
        if body.model != self.name:
            return refusal(404, f"there is no model {body.model!r}; there is {self.name!r}.", code="model_not_found")
        kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        response = responses.Response(body, f"{kind}-{uuid.uuid4().hex}", int(time.time()))
        pieces, loop = asyncio.Queue(), asyncio.get_running_loop()
        job = None
        try:
            job = self.writing.job(body)
            job.on_text = lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text)
            self.batcher.put(job)
            job.answers.add_done_callback(lambda _: pieces.put_nowait(None))
            if body.stream:
                # What goes wrong before the first piece has a status of its own.
                first = await within(request, job, pieces.get(), self.limits.seconds)
                if first is None:
                    job.answers.result()
                events = self.events(request, job, response, pieces, first)
                return StreamingResponse(events, media_type="text/event-stream")
            answers = await within(request, job, job.answers, self.limits.seconds)
        except ClientLeft:
            self.drop(job)
            return AnyResponse(status_code=CLIENT_LEFT)
        except Exception as error:
            self.drop(job)
            return refusal_for(error)
        return JSONResponse(response.whole(job.prompt_tokens, self.counted(job, answers)))

    async def events(
        self, request: Request, job: Job, response: responses.Response, pieces: asyncio.Queue, piece: str | None
    ) -> AsyncIterator[str]:
        """The events of a stream whose first piece of text is there; None is the end."""
        num_sent = 0
        try:
            for text in response.first(len(job.instructions) * job.number):
                yield text
            while piece is not None:
                num_sent += len(piece)
                yield response.text(piece)
                piece = await within(request, job, pieces.get(), self.limits.seconds)
            for text in response.last(job.prompt_tokens, self.counted(job, job.answers.result()), num_sent):
                yield text
        except ClientLeft:
            pass
        except Exception as error:
            yield f"data: {refusal_for(error).body.decode()}\n\n"
        finally:
            self.drop(job)

    def drop(self, job: Job | None) -> None:
        """Nobody waits for this one any more."""
        if job is not None and job.answers is not None:
            job.answers.cancel()


def create_app(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    name: str,
    limits: Limits = Limits(),
    key: str | None = None,
    cors_origins: list[str] = (),
) -> FastAPI:
    """
    The application that answers for a model; `app.state.server` has its parts.

    Args:
        model (`ProtoGenForConditionalGeneration`), processor (`ProtoGenProcessor`)
        name (`str`): what requests call the model.
        limits (`Limits`, *optional*)
        key (`str`, *optional*): requests under `/v1` have to bring it.
        cors_origins (`list[str]`, *optional*): origins whose pages may ask from a browser; none by default.
    """
    server = Server(model, processor, name, limits)
    handlers = {HTTPException: on_http_error, RequestValidationError: on_invalid, Exception: on_failure}
    no_pages = {"docs_url": None, "redoc_url": None}
    app = FastAPI(title="ProtoGen", lifespan=server.lifespan, exception_handlers=handlers, **no_pages)
    app.state.server = server
    app.add_middleware(Gate, metrics=server.metrics, key=key, body_bytes=limits.body_bytes)
    if cors_origins:
        headers = ["Authorization", "Content-Type"]
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=headers
        )
    own = {"id": name, "object": "model", "created": server.started, "owned_by": "protogen"}

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest):
        return await server.complete(request, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest):
        return await server.complete(request, body)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [own]}

    @app.get("/v1/models/{model_name:path}")
    async def one_model(model_name: str):
        return own if model_name == name else refusal(404, f"there is no model {model_name!r}.", code="model_not_found")

    @app.get("/health")
    async def health():
        return refusal(503, "the server is stopping.") if server.batcher.is_closed else {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(server.metrics.registry), media_type="text/plain; version=0.0.4")

    return app
