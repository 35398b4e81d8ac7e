"""`python -m tests.benchmarks.gateway`: what the gateway adds to a chat, and how many chats a second one worker serves.

Several targets are measured in short alternating rounds, so that the machine's noise hits all alike: the mock upstream directly, a bare
FastAPI and aiohttp pass-through to it, and the full path of the real gateway: a user with a context, Valkey with an append-only file,
every interaction recorded, metrics counted. `--peers` adds other gateways (`peers.py`), and ours with personalization off. The figures
are medians over the repeats.
"""

import argparse
import asyncio
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import uvloop
from redis import Redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from service.keys import ensure_keys
from service.settings import Settings
from tests.benchmarks import peers, processes
from tests.benchmarks.gateway_report import CONNECTIONS, Measured, draw, line, table
from tests.benchmarks.load import load
from tests.benchmarks.material import Caller, numbers
from tests.benchmarks.mock_vllm import TEXT
from tests.benchmarks.passthrough import SERVED, UPSTREAM
from tests.benchmarks.targets import DIRECT, FULL, OFF, PASSTHROUGH, USERS, Target
from tests.benchmarks.terminal import terminal

# Before each round, unmeasured: new connections, and a core that has just done something else.
WARM_SECONDS = 0.15
# Wrapped lines can be read, cut-off columns can't.


@dataclass
class Bench:
    """The running targets, and what was measured of them."""

    targets: dict[str, Target]
    redis_port: int
    measured: Measured

    async def measure(self, *, repeats: int, seconds: float, progress: Progress) -> None:
        counter = numbers()
        cases = [(stream, connections) for stream in (False, True) for connections in CONNECTIONS]
        task = progress.add_task("measuring", total=repeats * len(cases) * len(self.targets))
        for repeat in range(repeats):
            for stream, connections in cases:
                names = list(self.targets)
                # Nobody is always first.
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    described = f"{name}, {connections} connections{', streamed' if stream else ''}"
                    progress.update(task, description=described)
                    target, case = self.targets[name], (stream, connections, name)
                    requests = [target.requests(n, counter, stream=stream) for n in range(connections)]
                    # One connection is the headline's latency, and gives the fewest requests a second.
                    length = seconds * (2 if connections == 1 and not stream else 1)
                    await load(target.service.port, requests, seconds=WARM_SECONDS)
                    gc.collect()
                    before = target.service.cpu_seconds()
                    measured = await load(target.service.port, requests, seconds=length)
                    used = (target.service.cpu_seconds() - before) / len(measured.latencies) * 1000
                    self.measured.rounds.setdefault(case, []).append(measured)
                    self.measured.cpu_ms.setdefault(case, []).append(used)
                    progress.advance(task)


@contextmanager
def running(cores: processes.Cores, console: Console, *, with_peers: bool) -> Iterator[Bench]:
    """All processes up, the users taught, one reply of each target checked."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        folders = {name: folder / name for name in ("valkey", "mock", "gateway", "passthrough")}
        for each in folders.values():
            each.mkdir()
        key = ensure_keys(folders["gateway"] / "keys.json").first("client")
        server = stack.enter_context(processes.valkey(folders["valkey"]))
        upstream = stack.enter_context(processes.mock_vllm(folders["mock"], cores=cores.others))
        bare = processes.uvicorn(
            SERVED,
            folders["passthrough"],
            cores=cores.service,
            env={UPSTREAM: f"http://127.0.0.1:{upstream.port}"},
        )
        targets = {DIRECT: Target(upstream, key), PASSTHROUGH: Target(stack.enter_context(bare), key)}
        home = Settings().data_dir.absolute() / "bench-peers"
        for peer in peers.PEERS if with_peers else ():
            started = peers.serving(
                peer, folder / peer.name, console, home=home, cores=cores.service, upstream_port=upstream.port
            )
            try:
                targets[peer.name] = stack.enter_context(started)
            except processes.NotReady as problem:
                console.print(f"{peer.name} is left out. {problem}", markup=False)
        full = Target(
            stack.enter_context(
                processes.gateway(
                    folders["gateway"], cores=cores.service, redis_port=server.port, vllm_port=upstream.port
                )
            ),
            key,
        )
        targets |= ({OFF: replace(full, body={"personalization": False})} if with_peers else {}) | {FULL: full}
        caller = Caller(full.service.port, key)
        tokens = [caller.teach(f"user-{i}") for i in range(USERS)]
        for name, expected in ((OFF, 0), (FULL, tokens[0])):
            if name in targets:
                said, headers = targets[name].says("And the station?", stream=False)
                assert said == TEXT
                assert headers["x-fastslow-context-tokens"] == str(expected)
                assert "x-fastslow-degraded" not in headers
        yield Bench(targets, server.port, Measured(list(targets), context_tokens=tokens[0]))


def check_recorded(bench: Bench) -> None:
    """Every chat of the gateway was stored, or the figures are of something else."""
    rounds = bench.measured.rounds
    served = sum(len(r.latencies) for (_, _, target), each in rounds.items() if target in (OFF, FULL) for r in each)
    with Redis(port=bench.redis_port) as redis:
        stored = redis.dbsize()
    if stored < served:
        raise RuntimeError(f"{served} chats were served and {stored} keys are stored")


def overhead_header_ms(bench: Bench) -> float:
    """The gateway's own time as it tells it in a reply's header, the median of sequential chats."""
    target = bench.targets[FULL]
    caller = Caller(target.service.port, target.key)
    return median(caller.overhead_ms("user-0", f"Line {n}?") for n in range(100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    parser.add_argument(
        "--peers", action="store_true", help="measure other gateways too, and ours with personalization off"
    )
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    options = parser.parse_args()
    cores = processes.split_cores()
    console = terminal()
    os.sched_setaffinity(0, cores.others)
    columns = (TextColumn("{task.description:<42}"), BarColumn(), TimeRemainingColumn())
    with processes.tidy_end(), running(cores, console, with_peers=options.peers) as bench:
        console.print(f"{cores.told}; load average {os.getloadavg()[0]:.1f}")
        with (
            Progress(*columns, console=console) as progress,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            gc.disable()
            runner.run(bench.measure(repeats=options.repeats, seconds=options.seconds, progress=progress))
        check_recorded(bench)
        console.print(table(bench.measured))
        told = {"cores": cores.told, "load_average": os.getloadavg()[0]}
        result = line(bench.measured, overhead_header_ms=overhead_header_ms(bench), told=told)
    if options.plot:
        draw(bench.measured, options.plot)
    print(result)


if __name__ == "__main__":
    processes.as_command(main)
