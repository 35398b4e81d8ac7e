"""Old adapter versions: retired when newer ones have taken their place, and deleted once no replica of vLLM holds them.

In this order: marked in Redis, so that no pointer can move to it any more; evicted from every replica; its files deleted. Whatever dies in
between is done again at the next tick. Versions that were published and never promoted, because their job ended otherwise, go the same way.
Records stay, for the audit.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp

from service.domain.slow_weights import Scope
from service.errors import EngineUnavailable, FastslowError, NotFound, UpstreamRejected
from service.replicas import addresses
from service.settings import Settings
from service.store import Store
from workers.adapter_store import AdapterStore, StoreAway, adapter_store, by_scope
from workers.undone import sparing_others

log = logging.getLogger(__name__)

# vLLM answers an eviction within five seconds, and says so where replies in flight make it wait for longer.
EVICT_SECONDS = 15.0
# An eviction waits for the replies in flight, so several are asked for at once.
AT_ONCE = 16
# Those over it wait for the next tick: other tasks want the control queue too.
MOST_A_TICK = 512

Evict = Callable[[str], Awaitable[bool]]
"""Has every replica let go of a version; False where one still needs it.

Raises:
    UpstreamRejected: a replica answers that it can't.
    EngineUnavailable: a replica is away.
"""


async def retire_old(store: Store, settings: Settings, *, evict: Evict, now: float) -> list[str]:
    """Retire what newer versions have replaced, and delete what is retired; the names of the versions that were deleted.

    What is wrong with one scope or one version, an eviction that a replica refuses or hangs at included, is logged and counted, and the
    others are done. While a replica answers to none, nothing is deleted.

    Raises:
        OSError: the adapter store can't be read, or does not answer.
        StoreUnavailable: Redis is away.
    """
    old: list[str] = []
    adapters = adapter_store(settings)
    for tenant, scope, names in await asyncio.to_thread(lambda: list(by_scope(adapters))):
        async with sparing_others(
            store, "retention", "the old versions of %s of %s stay", scope, tenant, but=(OSError,)
        ):
            old += await _retired(store, adapters, scope, names, tenant=tenant, kept=settings.versions_kept, now=now)
    deleted: list[str] = []
    for start in range(0, min(len(old), MOST_A_TICK), AT_ONCE):
        names = old[start : start + AT_ONCE]
        answers = await asyncio.gather(*map(evict, names), return_exceptions=True)
        if all(isinstance(answer, EngineUnavailable) for answer in answers):
            log.warning("old adapter versions are not deleted until every replica answers: %s", answers[0])
            break
        for name, answer in zip(names, answers, strict=True):
            if answer is False:
                # For now: replies in flight may still read it.
                continue
            if await asyncio.to_thread(_deleted, adapters, name, answer):
                deleted.append(name)
            else:
                await store.counts.add("undone", "retention")
    await asyncio.to_thread(adapters.clean, now=now)
    return deleted


def _deleted(adapters: AdapterStore, name: str, evicted: bool | BaseException) -> bool:
    """Whether a version is gone that every replica should have let go of; why not is logged."""
    if isinstance(evicted, FastslowError):
        # In the replica's own words, which quote nobody: an eviction carries a name alone.
        log.error("%s is retired and stays, for it can't be evicted: %s", name, evicted.message)
        return False
    if isinstance(evicted, BaseException):
        log.error("%s is retired and stays, for it can't be evicted", name, exc_info=evicted)
        return False
    try:
        adapters.delete(name)
    except StoreAway:
        raise
    except OSError as error:
        log.error("%s is retired and stays, for it can't be deleted: %s", name, error)
        return False
    log.info("%s is retired and was deleted", name)
    return True


async def _retired(
    store: Store, adapters: AdapterStore, scope: Scope, names: Sequence[str], *, tenant: str, kept: int, now: float
) -> list[str]:
    """Of a scope's versions in the adapter store those that may go: retired now or before, and those that never came to serve."""
    promoted, never = [], []
    for name in names:
        if await _is_promoted(store, name, scope, tenant=tenant):
            promoted.append(name)
        elif await _has_ended(store, adapters, name, scope, tenant=tenant):
            never.append(name)
    state = await store.scopes.state(scope, tenant=tenant)
    standing = [name for name in promoted if name not in state.retired]
    previous = await store.scopes.previous(state, scope, tenant=tenant)
    old = superseded(standing, active=state.active, previous=previous, kept=kept)
    retired = {*state.retired, *await store.scopes.retire(old, scope, tenant=tenant, now=now)}
    return [name for name in promoted if name in retired] + never


def superseded(names: Sequence[str], *, active: str, previous: str, kept: int) -> list[str]:
    """Versions that are neither in use, nor where a rollback goes, nor among the newest `kept` of the others.

    Args:
        names: of one scope, the oldest first.
    """
    others = [name for name in names if name not in (active, previous)]
    return others[: max(0, len(others) - kept)]


async def _is_promoted(store: Store, name: str, scope: Scope, *, tenant: str) -> bool:
    try:
        await store.scopes.version(name, scope, tenant=tenant)
    except NotFound:
        return False
    return True


async def _has_ended(store: Store, adapters: AdapterStore, name: str, scope: Scope, *, tenant: str) -> bool:
    """Whether the job that published a version has ended without promoting it. Of a job that is not known any more nobody can tell."""
    version = await asyncio.to_thread(adapters.provenance, name)
    job = await store.jobs.load(version.job) if version else None
    # Its end and the promotion are one step, so after its end the record is there or will never be.
    return job is not None and job.ended and not await _is_promoted(store, name, scope, tenant=tenant)


@asynccontextmanager
async def replicas(settings: Settings) -> AsyncIterator[Evict]:
    """Evicts from every vLLM of the settings."""
    key = settings.vllm_api_key.get_secret_value()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=EVICT_SECONDS, sock_connect=settings.upstream_connect_seconds)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:

        async def evict(name: str) -> bool:
            answers = [await _evicted(http, url, name) for url in await _addresses(settings.replica_urls)]
            return all(answers)

        yield evict


async def _addresses(urls: Sequence[str]) -> list[str]:
    try:
        return [found for url in urls for found in await addresses(url)]
    except OSError as error:
        raise EngineUnavailable(f"the replicas can't be looked up: {error}") from error


async def _evicted(http: aiohttp.ClientSession, url: str, name: str) -> bool:
    try:
        async with http.delete(f"{url}/fastslow/adapters/{name}") as reply:
            if reply.status not in (200, 202):
                text = (await reply.text(errors="replace"))[:200]
                raise UpstreamRejected(f"{url} answers {reply.status}: {text}", status=reply.status)
            answer = await reply.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise EngineUnavailable(f"{url} does not answer: {str(error) or type(error).__name__}") from error
    if not answer["evicted"]:
        log.info("%s stays for now: replies at %s may still use it", name, url)
    return bool(answer["evicted"])
