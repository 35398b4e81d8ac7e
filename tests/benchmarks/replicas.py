"""`python -m tests.benchmarks.replicas`: what it saves that a user's chats go to one replica of vLLM.

Two real vLLMs, and users with an adapter each (random, so small that replies hardly change). In a pass every user chats once, in another
order each time. In one arm the gateway sends a user's chats to the same replica (rendezvous hash); in the other they are dealt out to the
replicas in turn, by two gateways that know one replica each. A round is a pass that is not counted, so that what the other arm has left
in the replicas does not matter, and some that are; the arms take turns.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
from rich.table import Table

from service.domain.slow_weights import AdapterVersion, Scope
from service.keys import Keys, ensure_keys
from service.settings import Settings
from service.stack.children import GATEWAY
from service.store import open_store
from tests.benchmarks import processes
from tests.benchmarks.adapter_loads import LOGGING, Logs
from tests.benchmarks.mock_vllm import MODEL
from tests.benchmarks.replica_adapters import put_in_use, write_adapters
from tests.benchmarks.stats import json_line, percentile
from tests.benchmarks.terminal import terminal

MAX_LORAS = 4
STALL = 5
"""A chat stalls whose first token takes so many times the median over all chats of both arms."""
AFFINITY, ROUND_ROBIN = "affinity", "round_robin"
ARMS = (AFFINITY, ROUND_ROBIN)
PROFILE = (
    "You are a helper of {user}, who lives in house {n} at the harbour, keeps {n} hens and {m} ducks, sails a blue boat "
    "called {user}'s Luck, reads the news at {m} in the evening, never eats fish on day {m} of the month, and likes "
    "answers that name a place in town. "
) * 3
QUESTIONS = ("Where do I buy feed?", "When does the ferry leave?", "Who mends sails?", "What grows in shade?")


@dataclass(frozen=True)
class Asked:
    """One chat."""

    seconds: float
    """To the first token."""
    prompt_tokens: int
    cached_tokens: int


@dataclass
class Round:
    """One arm's turn, of which the counted chats are kept."""

    asked: list[Asked] = field(default_factory=list)
    loads: int = 0
    """Adapters read from their files in the counted passes."""
    activations: int = 0
    """Adapters copied into a place of the batch."""


@dataclass(frozen=True)
class Arm:
    """The gateways that chats are dealt out to in turn."""

    name: str
    gateways: Sequence[httpx.AsyncClient]


async def one_round(
    arm: Arm, versions: Sequence[AdapterVersion], logs: Logs, *, number: int, passes: int, at_once: int
) -> Round:
    """A pass that is not counted and `passes` that are."""
    round_, rng = Round(), random.Random(number)
    loads = activations = 0
    for n in range(passes + 1):
        if n == 1:
            loads, activations = logs.counts()
        order = rng.sample(versions, len(versions))
        found = await _pass(arm, order, first=n * len(order), at_once=at_once, number=number)
        round_.asked += found if n else []
    now = logs.counts()
    round_.loads, round_.activations = now[0] - loads, now[1] - activations
    return round_


async def _pass(arm: Arm, order: Sequence[AdapterVersion], *, first: int, at_once: int, number: int) -> list[Asked]:
    """A chat of each, `at_once` of them at a time."""
    waiting = iter(enumerate(order, start=first))

    async def work() -> list[Asked]:
        return [await chat(arm.gateways[n % len(arm.gateways)], version, n=n, number=number) for n, version in waiting]

    return [asked for done in await asyncio.gather(*(work() for _ in range(at_once))) for asked in done]


