"""`python -m tests.benchmarks.gateway`: what the gateway adds to a chat, and how many chats a second one worker serves.

Three targets are measured in short alternating rounds, so that the machine's noise hits all alike: the mock upstream directly, a bare
FastAPI and aiohttp pass-through to it, and the full path of the real gateway: a user with a context, Valkey with an append-only file,
every interaction recorded, metrics counted. The figures are medians over the repeats.
"""

import argparse
import asyncio
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop
from redis import Redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.keys import ensure_keys
from tests.benchmarks import processes
from tests.benchmarks.load import load
from tests.benchmarks.material import Caller, chat_requests, numbers
from tests.benchmarks.mock_vllm import TEXT
from tests.benchmarks.passthrough import UPSTREAM
from tests.benchmarks.stats import Round, json_line, median_added_ms, median_ms, median_rps, percentile

DIRECT, PASSTHROUGH, FULL = "direct", "pass-through", "full path"
CONNECTIONS = (1, 16, 64)
USERS = 16
# Before each round, unmeasured: new connections, and a core that has just done something else.
WARM_SECONDS = 0.15


@dataclass
class Bench:
    """The running targets, and what was measured of them."""

    targets: dict[str, processes.Service]
    key: str
    redis_port: int
    context_tokens: int
    rounds: dict[tuple[bool, int, str], list[Round]] = field(default_factory=dict)
    """(streamed, connections, target) -> one round per repeat."""
    cpu_ms: dict[tuple[bool, int, str], list[float]] = field(default_factory=dict)
    """Likewise, milliseconds of the target's own CPU time per chat: what a busy machine changes least."""

    async def measure(self, *, repeats: int, seconds: float, progress: Progress) -> None:
        counter = numbers()
        cases = [(stream, connections) for stream in (False, True) for connections in CONNECTIONS]
        task = progress.add_task("measuring", total=repeats * len(cases) * len(self.targets))
        for repeat in range(repeats):
            for stream, connections in cases:
                targets = list(self.targets)
                # Nobody is always first.
                targets = targets[repeat % len(targets) :] + targets[: repeat % len(targets)]
                for target in targets:
                    progress.update(
                        task, description=f"{target}, {connections} connections{', streamed' if stream else ''}"
                    )
                    requests = [
                        chat_requests(self.key, f"user-{i % USERS}", counter, stream=stream) for i in range(connections)
                    ]
                    # One connection is the headline's latency, and gives the fewest requests a second.
                    length = seconds * (2 if connections == 1 and not stream else 1)
                    served = self.targets[target]
                    await load(served.port, requests, seconds=WARM_SECONDS)
                    gc.collect()
                    before = served.cpu_seconds()
                    measured = await load(served.port, requests, seconds=length)
                    used = (served.cpu_seconds() - before) / len(measured.latencies) * 1000
                    self.rounds.setdefault((stream, connections, target), []).append(measured)
                    self.cpu_ms.setdefault((stream, connections, target), []).append(used)
                    progress.advance(task)

    def rps(self, target: str) -> float:
        """Chats a second, not streamed, at the best number of connections."""
        return max(median_rps(self.rounds[False, connections, target]) for connections in CONNECTIONS[1:])


