"""`python -m tests.benchmarks.feedback`: feedback per second and its latency, at 10 users' and at 100,000 users' worth of stored data; and
its latency by the length of one user's history (`history.py`).

Two gateways over two Valkeys with append-only files, alike but for how many users' data lie there, are measured in short alternating
rounds. In a round ten users (of the ten, or any ten of the 100,000) give feedback as in an active session: ratings, comments and
corrections, each on an interaction of its own that nobody has said anything of. Before each round these users' data are set back, so that
every round on both sides does the same work.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop
from redis import Redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.domain.fast_weights import FastWeights
from service.keys import ensure_keys
from tests.benchmarks import history, processes, stored
from tests.benchmarks.load import http_request, load
from tests.benchmarks.material import Caller, headers, said
from tests.benchmarks.stats import Round, json_line, median_ms, median_rps

FEW, MANY = 10, 100_000
HISTORIES = (1, 100, 1_000, 10_000)
"""Feedbacks that one user has given before."""
ACTIVE = 10
"""Users that give feedback in a round, and connections where there is more than one."""
EACH = 24
"""Feedbacks of each in a round."""
FIRST_FRESH = 100
FILL_BATCH = 200


@dataclass
class Side:
    """One gateway over one Valkey, with so many users' data."""

    users: int
    port: int
    redis_port: int
    key: str
    wire: stored.Wire
    material: "Material"
    rounds: dict[int, list[Round]] = field(default_factory=dict)
    """connections -> rounds"""


@dataclass
class Material:
    """What is sent, for the template's user."""

    history: stored.Template
    state: FastWeights
    fresh: stored.Template
    requests: list[bytes]

    @classmethod
    async def made(cls, key: str) -> "Material":
        now = time.time()
        history, state = await stored.stored_user(now)
        numbers = range(FIRST_FRESH, FIRST_FRESH + EACH)
        requests = []
        for n in numbers:
            body = {"interaction_id": stored.interaction_id(stored.TEMPLATE_USER, n), **said(n)}
            requests.append(
                http_request("POST", "/v1/feedback", headers(key, stored.TEMPLATE_USER), json.dumps(body).encode())
            )
        return cls(history, state, await stored.fresh_interactions(numbers, now, state), requests)

    def requests_of(self, user: str) -> list[bytes]:
        return [r.replace(stored.TEMPLATE_USER.encode(), user.encode()) for r in self.requests]


def fill(side: Side, progress: Progress) -> None:
    """Store every user's data."""
    task = progress.add_task(f"filling with {side.users} users", total=side.users)
    history = side.material.history
    with Redis(port=side.redis_port) as redis:
        stored.turn_append_only(redis, on=False)
        for first in range(0, side.users, FILL_BATCH):
            users = range(first, min(first + FILL_BATCH, side.users))
            packed = b"".join(history.copied_to(stored.user_name(n)) for n in users)
            side.wire.send(packed, history.tape.commands * len(users))
            progress.advance(task, len(users))
        progress.update(task, description=f"{side.users} users' append-only file")
        stored.turn_append_only(redis, on=True)
    check_stored(side)


def check_stored(side: Side) -> None:
    """Read a user's data back through the API, and give feedback on a stored interaction: it is what the service would have written."""
    user, caller = stored.user_name(side.users - 1), Caller(side.port, side.key)
    found, _ = caller.call("GET", f"/v1/users/{user}/context", user)
    expected = {*side.material.state.guidelines, *side.material.state.exemplars}
    if found["revision"] != len(stored.HISTORY) or {item["id"] for item in found["items"]} != expected:
        raise RuntimeError(f"stored data are not read back as written: {found}")
    given = {"interaction_id": stored.interaction_id(user, len(stored.HISTORY)), "rating": True}
    reply, _ = caller.call("POST", "/v1/feedback", user, given)
    if reply["context_revision"] != len(stored.HISTORY) + 1:
        raise RuntimeError(f"feedback on a stored interaction: {reply}")


async def measure_round(side: Side, chosen: list[str], *, connections: int) -> Round:
    """Set the chosen users back, have each give its feedback, and see that all of it counted."""
    material = side.material
    for user in chosen:
        side.wire.send(await stored.forgotten(user), 1)
        side.wire.send(material.history.copied_to(user), material.history.tape.commands)
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
    if found["revision"] != len(stored.HISTORY) + EACH or len(measured.latencies) != len(chosen) * EACH:
        raise RuntimeError(
            f"{len(measured.latencies)} feedbacks were given, and a user is at revision {found['revision']}"
        )
    return measured


