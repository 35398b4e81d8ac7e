"""`python -m tests.benchmarks.feedback`: feedback per second and its latency, at 10 users' and at 100,000 users' worth of stored data; and
its latency by the length of one user's history (`history.py`).

Two gateways over two Valkeys with append-only files, alike but for how many users' data lie there, are measured in short alternating
rounds (`sides.py`).
"""

import argparse
import asyncio
import gc
import os
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import uvloop
from redis import Redis
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.benchmarks import history, processes, sides, stored
from tests.benchmarks.sides import ACTIVE, Side
from tests.benchmarks.stats import json_line, median_ms, median_rps
from tests.benchmarks.terminal import terminal

FEW, MANY = 10, 100_000
HISTORIES = (1, 100, 1_000, 10_000)
"""Feedbacks that one user has given before."""


async def measure(both: list[Side], *, repeats: int, progress: Progress) -> None:
    pick = random.Random(0)
    task = progress.add_task("measuring", total=repeats)
    for repeat in range(-1, repeats):
        # The first is to warm up; nobody is always first.
        for side in both if repeat % 2 else reversed(both):
            for connections in (1, ACTIVE):
                chosen = [stored.user_name(n) for n in pick.sample(range(side.users), ACTIVE)]
                measured = await sides.feedback_round(side, chosen, connections=connections)
                if repeat >= 0:
                    side.rounds.setdefault(connections, []).append(measured)
        progress.advance(task, repeat >= 0)


def table(both: list[Side]) -> Table:
    out = Table(title="Medians over repeats")
    for column in ("users stored", "connections", "feedbacks/s", "p50 ms", "p95 ms", "p99 ms"):
        out.add_column(column, justify="right")
    for side in both:
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
    console = terminal()
    os.sched_setaffinity(0, cores.others)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        console.print(f"{cores.told}; load average {os.getloadavg()[0]:.1f}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        # No chat is asked for, so nothing has to be there as vLLM.
        both = [
            sides.start(
                stack,
                runner,
                cores,
                folder / name,
                users=users,
                past=stored.ACTIVE_USER,
                vllm_port=processes.free_port(),
            )
            for name, users in (("few", FEW), ("many", options.users))
        ]
        lives = history.start(stack, folder / "history", cores)
        with Progress(*columns, console=console) as progress:
            for side in both:
                runner.run(sides.fill(side, progress))
            runner.run(lives.live([n for n in HISTORIES if n < options.history] + [options.history], progress))
            gc.disable()
            runner.run(measure(both, repeats=options.repeats, progress=progress))
            runner.run(lives.measure(repeats=options.repeats, progress=progress))
        console.print(table(both))
        console.print(lives.table())
        line = result(*both, lives, cores)
    print(line)


if __name__ == "__main__":
    processes.as_command(main)
