"""The supervisor over small children of its own: order, restarts, and nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from service.stack.leftovers import MARK, Watcher, marked, sweep
from service.stack.probes import log_says
from service.stack.process import Child
from service.stack.supervisor import ChildFailed, RestartPolicy, Supervisor
from service.stack.terminal import Terminal
from service.stack.up import run
from tests.waiting import PATIENCE_SECONDS

# Says that it is up, starts a child of its own, and writes its name to a file when it is asked to end.
WELL_BEHAVED = """
import pathlib, signal, subprocess, sys
def end(*_):
    with open(sys.argv[2], "a") as file:
        file.write(sys.argv[1] + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
while True:
    signal.pause()
"""
DEAF = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
)
QUICK = RestartPolicy(first_pause_seconds=0.01, longest_pause_seconds=0.05)


class Bench:
    """A folder for children, and what the terminal was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = str(folder)
        self.output = StringIO()
        self.terminal = Terminal(Console(file=self.output, width=1000))
        self.order = folder / "order"
        for name in ("logs", "run"):
            (folder / name).mkdir()

    def child(self, name: str, code: str = WELL_BEHAVED, **more: float) -> Child:
        return Child(
            name,
            f"the {name}",
            (sys.executable, "-c", code, name, str(self.order)),
            log_says(self.folder / "logs" / f"{name}.log", "up"),
            {MARK: self.mark},
            **more,
        )

    def supervisor(self, *children: Child, policy: RestartPolicy = QUICK) -> Supervisor:
        return Supervisor(children, data_dir=self.folder, terminal=self.terminal, policy=policy)

    def pid(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text())

    @property
    def said(self) -> str:
        return self.output.getvalue()


@pytest.fixture
def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    yield Bench(tmp_path)
    sweep(str(tmp_path), term_seconds=0)


async def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def watched(supervisor: Supervisor) -> AsyncIterator[asyncio.Task[None]]:
    await supervisor.start()
    watch = asyncio.create_task(supervisor.watch())
    try:
        yield watch
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await supervisor.stop()


async def test_children_stop_in_the_reverse_order_of_their_start_and_leave_no_process(bench: Bench) -> None:
    async with watched(bench.supervisor(bench.child("redis"), bench.child("vllm"), bench.child("gateway"))):
        assert len(marked(bench.mark)) == 6  # each with the child that it started
    assert bench.order.read_text() == "gateway vllm redis "
    assert marked(bench.mark) == []
    assert list((bench.folder / "run").iterdir()) == []


async def test_a_killed_child_is_started_again_and_it_is_said(bench: Bench) -> None:
    async with watched(bench.supervisor(bench.child("gateway"))):
        first = bench.pid("gateway")
        [orphan] = psutil.Process(first).children()
        os.kill(first, signal.SIGKILL)
        await until(lambda: "The gateway is back." in bench.said)
        assert bench.pid("gateway") != first
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert "The gateway died (killed by SIGKILL); starting it again" in bench.said


async def test_a_child_that_keeps_dying_ends_the_watch_with_its_last_words(bench: Bench) -> None:
    dying = "print('up', flush=True); import time; time.sleep(0.5); raise SystemExit('no more memory')"
    async with watched(bench.supervisor(bench.child("redis"), bench.child("worker", dying))) as watch:
        with pytest.raises(ChildFailed, match=r"(?s)The worker died 5 times in quick succession.*no more memory"):
            await asyncio.wait_for(watch, PATIENCE_SECONDS)
    assert bench.said.count("starting it again") == 4
    assert marked(bench.mark) == []


async def test_deaths_far_apart_never_end_the_watch(bench: Bench) -> None:
    policy = RestartPolicy(deaths=2, steady_seconds=0, first_pause_seconds=0.01)
    async with watched(bench.supervisor(bench.child("gateway"), policy=policy)) as watch:
        for times in (1, 2, 3):
            os.kill(bench.pid("gateway"), signal.SIGKILL)
            await until(lambda times=times: bench.said.count("is back") == times)
        assert not watch.done()


def test_the_pause_before_a_restart_doubles_up_to_a_limit() -> None:
    policy = RestartPolicy(first_pause_seconds=0.5, longest_pause_seconds=3)
    assert [policy.pause(deaths) for deaths in (1, 2, 3, 4, 9)] == [0.5, 1, 2, 3, 3]


async def test_a_child_that_ends_while_it_starts_fails_the_start_with_its_last_words(bench: Bench) -> None:
    supervisor = bench.supervisor(bench.child("vllm", "raise SystemExit('out of memory')"))
    with pytest.raises(ChildFailed, match=r"(?s)did not start: it ended \(exit code 1\).*out of memory"):
        await supervisor.start()
    await supervisor.stop()


async def test_a_child_that_is_never_ready_fails_the_start(bench: Bench) -> None:
    supervisor = bench.supervisor(bench.child("vllm", "import time; time.sleep(60)", ready_seconds=0.3))
    with pytest.raises(ChildFailed, match="not ready after"):
        await supervisor.start()
    await supervisor.stop()
    assert marked(bench.mark) == []


async def test_a_child_that_will_not_end_is_killed_after_its_time(bench: Bench) -> None:
    async with watched(bench.supervisor(bench.child("worker", DEAF, stop_seconds=0.2))):
        pass
    assert marked(bench.mark) == []


async def test_a_second_signal_kills_instead_of_asking(bench: Bench) -> None:
    supervisor = bench.supervisor(bench.child("worker", DEAF, stop_seconds=600))
    running = asyncio.create_task(run(supervisor, mark=bench.mark, terminal=bench.terminal))
    await until(lambda: "is ready" in bench.said)
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: "Stopping" in bench.said)
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == 0
    assert marked(bench.mark) == []


