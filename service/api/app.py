"""The gateway's application: every dependency an argument, so that tests pass their own."""

import asyncio
import gc
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.api import admin, budgets, chat, cold_start, feedback, health, norms, users
from service.api.admission import Admission
from service.api.auth import Authenticator
from service.api.direct import Direct, error_response
from service.api.headers import header
from service.api.patience import OutOfPatience, Patience
from service.api.presence import Attention
from service.api.protocol import HEAD_LIMIT, HeadLimit
from service.api.traces import TraceFrame
from service.contexts import Contexts
from service.engine import Engine
from service.errors import BodyTooLarge, FastslowError, InvalidFields, InvalidRequest, NotFound, RequestTimeout
from service.jobs import CeleryJobs, Jobs
from service.keys import Keys, load_keys
from service.metrics import Metrics
from service.prompt_encoder import load_prompt_encoder
from service.recall import Encoder, Recall
from service.replica_metrics import ReplicaStates
from service.serving import Serving
from service.settings import Settings
from service.store import Store, open_store
from service.tokens import Tokens, load_tokens
from service.tracing import Tracing, open_tracing
from service.vllm import VllmEngine

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    store: Store,
    engine: Engine,
    tokens: Tokens,
    keys: Keys,
    jobs: Jobs,
    encoder: Encoder | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over these dependencies, which it closes when it ends."""
    metrics = Metrics()
    store.users.folds.on_rebuild = metrics.folds.labels("rebuild").observe
    metrics.registry.register(ReplicaStates(engine.replicas))
    recall = Recall(store, encoder, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, HeadLimit]]:
        yield {HEAD_LIMIT: HeadLimit(settings.client_send_seconds, metrics.slow_clients.labels("head").inc)}
        await app.state.serving.norm_checks.aclose()
        await app.state.serving.recording.aclose()
        await engine.close()
        await store.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Fastslow",
        description="Online personalization for self-hosted LLMs, behind OpenAI's interface.",
        version="0.1.0",
        lifespan=lifespan,
        # A body without a Content-Type is taken for JSON, as curl's users expect.
        strict_content_type=False,
    )
    app.state.metrics = metrics
    app.state.store = store
    app.state.jobs = jobs
    app.state.authenticator = Authenticator(keys, settings)
    app.state.admission = Admission(store.rate_limits, engine, keys, settings, metrics)
    contexts = Contexts(tokens, settings, recall)
    app.state.serving = Serving(store, engine, tokens, keys, settings, metrics, contexts)
    for module in (chat, feedback, users, admin, budgets, cold_start, norms, health):
        app.include_router(module.router)
    app.add_exception_handler(FastslowError, _render_error)
    app.add_exception_handler(RequestValidationError, _render_validation)
    app.add_exception_handler(HTTPException, _render_http)
    app.add_exception_handler(Exception, _render_fault)
    app.add_middleware(Direct, route=_route(chat.chat, app), function=chat.chat)
    if tracing is not None:
        app.add_middleware(TraceFrame, tracing=tracing)
    app.add_middleware(RequestFrame, metrics=metrics, settings=settings)
    return app


def _route(function: Callable[..., Any], app: FastAPI) -> APIRoute:
    return next(route for route in app.routes if isinstance(route, APIRoute) and route.endpoint is function)


def app_from_env() -> FastAPI:
    """The application by the environment's settings: uvicorn's factory."""
    settings = Settings()
    logs.configure(settings)
    app = create_app(
        settings,
        store=open_store(settings),
        engine=VllmEngine(settings),
        tokens=load_tokens(settings.model_path),
        keys=load_keys(settings.keys_path),
        jobs=CeleryJobs(settings),
        encoder=load_prompt_encoder(settings),
        tracing=open_tracing(settings, service="fastslow-gateway"),
    )
    # A full collection looks through all that was made until here, 0.1 s with every request waiting; frozen, it is left out.
    gc.collect()
    gc.freeze()
    return app


class RequestFrame:
    """Around every request: its id and start, limits on its body and on its client's slowness, what is due at its end, the count of it.

    In the request's state, `headers` go with whatever reply it gets, and the functions in `ended` are called when the reply's last byte, or
    the client, has left.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, settings: Settings) -> None:
        self._app = app
        self._metrics = metrics
        # As many as there are routes and statuses.
        self._counter = lru_cache(1024)(metrics.requests.labels)
        self._max_body_bytes = settings.max_body_bytes
        self._send_seconds = settings.client_send_seconds
        self._take_seconds = settings.client_take_seconds
        self._patience = Patience()
        self._attention = Attention()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        logs.request_id.set(request_id)
        headers: dict[str, str] = {}
        ended: list[Callable[[], None]] = []
        # Its own: not every server copies what the lifespan left there.
        own = {
            "request_id": request_id,
            "started": time.perf_counter(),
            "headers": headers,
            "ended": ended,
            "attention": self._attention,
        }
        scope["state"] = scope.get("state", {}) | own
        loop, patience = asyncio.get_running_loop(), self._patience
        body_until = loop.time() + self._send_seconds
        received, complete = 0, False

        async def limited_receive() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await patience.wait(receive(), until=body_until)
            except OutOfPatience:
                raise self._too_slow() from None
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        async def framed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                own_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *own_headers]
                own["status"] = message["status"]
                self._count(scope, message["status"])
            await patience.wait(send(message), until=loop.time() + self._take_seconds)

        try:
            declared = header(scope, b"content-length") or "0"
            if declared.isdigit() and int(declared) > self._max_body_bytes:
                error = self._too_large()
                await error_response(error)(scope, receive, framed_send)
            else:
                await self._app(scope, limited_receive, framed_send)
        except OutOfPatience:
            # The server closes the connection over the reply that is not complete.
            self._metrics.slow_clients.labels("reply").inc()
            log.info("request %s ends: its client took nothing for %g s", request_id, self._take_seconds)
        except Exception:
            # The reply to a fault of ours is made outside of this frame.
            if "status" not in own:
                self._count(scope, FastslowError.status)
            raise
        finally:
            for end in ended:
                end()

    def _count(self, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._counter(route, status).inc()

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request's body is over the limit of {self._max_body_bytes} bytes.")

    def _too_slow(self) -> RequestTimeout:
        self._metrics.slow_clients.labels("body").inc()
        return RequestTimeout(f"The request's body was not there within {self._send_seconds:g} s.")


async def _render_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FastslowError)
    return error_response(error)


