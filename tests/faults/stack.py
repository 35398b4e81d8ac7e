"""The stack that is broken: its processes under the supervisor of `fastslow up`, and the means to break them."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from redis.asyncio import Redis
from rich.console import Console

from service.errors import StoreUnavailable
from service.keys import ApiKey, Keys
from service.settings import Settings
from service.stack.children import mark_of
from service.stack.leftovers import Watcher
from service.stack.process import Child
from service.stack.supervisor import RestartPolicy, Supervisor
from service.stack.terminal import Terminal
from service.store import Store, open_store
from tests.faults.front import Balancer
from tests.faults.members import VLLM_KEY, Layout, Ports, free_ports, members, suite_settings
from tests.faults.proxy import Proxy, to_port
from tests.waiting import until

TENANTS = ("acme", "globex")
KEYS = Keys(
    api_keys=tuple(ApiKey(key=f"fsk-client-key-of-{tenant}", tenant=tenant) for tenant in TENANTS),
    cache_salt_secret="salt" * 8,
    vllm_api_key=VLLM_KEY,
)
# On cores that are busy with other things a start takes many times the seconds that it takes alone.
WHOLE_SECONDS = 180.0
KEY_OF = {key.tenant: key.key for key in KEYS.api_keys}


class Stack:
    """Running, from `started` on."""

    def __init__(self, layout: Layout, folder: Path, model: Path, ports: Ports) -> None:
        self.layout = layout
        self.folder = folder
        self.ports = ports
        self.settings: Settings = suite_settings(layout, ports, folder=folder, model=model)
        self.store: Store = open_store(self.settings.model_copy(update={"redis_timeout_seconds": 20.0}))
        """Past the proxies."""
        self.adapters: list[str] = []
        """Versions of the users of the trial that is on."""
        self.problems: list[str] = []
        """What a fault saw that must not be."""
        self.balancer = Balancer(ports.gateways)
        self.front = Proxy(self.balancer.dial)
        self.to_redis = Proxy(to_port(ports.redis))
        self.to_vllm = [Proxy(to_port(port)) for port in ports.upstreams]
        self.children: dict[str, Child] = {}

    @property
    def url(self) -> str:
        """What clients know."""
        return f"http://127.0.0.1:{self.front.port}"

    def redis(self) -> Redis:
        """A client of the one Redis, past the proxy."""
        return Redis(port=self.ports.redis)

    def pid(self, name: str) -> int | None:
        """Of a member's process; None between its death and its next start."""
        with suppress(FileNotFoundError, ValueError):
            return int((self.folder / "run" / f"{name}.pid").read_text())
        return None

    def signal(self, name: str, number: signal.Signals) -> None:
        """To all processes of a member."""
        if (pid := self.pid(name)) is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)

    def kill(self, *names: str) -> None:
        """SIGKILL; the supervisor starts them again."""
        for name in names:
            self.signal(name, signal.SIGKILL)

    @contextmanager
    def paused(self, *names: str) -> Iterator[None]:
        """They hang inside the block."""
        for name in names:
            self.signal(name, signal.SIGSTOP)
        try:
            yield
        finally:
            for name in names:
                self.signal(name, signal.SIGCONT)

    async def restart(self, name: str) -> None:
        """As a deployment does it: SIGTERM, and on with the next once the new process is ready."""
        before = self.pid(name)
        assert before is not None, f"{name} does not run"
        os.kill(before, signal.SIGTERM)

        async def ready() -> bool:
            return self.pid(name) not in (None, before) and not await self.children[name].probe()

        await until(ready, seconds=WHOLE_SECONDS, what=f"that {name} is back")

    async def whole(self) -> None:
        """Wait until every member is ready, and worker and scheduler have done something since."""

        async def ready() -> bool:
            missing = await asyncio.gather(*(child.probe() for child in self.children.values()))
            return not any(missing)

        await until(ready, seconds=WHOLE_SECONDS, every=0.2, what="that all of the stack is ready")
        await self.worked(since=time.time(), within=WHOLE_SECONDS)

    async def worked(self, *, since: float, within: float) -> float | None:
        """When the scheduler's first tick after `since` (seconds since the epoch) was done by the worker; None where none was in time."""

        async def swept() -> float | None:
            # Redis itself may be what has not come back yet.
            with suppress(StoreUnavailable):
                at = (await self.store.counts.read()).get(("sweep", ""), 0.0)
                return at if at > since else None
            return None

        try:
            return await until(swept, seconds=within, every=0.2)
        except AssertionError:
            return None


@asynccontextmanager
async def started(layout: Layout, folder: Path, model: Path) -> AsyncIterator[Stack]:
    """A stack in an empty folder; nothing of it is left afterwards."""
    for name in ("logs", "run", "redis", "adapters"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    stack = Stack(layout, folder, model, free_ports(layout))
    stack.settings.keys_path.write_text(KEYS.model_dump_json())
    for proxy in (stack.front, stack.to_redis, *stack.to_vllm):
        await proxy.start()
    replicas = ", ".join(f'"http://127.0.0.1:{proxy.port}"' for proxy in stack.to_vllm)
    seen = {"FASTSLOW_VLLM_REPLICA_URLS": f"[{replicas}]"}
    if not layout.sentinels:
        seen["FASTSLOW_REDIS_URL"] = f"redis://127.0.0.1:{stack.to_redis.port}/0"
    processes = members(layout, stack.ports, stack.settings, KEYS, seen_by_gateways=seen)
    stack.children = {child.name: child for child in processes}
    policy = RestartPolicy(
        deaths=10**6, first_pause_seconds=layout.restart_seconds, longest_pause_seconds=layout.restart_seconds
    )
    with (folder / "supervisor.log").open("w") as log:
        supervisor = Supervisor(processes, data_dir=folder, terminal=Terminal(Console(file=log)), policy=policy)
        watching: asyncio.Task[None] | None = None
        watcher = Watcher(mark_of(folder))
        try:
            await supervisor.start()
            watching = asyncio.create_task(supervisor.watch())
            stack.balancer.start()
            await stack.whole()
            yield stack
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await stack.balancer.close()
            await supervisor.stop()
            for proxy in (stack.front, stack.to_redis, *stack.to_vllm):
                await proxy.close()
            await stack.store.close()
            await asyncio.to_thread(watcher.close)
