"""The live metric of adherence: replies are held against the norms of their user's scopes, after they were sent.

No chat waits for it: a tenant's norms are read once in a few seconds, and replies are checked in a thread of their own.
"""

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from service.errors import StoreUnavailable
from service.metrics import Metrics
from service.settings import Settings
from service.store.norms import NormStore, parsed
from service.verifiers.norms import Finding, findings

log = logging.getLogger(__name__)

# Replies whose check is under way; a metric can do without those past this.
MAX_PENDING = 100
# More tenants at once than this just read Redis more often.
MAX_CACHED = 1024


class NormChecks:
    """Counts which norms replies hold, by kind of norm."""

    def __init__(self, store: NormStore, settings: Settings, metrics: Metrics) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._cached: dict[str, tuple[float, Mapping[str, bytes]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # One thread: checks hold the interpreter's lock, so that more would only take it from the event loop more often.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="norms")

    def begin(
        self, reply: str, *, reply_id: str, prompt: Callable[[], str], tenant: str, user: str, cohort: str | None
    ) -> None:
        """Begin to check a reply, if there are norms for it and its turn comes.

        Args:
            reply_id: decides whether the reply is of the share that is checked.
            prompt: says the text that it answers.
        """
        scopes = _scopes(user, cohort)
        fresh = self._fresh(tenant)
        if fresh is not None and not _any(fresh, scopes):
            return
        if zlib.crc32(reply_id.encode()) >= self._settings.norm_checks_share * 2**32:
            return
        if len(self._tasks) >= MAX_PENDING:
            self._metrics.norms_unchecked.labels("busy").inc()
            return
        task = asyncio.create_task(self._check(reply, scopes, prompt=prompt(), tenant=tenant))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """Drop the checks under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _check(self, reply: str, scopes: Sequence[str], *, prompt: str, tenant: str) -> None:
        stored = self._fresh(tenant)
        if stored is None:
            stored = await self._store.all(tenant=tenant)
            if len(self._cached) >= MAX_CACHED:
                self._cached.clear()
            self._cached[tenant] = time.monotonic() + self._settings.norms_cache_seconds, stored
        if not _any(stored, scopes):
            return
        if len(reply) > self._settings.norm_checks_max_chars:
            self._metrics.norms_unchecked.labels("long").inc()
            return
        loop = asyncio.get_running_loop()
        for finding in await loop.run_in_executor(self._thread, _findings, stored, scopes, prompt, reply):
            held = "yes" if finding.problem is None else "no"
            self._metrics.norm_checks.labels(finding.norm.checker, held).inc()

    def _fresh(self, tenant: str) -> Mapping[str, bytes] | None:
        """The tenant's norms, if they were read a moment ago."""
        until, stored = self._cached.get(tenant, (0.0, {}))
        return stored if time.monotonic() < until else None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        away = isinstance(error, StoreUnavailable)
        self._metrics.norms_unchecked.labels("store" if away else "failed").inc()
        log.warning("a reply is not held against its norms: %s", error, exc_info=None if away else error)


def _findings(stored: Mapping[str, bytes], scopes: Sequence[str], prompt: str, reply: str) -> list[Finding]:
    return findings(parsed(stored, scopes), prompt, reply)


def _scopes(user: str, cohort: str | None) -> tuple[str, ...]:
    """The user's as they are written, most specific first. Every chat asks, so no `Scope` is made."""
    return (f"user:{user}", f"cohort:{cohort}", "global") if cohort else (f"user:{user}", "global")


def _any(stored: Mapping[str, bytes], scopes: Sequence[str]) -> bool:
    return bool(stored) and any(scope in stored for scope in scopes)
