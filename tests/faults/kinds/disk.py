"""Disks that are full. A limit on the size of files stands for them, which needs no privileges and fails in the same place."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.faults.limited import limit_running
from tests.faults.members import UPSTREAMS, Layout, adapter_cache, full_disk
from tests.faults.people import WEIGHTS_BYTES
from tests.faults.registry import fault
from tests.faults.stack import Stack

# Until Redis has tried to write, and refuses what comes.
NOTICED_SECONDS = 2.0
FLUSHED_ALWAYS = Layout(settings=(("redis_appendfsync", "always"),))


@contextmanager
def full(stack: Stack, *names: str, most_bytes: int) -> Iterator[None]:
    """No file of these members, nor of those started in their place, may be longer inside the block."""
    for name in names:
        full_disk(name, stack.settings).write_text(str(most_bytes))
        _limit(stack, name, most_bytes)
    try:
        yield
    finally:
        for name in names:
            full_disk(name, stack.settings).unlink()
            _limit(stack, name, None)


def _limit(stack: Stack, name: str, most_bytes: int | None) -> None:
    if (pid := stack.pid(name)) is not None:
        with suppress(psutil.NoSuchProcess):
            limit_running(pid, most_bytes)


def _longest(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@fault("disk-full-aof")
async def disk_full_aof(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The disk of the append-only file is full; flushed every second."""
    with full(stack, "redis", most_bytes=_longest(stack.folder / "redis" / "redis")):
        yield


@fault("disk-full-aof-always", layout=FLUSHED_ALWAYS)
async def disk_full_aof_always(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The same, flushed at each write: Redis ends rather than to go on, and again each time that it is started."""
    with full(stack, "redis", most_bytes=_longest(stack.folder / "redis" / "redis")):
        yield


@fault("disk-full-aof-kill", instant=True, on_request=True)
async def disk_full_aof_kill(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The disk of the append-only file is full, and Redis is killed before there is room again: two things at once."""
    with full(stack, "redis", most_bytes=_longest(stack.folder / "redis" / "redis")):
        await asyncio.sleep(NOTICED_SECONDS)
        stack.kill("redis")
    yield


@fault("disk-full-adapters")
async def disk_full_adapters(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The upstreams' disks are full while they start, so that they can copy no adapter from the store."""
    for name in UPSTREAMS:
        shutil.rmtree(adapter_cache(name, stack.settings), ignore_errors=True)
    with full(stack, *UPSTREAMS, most_bytes=WEIGHTS_BYTES // 2):
        stack.kill(*UPSTREAMS)
        yield
