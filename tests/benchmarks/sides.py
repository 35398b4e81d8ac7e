"""Gateways that are alike but for how many users' data their Valkeys hold: filled, checked, and measured in short rounds.

In a round ten users (any ten of those that are stored) give feedback as in an active session: ratings, comments and corrections, each on
an interaction of its own that nobody has said anything of. Before each round these users' data are set back, so that every round on
every side does the same work.
"""

import asyncio
import gc
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from redis import Redis
from rich.progress import Progress

from service.domain.fast_weights import FastWeights
from service.keys import ensure_keys
from tests.benchmarks import processes, stored
from tests.benchmarks.load import http_request, load
from tests.benchmarks.material import Caller, headers, said
from tests.benchmarks.stats import Round

ACTIVE = 10
"""Users that give feedback in a round, and connections where there is more than one."""
EACH = 24
"""Feedbacks of each in a round."""
CHATS = 2
"""Chats of each in a round."""
FIRST_FRESH = 100
FILL_BATCH = 200


@dataclass
class Material:
    """What is sent, for the template's user."""

    past: stored.Past
    history: stored.Template
    state: FastWeights
    fresh: stored.Template
    requests: list[bytes]

    @classmethod
    async def made(cls, key: str, past: stored.Past) -> "Material":
        now = time.time()
        history, state = await stored.stored_user(past, now)
        numbers = range(FIRST_FRESH, FIRST_FRESH + EACH)
        requests = []
        for n in numbers:
            body = {"interaction_id": stored.interaction_id(stored.TEMPLATE_USER, n), **said(n)}
            requests.append(
                http_request("POST", "/v1/feedback", headers(key, stored.TEMPLATE_USER), json.dumps(body).encode())
            )
        return cls(past, history, state, await stored.fresh_interactions(numbers, now, state), requests)

    def requests_of(self, user: str) -> list[bytes]:
        return [r.replace(stored.TEMPLATE_USER.encode(), user.encode()) for r in self.requests]


@dataclass
class Side:
    """One gateway over one Valkey, with so many users' data."""

    users: int
    port: int
    redis_port: int
    key: str
    wire: stored.Wire
    material: Material
    bytes_per_user: float = 0.0
    """Of Redis's memory, for what is stored of each."""
    rounds: dict[int, list[Round]] = field(default_factory=dict)
    """connections -> rounds of feedback"""
    overhead_ms: list[float] = field(default_factory=list)
    """The gateway's own part of a chat, the median of each round."""


def start(
    stack: ExitStack,
    runner: asyncio.Runner,
    cores: processes.Cores,
    folder: Path,
    *,
    users: int,
    past: stored.Past,
    vllm_port: int,
) -> Side:
    """The processes of one side, nothing stored yet."""
    folder.mkdir()
    keys = ensure_keys(folder / "keys.json")
    server = stack.enter_context(processes.valkey(folder / "valkey"))
    gateway = stack.enter_context(
        processes.gateway(folder, cores=cores.service, redis_port=server.port, vllm_port=vllm_port)
    )
    material = runner.run(Material.made(keys.first("client"), past))
    wire = stored.Wire(server.port, material.history.tape.scripts)
    stack.callback(wire.close)
    return Side(users, gateway.port, server.port, keys.first("client"), wire, material)


async def fill(side: Side, progress: Progress) -> None:
    """Store every user's data."""
    task = progress.add_task(f"filling with {side.users:,} users", total=side.users)
    history = side.material.history
    with Redis(port=side.redis_port) as redis:
        empty_bytes = redis.info("memory")["used_memory"]
        stored.turn_append_only(redis, on=False)
        for first in range(0, side.users, FILL_BATCH):
            users = range(first, min(first + FILL_BATCH, side.users))
            packed = b"".join(history.copied_to(stored.user_name(n)) for n in users)
            side.wire.send(packed, history.tape.commands * len(users))
            progress.advance(task, len(users))
        progress.update(task, description=f"{side.users:,} users' append-only file")
        stored.turn_append_only(redis, on=True)
        side.bytes_per_user = (redis.info("memory")["used_memory"] - empty_bytes) / side.users
    await check_stored(side)


async def check_stored(side: Side) -> None:
    """Read a user's data back through the API, and change a stored feedback: it is what the service would have written."""
    user, caller = stored.user_name(side.users - 1), Caller(side.port, side.key)
    feedbacks = len(side.material.past.history)
    found, _ = caller.call("GET", f"/v1/users/{user}/context", user)
    expected = {*side.material.state.guidelines, *side.material.state.exemplars}
    if found["revision"] != feedbacks or {item["id"] for item in found["items"]} != expected:
        raise RuntimeError(f"stored data are not read back as written: {found}")
    given = {"interaction_id": stored.interaction_id(user, 0), "rating": False}
    reply, _ = caller.call("POST", "/v1/feedback", user, given)
    if reply["context_revision"] != feedbacks + 1:
        raise RuntimeError(f"feedback on a stored interaction: {reply}")
    await set_back(side, [user])


async def set_back(side: Side, users: Sequence[str]) -> None:
    """Give these users the stored data again, whatever they did since."""
    history = side.material.history
    for user in users:
        side.wire.send(await stored.forgotten(user), 1)
        side.wire.send(history.copied_to(user), history.tape.commands)


def chats(side: Side, chosen: Sequence[str]) -> float:
    """The median of the gateway's own part of these users' chats, milliseconds."""
    caller = Caller(side.port, side.key)
    return median(caller.overhead_ms(user, f"Line {n}?") for n in range(CHATS) for user in chosen)


async def feedback_round(side: Side, chosen: Sequence[str], *, connections: int) -> Round:
    """Set the chosen users back, have each give its feedback, and see that all of it counted."""
    material = side.material
    await set_back(side, chosen)
    for user in chosen:
        side.wire.send(material.fresh.copied_to(user), material.fresh.tape.commands)
    queues: list[Iterator[bytes]] = [iter(material.requests_of(user)) for user in chosen]
    if connections == 1:
        queues = [itertools.chain.from_iterable(zip(*queues, strict=True))]
    gc.collect()
    # Revisions of one digit and of two.
    length = len(
        f'{{"object":"feedback","interaction_id":"{stored.interaction_id(chosen[0], 0)}","context_revision":1,"changed":true}}'
    )
    measured = await load(side.port, queues, lengths=range(length, length + 2))
    found, _ = Caller(side.port, side.key).call("GET", f"/v1/users/{chosen[0]}/context", chosen[0])
    if found["revision"] != len(material.past.history) + EACH or len(measured.latencies) != len(chosen) * EACH:
        raise RuntimeError(
            f"{len(measured.latencies)} feedbacks were given, and a user is at revision {found['revision']}"
        )
    return measured