async def chat(gateway: httpx.AsyncClient, version: AdapterVersion, *, n: int, number: int) -> Asked:
    """A streamed chat of a version's user.

    Raises:
        RuntimeError: it was not served by that version.
    """
    user = Scope.parse(version.scope).name
    # Another profile in each round, so that no arm finds what the other has cached.
    profile = PROFILE.format(user=user, n=number + 2, m=3 * number + 5)
    messages = [{"role": "system", "content": profile}, {"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    began, seconds, usage = time.perf_counter(), 0.0, None
    async with gateway.stream("POST", "/v1/chat/completions", json=body, headers={"X-User-ID": user}) as reply:
        if reply.headers.get("x-fastslow-adapter") != version.name:
            raise RuntimeError(f"{reply.status_code}: not by {version.name}, but {dict(reply.headers)}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not seconds and any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                seconds = time.perf_counter() - began
            usage = chunk.get("usage") or usage
    if usage is None or not seconds:
        raise RuntimeError(f"a chat of {user} has ended without a token")
    return Asked(seconds, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


def figures(rounds: Sequence[Round], *, stall_seconds: float) -> dict[str, object]:
    """Of one arm."""
    asked = [chat for round_ in rounds for chat in round_.asked]
    first = [chat.seconds for chat in asked]
    return {
        "ttft_p50_ms": percentile(first, 0.5) * 1000,
        "ttft_p95_ms": percentile(first, 0.95) * 1000,
        "loads": sum(round_.loads for round_ in rounds),
        "activations": sum(round_.activations for round_ in rounds),
        "stalls": sum(seconds > stall_seconds for seconds in first),
        "cached_share": sum(chat.cached_tokens for chat in asked) / sum(chat.prompt_tokens for chat in asked),
        "chats": len(asked),
        "ttft_p50_ms_by_round": [median(chat.seconds for chat in round_.asked) * 1000 for round_ in rounds],
    }


def compared(rounds: dict[str, list[Round]]) -> dict[str, dict[str, object]]:
    """The figures by arm."""
    every = [chat.seconds for found in rounds.values() for round_ in found for chat in round_.asked]
    return {arm: figures(found, stall_seconds=STALL * median(every)) for arm, found in rounds.items()}


def table(found: dict[str, dict[str, object]]) -> Table:
    out = Table(title="First token, and what the replicas had to do for it", padding=(0, 1))
    columns = ("ttft_p50_ms", "ttft_p95_ms", "loads", "activations", "stalls", "cached_share", "chats")
    for column in ("", *columns):
        out.add_column(column, justify="right", no_wrap=True)
    for arm, row in found.items():
        out.add_row(arm, *(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    return out


@contextmanager
def vllm(folder: Path, *, adapters: Path, in_memory: int) -> Iterator[processes.Service]:
    """A replica as `fastslow up` starts it, on whichever cores."""
    folder.mkdir()
    (folder / "logging.json").write_text(json.dumps(LOGGING))
    port = processes.free_port()
    env = {
        "FASTSLOW_DATA_DIR": str(folder),
        "FASTSLOW_MODEL": processes.model_folder(),
        "FASTSLOW_ADAPTER_STORE": str(adapters),
        "FASTSLOW_VLLM_PORT": str(port),
        "FASTSLOW_VLLM_STOP_SECONDS": "1",
        "FASTSLOW_VLLM_ADAPTERS_IN_BATCH": str(MAX_LORAS),
        "FASTSLOW_VLLM_ADAPTERS_IN_MEMORY": str(in_memory),
        "VLLM_LOGGING_CONFIG_PATH": str(folder / "logging.json"),
    }
    command = [sys.executable, "-m", "workers.vllm_server"]
    cores = frozenset(os.sched_getaffinity(0))
    with processes.server("vLLM", command, port=port, path="/health", folder=folder, cores=cores, env=env) as started:
        yield started


@contextmanager
def gateway(folder: Path, keys: Keys, *, redis_url: str, urls: Sequence[str]) -> Iterator[processes.Service]:
    """A gateway over these replicas."""
    ensure_keys(folder / "keys.json")
    (folder / "keys.json").write_text(keys.model_dump_json())
    env = {
        "FASTSLOW_RECALL": "False",
        "FASTSLOW_DATA_DIR": str(folder),
        "FASTSLOW_MODEL": processes.model_folder(),
        "FASTSLOW_REDIS_URL": redis_url,
        "FASTSLOW_REDIS_TIMEOUT_SECONDS": "30",
        "FASTSLOW_VLLM_REPLICA_URLS": json.dumps(urls),
        # All replicas share the cores, and may be slow to say that they are well.
        "FASTSLOW_REPLICA_PROBE_TIMEOUT_SECONDS": "60",
    }
    cores = frozenset(os.sched_getaffinity(0))
    with processes.uvicorn(GATEWAY, folder, cores=cores, env=env) as started:
        yield started


async def measured(
    gateways: dict[str, list[str]],
    key: str,
    versions: Sequence[AdapterVersion],
    logs: Logs,
    options: argparse.Namespace,
) -> dict[str, list[Round]]:
    """The rounds of each arm, which take turns."""
    rounds: dict[str, list[Round]] = {arm: [] for arm in ARMS}
    async with AsyncExitStack() as stack:
        limits, headers = httpx.Timeout(300.0), {"Authorization": f"Bearer {key}"}
        arms = []
        for name, urls in gateways.items():
            clients = [httpx.AsyncClient(base_url=url, timeout=limits, headers=headers) for url in urls]
            arms.append(Arm(name, [await stack.enter_async_context(client) for client in clients]))
        for number in range(options.rounds):
            # Which begins changes, too.
            for n, arm in enumerate(arms if number % 2 == 0 else arms[::-1]):
                found = await one_round(
                    arm, versions, logs, number=2 * number + n, passes=options.passes, at_once=options.at_once
                )
                rounds[arm.name].append(found)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64, help="and users")
    parser.add_argument("--in-memory", type=int, default=40, help="adapters that a replica holds: its share, not all")
    parser.add_argument("--rounds", type=int, default=2, help="of each arm")
    parser.add_argument("--passes", type=int, default=2, help="of a round that are counted")
    parser.add_argument("--at-once", type=int, default=4, help="chats")
    options = parser.parse_args()
    console = terminal()
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        keys = ensure_keys(folder / "keys.json")
        config = json.loads((Path(processes.model_folder()) / "config.json").read_text())
        users = [f"user-{n}" for n in range(options.adapters)]
        console.print(f"writing {options.adapters} adapters, starting two vLLMs: some minutes")
        versions = write_adapters(folder / "adapters", config, users, tenant=keys.api_keys[0].tenant)
        redis = f"redis://127.0.0.1:{stack.enter_context(processes.valkey(folder / 'valkey')).port}/0"
        names = ("vllm-0", "vllm-1")
        ports = [
            stack.enter_context(vllm(folder / name, adapters=folder / "adapters", in_memory=options.in_memory)).port
            for name in names
        ]
        replicas = [f"http://127.0.0.1:{port}" for port in ports]
        own = [stack.enter_context(gateway(folder / f"gateway-{n}", keys, redis_url=redis, urls=urls)).port
               for n, urls in enumerate((replicas, replicas[:1], replicas[1:]))]  # fmt: skip
        urls = [f"http://127.0.0.1:{port}" for port in own]
        logs = Logs([folder / name / "workers.vllm_server.log" for name in names])

        async def run() -> dict[str, list[Round]]:
            store = open_store(Settings(_env_file=None, redis_url=redis, redis_timeout_seconds=30))
            try:
                await put_in_use(store, versions)
            finally:
                await store.close()
            console.print("measuring")
            return await measured(
                {AFFINITY: urls[:1], ROUND_ROBIN: urls[1:]}, keys.first("client"), versions, logs, options
            )

        found = compared(asyncio.run(run()))
    console.print(table(found))
    details = {"in_memory": options.in_memory, "at_once": options.at_once, "load_average": os.getloadavg()[0]}
    print(json_line("replicas", {"adapters": options.adapters, "max_loras": MAX_LORAS}, found | details))


if __name__ == "__main__":
    processes.as_command(main)
