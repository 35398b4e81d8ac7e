"""The short way to the function that most requests are for, past FastAPI's layers (docs/benchmarks.md, "Steps").

FastAPI declares the route all the same: the interface's description is made of it, and what is not in order takes its way, so that it is
FastAPI that says what is wrong with a body.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Caller, authenticated
from service.api.headers import header
from service.api.presence import ClientGone
from service.api.schemas import ChatRequest
from service.errors import FastslowError

JSON_TYPES = ("", "application/json")


class Direct:
    """Calls the function of one route of FastAPI's, whose arguments are the request, a body that is checked in one go, and the caller."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        route: APIRoute,
        function: Callable[[Request, ChatRequest, Caller], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._route = route
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._route.path or scope["method"] not in self._route.methods:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        request = Request(scope, receive)
        try:
            raw = await _read(receive)
            body = _checked(request, raw)
            if body is None:
                await self._app(scope, _again(raw, receive), send)
                return
            response = await self._function(request, body, await authenticated(request))
        except FastslowError as error:
            response = error_response(error)
        await response(scope, receive, send)


def error_response(error: FastslowError) -> JSONResponse:
    """An error of ours in OpenAI's shape."""
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _read(receive: Receive) -> bytes:
    """The whole body.

    Raises:
        ClientGone: before it was there.
    """
    body: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The client closed the request.")
        body.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(body)


def _checked(request: Request, raw: bytes) -> ChatRequest | None:
    """The body, None where something is wrong with it."""
    if (header(request.scope, b"content-type") or "").partition(";")[0] not in JSON_TYPES:
        return None
    try:
        return ChatRequest.model_validate_json(raw)
    except ValidationError:
        return None


def _again(raw: bytes, receive: Receive) -> Receive:
    """Receives what was received already, and then what comes."""
    told: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def replay() -> Any:
        return told.pop() if told else await receive()

    return replay