async def measure(sides: list[Side], *, repeats: int, progress: Progress) -> None:
    pick = random.Random(0)
    task = progress.add_task("measuring", total=repeats)
    for repeat in range(-1, repeats):
        # The first is to warm up; nobody is always first.
        for side in sides if repeat % 2 else reversed(sides):
            for connections in (1, ACTIVE):
                chosen = [stored.user_name(n) for n in pick.sample(range(side.users), ACTIVE)]
                measured = await measure_round(side, chosen, connections=connections)
                if repeat >= 0:
                    side.rounds.setdefault(connections, []).append(measured)
        progress.advance(task, repeat >= 0)


def start(stack: ExitStack, runner: asyncio.Runner, cores: processes.Cores, folder: Path, *, users: int) -> Side:
    """The processes of one side, nothing stored yet."""
    folder.mkdir()
    keys = ensure_keys(folder / "keys.json")
    server = stack.enter_context(processes.valkey(folder / "valkey"))
    # No chat is asked for, so nothing has to be there as vLLM.
    gateway = stack.enter_context(
        processes.gateway(folder, cores=cores.service, redis_port=server.port, vllm_port=processes.free_port())
    )
    material = runner.run(Material.made(keys.first("client")))
    wire = stored.Wire(server.port, material.history.tape.scripts)
    stack.callback(wire.close)
    return Side(users, gateway.port, server.port, keys.first("client"), wire, material)


def table(sides: list[Side]) -> Table:
    out = Table(title="Medians over repeats")
    for column in ("users stored", "connections", "feedbacks/s", "p50 ms", "p95 ms", "p99 ms"):
        out.add_column(column, justify="right")
    for side in sides:
        for connections, rounds in side.rounds.items():
            figures = [f"{median_ms(rounds, share):.2f}" for share in (0.50, 0.95, 0.99)]
            out.add_row(f"{side.users:,}", str(connections), f"{median_rps(rounds):.0f}", *figures)
    return out


def result(few: Side, many: Side, lives: history.Lives, cores: processes.Cores) -> str:
    """The last line: latency of one connection and throughput of ten, both with the many users' data; growth with a user's history."""
    ratio = median(m.ms(0.50) / f.ms(0.50) for m, f in zip(many.rounds[1], few.rounds[1], strict=True))
    headline = {
        "p50_ms": median_ms(many.rounds[1], 0.50),
        "p99_ms": median_ms(many.rounds[1], 0.99),
        "rps": median_rps(many.rounds[ACTIVE]),
        "p50_ratio_100k_to_10": ratio,
        f"p50_ratio_history_{max(lives.at) // 1000}k_to_1": lives.ratio(),
    }
    with Redis(port=many.redis_port) as redis:
        memory = redis.info("memory")["used_memory"] / 2**30
    details = {
        "p50_ms_at_10": median_ms(few.rounds[1], 0.50),
        "p99_ms_at_10": median_ms(few.rounds[1], 0.99),
        "rps_at_10": median_rps(few.rounds[ACTIVE]),
        "p50_ms_10_connections": median_ms(many.rounds[ACTIVE], 0.50),
        "p99_ms_10_connections": median_ms(many.rounds[ACTIVE], 0.99),
        "stored_gib": memory,
        **lives.details(),
        "cores": cores.told,
        "load_average": os.getloadavg()[0],
    }
    return json_line("feedback", headline, details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="rounds of each case")
    parser.add_argument("--users", type=int, default=MANY, help="users with stored data on the large side")
    parser.add_argument("--history", type=int, default=10_000, help="feedbacks of the user with the longest history")
    options = parser.parse_args()
    cores = processes.split_cores()
    console = Console(stderr=True)
    os.sched_setaffinity(0, cores.others)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        console.print(f"{cores.told}; load average {os.getloadavg()[0]:.1f}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        sides = [
            start(stack, runner, cores, folder / name, users=users)
            for name, users in (("few", FEW), ("many", options.users))
        ]
        lives = history.start(stack, folder / "history", cores)
        with Progress(*columns, console=console) as progress:
            for side in sides:
                fill(side, progress)
            runner.run(lives.live([n for n in HISTORIES if n < options.history] + [options.history], progress))
            gc.disable()
            runner.run(measure(sides, repeats=options.repeats, progress=progress))
            runner.run(lives.measure(repeats=options.repeats, progress=progress))
        console.print(table(sides))
        console.print(lives.table())
        line = result(*sides, lives, cores)
    print(line)


if __name__ == "__main__":
    processes.as_command(main)
