"""One process of the stack: started in a group of its own, its output in a log, stopped with all that it started."""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from service.stack.probes import Probe

# A killed process is gone in milliseconds, unless it hangs in the kernel.
GONE_SECONDS = 2.0
TAIL_LINES = 15
TAIL_BYTES = 16384


@dataclass(frozen=True)
class Child:
    """What to start, and how to tell that it is ready."""

    name: str
    """Names its log and its pid file."""
    title: str
    """Names it to people."""
    argv: tuple[str, ...]
    probe: Probe
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of whoever starts it."""
    ready_seconds: float = 120.0
    stop_seconds: float = 10.0
    """How long it may take to end by itself before it is killed."""
    patience: str = ""
    """How long a start takes, where that is long."""


class Started:
    """A child that was started, from then on until it and its whole group are gone."""

    def __init__(self, child: Child, process: Process, log: Path, pid_file: Path) -> None:
        self.child = child
        self._process = process
        self._log = log
        self._pid_file = pid_file
        self._end = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> str:
        """Wait for its end, kill what is left of its group, and say how it ended."""
        code = await self._process.wait()
        # Once only: later, the group's number may be somebody else's.
        if not self._end:
            self._end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self._signal(signal.SIGKILL)
            self._pid_file.unlink(missing_ok=True)
            with suppress(TimeoutError):
                await asyncio.wait_for(_group_gone(self.pid), GONE_SECONDS)
        return self._end

    async def stop(self, seconds: float) -> None:
        """Ask it to end, and kill its group after this many seconds."""
        if self._end:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), seconds)
        self._signal(signal.SIGKILL)
        await self.wait()

    def tail(self) -> str:
        """The last lines of its log."""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def _group_gone(group: int) -> None:
    # No event tells of a process that is not our own child.
    while any(_lives_in(process, group) for process in psutil.process_iter()):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def _lives_in(process: psutil.Process, group: int) -> bool:
    # A zombie waits for nothing but its parent, which may be a container's first process that never looks.
    with suppress(psutil.Error, OSError):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


async def start(child: Child, *, log_dir: Path, run_dir: Path) -> Started:
    """Start a child. Its earlier log is kept as `NAME.log.1`, so logs hold two starts at most."""
    log = log_dir / f"{child.name}.log"
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *child.argv,
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
            env={**psutil.Process().environ(), **child.env},
        )
    pid_file = run_dir / f"{child.name}.pid"
    pid_file.write_text(f"{process.pid}\n")
    return Started(child, process, log, pid_file)
