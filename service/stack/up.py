"""`fastslow up`: from nothing to a stack that serves, until it is told to stop."""

import asyncio
import errno
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil

from service.errors import FastslowError
from service.keys import ensure_keys
from service.settings import Settings
from service.stack import checks
from service.stack.children import children, mark_of
from service.stack.leftovers import MARK, Watcher, sweep
from service.stack.supervisor import Supervisor
from service.stack.terminal import Terminal
from service.stack.welcome import welcome

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(settings: Settings, terminal: Terminal) -> int:
    """Run a local stack until Ctrl-C or SIGTERM; the exit code is 1 where it could not be started or kept up."""
    try:
        with checks.data_folder(settings.data_dir):
            # The lock is ours, so whoever still carries this folder's mark belongs to a stack that was killed.
            if left := sweep(mark_of(settings.data_dir)):
                terminal.say(f"Stopped {left} processes that an earlier start had left behind.")
            return asyncio.run(_up(settings, terminal))
    except FastslowError as error:
        terminal.say(error.message)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        terminal.say(checks.folder_problem(settings.data_dir, error))
    return 1


async def _up(settings: Settings, terminal: Terminal) -> int:
    checks.check_installed(settings)
    checks.check_model(settings)
    checks.check_ports(settings)
    await checks.check_urls(settings)
    keys = ensure_keys(settings.keys_path)

    async def prepare() -> None:
        if not settings.model:
            await prepare_model(settings.data_dir, terminal)

    supervisor = Supervisor(children(settings, keys), data_dir=settings.data_dir, terminal=terminal)
    return await run(
        supervisor,
        mark=mark_of(settings.data_dir),
        terminal=terminal,
        prepare=prepare,
        when_ready=lambda: terminal.say(welcome(settings, keys)),
    )


async def run(
    supervisor: Supervisor,
    *,
    mark: str,
    terminal: Terminal,
    prepare: Callable[[], Coroutine[Any, Any, None]] | None = None,
    when_ready: Callable[[], None] | None = None,
) -> int:
    """Start the supervisor's children and keep them running until a signal; then stop them, and whatever carries the mark.

    The first signal stops in order, the second at once. Returns the exit code.
    """
    told_to_stop = asyncio.Event()

    async def serve() -> None:
        if prepare is not None:
            await prepare()
        await supervisor.start()
        if when_ready is not None:
            when_ready()
        await supervisor.watch()

    def on_signal() -> None:
        if told_to_stop.is_set():
            supervisor.hurry()
            return
        told_to_stop.set()
        terminal.say("Stopping; once more to stop at once.")

    watcher = Watcher(mark)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    serving, stopping = asyncio.create_task(serve()), asyncio.create_task(told_to_stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving  # It never ends well by itself: this raises.
        return 0
    except FastslowError as error:
        terminal.say(error.message)
        return 1
    finally:
        for task in (serving, stopping):
            task.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)
        await supervisor.stop()
        await asyncio.to_thread(watcher.close)


async def prepare_model(data_dir: Path, terminal: Terminal) -> None:
    """Make the default model, in a process of its own, because that takes torch.

    Raises:
        StackProblem: it could not be made; the message is the process's last line.
    """
    log = data_dir / "logs" / "model.log"
    argv = (sys.executable, "-m", "workers.model", "--data-dir", str(data_dir))
    # A process that is cut off here carries the mark, so it is stopped with the rest.
    env = {**psutil.Process().environ(), MARK: mark_of(data_dir)}
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=PIPE, stderr=errors, start_new_session=True, env=env
        )
    assert process.stdout is not None
    async for line in process.stdout:
        terminal.say(line.decode(errors="replace").rstrip())
    if await process.wait() != 0:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise checks.StackProblem(last or f"The default model could not be prepared; see {log}.")
