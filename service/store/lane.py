"""One connection to Redis that all requests of a process share, for what has a short answer.

What is asked at the same moment leaves in one write, and the answers come in the order of the questions: no pool, no lock, no task and no
timer for each. Redis answers a connection's commands in turn, so a long answer would keep the others waiting: those have the pool.

redis-py makes the connection (address, TLS, credentials, whom the sentinels call the primary) and leaves it to the protocol here.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import InvalidResponse, ReadOnlyError

from service.store.keys import CACHED_NAMES

Command = tuple[str | bytes | int | float, ...]

# Commands that name what a chat reads of its user: the same bytes each time, so they are packed once.
NAMES_ALONE = frozenset({"HGET", "HGETALL", "EXISTS"})
# Some hundred bytes each, five a user.
CACHED_COMMANDS = 5 * CACHED_NAMES

# A server that has just died, or been demoted, is asked again in its new place once.
RECONNECT_SECONDS = 0.02


@dataclass(eq=False)
class _Question:
    """Some commands, sent together."""

    commands: int
    until: float
    """By the loop's clock."""
    answered: "asyncio.Future[list[Any]]"
    answers: list[Any] = field(default_factory=list)


class _Wire(asyncio.Protocol):
    """One connection, from when it is ready until it is lost."""

    def __init__(self, connection: Any, *, timeout_seconds: float) -> None:
        self._connection = connection
        self._transport: asyncio.Transport = connection._writer.transport
        self._loop = asyncio.get_running_loop()
        self._timeout_seconds = timeout_seconds
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=BaseParser.parse_error, notEnoughData=...
        )
        self._questions: deque[_Question] = deque()
        self._unsent: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self.stale = False
        """Not to be asked any more."""
        self._transport.set_protocol(self)

    def ask(self, packed: bytes, commands: int) -> "asyncio.Future[list[Any]]":
        """The answers to some commands. It fails with TimeoutError, or with ConnectionLost."""
        until = self._loop.time() + self._timeout_seconds
        question = _Question(commands, until, self._loop.create_future())
        self._questions.append(question)
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._ring)
        # What others ask before the loop's next turn leaves with it.
        self._unsent.append(packed)
        if len(self._unsent) == 1:
            self._loop.call_soon(self._send)
        return question.answered

    def _send(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        questions, next_answer = self._questions, self._reader.gets
        self._reader.feed(data)
        while (answer := next_answer()) is not ...:
            if isinstance(answer, hiredis.PushNotification):
                continue
            question = questions[0]
            question.answers.append(answer)
            if len(question.answers) == question.commands:
                questions.popleft()
                # Whoever asked may have gone.
                if not question.answered.done():
                    question.answered.set_result(question.answers)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stale = True
        self._connection._close()
        if self._timer is not None:
            self._timer.cancel()
        for question in self._questions:
            if not question.answered.done():
                question.answered.set_exception(
                    ConnectionLost(f"the connection broke: {exc or 'closed by the server'}")
                )
        self._questions.clear()

    def close(self) -> None:
        self._transport.abort()

    def _ring(self) -> None:
        """One timer for all: whoever asked first runs out of time first. Where somebody has, the connection is given up."""
        self._timer = None
        now = self._loop.time()
        for question in self._questions:
            if question.until > now:
                self._timer = self._loop.call_at(question.until, self._ring)
                return
            self.stale = True
            if not question.answered.done():
                question.answered.set_exception(TimeoutError())
        if self.stale:
            self.close()


class Lane:
    """Asks over one connection, and makes a new one when that is lost.

    Args:
        pool: makes connections.
        timeout_seconds: longest wait for an answer, and for a connection.
    """

    def __init__(self, pool: ConnectionPool, timeout_seconds: float) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._wire: _Wire | None = None
        self._opening: asyncio.Task[_Wire] | None = None

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to some commands, sent together; an error that Redis answers to one of them is raised.

        Raises:
            RedisError, OSError: Redis is away, does not answer in time, or refuses.
        """
        packed = b"".join([_packed(command) if command[0] in NAMES_ALONE else _pack(command) for command in commands])
        wire = self._wire
        if wire is None or wire.stale:
            return _raised(await self._ask_anew(packed, len(commands)))
        try:
            return _raised(await wire.ask(packed, len(commands)))
        except ConnectionLost:
            await asyncio.sleep(RECONNECT_SECONDS)
        except ReadOnlyError:
            # A primary that was demoted: the new one is elsewhere.
            wire.stale = True
        return _raised(await self._ask_anew(packed, len(commands)))

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._wire is not None:
            self._wire.close()

    async def _ask_anew(self, packed: bytes, commands: int) -> list[Any]:
        async with asyncio.timeout(self._timeout_seconds):
            wire = self._wire
            if wire is None or wire.stale:
                if self._opening is None:
                    self._opening = asyncio.create_task(self._open())
                    self._opening.add_done_callback(self._opened)
                # Others wait for it too.
                wire = await asyncio.shield(self._opening)
            return await wire.ask(packed, commands)

    async def _open(self) -> _Wire:
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            # With the handshake: a server whose machine is gone takes no part in it, and says nothing of that.
            async with asyncio.timeout(self._timeout_seconds):
                await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _Wire(connection, timeout_seconds=self._timeout_seconds)

    def _opened(self, opening: "asyncio.Task[_Wire]") -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._wire = opening.result()


def _pack(command: Command) -> bytes:
    # Its annotation has commands of one word.
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


_packed = lru_cache(CACHED_COMMANDS)(_pack)


def _raised(answers: list[Any]) -> list[Any]:
    """The answers, if none is an error."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
