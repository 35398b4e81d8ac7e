"""Celery's messages over a real RabbitMQ: they wait for a worker through a restart of the broker, and a broker that is away is told of.

Needs RabbitMQ (Debian's package `rabbitmq-server`).
"""

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.errors import StoreUnavailable
from service.jobs import CeleryJobs
from service.settings import Settings
from tests.fakes import MODEL
from tests.gateway import environment, free_port
from tests.waiting import until

# Debian's own script, because the one on the path changes the user and forgets the environment.
SERVER = shutil.which("rabbitmq-server", path=f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(SERVER is None, reason="RabbitMQ is not installed"),
]


class RabbitMq:
    """A broker of one node, with its data in a folder, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._distribution_port = free_port()
        self._names_port = free_port()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    async def start(self) -> None:
        given = {
            "MNESIA_BASE": self._folder / "data",
            "LOG_BASE": self._folder / "log",
            # Two at once, of tests side by side, have different names.
            "NODENAME": f"fastslow{self.port}@localhost",
            "NODE_IP_ADDRESS": "127.0.0.1",
            "NODE_PORT": self.port,
            "DIST_PORT": self._distribution_port,
        }
        assert SERVER is not None
        self._process = await asyncio.create_subprocess_exec(
            SERVER,
            env=os.environ
            | {"HOME": str(self._folder), "ERL_EPMD_PORT": str(self._names_port)}
            | {f"RABBITMQ_{name}": str(value) for name, value in given.items()},
            stdout=asyncio.subprocess.DEVNULL,
        )

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, seconds=120, what="RabbitMQ's start")

    async def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        await self._process.wait()
        # Erlang's server of names would stay.
        names = await asyncio.create_subprocess_exec(
            "epmd", "-port", str(self._names_port), "-kill", stdout=asyncio.subprocess.DEVNULL
        )
        await names.wait()


@pytest.fixture
async def rabbitmq(tmp_path: Path) -> AsyncIterator[RabbitMq]:
    server = RabbitMq(tmp_path / "rabbitmq")
    (tmp_path / "rabbitmq").mkdir()
    await server.start()
    yield server
    await server.stop()


@asynccontextmanager
async def worker(settings: Settings, log: Path) -> AsyncIterator[None]:
    command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "control", "--concurrency", "1"]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, "--loglevel", "INFO", env=environment(settings), stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def test_a_message_waits_through_a_restart_of_the_broker_for_a_worker_and_a_broker_that_is_away_is_said(
    settings: Settings, rabbitmq: RabbitMq, tmp_path: Path
) -> None:
    given = settings.model_copy(update={"broker_url": rabbitmq.url, "model_name": MODEL})
    jobs = CeleryJobs(given)
    await jobs.optimize("acme", "alice")
    await rabbitmq.stop()
    with pytest.raises(StoreUnavailable, match="The job queue can't be reached"):
        await jobs.optimize("acme", "bob")
    await rabbitmq.start()
    await jobs.optimize("acme", "carol")

    log = tmp_path / "worker.log"

    async def both_done() -> bool:
        lines = log.read_text().splitlines()
        return sum("optimize_context" in line and "succeeded" in line for line in lines) == 2

    async with worker(given, log):
        await until(both_done, seconds=300, what="the tasks of alice and carol")
