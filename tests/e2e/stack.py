"""`fastslow up` as a stranger runs it: every process the real one, on free ports and an empty data folder."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.gateway import free_port

READY_SECONDS = 420
STOP_SECONDS = 120
ANCHORS = 16
MODEL = "smollm2-135m-instruct"


class Stack:
    """A running `fastslow up`."""

    def __init__(self, folder: Path, model: Path, **changed: object) -> None:
        self.data_dir = folder / "data"
        self.model = model
        self.output = folder / "up.log"
        self.url = f"http://127.0.0.1:{free_port()}"
        settings = {
            "DATA_DIR": self.data_dir,
            "MODEL": model,
            "PORT": self.url.rsplit(":", 1)[1],
            "REDIS_PORT": free_port(),
            "VLLM_PORT": free_port(),
            # Short, so that a dead worker's job is taken up within seconds and not minutes.
            "LEASE_SECONDS": 5,
            "SWEEP_SECONDS": 5,
            # The test starts consolidations itself.
            "DUE_FEEDBACKS": 100_000,
            # The training and its gate are the real ones, with fewer steps and anchors: the bound on KL is wider for that.
            "ANCHORS": ANCHORS,
            "TRAIN_STEPS": 8,
            # A test that waits for the optimizer need not wait for a minute of silence first. What users say in a row is searched once,
            # when they have said it, with half of the calls.
            "OPTIMIZE_SILENCE_SECONDS": 5,
            "OPTIMIZE_FEEDBACKS": 100,
            "OPTIMIZE_METRIC_CALLS": 24,
        }
        settings |= {name.upper(): value for name, value in changed.items()}
        self._environment = os.environ | {f"FASTSLOW_{name}": str(value) for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "fastslow", "up"],
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            assert self.process is not None
            assert self.process.poll() is None, f"`fastslow up` ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"not ready after {READY_SECONDS} s:\n{self.said()}"
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def stop(self) -> list[str]:
        """Ctrl-C; the command lines of what is still there afterwards."""
        if self.process is None or self.process.poll() is not None:
            return []
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            left = [child for child in children if child.is_running()]
            names = []
            for child in left:
                with suppress(psutil.NoSuchProcess):  # a zombie is one
                    names.append(" ".join(child.cmdline()))
                    child.kill()
            self.process.kill()
        return names

    def kill(self, *words: str) -> None:
        """SIGKILL to the child whose command line has these words, and to all below it."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            # One that has just been killed may still be in the list.
            with suppress(psutil.NoSuchProcess):
                if all(word in " ".join(child.cmdline()) for word in words):
                    for process in (child, *child.children(recursive=True)):
                        process.kill()
                    return
        raise AssertionError(f"no child with {words} in its command line")

    def key(self, role: str) -> str:
        keys: list[dict[str, str]] = json.loads((self.data_dir / "keys.json").read_text())["api_keys"]
        return next(key["key"] for key in keys if key["role"] == role)

    def admin(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key('admin')}"}, timeout=120)

    def user(self, name: str) -> "User":
        return User(self, name)


class User:
    """A person with the official OpenAI client, and a few calls of ours beside it."""

    def __init__(self, stack: Stack, name: str) -> None:
        headers = {"X-User-ID": name}
        self.openai = OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key("client"), default_headers=headers)
        self.http = httpx.Client(
            base_url=stack.url, headers=headers | {"Authorization": f"Bearer {stack.key('client')}"}, timeout=120
        )
        self.name = name

    def ask(self, question: str, *, max_tokens: int = 40) -> "Reply":
        """A greedy reply."""
        raw = self.openai.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
        )
        completion = raw.parse()
        return Reply(completion.id, completion.choices[0].message.content or "", dict(raw.headers))

    def stream(self, question: str, *, max_tokens: int = 40) -> "Reply":
        with self.openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
        ) as chunks:
            pieces = list(chunks)
        text = "".join(c.choices[0].delta.content or "" for c in pieces if c.choices)
        return Reply(pieces[0].id, text, {})

    def feedback(self, reply: "Reply", **signals: Any) -> dict[str, Any]:
        response = self.http.post("/v1/feedback", json={"interaction_id": reply.id} | signals)
        assert response.status_code == 200, response.text
        receipt: dict[str, Any] = response.json()
        return receipt

    def dry_run(self, question: str) -> dict[str, Any]:
        """What vLLM would be asked."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "personalization": {"dry_run": True},
        }
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        shown: dict[str, Any] = response.json()
        return shown

    def context(self) -> dict[str, Any]:
        response = self.http.get(f"/v1/users/{self.name}/context")
        assert response.status_code == 200, response.text
        context: dict[str, Any] = response.json()
        return context

    def items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.context()["items"]
        return items


class Reply:
    """One completion as its reader sees it."""

    def __init__(self, interaction_id: str, text: str, headers: dict[str, str]) -> None:
        self.id = interaction_id
        self.text = text
        self.adapter = headers.get("x-fastslow-adapter", "")
        self.member = headers.get("x-fastslow-context-member", "")


@contextmanager
def running(folder: Path, model: Path, **settings: object) -> Iterator[Stack]:
    """A stack that is stopped with Ctrl-C afterwards and must leave nothing. Settings by name, beyond what all stacks here have."""
    stack = Stack(folder, model, **settings)
    try:
        stack.start()
        yield stack
    finally:
        left = stack.stop()
    assert left == []
