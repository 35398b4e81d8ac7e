"""The cached folds of users' logs in Redis: read, by their stamp where this process knows them, and folded anew where there is none."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.domain.fast_weights import FastWeights
from service.errors import StoreUnavailable
from service.store.connection import Connection
from service.store.keys import UserKeys
from service.store.lane import Command
from service.store.logs import Logs
from service.store.states import States, Write, whole, write

# Caches a fold that was rebuilt from the log, unless a newer event is there by now; the head's stamp, which is now the fold's.
CACHE_FOLD = """#!lua
local log, state, who = unpack(KEYS)
local revision, stamp, state_ttl = unpack(ARGV, 1, 3)
local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)
if #last == 0 or last[1][1] ~= revision .. '-0' then return nil end
redis.call('HSETNX', who, 'head', stamp)
stamp = redis.call('HGET', who, 'head')
redis.call('DEL', state)
redis.call('HSET', state, 'stamp', stamp, unpack(ARGV, 4))
redis.call('EXPIRE', state, state_ttl)
return stamp
"""


@dataclass(frozen=True)
class Head:
    """Where a user's log was when it was read."""

    stamp: bytes | None
    has_log: bool
    cached: list[bytes | None] | None
    """The cached fold; None where it was not read, for this process knows one."""


NOTHING_YET = FastWeights()
"""Of all users who have not said anything."""


class Folds:
    """The fast weights of users.

    Args:
        seconds: how long one is cached that nobody writes to.
    """

    def __init__(self, connection: Connection, logs: Logs, *, seconds: int) -> None:
        self._redis = connection
        self._logs = logs
        self._seconds = seconds
        self._states = States()
        self.on_rebuild: Callable[[float], None] = lambda seconds: None
        """Told how long each fold of a whole log took."""

    async def read(self, keys: UserKeys, *more: Command) -> tuple[Head, list[Any]]:
        """The log's head and, read after it, the answers to some more commands, in one round trip."""
        unknown = keys.state not in self._states
        reads: list[Command] = [("HGET", keys.user, "head"), ("EXISTS", keys.log)]
        stamp, has_log, *answers = await self._redis.brief(*reads, *([whole(keys.state)] if unknown else []), *more)
        cached = answers.pop(0) if unknown else None
        return Head(stamp, bool(has_log), cached), answers

    async def at(self, head: Head, keys: UserKeys) -> tuple[FastWeights, bool]:
        """The fast weights at a log's head, and whether they may be of a later moment (they were not there, or not known here)."""
        if not head.has_log:
            return NOTHING_YET, False
        if head.stamp is not None and (known := self._states.stamped(keys.state, head.stamp)) is not None:
            return known, False
        stamp, cached, later = head.stamp, head.cached, False
        if cached is None or cached[0] != stamp:
            stamp, cached = await self._redis.brief(("HGET", keys.user, "head"), whole(keys.state))
            later = True
        if stamp is None or cached[0] != stamp:
            return await self._rebuilt(keys), True
        return self._states.read(keys.state, cached), later

    def write(self, state: FastWeights, keys: UserKeys) -> Write:
        """What a script has to write, so that these are the cached fast weights."""
        return write(state, self._states.last(keys.state))

    def written(self, done: Write, keys: UserKeys) -> None:
        """It was written, and the stamp is the head's."""
        self._states.keep(keys.state, done.known(done.stamp))

    async def _rebuilt(self, keys: UserKeys) -> FastWeights:
        # Some tenths of a second for thousands of events: other users' chats go on meanwhile.
        history, started = await self._logs.read(keys), time.perf_counter()
        rebuilt = await asyncio.to_thread(history.fold)
        self.on_rebuild(time.perf_counter() - started)
        cached = write(rebuilt, None)
        # A full Redis can't cache it; then it is folded again next time.
        with suppress(StoreUnavailable):
            args = (rebuilt.revision, cached.stamp, self._seconds, *cached.fields)
            if stamp := await self._redis.script(CACHE_FOLD, [keys.log, keys.state, keys.user], *args):
                self._states.keep(keys.state, cached.known(stamp))
        return rebuilt
