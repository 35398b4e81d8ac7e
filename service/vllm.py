"""The client of vLLM: kept connections, vLLM's errors turned into ours, generation aborted when the caller goes away.

Of several replicas a request goes to its user's (`service/replicas.py`), and once to another where that fails before a reply has begun.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

import orjson

from service.engine import BACKGROUND_PRIORITY, SCORE_PATH, Candidates, Sampled, Score
from service.errors import EngineUnavailable, InvalidRequest, UpstreamRejected
from service.replicas import BUSY_SECONDS, Replica, Replicas
from service.replies import away, begun, refusal, whole
from service.settings import Settings
from service.tracing import Span, span
from service.upstream import Limits, Reply, Upstream

log = logging.getLogger(__name__)
T = TypeVar("T")
Begin = Callable[[Reply], Awaitable[T]]
"""Reads the first part of a reply."""

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
TOKENIZE_PATH = "/tokenize"
TRIES = 2
# vLLM's server closes a connection that was idle for five seconds; a request that meets that would fail.
IDLE_SECONDS = 4.0
HEALTH_SECONDS = 2.0


class _Asked(Generic[T]):
    """A request at one replica. Its block gets what was read first, and what is left of the reply can be read until it ends."""

    first: T

    def __init__(self, upstream: Upstream, replica: Replica, part: Span) -> None:
        self._upstream = upstream
        self._replica = replica
        self._part = part
        self.reply: Reply | None = None
        part.__enter__()
        replica.in_flight += 1

    def close(self, error: BaseException | None) -> None:
        """Nothing more is read; a reply that is not complete is broken off."""
        self._replica.in_flight -= 1
        if self.reply is not None:
            self._upstream.give_back(self.reply)
        self._part.__exit__(type(error) if error else None, error, None)

    def __enter__(self) -> T:
        return self.first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


class VllmEngine:
    """`Engine` over HTTP."""

    def __init__(self, settings: Settings) -> None:
        key = settings.vllm_api_key.get_secret_value()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._settings = settings
        limits = Limits(
            connect=settings.upstream_connect_seconds,
            read=settings.upstream_timeout_seconds,
            total=settings.upstream_total_seconds,
            idle=IDLE_SECONDS,
        )
        self._upstream = Upstream(limits, headers=headers, connections=settings.upstream_connections)
        self.replicas = Replicas(settings.request_urls, settings)

    async def complete(self, body: dict[str, Any], *, request_id: str, affinity: str = "") -> dict[str, Any]:
        with await self._ask(whole, CHAT_PATH, body, request_id=request_id, affinity=affinity) as read:
            reply: dict[str, Any] = orjson.loads(read)
            return reply

    @asynccontextmanager
    async def stream(
        self, body: dict[str, Any], *, request_id: str, affinity: str = ""
    ) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        with await self._ask(begun, CHAT_PATH, body, request_id=request_id, affinity=affinity) as events:
            yield events

    async def score(
        self, items: Sequence[Candidates], *, model: str, cache_salt: str, request_id: str, affinity: str = ""
    ) -> list[list[Score]]:
        bodies = [
            {
                "messages": [message.sent() for message in item.messages],
                "replies": item.replies,
                "ended": item.ended,
            }
            for item in items
        ]
        body = {"model": model, "cache_salt": cache_salt, "items": bodies}
        with await self._ask(whole, SCORE_PATH, body, request_id=request_id, affinity=affinity) as read:
            scores = orjson.loads(read)["scores"]
        return [[Score(**score) for score in replies] for replies in scores]

    async def sample(
        self,
        prompt: Sequence[int],
        *,
        model: str,
        samples: int,
        max_tokens: int,
        end: int,
        seed: int,
        cache_salt: str,
        request_id: str,
        affinity: str = "",
    ) -> list[Sampled]:
        body = {
            "model": model,
            "prompt": list(prompt),
            "n": samples,
            "max_tokens": max_tokens,
            "seed": seed,
            "stop_token_ids": [end],
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": cache_salt,
            "priority": BACKGROUND_PRIORITY,
            # The model's own defaults may cut the distribution.
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        with await self._ask(whole, COMPLETIONS_PATH, body, request_id=request_id, affinity=affinity) as read:
            choices = sorted(orjson.loads(read)["choices"], key=lambda choice: choice["index"])
        return [Sampled(tuple(c["token_ids"]), tuple(c["logprobs"]["token_logprobs"])) for c in choices]

    async def preload(self, adapter: str, *, affinity: str = "") -> None:
        try:
            where = (await self.replicas.order(affinity, adapter))[:1] if affinity else await self.replicas.known()
        except EngineUnavailable as error:
            log.warning("%s is loaded nowhere yet: %s", adapter, error)
            return
        await asyncio.gather(*(self._preload(adapter, replica) for replica in where))

    async def _preload(self, adapter: str, replica: Replica) -> None:
        body = orjson.dumps({"model": adapter, "prompt": "."})
        try:
            with await self._asked(replica, TOKENIZE_PATH, body, adapter, whole, {}):
                log.info("%s is loaded at %s", adapter, replica.url)
        except (EngineUnavailable, UpstreamRejected) as error:
            log.warning("%s is not loaded at %s yet: %s", adapter, replica.url, error)

    def waiting(self) -> int | None:
        self.replicas.watch()
        known = [replica.waiting for replica in self.replicas.all if replica.waiting is not None]
        return min(known, default=None)

    async def _ask(
        self, begin: Begin[T], path: str, body: dict[str, Any], *, request_id: str, affinity: str
    ) -> "_Asked[T]":
        """The first replica that answers, of two that are asked.

        Raises:
            EngineUnavailable: neither can answer.
            UpstreamRejected: the request's own fault, or an adapter that is at neither.
            InvalidRequest: it can't be written as JSON: a number of more than 64 bits.
        """
        model = body["model"]
        try:
            data = orjson.dumps(body)
        except TypeError as error:
            raise InvalidRequest(f"The request can't be sent on: {error}.") from error
        headers = {"X-Request-Id": request_id, "X-Session-ID": affinity or request_id}
        problem: EngineUnavailable | UpstreamRejected | None = None
        for replica in (await self.replicas.order(affinity or request_id, model))[:TRIES]:
            try:
                return await self._asked(replica, path, data, model, begin, headers)
            except (EngineUnavailable, UpstreamRejected) as error:
                if isinstance(error, UpstreamRejected) and error.status != 404:
                    raise
                log.info("request %s failed at %s: %s", request_id, replica.url, error)
                # That there is no such adapter says more than that another replica is away.
                problem = problem if isinstance(problem, UpstreamRejected) else error
        assert problem is not None, "there is a replica to ask"
        raise problem

    async def _asked(
        self, replica: Replica, path: str, data: bytes, model: str, begin: Begin[T], headers: dict[str, str]
    ) -> "_Asked[T]":
        """One replica's answer, as far as `begin` reads it."""
        part = span("vllm", kind="client", url__full=f"{replica.url}{path}", gen_ai__request__model=model)
        asked: _Asked[T] = _Asked(self._upstream, replica, part)
        try:
            asked.reply = await self._upstream.request(
                "POST", f"{replica.url}{path}", data, headers | part.carrier(), under_way=replica.under_way
            )
            if asked.reply.status != 200:
                raise refusal(asked.reply.status, await asked.reply.read())
            asked.first = await begin(asked.reply)
        except (OSError, EngineUnavailable, UpstreamRejected) as error:
            problem = away(error) if isinstance(error, OSError) else error
            self._note(replica, model, problem, asked.reply.status if asked.reply else None)
            asked.close(problem)
            raise problem from error
        except BaseException as error:
            asked.close(error)
            raise
        replica.answered += 1
        replica.failures = 0
        return asked

    def _note(
        self, replica: Replica, model: str, error: EngineUnavailable | UpstreamRejected, status: int | None
    ) -> None:
        """What a failed request says of its replica."""
        replica.failed += 1
        if isinstance(error, UpstreamRejected):
            if status == 404:
                replica.lacks(model, seconds=self._settings.failed_adapter_seconds)
        elif status in (429, 503):
            replica.busy_until = time.monotonic() + BUSY_SECONDS
        else:
            replica.failures += 1

    async def ready(self) -> None:
        problem: Exception | None = None
        for replica in sorted(await self.replicas.known(), key=lambda replica: replica.failures):
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    response = await self._upstream.request("GET", f"{replica.url}/health")
                    try:
                        told = await response.read()
                    finally:
                        self._upstream.give_back(response)
                if response.status == 200:
                    return
                problem = problem or refusal(max(response.status, 500), told)
            except OSError as error:
                problem = problem or away(error)
        if problem is not None:
            raise problem

    async def close(self) -> None:
        await self.replicas.close()
        self._upstream.close()
