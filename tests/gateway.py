"""A real gateway process for tests: uvicorn on a free port, as it is started in production."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from pydantic import SecretStr

from service.keys import Keys
from service.settings import Settings
from service.stack.children import GATEWAY

READY_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make a child process read these very settings."""
    changed = {name: getattr(settings, name) for name in settings.model_fields_set}
    plain = {n: v.get_secret_value() if isinstance(v, SecretStr) else str(v) for n, v in changed.items()}
    return os.environ | {f"FASTSLOW_{name.upper()}": value for name, value in plain.items()}


@asynccontextmanager
async def gateway_process(settings: Settings, keys: Keys) -> AsyncIterator[str]:
    """The URL of a gateway that runs until the block ends."""
    settings.keys_path.parent.mkdir(parents=True, exist_ok=True)
    settings.keys_path.write_text(keys.model_dump_json())
    port = free_port()
    command = [sys.executable, "-m", *GATEWAY, "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, env=environment(settings))
    url = f"http://127.0.0.1:{port}"
    try:
        await until_live(url)
        yield url
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), timeout=READY_SECONDS)


async def until_live(url: str) -> None:
    """Poll the gateway until it answers."""
    deadline = asyncio.get_running_loop().time() + READY_SECONDS
    async with httpx.AsyncClient() as http:
        while True:
            try:
                (await http.get(f"{url}/health/live")).raise_for_status()
                return
            except httpx.HTTPError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)