@contextmanager
def running(cores: processes.Cores) -> Iterator[Bench]:
    """All processes up, the users taught, one reply of each target checked."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        folders = {name: folder / name for name in ("valkey", "mock", "gateway", "passthrough")}
        for each in folders.values():
            each.mkdir()
        keys = ensure_keys(folders["gateway"] / "keys.json")
        server = stack.enter_context(processes.valkey(folders["valkey"]))
        upstream = stack.enter_context(processes.mock_vllm(folders["mock"], cores=cores.others))
        bare = stack.enter_context(
            processes.uvicorn(
                "tests.benchmarks.passthrough:make_app",
                folders["passthrough"],
                cores=cores.service,
                env={UPSTREAM: f"http://127.0.0.1:{upstream.port}"},
            )
        )
        full = stack.enter_context(
            processes.gateway(folders["gateway"], cores=cores.service, redis_port=server.port, vllm_port=upstream.port)
        )
        caller = Caller(full.port, keys.first("client"))
        tokens = [caller.teach(f"user-{i}") for i in range(USERS)]
        reply, headers = caller.chat("user-0", "And the station?")
        assert reply["choices"][0]["message"]["content"] == TEXT
        assert headers["x-fastslow-context-tokens"] == str(tokens[0])
        assert "x-fastslow-degraded" not in headers
        yield Bench(
            {DIRECT: upstream, PASSTHROUGH: bare, FULL: full},
            keys.first("client"),
            server.port,
            context_tokens=tokens[0],
        )


def check_recorded(bench: Bench) -> None:
    """Every chat of the full path was stored, or the figures are of something else."""
    served = sum(len(r.latencies) for (_, _, target), rounds in bench.rounds.items() if target == FULL for r in rounds)
    with Redis(port=bench.redis_port) as redis:
        stored = redis.dbsize()
    if stored < served:
        raise RuntimeError(f"{served} chats were served and {stored} keys are stored")


def overhead_header_ms(bench: Bench) -> float:
    """The gateway's own time as it tells it in a reply's header, the median of sequential chats."""
    caller = Caller(bench.targets[FULL].port, bench.key)
    return median(float(caller.chat("user-0", f"Line {n}?")[1]["x-fastslow-overhead-ms"]) for n in range(100))


def table(bench: Bench) -> Table:
    out = Table(padding=(0, 0), title=f"Medians over repeats, ms; the context has {bench.context_tokens} tokens")
    for column in ("", "conns", "target"):
        out.add_column(column, no_wrap=True)
    for column in ("req/s", "p50 ms", "added p50", "p95", "p99", "1st byte", "CPU ms"):
        out.add_column(column, justify="right", no_wrap=True)
    for (stream, connections, target), rounds in sorted(bench.rounds.items(), key=lambda r: (r[0][0], r[0][1])):
        direct = bench.rounds[stream, connections, DIRECT]
        added = [f"{median_added_ms(rounds, direct, share):.2f}" for share in (0.50, 0.95, 0.99)]
        first = median(percentile(r.first_bytes, 0.5) for r in rounds) * 1000
        out.add_row(
            "stream" if stream else "whole",
            str(connections),
            target,
            f"{median_rps(rounds):.0f}",
            f"{median_ms(rounds, 0.50):.2f}",
            *(["", "", ""] if target == DIRECT else added),
            f"{first:.2f}",
            f"{median(bench.cpu_ms[stream, connections, target]):.2f}",
            end_section=target == list(bench.targets)[-1],
        )
    return out


def result(bench: Bench, cores: processes.Cores) -> str:
    """The last line: added latency of one connection, not streamed; throughput at the best of the others."""
    alone = {target: bench.rounds[False, 1, target] for target in bench.targets}
    streams = {target: bench.rounds[True, 1, target] for target in bench.targets}
    rps, bare = bench.rps(FULL), bench.rps(PASSTHROUGH)
    headline = {
        "added_p50_ms": median_added_ms(alone[FULL], alone[DIRECT], 0.50),
        "added_p99_ms": median_added_ms(alone[FULL], alone[DIRECT], 0.99),
        "rps": rps,
        "passthrough_rps": bare,
        "rps_ratio_passthrough": rps / bare,
    }
    details = {
        "added_p95_ms": median_added_ms(alone[FULL], alone[DIRECT], 0.95),
        "passthrough_added_p50_ms": median_added_ms(alone[PASSTHROUGH], alone[DIRECT], 0.50),
        "passthrough_added_p99_ms": median_added_ms(alone[PASSTHROUGH], alone[DIRECT], 0.99),
        "overhead_header_p50_ms": overhead_header_ms(bench),
        "stream_added_p50_ms": median_added_ms(streams[FULL], streams[DIRECT], 0.50),
        "stream_first_byte_added_p50_ms": 1000
        * median(
            percentile(full.first_bytes, 0.5) - percentile(direct.first_bytes, 0.5)
            for full, direct in zip(streams[FULL], streams[DIRECT], strict=True)
        ),
        "stream_rps": max(median_rps(bench.rounds[True, c, FULL]) for c in CONNECTIONS[1:]),
        "stream_passthrough_rps": max(median_rps(bench.rounds[True, c, PASSTHROUGH]) for c in CONNECTIONS[1:]),
        "whole_rps_by_connections": {
            target: {str(c): median_rps(bench.rounds[False, c, target]) for c in CONNECTIONS}
            for target in bench.targets
        },
        "cpu_ms": median(bench.cpu_ms[False, 16, FULL]),
        "passthrough_cpu_ms": median(bench.cpu_ms[False, 16, PASSTHROUGH]),
        "stream_cpu_ms": median(bench.cpu_ms[True, 16, FULL]),
        "stream_passthrough_cpu_ms": median(bench.cpu_ms[True, 16, PASSTHROUGH]),
        "context_tokens": bench.context_tokens,
        "cores": cores.told,
        "load_average": os.getloadavg()[0],
    }
    return json_line("gateway", headline, details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    options = parser.parse_args()
    cores = processes.split_cores()
    console = Console(stderr=True)
    os.sched_setaffinity(0, cores.others)
    columns = (TextColumn("{task.description:<38}"), BarColumn(), TimeRemainingColumn())
    with processes.tidy_end(), running(cores) as bench:
        console.print(f"{cores.told}; load average {os.getloadavg()[0]:.1f}")
        with (
            Progress(*columns, console=console) as progress,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            gc.disable()
            runner.run(bench.measure(repeats=options.repeats, seconds=options.seconds, progress=progress))
        check_recorded(bench)
        console.print(table(bench))
        line = result(bench, cores)
    print(line)


if __name__ == "__main__":
    processes.as_command(main)
