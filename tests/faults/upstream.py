"""Answers like vLLM, with what it was asked: `python -m tests.faults.upstream PORT`, the settings in the environment.

It loads adapters as our plugin has vLLM load them, from verified copies of the store's, once. As the real one would
without our guard, it dies of a request for `prompt_logprobs`.
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from aiohttp import web

from service.settings import Settings
from tests.fakes import FakeVllm
from tests.faults.checks import Echo
from workers.adapter_store import AdapterRefused, adapter_store, local_copies
from workers.adapter_store.copies import Copy

# A stream takes a fifth of a second, so that faults meet some of them.
PIECE_SECONDS = 0.01
FILLER = " and so on" * 5
DRAIN_SECONDS = 30.0
DEADLY = frozenset({"prompt_logprobs", "echo", "vllm_xargs"})


class EchoVllm(FakeVllm):
    """See above."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._store = adapter_store(settings)
        self._copies = local_copies(settings)
        self._held: list[Copy] = []
        self.piece_seconds = PIECE_SECONDS
        self.reply = self._echo

    def _echo(self, body: dict[str, Any]) -> str:
        # It runs for long, and nobody looks at these here.
        for kept in (self.bodies, self.headers, self.scored, self.loaded):
            kept.clear()
        return f"{Echo.of(body['model'], body['messages']).written()}\n{FILLER}"

    def _refusal(self, body: dict[str, Any]) -> web.Response | None:
        if DEADLY & body.keys():
            os._exit(1)
        return super()._refusal(body)

    def _unknown(self, body: dict[str, Any]) -> web.Response | None:
        name = body["model"]
        if name not in self.adapters and name != self._settings.model_name and self._loads(name):
            self.adapters.add(name)
        return super()._unknown(body)

    def _loads(self, name: str) -> bool:
        try:
            copy = self._copies.take(name, self._store.copy_to)
        except AdapterRefused as refusal:
            # On a full disk there is no room for the log either.
            with suppress(OSError):
                print(f"{name} is not served: {refusal}", flush=True)
            return False
        if copy is not None:
            # For as long as it runs: it never unloads one.
            self._held.append(copy)
        return copy is not None


async def serve(port: int) -> None:
    """Until SIGTERM, and then until what is under way has ended."""
    vllm, told = EchoVllm(Settings()), asyncio.Event()
    vllm.url = f"http://127.0.0.1:{port}"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    await vllm.start(drain_seconds=DRAIN_SECONDS)
    print("ready", flush=True)
    await told.wait()
    await vllm.stop()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
