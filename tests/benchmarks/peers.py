"""Other gateways to compare with, each in an environment of its own, which is made on first use: their pins clash with ours.

Each is set up as its documentation has it for production on one core: one worker, nothing stored, no telemetry, errors alone logged.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console

from tests.benchmarks import processes
from tests.benchmarks.mock_vllm import MODEL, TEXT
from tests.benchmarks.targets import Target


class Peer(ABC):
    """One gateway: what to install, and how to start it."""

    name: str
    requirements: tuple[str, ...]
    """Pinned; pip resolves the rest."""

    @abstractmethod
    @contextmanager
    def serving(self, python: Path, folder: Path, *, cores: frozenset[int], upstream_port: int) -> Iterator[Target]:
        """The gateway over the upstream, started with the interpreter of its environment."""


class LiteLlm(Peer):
    """The proxy, by https://docs.litellm.ai/docs/proxy/prod: a master key, one uvicorn worker, no database, LITELLM_LOG=ERROR."""

    name = "LiteLLM"
    requirements = ("litellm[proxy]==1.106.12", "uvloop", "httptools")

    @contextmanager
    def serving(self, python: Path, folder: Path, *, cores: frozenset[int], upstream_port: int) -> Iterator[Target]:
        port, key = processes.free_port(), f"sk-{secrets.token_hex(16)}"
        upstream = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{upstream_port}/v1"}
        config = {
            "model_list": [{"model_name": MODEL, "litellm_params": upstream | {"api_key": "none"}}],
            "general_settings": {"master_key": key, "disable_spend_logs": True, "disable_error_logs": True},
            "litellm_settings": {"set_verbose": False, "request_timeout": 600, "num_retries": 0, "callbacks": []},
        }
        # JSON is YAML.
        (folder / "config.yaml").write_text(json.dumps(config))
        env = {
            "LITELLM_MASTER_KEY": key,
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        command = [str(python), "-m", "litellm.proxy.proxy_cli", "--config", "config.yaml", "--num_workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
        started = processes.server(
            self.name, command, port=port, path="/health/liveliness", folder=folder, cores=cores, env=env
        )
        with started as service:
            yield Target(service, key)


class TensorZero(Peer):
    """The Rust gateway; without ClickHouse it observes nothing, which is its fastest way of running."""

    name = "TensorZero"
    requirements = ("tensorzero==2026.6.0",)

    @contextmanager
    def serving(self, python: Path, folder: Path, *, cores: frozenset[int], upstream_port: int) -> Iterator[Target]:
        (folder / "tensorzero.toml").write_text(
            f"""
            [gateway]
            disable_pseudonymous_usage_analytics = true
            observability.enabled = false

            [models."{MODEL}"]
            routing = ["vllm"]

            [models."{MODEL}".providers.vllm]
            type = "vllm"
            model_name = "{MODEL}"
            api_base = "http://127.0.0.1:{upstream_port}/v1"
            api_key_location = "none"
            """
        )
        command = [str(python), "-m", "tests.benchmarks.tensorzero_gateway", "tensorzero.toml"]
        with processes.process(command, folder=folder, cores=cores, env={"RUST_LOG": "error"}) as pid:
            service = processes.Service(processes.told_port(self.name, pid, folder), pid)
            body = {"model": f"tensorzero::model_name::{MODEL}"}
            yield Target(service, key="none", path="/openai/v1/chat/completions", body=body)


class VllmRouter(Peer):
    """The vLLM project's own router (Rust), by users as our gateway sends them: what a hop costs that would choose the replica instead."""

    name = "vllm-router"
    requirements = ("vllm-router==0.1.17",)

    @contextmanager
    def serving(self, python: Path, folder: Path, *, cores: frozenset[int], upstream_port: int) -> Iterator[Target]:
        port = processes.free_port()
        command = [str(python), "-m", "vllm_router.launch_router", "--port", str(port), "--policy", "consistent_hash"]
        command += ["--worker-urls", f"http://127.0.0.1:{upstream_port}", "--log-level", "error"]
        command += ["--prometheus-port", str(processes.free_port())]
        # With a single core it never gets ready, so it is given its own once it is.
        every = frozenset(range(psutil.cpu_count() or 1))
        started = processes.server(self.name, command, port=port, path="/health", folder=folder, cores=every, env={})
        with started as service:
            for thread in psutil.Process(service.pid).threads():
                os.sched_setaffinity(thread.id, cores)
            yield Target(service, key="none")


PEERS: tuple[Peer, ...] = (LiteLlm(), TensorZero(), VllmRouter())


def environment(peer: Peer, home: Path, console: Console) -> Path:
    """The interpreter of the peer's environment below `home`, which is made first where it is missing or has other versions.

    Raises:
        NotReady: it can't be installed.
    """
    folder = home / peer.name.lower()
    python, stamp, wanted = folder / "bin" / "python", folder / ".installed", "\n".join(peer.requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        console.print(f"Installing {' '.join(peer.requirements)} into {folder} (once, some minutes)...", markup=False)
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(folder)], peer, console)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        run([*pip, *peer.requirements], peer, console)
        stamp.write_text(wanted)
    return python


def run(command: list[str], peer: Peer, console: Console) -> None:
    """Run a command and show its latest line meanwhile.

    Raises:
        NotReady: it failed; with its last lines.
    """
    last: deque[str] = deque(maxlen=5)
    with (
        console.status(peer.name) as status,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            last.append(line.rstrip())
            status.update(f"{peer.name}: {line.strip()[:100]}")
    if child.returncode:
        raise processes.NotReady(f"{peer.name} can't be installed:\n" + "\n".join(last))


@contextmanager
def serving(
    peer: Peer, folder: Path, console: Console, *, home: Path, cores: frozenset[int], upstream_port: int
) -> Iterator[Target]:
    """A peer up, working in `folder`, installed first if need be; one whole reply and one stream of it are as the upstream gave them.

    Raises:
        NotReady: it can't be installed, does not start, or answers something else.
    """
    folder.mkdir()
    python = environment(peer, home, console)
    with peer.serving(python, folder, cores=cores, upstream_port=upstream_port) as target:
        for stream in (False, True):
            try:
                said, _ = target.says("And the station?", stream=stream)
            except (OSError, RuntimeError) as error:
                raise processes.NotReady(f"{peer.name} does not answer: {error}") from error
            if said != TEXT:
                raise processes.NotReady(f"{peer.name} answers {said!r}")
        yield target
