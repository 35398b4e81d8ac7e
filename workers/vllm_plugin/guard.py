"""Which paths a replica answers, and to whom.

vLLM asks for its API key below `/v1` and a few more prefixes only, and offers routes that load files by path, run prompts without a
key, or are known to kill the engine. Here everything is closed that the gateway and the workers don't use.
"""

from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from workers.vllm_plugin.eviction import Readers

PUBLIC = frozenset({("GET", "/health"), ("GET", "/metrics"), ("GET", "/version")})
"""For probes and Prometheus."""
KEYED = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    }
)
OURS = "/fastslow/"
"""Our own routes, with the key."""


class Guard:
    """ASGI middleware: 404 for a closed path, 401 without the API key.

    Args:
        tokens: the accepted API keys; none means that no key is asked for, as in vLLM.
        readers: told of each request to the engine.
        seen: shown the bytes of each such request.
    """

    def __init__(self, app: ASGIApp, *, tokens: Sequence[str], readers: Readers, seen: Callable[[bytes], None]) -> None:
        self._app = app
        self._authentication = AuthenticationMiddleware(app, list(tokens)) if tokens else None
        self._readers = readers
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._other_than_http(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif scope["method"] == "POST":
            with self._readers.reading():
                await self._app(scope, self._showing(receive), send)
        else:
            await self._app(scope, receive, send)

    def _showing(self, receive: Receive) -> Receive:
        async def received() -> Message:
            message = await receive()
            self._seen(message.get("body", b""))
            return message

        return received

    async def _other_than_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # Closed before it is accepted, which the server turns into a 403.
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        call = (scope["method"], path)
        if call in PUBLIC:
            return None
        if call not in KEYED and not path.startswith(OURS):
            return _error(404, f"{call[0]} {path} is not served here.", "not_found")
        if self._authentication and not self._authentication.verify_token(Headers(scope=scope)):
            return _error(401, "The API key is missing or wrong.", "invalid_api_key")
        return None


def _error(status: int, message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)
