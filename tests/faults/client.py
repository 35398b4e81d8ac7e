"""One user of the load: chats by OpenAI's client as it comes, and feedback that is sent until it is acknowledged."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import openai

from tests.faults.checks import Acknowledged, Echo, Person, crossing
from tests.faults.records import Kind, Records, Request

CONNECT_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 2.0
REFUSED = 400
RETRIED = frozenset({408, 429})
"""Of the statuses below 500, those that are tried again."""
SERVER_ERROR = 500


@dataclass(frozen=True)
class Say:
    """A feedback that is to be given."""

    interaction: str
    comment: str
    correction: str | None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def body(self) -> dict[str, str]:
        body = {"interaction_id": self.interaction, "comment": self.comment}
        return body | ({"correction": self.correction} if self.correction else {})


class Noted(httpx.AsyncHTTPTransport):
    """Notes each attempt that fails, which OpenAI's client hides where another one goes well."""

    def __init__(self, records: Records) -> None:
        super().__init__()
        self._records = records

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await super().handle_async_request(request)
        except httpx.TransportError as error:
            self._records.attempts.append((time.monotonic(), type(error).__name__))
            raise
        if response.status_code >= REFUSED:
            self._records.attempts.append((time.monotonic(), str(response.status_code)))
        return response


class User:
    """Chats, whole and streamed in turn, and comments on each reply.

    Args:
        url: of what stands before the gateways.
        reply_seconds: longest wait for a reply, and for each piece of it. OpenAI's client would wait ten minutes by itself.
        echoes: whether the upstream tells what it was asked, so that the replies can be checked.
    """

    def __init__(
        self,
        person: Person,
        records: Records,
        *,
        url: str,
        key: str,
        model: str,
        pause_seconds: float,
        reply_seconds: float,
        echoes: bool,
    ) -> None:
        self.person = person
        self.acknowledged: list[Acknowledged] = []
        self._records = records
        self._model = model
        self._pause_seconds = pause_seconds
        self._echoes = echoes
        self._said: asyncio.Queue[Say] = asyncio.Queue()
        self._revision = 0
        self._chats = 0
        headers = {"Authorization": f"Bearer {key}", "X-User-ID": person.name}
        timeout = httpx.Timeout(reply_seconds, connect=CONNECT_SECONDS)
        self._http = httpx.AsyncClient(transport=Noted(records), timeout=timeout, base_url=url, headers=headers)
        self._openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, default_headers=headers, http_client=self._http, timeout=timeout
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def chat_on(self, stop: asyncio.Event) -> None:
        """Until told to stop."""
        await asyncio.sleep(random.random() * self._pause_seconds)
        while not stop.is_set():
            asked = f"Question {uuid.uuid4().hex} of {self.person.name}?"
            self._chats += 1
            streamed = self._chats % 2 == 0
            async with self._noted("stream" if streamed else "chat"):
                interaction = await (self._stream(asked) if streamed else self._whole(asked))
                if interaction:
                    self._said.put_nowait(self._opinion(interaction))
            await asyncio.sleep(self._pause_seconds)

    async def tell(self) -> None:
        """Give feedback for ever, one after the other."""
        while True:
            say = await self._said.get()
            async with self._noted("feedback"):
                await self._give(say)
            self._said.task_done()

    async def all_told(self) -> None:
        """Wait until everything is acknowledged, or refused for good."""
        await self._said.join()

    def untold(self) -> int:
        """Feedback that waits for its turn."""
        return self._said.qsize()

    def _opinion(self, interaction: str) -> Say:
        word = uuid.uuid4().hex[:8]
        comment = f"Always mention {self.person.secret} beside {word}."
        correction = f"It is {word}, and {self.person.secret}." if self._chats % 5 == 0 else None
        return Say(interaction, comment, correction)

    @asynccontextmanager
    async def _noted(self, kind: Kind) -> AsyncIterator[None]:
        began, error = time.monotonic(), ""
        try:
            yield
        except (openai.OpenAIError, httpx.HTTPError) as failure:
            error = _told(failure)
        except asyncio.CancelledError:
            error = "not done in time"
            raise
        finally:
            self._records.requests.append(Request(kind, began, time.monotonic(), error))

    async def _whole(self, asked: str) -> str:
        """The interaction's id, empty where it was not kept."""
        known = self._revision
        raw = await self._openai.chat.completions.with_raw_response.create(
            model=self._model, messages=[{"role": "user", "content": asked}], max_tokens=32
        )
        completion = raw.parse()
        degraded = self._look(asked, completion.choices[0].message.content or "", raw.headers, known=known)
        return "" if {"interaction-not-recorded", "store-unavailable"} & set(degraded) else completion.id

    async def _stream(self, asked: str) -> str:
        known = self._revision
        raw = await self._openai.chat.completions.with_raw_response.create(
            model=self._model, messages=[{"role": "user", "content": asked}], max_tokens=32, stream=True
        )
        pieces, finished, interaction = [], False, ""
        async for chunk in raw.parse():
            interaction = chunk.id
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                finished = finished or choice.finish_reason is not None
        if not finished:
            raise httpx.ReadError("the stream has no end")
        degraded = self._look(asked, "".join(pieces), raw.headers, known=known)
        # Whether it was kept at the end is told in a comment of the stream, which the client leaves out.
        return "" if "store-unavailable" in degraded else interaction

    def _look(self, asked: str, reply: str, headers: httpx.Headers, *, known: int) -> list[str]:
        """Check whose the reply is, and that nothing was left out unsaid; what it was degraded by."""
        degraded = [reason for reason in headers.get("x-fastslow-degraded", "").split(",") if reason]
        self._records.degraded.update(degraded)
        revision = int(headers["x-fastslow-context-revision"])
        if revision < known and not degraded:
            self._records.behind.append(f"{self.person.name}: revision {revision}, and {known} was acknowledged before")
        if self._echoes:
            echo = Echo.read(reply)
            if problem := crossing(echo, self.person, asked=asked, base_model=self._model):
                self._records.crossed.append(problem)
            self._records.personal += self.person.secret in echo.secrets
        return degraded

    async def _give(self, say: Say) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            wait = pause
            try:
                response = await self._http.post("/v1/feedback", json=say.body(), headers={"Idempotency-Key": say.key})
                if response.status_code < SERVER_ERROR and response.status_code not in RETRIED:
                    response.raise_for_status()
                    revision = response.json()["context_revision"]
                    self._revision = max(self._revision, revision)
                    self.acknowledged.append(Acknowledged(self.person, say.interaction, say.comment, revision))
                    return
                wait = float(response.headers.get("Retry-After", pause))
            except httpx.TransportError:
                pass
            await asyncio.sleep(min(wait, LONGEST_PAUSE_SECONDS))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _told(failure: Exception) -> str:
    """A failure by its kind: the status with the code, or what became of the connection."""
    if isinstance(failure, openai.APIStatusError):
        return f"{failure.status_code} {failure.code or ''}".strip()
    if isinstance(failure, openai.APIConnectionError):
        return type(failure.__cause__ or failure).__name__
    if isinstance(failure, openai.APIError):
        return str(failure.code)
    if isinstance(failure, httpx.HTTPStatusError):
        return f"{failure.response.status_code} {failure.response.json()['error']['code']}"
    return type(failure).__name__
