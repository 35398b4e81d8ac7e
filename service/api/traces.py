"""The span around a call of the API, where traces are on: it goes on with the client's trace, and ends with the last byte."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.tracing import Tracing


class TraceFrame:
    """Inside of the frame that gives a request its id. Health checks and scrapes make no spans."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        method: str = scope["method"]
        with self._tracing.begin(
            method,
            kind="server",
            carrier=Headers(scope=scope),
            http__request__method=method,
            fastslow__request_id=scope["state"]["request_id"],
        ) as span:

            async def noted_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # Of the path the pattern alone, for some name a user.
                    route = getattr(scope.get("route"), "path", "unmatched")
                    span.rename(f"{method} {route}")
                    span.set(http__route=route, http__response__status_code=message["status"])
                    if message["status"] >= 500:
                        span.fail(str(message["status"]))
                await send(message)

            await self._app(scope, receive, noted_send)
