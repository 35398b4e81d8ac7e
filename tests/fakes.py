"""Small fakes at our own seams. `FakeVllm` is a real HTTP server, so that the gateway's real client is what is tested."""

import asyncio
import zlib
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web
from aiohttp.typedefs import Handler

from service.embedding import WIDTH, Vectors

MODEL = "smollm2-135m-instruct"
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 3,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
}


class RecordedJobs:
    """Where consolidations and optimizations are sent: lists. Jobs that are to be trained side by side are in one list."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.optimized: list[tuple[str, str]] = []

    async def consolidate(self, job_ids: Sequence[str]) -> None:
        self.sent.append(list(job_ids))

    async def optimize(self, tenant: str, user: str) -> None:
        self.optimized.append((tenant, user))


class FakeEmbedder:
    """Texts are alike as far as they share words. What it embedded is in `texts`; it is its own student, too."""

    def __init__(self, name: str = "words") -> None:
        self.name = self.teacher = name
        self.texts: list[str] = []

    def encode(self, text: str) -> Vectors:
        (row,) = self.embed([text])
        return row

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.texts += texts
        rows = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % WIDTH] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def overlap(conversation: str, reply: str) -> float:
    """A log-probability per token (nats) that grows from -4 to -1 with the share of the reply's words that were said before."""
    said, words = set(conversation.lower().split()), reply.lower().split()
    return -4 + 3 * sum(word in said for word in words) / max(1, len(words))


class FakeVllm:
    """Answers chat completions in vLLM's shapes; what it says is `reply(body)`, what it was asked is in `bodies`.

    Scores replies too, a word as a token: by `likelihood(conversation, reply)`; those requests are in `scored`. Evicts adapters, unless
    replies in flight are `reading` them.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.adapters: set[str] = set()
        self.evicted: list[str] = []
        self.reading: set[str] = set()
        self.kept: set[str] = set()
        """Adapters that it fails to evict."""
        self.scored: list[dict[str, Any]] = []
        self.likelihood: Callable[[str, str], float] = overlap
        self.reply: Callable[[dict[str, Any]], str] = lambda body: f"Reply {len(self.bodies)}"
        self.refuse: tuple[int, dict[str, Any]] | None = None
        self.most_messages: int | None = None
        """More are longer than its window."""
        self.piece_seconds = 0.0
        self.cut_stream_after: int | None = None
        self.aborted = asyncio.Event()
        self.loaded: list[str] = []
        """Adapters that were asked to be loaded, without a reply."""
        self.waiting = 0
        self.free = asyncio.Event()
        """While it is not set, chats wait once they have been asked for."""
        self.free.set()
        self.answering = asyncio.Event()
        """While it is not set, nothing is answered: the process hangs."""
        self.answering.set()
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self, *, drain_seconds: float = 0.1) -> None:
        app = web.Application(middlewares=[self._hang])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/fastslow/score", self._score)
        app.router.add_delete("/fastslow/adapters/{name}", self._evict)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=drain_seconds)
        await self._runner.setup()
        # The second time on the port that it had.
        site = web.TCPSite(self._runner, "127.0.0.1", urlsplit(self.url).port or 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def last(self) -> dict[str, Any]:
        return self.bodies[-1]

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    @web.middleware
    async def _hang(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        await self.answering.wait()
        return await handler(request)

    async def _metrics(self, _: web.Request) -> web.Response:
        labels = f'engine="0",model_name="{MODEL}"'
        gauges = {"vllm:num_requests_running": 1, "vllm:num_requests_waiting": self.waiting}
        return web.Response(text="".join(f"{name}{{{labels}}} {float(value)}\n" for name, value in gauges.items()))

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loaded.append(body["model"])
        return self._refusal(body) or web.json_response({"count": 1, "max_model_len": 2048, "tokens": [1]})

    async def _evict(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name in self.kept:
            return web.Response(status=500, text="the engine has lost it")
        if name in self.reading:
            return web.json_response({"name": name, "evicted": False}, status=202)
        self.adapters.discard(name)
        self.evicted.append(name)
        return web.json_response({"name": name, "evicted": True})

    def _unknown(self, body: dict[str, Any]) -> web.Response | None:
        if body["model"] == MODEL or body["model"] in self.adapters:
            return None
        error = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "code": 404}
        return web.json_response({"error": error}, status=404)

    def _refusal(self, body: dict[str, Any]) -> web.Response | None:
        if self.most_messages is not None and len(body["messages"]) > self.most_messages:
            error = {"message": "maximum context length is 2048", "param": "input_tokens", "code": 400}
            return web.json_response({"error": error}, status=400)
        if self.refuse is not None:
            status, error = self.refuse
            return web.json_response({"error": error}, status=status)
        return self._unknown(body)

    async def _score(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.scored.append(body)
        return self._refusal(body) or web.json_response({"scores": [self._scores(item) for item in body["items"]]})

    def _scores(self, item: dict[str, Any]) -> list[dict[str, float]]:
        conversation = " ".join(message.get("content") or "" for message in item["messages"])
        scores = []
        for reply in item["replies"]:
            tokens = len(reply.split()) + item["ended"]
            scores.append({"logprob_sum": tokens * self.likelihood(conversation, reply), "tokens": tokens})
        return scores

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        refusal = self._refusal(body)
        if refusal is not None:
            return refusal
        try:
            await self.free.wait()
            serve = self._stream if body.get("stream") else self._whole
            return await serve(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted.set()
            raise

    def _frame(self, request: web.Request, body: dict[str, Any], kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{request.headers['X-Request-Id']}",
            "object": kind,
            "created": 1,
            "model": body["model"],
            "kv_transfer_params": None,
        }

    async def _whole(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(self.piece_seconds)
        message = {"role": "assistant", "content": self.reply(body), "refusal": None, "function_call": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None, "token_ids": None}
        return web.json_response(self._frame(request, body, "chat.completion") | {"choices": [choice], "usage": USAGE})

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        frame = self._frame(request, body, "chat.completion.chunk")
        words = self.reply(body).split(" ")
        pieces = [words[0], *(f" {word}" for word in words[1:])]
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": p} for p in pieces)]
        for n, delta in enumerate(deltas):
            if n == self.cut_stream_after:
                assert request.transport is not None
                request.transport.close()
                return response
            await asyncio.sleep(self.piece_seconds)
            finish = "stop" if n == len(deltas) - 1 else None
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            await response.write(b"data: " + web.json_response(frame | {"choices": [choice]}).body + b"\n\n")
        if body.get("stream_options", {}).get("include_usage"):
            await response.write(b"data: " + web.json_response(frame | {"choices": [], "usage": USAGE}).body + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response
