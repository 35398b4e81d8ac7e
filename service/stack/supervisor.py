"""Starts the children in order, restarts one that dies, stops all in reverse order."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import FastslowError
from service.stack import process
from service.stack.process import Child, Started
from service.stack.terminal import Terminal

PROBE_EVERY_SECONDS = 0.2


class ChildFailed(FastslowError):
    """A child did not start, or keeps dying; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class RestartPolicy:
    """How often a child may die."""

    deaths: int = 5
    """So many in quick succession, and the stack gives up."""
    steady_seconds: float = 60.0
    """A child that was ready for this long starts again with a clean slate."""
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 15.0

    def pause(self, deaths: int) -> float:
        """Seconds before the restart after this many deaths in a row: doubled each time."""
        return min(self.first_pause_seconds * 2.0 ** (deaths - 1), self.longest_pause_seconds)


class Supervisor:
    """The children, in the order of their start."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        data_dir: Path,
        terminal: Terminal,
        policy: RestartPolicy = RestartPolicy(),
    ) -> None:
        self._children = children
        self._log_dir = data_dir / "logs"
        self._run_dir = data_dir / "run"
        self._terminal = terminal
        self._policy = policy
        self._running: dict[str, Started] = {}
        self._hurry = asyncio.Event()

    async def start(self) -> None:
        """Start each child once the one before is ready.

        Raises:
            ChildFailed: one ended or was not ready in time. A first start is not tried again: its cause seldom passes by itself.
        """
        for child in self._children:
            began = time.monotonic()
            with self._terminal.busy(f"Starting {child.title}{child.patience}"):
                started = await self._launch(child)
                missing = await self._until_ready(started)
            if missing:
                raise self._failed(started, f"{_first(child)} did not start: {missing}.")
            self._terminal.say(f"{_first(child)} is ready after {time.monotonic() - began:.0f} s.")

    async def watch(self) -> None:
        """Restart whatever dies, for ever.

        Raises:
            ChildFailed: one died too often.
        """
        watches = [asyncio.create_task(self._keep(child)) for child in self._children]
        try:
            await asyncio.gather(*watches)
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def stop(self) -> None:
        """Stop all, the last started first, so that the gateway drains while what it needs still runs."""
        for child in reversed(self._children):
            started = self._running.pop(child.name, None)
            if started is None:
                continue
            with self._terminal.busy(f"Stopping {child.title}"):
                stopping = asyncio.create_task(started.stop(child.stop_seconds))
                hurried = asyncio.create_task(self._hurry.wait())
                await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
                hurried.cancel()
                if not stopping.done():
                    stopping.cancel()
                    stopping = asyncio.create_task(started.stop(0))
                await stopping
            self._terminal.say(f"{_first(child)} has stopped.")

    def hurry(self) -> None:
        """From now on kill instead of asking."""
        self._hurry.set()

    async def _launch(self, child: Child) -> Started:
        started = await process.start(child, log_dir=self._log_dir, run_dir=self._run_dir)
        self._running[child.name] = started
        return started

    async def _until_ready(self, started: Started) -> str:
        """Nothing once it is ready; why not, where it ended before or took too long."""
        child, deadline = started.child, time.monotonic() + started.child.ready_seconds
        while True:
            if started.ended:
                return f"it ended ({await started.wait()})"
            missing = await child.probe()
            # Somebody else may answer in its place, while it died of a taken port.
            if not missing and not started.ended:
                return ""
            if time.monotonic() > deadline:
                return f"not ready after {child.ready_seconds:.0f} s ({missing})"
            await asyncio.sleep(PROBE_EVERY_SECONDS)

    async def _keep(self, child: Child) -> None:
        deaths, ready_since = 0, time.monotonic()
        while True:
            started = self._running[child.name]
            how = await started.wait()
            deaths = 1 if time.monotonic() - ready_since > self._policy.steady_seconds else deaths + 1
            if deaths >= self._policy.deaths:
                raise self._failed(started, f"{_first(child)} died {deaths} times in quick succession ({how}).")
            pause = self._policy.pause(deaths)
            self._terminal.say(f"{_first(child)} died ({how}); starting it again in {pause:.1f} s.")
            await asyncio.sleep(pause)
            started = await self._launch(child)
            missing = await self._until_ready(started)
            ready_since = time.monotonic()
            if not missing:
                self._terminal.say(f"{_first(child)} is back.")
            elif not started.ended:
                self._terminal.say(f"{_first(child)} is {missing}.")
                await started.stop(child.stop_seconds)

    def _failed(self, started: Started, what: str) -> ChildFailed:
        lines = started.tail()
        log = self._log_dir / f"{started.child.name}.log"
        return ChildFailed(f"{what} The last lines of {log}:\n{lines}" if lines else f"{what} Its log {log} is empty.")


def _first(child: Child) -> str:
    """The title as a sentence begins with it (vLLM keeps its small letter)."""
    return child.title if child.title.startswith("vLLM") else child.title[0].upper() + child.title[1:]
