"""`python -m tests.benchmarks.scale`: do a chat and a feedback take longer where more users are stored, or where the asking user has said
more before?

Three gateways over three Valkeys with append-only files, alike but for how many light users (one interaction, one feedback and its fold)
lie there, take turns: any ten users chat, and then give feedback (`sides.py`). Then one user is measured after 1, 1,000 and 10,000
feedbacks, likewise in turns (`history.py`).
"""

import argparse
import asyncio
import gc
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil
import uvloop
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.benchmarks import history, processes, sides, stored
from tests.benchmarks.history import RECALLING
from tests.benchmarks.sides import ACTIVE, Side
from tests.benchmarks.stats import json_line, median_ms
from tests.benchmarks.terminal import terminal

FEW, SOME, MANY = 1_000, 100_000, 1_000_000
HISTORIES = (1, 1_000, 10_000)
# Of the largest Valkey, unless the command line says how many users; a machine that has less gives half of what it has.
MEMORY_BYTES = 8 * 2**30


async def measure(stores: Sequence[Side], *, repeats: int, progress: Progress) -> None:
    """Rounds of chats and of feedback on each side in turn."""
    pick = random.Random(0)
    task = progress.add_task("measuring by users", total=repeats)
    for repeat in range(-1, repeats):
        # The first is to warm up; nobody is always first.
        first = repeat % len(stores)
        for side in (*stores[first:], *stores[:first]):
            chosen = [stored.user_name(n) for n in pick.sample(range(side.users), ACTIVE)]
            overhead_ms = sides.chats(side, chosen)
            feedback = await sides.feedback_round(side, chosen, connections=1)
            # So that chats of later rounds are of light users too.
            await sides.set_back(side, chosen)
            if repeat >= 0:
                side.overhead_ms.append(overhead_ms)
                side.rounds.setdefault(1, []).append(feedback)
        progress.advance(task, repeat >= 0)


def ratio(few: Sequence[float], many: Sequence[float]) -> float:
    """The median over repeats of the ratio within one."""
    return median(b / a for a, b in zip(few, many, strict=True))


def short(n: int) -> str:
    """1000000 as 1m, 10000 as 10k."""
    for size, letter in ((10**6, "m"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)


def fitting(side: Side) -> int:
    """How many such users fit into the memory that there is for them, a million at most."""
    memory_bytes = min(MEMORY_BYTES, psutil.virtual_memory().available // 2)
    return min(MANY, int(memory_bytes / side.bytes_per_user))


def table(stores: Sequence[Side]) -> Table:
    out = Table(title="By users stored: medians over repeats")
    for column in ("users stored", "Redis bytes a user", "chat's own part, p50 ms", "feedback p50 ms", "p99 ms"):
        out.add_column(column, justify="right")
    for side in stores:
        figures = (median(side.overhead_ms), median_ms(side.rounds[1], 0.50), median_ms(side.rounds[1], 0.99))
        out.add_row(f"{side.users:,}", f"{side.bytes_per_user:,.0f}", *(f"{figure:.2f}" for figure in figures))
    return out


def result(stores: Sequence[Side], lives: history.Lives, cores: processes.Cores) -> str:
    """The last line; a ratio of its headline is the larger one of a chat's own part and of a feedback."""
    few, *_, many = stores
    by_users = {
        "chat": ratio(few.overhead_ms, many.overhead_ms),
        "feedback": ratio([r.ms(0.50) for r in few.rounds[1]], [r.ms(0.50) for r in many.rounds[1]]),
    }
    by_history = {"chat": lives.chat_ratio(RECALLING), "feedback": lives.ratio()}
    headline = {
        f"p50_ratio_users_{short(many.users)}_to_{short(few.users)}": max(by_users.values()),
        f"p50_ratio_history_{short(max(lives.at))}_to_{short(min(lives.at))}": max(by_history.values()),
        "redis_bytes_per_user": round(many.bytes_per_user),
    }

    def by_side(figure: Callable[[Side], float]) -> dict[str, float]:
        return {str(side.users): figure(side) for side in stores}

    details = {
        "ratio_users": by_users,
        "ratio_history": by_history,
        "chat_overhead_p50_ms_by_users": by_side(lambda side: median(side.overhead_ms)),
        "feedback_p50_ms_by_users": by_side(lambda side: median_ms(side.rounds[1], 0.50)),
        "feedback_p99_ms_by_users": by_side(lambda side: median_ms(side.rounds[1], 0.99)),
        "redis_bytes_per_user_by_users": by_side(lambda side: side.bytes_per_user),
        **lives.details(),
        "cores": cores.told,
        "load_average": os.getloadavg()[0],
    }
    return json_line("scale", headline, details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="rounds of each case")
    parser.add_argument(
        "--users", type=int, help="users of the largest store; by default a million or what fits into 8 GiB"
    )
    parser.add_argument("--history", type=int, default=max(HISTORIES), help="feedbacks of the longest history")
    options = parser.parse_args()
    if options.users is not None and options.users <= FEW:
        parser.error(f"--users must be over {FEW}, the smallest store's")
    cores = processes.split_cores()
    console = terminal()
    os.sched_setaffinity(0, cores.others)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        console.print(f"{cores.told}; load average {os.getloadavg()[0]:.1f}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        upstream = stack.enter_context(processes.mock_vllm(folder, cores=cores.others))

        def started(users: int) -> Side:
            return sides.start(
                stack,
                runner,
                cores,
                folder / f"users-{users}",
                users=users,
                past=stored.LIGHT_USER,
                vllm_port=upstream.port,
            )

        lives = history.start(stack, folder / "history", cores)
        with Progress(*columns, console=console) as progress:
            most = options.users or MANY
            stores = [started(users) for users in (FEW, SOME) if users < most]
            for side in stores:
                runner.run(sides.fill(side, progress))
            stores.append(started(options.users or fitting(stores[-1])))
            runner.run(sides.fill(stores[-1], progress))
            runner.run(lives.live([n for n in HISTORIES if n < options.history] + [options.history], progress))
            gc.disable()
            runner.run(measure(stores, repeats=options.repeats, progress=progress))
            runner.run(lives.measure(repeats=options.repeats, progress=progress))
        console.print(table(stores))
        console.print(lives.table())
        line = result(stores, lives, cores)
    print(line)


if __name__ == "__main__":
    processes.as_command(main)