async def test_sigterm_stops_all_with_exit_code_0_and_a_failure_with_1(bench: Bench) -> None:
    running = asyncio.create_task(run(bench.supervisor(bench.child("redis")), mark=bench.mark, terminal=bench.terminal))
    await until(lambda: "is ready" in bench.said)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == 0
    broken = bench.supervisor(bench.child("redis"), bench.child("vllm", "raise SystemExit('broken')"))
    assert await asyncio.wait_for(run(broken, mark=bench.mark, terminal=bench.terminal), PATIENCE_SECONDS) == 1
    assert bench.order.read_text() == "redis redis "
    assert marked(bench.mark) == []


async def test_a_signal_during_the_start_stops_what_has_started(bench: Bench) -> None:
    slow = bench.child("vllm", "import time; time.sleep(600)")
    running = asyncio.create_task(
        run(bench.supervisor(bench.child("redis"), slow), mark=bench.mark, terminal=bench.terminal)
    )
    await until(lambda: "Starting the vllm" in bench.said)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == 0
    assert marked(bench.mark) == []


def test_the_watcher_stops_what_carries_the_mark_when_its_holder_is_killed(bench: Bench) -> None:
    code = (
        f"import os, subprocess, sys, time; from service.stack.leftovers import Watcher; Watcher({bench.mark!r});"
        # In a session of its own, as vLLM's and Celery's processes may be.
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True,"
        f"env=dict(os.environ, {MARK}={bench.mark!r})); print('up', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert len(marked(bench.mark)) == 1
    holder.kill()
    holder.wait()
    holder.stdout.close()
    deadline = time.monotonic() + 20
    while marked(bench.mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(bench.mark) == []


def test_a_sweep_leaves_other_stacks_alone(bench: Bench) -> None:
    env = {**os.environ, MARK: f"{bench.mark}-of-another"}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=env) as other:
        watcher = Watcher(bench.mark)
        watcher.close()
        alive = other.poll() is None
        other.kill()
    assert alive


async def test_a_log_holds_one_start_and_the_one_before(bench: Bench) -> None:
    for _ in range(3):
        async with watched(bench.supervisor(bench.child("redis"))):
            pass
    assert sorted(p.name for p in (bench.folder / "logs").iterdir()) == ["redis.log", "redis.log.1"]
    assert (bench.folder / "logs" / "redis.log").read_text() == "up\n"
