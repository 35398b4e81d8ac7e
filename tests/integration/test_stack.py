"""`fastslow up` as people run it, on the real Valkey, gateway, worker and scheduler, with a small fake of vLLM behind a URL."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.stack.leftovers import marked, sweep
from tests.fakes import FakeVllm

pytestmark = pytest.mark.timeout(180)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


class Up:
    """A `fastslow up` and what it printed."""

    def __init__(self, data_dir: Path, **given: object) -> None:
        self.data_dir = data_dir
        self.lines: list[str] = []
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTSLOW_")}
        variables = {f"FASTSLOW_{name.upper()}": str(value) for name, value in given.items()}
        command = [str(Path(sys.executable).with_name("fastslow")), "up", "--data-dir", str(data_dir)]
        self.process = subprocess.Popen(
            command, env=inherited | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, words: str) -> "Up":
        def there() -> bool:
            assert self.process.poll() is None or words in self.said, self.said
            return words in self.said

        until(there)
        return self

    def ended(self) -> int:
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def pid(self, name: str) -> int:
        return int((self.data_dir / "run" / f"{name}.pid").read_text())


@pytest.fixture
def stacks(tmp_path: Path, model_path: Path, vllm: FakeVllm) -> Iterator[Callable[..., Up]]:
    """Starts `fastslow up` on one data folder and the same ports each time."""
    base = {
        "port": free_port(),
        "redis_port": free_port(),
        "vllm_url": vllm.url,
        "model": model_path,
    }
    started: list[Up] = []

    def start(**given: object) -> Up:
        started.append(Up(tmp_path, **(base | given)))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait()
    sweep(str(tmp_path), term_seconds=0)


def get(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        result: dict[str, object] = json.load(reply)
        return result


async def test_the_stack_serves_survives_killed_children_and_stops_in_order(
    stacks: Callable[..., Up], tmp_path: Path
) -> None:
    await _in_thread(lambda: _serves_survives_stops(stacks, tmp_path))


def _serves_survives_stops(stacks: Callable[..., Up], tmp_path: Path) -> None:
    up = stacks().wait_for("Ctrl-C stops everything")
    calls = [line for line in up.lines if line.startswith(("REPLY=", "curl "))]
    done = subprocess.run(["sh", "-c", "\n".join(calls)], capture_output=True, text=True, check=True, timeout=60)
    reply, feedback, context = (json.loads(line) for line in done.stdout.splitlines())
    assert feedback["interaction_id"] == reply["id"]
    assert [item["reply"] for item in context["items"]] == ["Paris. Ask me anything else!"]
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600

    for name, title in (("redis", "Redis (embedded Valkey)"), ("gateway", "The gateway"), ("worker", "The worker")):
        os.kill(up.pid(name), signal.SIGKILL)
        up.wait_for(f"{title} is back.")
    again = subprocess.run(["sh", "-c", calls[2]], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(again.stdout)["items"] == context["items"]

    up.process.send_signal(signal.SIGINT)
    assert up.ended() == 0
    stopped = [line for line in up.lines if line.endswith("has stopped.")]
    assert [line.split()[1] for line in stopped] == ["gateway", "scheduler", "control", "worker", "(embedded"]
    assert marked(str(tmp_path)) == []


async def test_sigkill_of_the_command_leaves_no_process_and_the_next_start_has_all_that_was_there(
    stacks: Callable[..., Up], tmp_path: Path
) -> None:
    await _in_thread(lambda: _sigkill(stacks, tmp_path))


def _sigkill(stacks: Callable[..., Up], tmp_path: Path) -> None:
    up = stacks().wait_for("Ctrl-C stops everything")
    everyone = psutil.Process(up.process.pid).children(recursive=True)
    assert len(everyone) >= 8  # Redis, two workers with a child of their own each, scheduler, gateway, watcher
    refused = stacks(port=free_port(), redis_port=free_port())
    assert refused.ended() == 1
    assert refused.lines == [
        f"Another `fastslow up` runs on the data folder {tmp_path}: stop it, or choose another with --data-dir."
    ]
    os.kill(up.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(everyone, timeout=40)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []

    second = stacks().wait_for("Ctrl-C stops everything")
    assert [line for line in second.lines if "key" in line] == [line for line in up.lines if "key" in line]
    second.process.send_signal(signal.SIGTERM)
    assert second.ended() == 0
    assert marked(str(tmp_path)) == []


async def test_a_redis_url_is_used_and_none_is_started_for_it(
    stacks: Callable[..., Up], tmp_path: Path, redis_url: str
) -> None:
    def use() -> None:
        up = stacks(redis_url=redis_url).wait_for("Ctrl-C stops everything")
        assert sorted(p.stem for p in (tmp_path / "run").glob("*.pid")) == ["beat", "control", "gateway", "worker"]
        address = next(line for line in up.lines if line.startswith("Fastslow is ready at")).split()[-1]
        assert get(address.removesuffix("/v1") + "/health/ready")["status"] == "ok"
        up.process.send_signal(signal.SIGTERM)
        assert up.ended() == 0

    await _in_thread(use)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"port": "taken"}, r"Port \d+ for the gateway is taken: choose another with --port or FASTSLOW_PORT."),
        ({"redis_url": "redis://127.0.0.1:1/0"}, r"No Redis at FASTSLOW_REDIS_URL redis://127.0.0.1:1/0: .*"),
        ({"model": "/no/such/model"}, r"No model at /no/such/model \(config.json is missing\): .*"),
        ({"port": "http"}, r"FASTSLOW_PORT is not valid: Input should be a valid integer.*"),
    ],
)
async def test_a_problem_is_one_line_and_exit_code_1(
    stacks: Callable[..., Up], tmp_path: Path, given: dict[str, object], line: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        up = stacks(**{name: other.getsockname()[1] if value == "taken" else value for name, value in given.items()})
        code = await _in_thread(up.ended)
    assert code == 1
    assert len(up.lines) == 1
    assert re.fullmatch(line, up.lines[0])
    assert marked(str(tmp_path)) == []


async def _in_thread(work: Callable[[], object]) -> object:
    """The fake of vLLM answers on this thread's loop meanwhile."""
    return await asyncio.to_thread(work)
