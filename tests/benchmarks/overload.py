"""`python -m tests.benchmarks.overload`: what a gateway does when more is asked than the model can answer.

Chats arrive at one, two and three times the upstream's capacity, whether or not earlier ones are answered (an open loop: users don't wait
for each other), through the real gateway with limits as by default. Counted are those answered, those refused, how long the answered
ones took, and the gateway's memory.
"""

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from rich.table import Table

from service.keys import ensure_keys
from tests.benchmarks import processes
from tests.benchmarks.full_vllm import CAPACITY, PLACES, REQUESTS, SERVE_SECONDS
from tests.benchmarks.material import CHAT, conversation, headers
from tests.benchmarks.mock_vllm import MODEL
from tests.benchmarks.stats import json_line, percentile
from tests.benchmarks.targets import USERS
from tests.benchmarks.terminal import terminal

FACTORS = (1.0, 2.0, 3.0)
MIB = 1 << 20


@dataclass
class Load:
    """What became of the chats of one rate."""

    offered: float
    """Chats per second."""
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """Of those answered, in seconds."""
    without_retry_after: int = 0
    """Refusals that did not say when to come again."""
    most_bytes: int = 0
    """Resident memory of the gateway at its highest."""

    @property
    def goodput(self) -> float:
        """Answered chats per second."""
        return self.statuses[200] / self.seconds


async def offer(url: str, key: str, gateway: psutil.Process, *, rate: float, seconds: float) -> Load:
    """Begin `rate` chats a second for `seconds`, and wait for all of their ends."""
    found = Load(rate)
    numbers = itertools.count()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as http:

        async def chat(n: int) -> None:
            sent = time.perf_counter()
            body = {"model": MODEL, "messages": conversation(f"Question {n}?")}
            async with http.post(f"{url}{CHAT}", json=body, headers=headers(key, f"user-{n % USERS}")) as reply:
                await reply.read()
            found.statuses[reply.status] += 1
            if reply.status == 200:
                found.latencies.append(time.perf_counter() - sent)
            elif "retry-after" not in reply.headers:
                found.without_retry_after += 1

        started = time.perf_counter()
        async with asyncio.TaskGroup() as chats:
            for n in numbers:
                due = started + n / rate
                if due >= started + seconds:
                    break
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                chats.create_task(chat(n))
                if n % 32 == 0:
                    found.most_bytes = max(found.most_bytes, gateway.memory_info().rss)
        found.seconds = time.perf_counter() - started
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    console = terminal()
    cores = processes.split_cores()
    os.sched_setaffinity(0, cores.others)
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-overload-")))
        key = ensure_keys(folder / "keys.json").first("client")
        redis = stack.enter_context(processes.valkey(folder))
        upstream = stack.enter_context(processes.mock_vllm(folder, cores=cores.others, module="full_vllm"))
        service = stack.enter_context(
            processes.gateway(folder, cores=cores.service, redis_port=redis.port, vllm_port=upstream.port)
        )
        url, gateway = f"http://127.0.0.1:{service.port}", psutil.Process(service.pid)
        loads = {}
        # Once unmeasured: connections are made, memory is taken.
        for factor, seconds in ((1.0, options.seconds / 4), *((f, options.seconds) for f in FACTORS)):
            console.print(f"{factor:g} times the capacity for {seconds:g} s", highlight=False)
            loads[factor] = asyncio.run(offer(url, key, gateway, rate=factor * CAPACITY, seconds=seconds))
    console.print(table(loads))
    print(line(loads))
    if any(load.statuses.keys() - {200, 503} or load.without_retry_after for load in loads.values()):
        sys.exit("a chat was neither answered nor refused with 503 and Retry-After")


def table(loads: Mapping[float, Load]) -> Table:
    title = f"{PLACES} places, {SERVE_SECONDS:g} s a chat, at most {REQUESTS} requests: {CAPACITY:g} chats per second"
    shown = Table(title=title)
    for column in ("offered", "answered /s", "refused", "p50 ms", "p99 ms", "gateway MiB"):
        shown.add_column(column, justify="right")
    for factor, load in loads.items():
        times = [f"{percentile(load.latencies, share) * 1000:.0f}" for share in (0.5, 0.99)]
        refused = f"{1 - load.statuses[200] / load.statuses.total():.0%}"
        shown.add_row(f"{factor:g} x", f"{load.goodput:.0f}", refused, *times, f"{load.most_bytes / MIB:.0f}")
    return shown


def line(loads: Mapping[float, Load]) -> str:
    """The last line; keys of the parts are the factors of the capacity."""
    peak = max(load.goodput for load in loads.values())
    last = loads[max(loads)]
    by = {f"{factor:g}": load for factor, load in loads.items()}
    return json_line(
        "overload",
        {
            "goodput_at_3x_to_peak": last.goodput / peak,
            "peak_rps": peak,
            "p99_ms_at_3x": percentile(last.latencies, 0.99) * 1000,
            "memory_at_3x_to_1x": last.most_bytes / loads[min(loads)].most_bytes,
        },
        {
            "capacity_rps": CAPACITY,
            "goodput": {factor: load.goodput for factor, load in by.items()},
            "refused": {factor: load.statuses[503] / load.statuses.total() for factor, load in by.items()},
            "p50_ms": {factor: percentile(load.latencies, 0.5) * 1000 for factor, load in by.items()},
            "p99_ms": {factor: percentile(load.latencies, 0.99) * 1000 for factor, load in by.items()},
            "without_retry_after": sum(load.without_retry_after for load in loads.values()),
        },
    )


if __name__ == "__main__":
    processes.as_command(main)