async def _render_validation(request: Request, error: Exception) -> JSONResponse:
    """The first bad field, named; 400 for OpenAI's own call and for what is not JSON, 422 for ours."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # Of a field that may be one of several types, the branch that got furthest is the one that was meant.
    first = max((e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]), key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        problem = first.get("ctx", {}).get("error", first["msg"])
        return await _render_error(
            request, InvalidRequest(f"The body is not valid JSON: {problem}.", code="invalid_json")
        )
    place, *path = first["loc"]
    named = place != "body" and path
    param = str(path[0]) if named else _field(tuple(path), error.body, missing=first["type"] == "missing") or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is not a parameter of this call"
    if not param and first["type"] in ("model_attributes_type", "dict_type", "missing"):
        message = "The body must be a JSON object, sent with Content-Type: application/json"
    where = f"'{param}': " if param else ""
    openai_call = request.url.path == "/v1/chat/completions"
    kind = InvalidRequest if openai_call else InvalidFields
    return await _render_error(request, kind(f"{where}{message}.", param=param, code="invalid_value"))


def _field(path: tuple[int | str, ...], body: Any, *, missing: bool) -> str:
    """The path of a bad field as the client wrote it, without the names that pydantic gives the branches of a union."""
    parts: list[str] = []
    value = body
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if missing and part == path[-1]:
                parts.append(str(part))
            continue
        parts.append(str(part))
    return ".".join(parts)


async def _render_http(request: Request, error: Exception) -> JSONResponse:
    """The framework's own refusals (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, FastslowError):  # raised while FastAPI read the body
        return await _render_error(request, error.__cause__)
    if error.status_code == 404:
        return await _render_error(request, NotFound(f"There is no {request.url.path}.", code="unknown_path"))
    refused = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}.")
    return JSONResponse(refused.body(), error.status_code, headers=error.headers)


async def _render_fault(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours: logged with its trace by the server, told without it."""
    fault = FastslowError(f"The service failed at this request; its log says why under {request.state.request_id}.")
    log.error("request %s failed", request.state.request_id, exc_info=error)
    return JSONResponse(fault.body(), fault.status, headers={"x-request-id": request.state.request_id})
