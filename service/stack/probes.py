"""Whether a process is ready: each probe answers with what is still missing, and with nothing once it is ready."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.store.connection import FAILURES
from service.store.redis_urls import clients

Probe = Callable[[], Awaitable[str]]

PROBE_SECONDS = 3.0
# Enough of a JSON reply to see which dependency is away.
SHOWN_CHARS = 300


def http_ok(url: str, *, key: str = "") -> Probe:
    """Ready when a GET is answered with 200."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def probe() -> str:
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
            async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http, http.get(url) as reply:
                return (
                    "" if reply.status == 200 else f"{url} answers {reply.status}: {(await reply.text())[:SHOWN_CHARS]}"
                )
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return f"{url} does not answer ({error or type(error).__name__})"

    return probe


def redis_answers(url: str) -> Probe:
    """Ready when a PING is answered, which Redis does not do while it loads its files."""

    async def probe() -> str:
        try:
            # Whoever probes asks again; the client's own retries would take seconds each time.
            once = Retry(NoBackoff(), 0)
            client, close = clients(url, retry=once, socket_timeout=PROBE_SECONDS, socket_connect_timeout=PROBE_SECONDS)
        except ValueError as error:
            return str(error)
        try:
            await client.ping()
        except FAILURES as error:
            return str(error)
        finally:
            await close()
        return ""

    return probe


def log_says(log: Path, words: str) -> Probe:
    """Ready when the log of this start has these words; for processes that listen nowhere."""

    async def probe() -> str:
        return "" if words in _text(log) else f"no '{words}' in its log yet"

    return probe


def _text(log: Path) -> str:
    # A log is some kilobytes long while its process starts.
    return log.read_text(errors="replace")
