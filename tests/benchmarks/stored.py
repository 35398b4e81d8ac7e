"""Users' worth of stored data, written quickly and yet exactly as the service writes it.

The service's own store writes one user's data onto a tape instead of to Redis. The commands on the tape, already in the wire's format,
are then sent for any number of users with the names exchanged: all that names a user has the same width for every user.
"""

import hashlib
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hiredis
from redis import Redis

from service.domain.fast_weights import FastWeights
from service.domain.feedback import FeedbackEvent, Interaction, Message, Preference, Signals, VersionTuple
from service.domain.fold import apply
from service.store.connection import Connection
from service.store.keys import UserKeys
from service.store.lane import Command
from service.store.users import UserStore
from tests.benchmarks.material import COMMENTS, QUESTIONS, WANTED, conversation
from tests.benchmarks.mock_vllm import MODEL, TEXT

TENANT = "default"
TEMPLATE_USER = "u0000000"
RETENTION_SECONDS = 30 * 86400
LOG_MOST_EVENTS = 4000
SEND_BYTES = 2**21


@dataclass(frozen=True)
class Past:
    """What a stored user has done."""

    history: tuple[Signals, ...]
    """The feedback, each on an interaction of its own."""
    silent: int
    """Interactions without feedback."""


ACTIVE_USER = Past(
    (
        Signals(rating=1.0, comment=COMMENTS[0]),
        Signals(correction=WANTED[1]),
        Signals(rating=-1.0),
        Signals(preference=Preference(other=WANTED[3], better="other")),
    ),
    silent=2,
)
LIGHT_USER = Past((Signals(comment=COMMENTS[0], correction=WANTED[0]),), silent=0)
"""The least that a user can be who has a context: a million of them fit into a machine's memory."""


def _users(tape: "Tape") -> UserStore:
    return UserStore(tape, state_cache_seconds=RETENTION_SECONDS, log_most_events=LOG_MOST_EVENTS)


def user_name(n: int) -> str:
    return f"u{n:07d}"


def interaction_id(user: str, n: int) -> str:
    """As wide as a real completion's id."""
    return f"chatcmpl-{user}{n:024x}"


class Tape(Connection):
    """A connection that keeps its commands in the wire's format and sends nothing."""

    def __init__(self) -> None:
        self.packed = b""
        self.commands = 0
        self.scripts: set[str] = set()

    async def call(self, *command: str | bytes | int | float) -> None:
        self.packed += hiredis.pack_command(tuple(c if isinstance(c, bytes) else str(c) for c in command))
        self.commands += 1

    async def brief(self, *commands: Command) -> list[Any]:
        for command in commands:
            await self.call(*command)
        return []

    async def script(self, source: str, keys: Sequence[str], *args: str | bytes | int | float) -> list[bytes]:
        self.scripts.add(source)
        await self.call("EVALSHA", hashlib.sha1(source.encode()).hexdigest(), len(keys), *keys, *args)
        return [b"ok"]


class Template:
    """One user's data on a tape, to be copied to other users."""

    def __init__(self, tape: Tape, interactions: Sequence[int]) -> None:
        self.tape = tape
        self._interactions = interactions
        self._names = self._named(TEMPLATE_USER)

    def copied_to(self, user: str) -> bytes:
        """The tape's commands with `user` in place of the template's."""
        packed = self.tape.packed
        for old, new in zip(self._names, self._named(user), strict=True):
            packed = packed.replace(old, new)
        return packed

    def _named(self, user: str) -> list[bytes]:
        """All that is named after a user, the same kinds in the same order for each: bucket, ids of keys, the user's own id."""
        keys = UserKeys(tenant=TENANT, user=user)
        bucket, _, owner = keys.log.partition("log:")
        digests = [keys.interaction(interaction_id(user, n)).rpartition(":")[2] for n in self._interactions]
        return [name.encode() for name in (bucket, owner, *digests, user)]


async def stored_user(past: Past, now: float) -> tuple[Template, FastWeights]:
    """A user with this past, and the fast weights that follow from it."""
    tape, state = Tape(), FastWeights()
    users = _users(tape)
    for n, signals in enumerate(past.history):
        served = interaction(n, now, state)
        await users.record(served, retention_seconds=RETENTION_SECONDS)
        event = FeedbackEvent(revision=n + 1, at=now + n, interaction=replace(served, signals=signals))
        state = apply(state, event)
        await users.append(event, state, tenant=TENANT, user=TEMPLATE_USER, optimize_at=event.at)
    interactions = range(len(past.history) + past.silent)
    for n in interactions[len(past.history) :]:
        await users.record(interaction(n, now, state), retention_seconds=RETENTION_SECONDS)
    return Template(tape, interactions), state


async def fresh_interactions(numbers: Sequence[int], now: float, state: FastWeights) -> Template:
    """Interactions of a stored user that have no feedback yet."""
    tape = Tape()
    users = _users(tape)
    for n in numbers:
        await users.record(interaction(n, now, state), retention_seconds=RETENTION_SECONDS)
    return Template(tape, numbers)


async def forgotten(user: str) -> bytes:
    """The command that takes away a user's log and state, so that the stored ones can be written again."""
    tape, keys = Tape(), UserKeys(tenant=TENANT, user=user)
    await tape.call("DEL", keys.log, keys.state, keys.user)
    return tape.packed


def interaction(n: int, now: float, state: FastWeights) -> Interaction:
    """The template user's `n`-th chat."""
    question = f"{QUESTIONS[n % len(QUESTIONS)]} I have ticket {n:08d}."
    return Interaction(
        id=interaction_id(TEMPLATE_USER, n),
        tenant=TENANT,
        user=TEMPLATE_USER,
        created=now,
        messages=tuple(Message(**m) for m in conversation(question)),
        reply=TEXT,
        finish_reason="stop",
        version=VersionTuple(model=MODEL, context_revision=state.revision),
        items=(*state.guidelines, *state.exemplars),
    )


class Wire:
    """Sends packed commands and waits for as many replies."""

    def __init__(self, port: int, scripts: Iterable[str]) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._reader = hiredis.Reader()
        for script in scripts:
            self.send(hiredis.pack_command(("SCRIPT", "LOAD", script)), 1)

    def send(self, packed: bytes, commands: int) -> None:
        """Raises hiredis.ReplyError if a command is refused."""
        self._socket.sendall(packed)
        while commands:
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(SEND_BYTES))
                continue
            if isinstance(reply, hiredis.ReplyError):
                raise reply
            if isinstance(reply, list) and reply != [b"ok"]:
                raise RuntimeError(f"the store's script answered {reply}")
            commands -= 1

    def close(self) -> None:
        self._socket.close()


def turn_append_only(redis: Redis, *, on: bool) -> None:
    """Off while filling, as nothing is measured then; on, and until the file holds all that is there."""
    redis.config_set("appendonly", "yes" if on else "no")
    while on:
        info = redis.info("persistence")
        if info["aof_enabled"] and not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]:
            assert info["aof_last_bgrewrite_status"] == "ok", info
            return
        time.sleep(0.05)
