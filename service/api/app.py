"""The gateway's application: every dependency an argument, so that tests pass their own."""

import gc
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import admin, budgets, chat, cold_start, feedback, health, norms, users
from service.api.auth import Authenticator
from service.contexts import Contexts
from service.embedding import Embedder, load_embedder
from service.engine import Engine, VllmEngine
from service.errors import BodyTooLarge, FastslowError, InvalidFields, InvalidRequest, NotFound
from service.jobs import CeleryJobs, Jobs
from service.keys import Keys, load_keys
from service.metrics import Metrics
from service.recall import Recall
from service.serving import Serving
from service.settings import Settings
from service.store import Store, open_store
from service.tokens import Tokens, load_tokens

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    store: Store,
    engine: Engine,
    tokens: Tokens,
    keys: Keys,
    jobs: Jobs,
    embedder: Embedder | None = None,
) -> FastAPI:
    """The application over these dependencies, which it closes when it ends."""
    metrics = Metrics()
    recall = Recall(store.embeddings, embedder, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await recall.aclose()
        await app.state.serving.norm_checks.aclose()
        await engine.close()
        await store.close()

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
    contexts = Contexts(tokens, settings, recall)
    app.state.serving = Serving(store, engine, tokens, keys, settings, metrics, contexts)
    for module in (chat, feedback, users, admin, budgets, cold_start, norms, health):
        app.include_router(module.router)
    app.add_exception_handler(FastslowError, _render_error)
    app.add_exception_handler(RequestValidationError, _render_validation)
    app.add_exception_handler(HTTPException, _render_http)
    app.add_exception_handler(Exception, _render_fault)
    app.add_middleware(RequestFrame, metrics=app.state.metrics, max_body_bytes=settings.max_body_bytes)
    return app


def app_from_env() -> FastAPI:
    """The application by the environment's settings: uvicorn's factory."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings()
    app = create_app(
        settings,
        store=open_store(settings),
        engine=VllmEngine(settings),
        tokens=load_tokens(settings.model_path),
        keys=load_keys(settings.keys_path),
        jobs=CeleryJobs(settings),
        embedder=load_embedder(settings),
    )
    # A full collection looks through all that was made until here, 0.1 s with every request waiting; frozen, it is left out.
    gc.collect()
    gc.freeze()
    return app


class RequestFrame:
    """Around every request: its id and start, the limit on its body, the count of its outcome."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, started=time.perf_counter())
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        async def framed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            error = self._too_large()
            await JSONResponse(error.body(), error.status)(scope, receive, framed_send)
            return
        await self._app(scope, limited_receive, framed_send)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request's body is over the limit of {self._max_body_bytes} bytes.")


async def _render_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FastslowError)
    return JSONResponse(error.body(), error.status, headers=error.headers())


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
    return JSONResponse(fault.body(), fault.status)
