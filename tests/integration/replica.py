"""A real vLLM replica for tests, and small LoRA adapters in PEFT's format."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
from safetensors.numpy import save

from service.settings import Settings
from tests.adapters import random_lora

BASE = "smollm2-135m-instruct"
KEY = "a-key-of-the-tests"
START_SECONDS = 240.0
# In a batch; so few that a test can make others wait.
SEQUENCES = 8


class Replica:
    """A vLLM server of this test session; `store` and `cache` are its folders of adapters."""

    def __init__(self, folder: Path, model_path: Path) -> None:
        self.store = folder / "adapters"
        self.cache = folder / "cache"
        self.store.mkdir()
        self.model_path = model_path
        self._log = folder / "vllm.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "model": model_path,
            "model_name": BASE,
            "adapter_store": self.store,
            "adapter_cache_dir": self.cache,
            "vllm_port": port,
            "vllm_api_key": KEY,
            "vllm_adapters_in_batch": 2,
            # So few that a test can push an adapter out of memory.
            "vllm_adapters_in_memory": 2,
            "vllm_max_sequences": SEQUENCES,
            "vllm_stop_seconds": 1,
        }
        environment = {f"FASTSLOW_{name.upper()}": str(value) for name, value in settings.items()}
        # As in our image, which has none.
        environment["CXX"] = "no-compiler"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.vllm_server"],
                env=os.environ | environment,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=120
        )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        """Until it answers its health check.

        Raises:
            RuntimeError: it ended or took too long; with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.healthy():
                return
            time.sleep(0.2)
        raise RuntimeError(f"vLLM did not start:\n{self.log()[-3000:]}")

    def stop(self) -> None:
        """End it and all of its processes."""
        self.http.close()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        # The engine's processes outlive an API server that was killed or crashed.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def healthy(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def chat(
        self, model: str, *, max_tokens: int = 8, headers: dict[str, str] | None = None, **fields
    ) -> httpx.Response:
        """A greedy chat completion of one fixed prompt."""
        return self.http.post("/v1/chat/completions", json=chat_body(model, max_tokens, **fields), headers=headers)

    def reply(self, model: str) -> str:
        """The text of `chat`; fails unless it is 200."""
        response = self.chat(model)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def metric(self, name: str) -> float:
        """The present value of vLLM's `vllm:<name>`."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


def chat_body(model: str, max_tokens: int, **fields) -> dict:
    """The body of a greedy chat completion of one fixed prompt."""
    messages = [{"role": "user", "content": "Name three rivers."}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **fields}


def publish_adapter(
    store: Path,
    model_path: Path,
    *,
    seed: int,
    number: int = 1,
    rank: int = 4,
    base_model: str = BASE,
    spoil: bool = False,
) -> str:
    """Write an adapter version with random weights, strong enough to change a greedy reply.

    Args:
        spoil: change the weights after they were hashed.

    Returns:
        Its name.
    """
    weights = save(random_lora(json.loads((model_path / "config.json").read_text()), rank=rank, seed=seed))
    content_sha256 = hashlib.sha256(weights).hexdigest()
    scope = hashlib.sha256(f"user:{seed}".encode()).hexdigest()[:12]
    name = f"fs-{scope}-{number:04d}-{content_sha256[:12]}"
    if spoil:
        weights = weights[:-1] + bytes([weights[-1] ^ 1])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": list(Settings.model_fields["lora_target_modules"].default),
    }
    folder = store / name
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    provenance = {"name": name, "base_model": base_model, "content_sha256": content_sha256}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return name
