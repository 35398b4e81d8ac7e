"""Serves TensorZero's gateway over HTTP, in an environment that has its wheel: `python -m tests.benchmarks.tensorzero_gateway CONFIG`.

Its usual form is a container; the wheel holds the same Rust server, for OpenAI's routes alone, on threads and on a port of its own choice,
which the file `port` tells.
"""

import asyncio
import importlib
import sys
from pathlib import Path
from urllib.parse import urlsplit


def tell(port: int) -> None:
    """Write the file at once, so that nobody reads half a number."""
    draft = Path("port.draft")
    draft.write_text(str(port))
    draft.rename("port")


async def serve(config: str) -> None:
    tensorzero = importlib.import_module("tensorzero")
    # Kept: the server ends with it.
    gateway = await tensorzero._start_http_gateway(
        config_file=config, clickhouse_url=None, postgres_url=None, valkey_url=None, async_setup=True
    )
    tell(urlsplit(gateway.base_url).port)
    await asyncio.Event().wait()
    gateway.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
