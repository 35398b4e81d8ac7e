"""Optimizes one user's contexts: under a lease, from the log to an event in it, counted by how it ended."""

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Literal

from service.domain.absorption import absorbed
from service.domain.context import Count
from service.domain.events import EditEvent, PopulationEvent
from service.domain.fast_weights import FastWeights
from service.domain.feedback import BASE
from service.domain.fold import apply
from service.domain.policy import optimize_at
from service.errors import (
    Conflict,
    ContextLengthExceeded,
    EngineUnavailable,
    NotFound,
    StoreUnavailable,
    UpstreamRejected,
)
from service.settings import Settings
from service.store import Store
from service.store.users import ChatState
from workers.context_search.embedded import wants_recall
from workers.context_search.examples import usable
from workers.context_search.search import Found, Means, Work, search

log = logging.getLogger(__name__)

Outcome = Literal["improved", "kept", "too-little", "scorer-away", "scorer-refused", "failed"]

# Events read for the newest feedback; what was said before is in the fast weights alone.
RECENT_EVENTS = 400
# Other events may come first; each time the log is read again and the same result appended.
MOST_CONFLICTS = 20
# How long until a user is tried again whose scorer was away, and one whose adapter or texts it refuses: that seldom passes by itself.
AWAY_SECONDS = 60.0
REFUSED_SECONDS = 600.0

MeansOf = Callable[[str, str, Callable[[], bool]], Means]
"""(tenant, user, whether to stop) -> what that user's search asks of the world."""
EmbedOf = Callable[[str, str, FastWeights], Awaitable[None]]
"""(tenant, user, fast weights) with more exemplars than fit: has them embedded for recall."""


class Optimizing:
    """What optimizing takes, the same for all users.

    Args:
        count: tokens of a text under the served model's tokenizer.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        store: Store,
        settings: Settings,
        count: Count,
        means: MeansOf,
        embed: EmbedOf,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings
        self._count = count
        self._means = means
        self._embed = embed
        self._clock = clock

    async def optimize(self, *, tenant: str, user: str) -> Outcome | None:
        """Optimize a user's contexts; None where nothing is due any more or another worker is at it.

        Raises:
            StoreUnavailable: Redis is away; what was due is due again later.
        """
        queue, token = self._store.optimizations, uuid.uuid4().hex
        limit = self._settings.optimize_limit_seconds
        # Its last request may take as long again as the search.
        held = await queue.acquire(tenant=tenant, user=user, token=token, seconds=2 * limit)
        if not held:
            return None
        try:
            outcome = await self._outcome(tenant=tenant, user=user, deadline=time.monotonic() + limit)
            await self._embed_exemplars(tenant=tenant, user=user)
        finally:
            await queue.release(tenant=tenant, user=user, token=token)
        await self._store.counts.add("optimize", outcome)
        return outcome

    async def _outcome(self, *, tenant: str, user: str, deadline: float) -> Outcome:
        """How a search ends; one that could not be made is due again later."""
        queue = self._store.optimizations
        try:
            return await self._search(tenant=tenant, user=user, deadline=deadline)
        except (EngineUnavailable, UpstreamRejected, ContextLengthExceeded) as error:
            log.warning("the contexts of %s stay as they are, vLLM can't score: %s", user, error)
            away = isinstance(error, EngineUnavailable)
            wait = AWAY_SECONDS if away else REFUSED_SECONDS
            await queue.ask_for(tenant=tenant, user=user, at=self._clock() + wait)
            return "scorer-away" if away else "scorer-refused"
        except StoreUnavailable:
            raise
        except Exception:
            # Its contexts still serve; every minute again it would only keep vLLM busy.
            log.exception("the contexts of %s stay as they are", user)
            await queue.ask_for(tenant=tenant, user=user, at=self._clock() + REFUSED_SECONDS)
            return "failed"

    async def _embed_exemplars(self, *, tenant: str, user: str) -> None:
        """For recall, whatever came of the search."""
        chat = await self._store.users.chat_state(tenant=tenant, user=user)
        adapter, unneeded = await self._in_use(chat, tenant=tenant, user=user)
        if wants_recall(
            chat.fast_weights,
            adapter=adapter,
            absorbed=unneeded,
            budget_tokens=self._settings.most_context_tokens,
            count=self._count,
        ):
            await self._embed(tenant, user, chat.fast_weights)

    async def _search(self, *, tenant: str, user: str, deadline: float) -> Outcome:
        chat = await self._store.users.chat_state(tenant=tenant, user=user)
        adapter, unneeded = await self._in_use(chat, tenant=tenant, user=user)
        state = chat.fast_weights
        if await self._is_done(state, adapter=adapter, tenant=tenant, user=user):
            await self._store.optimizations.settle(tenant=tenant, user=user, revision=state.revision)
            return "kept"
        events = await self._store.users.events(tenant=tenant, user=user, after=max(0, state.revision - RECENT_EVENTS))
        examples, revisions = usable(
            (event for event in events if event.revision <= state.revision),
            user=user,
            count=self._count,
            room_tokens=self._settings.max_model_len - self._settings.most_context_tokens,
        )
        work = Work(
            state=state,
            examples=examples,
            revisions=revisions,
            model=self._settings.model_name,
            adapter=adapter,
            absorbed=unneeded,
            budget_tokens=self._settings.most_context_tokens,
            count=self._count,
        )
        found = await search(work, self._means(tenant, user, lambda: time.monotonic() > deadline), seed=state.revision)
        if not found.members and not found.merged:
            await self._store.optimizations.settle(tenant=tenant, user=user, revision=state.revision)
            return "too-little"
        await self._append(found, work, adapter=adapter, tenant=tenant, user=user)
        return "improved" if found.improved else "kept"

    async def _append(self, found: Found, work: Work, *, adapter: str, tenant: str, user: str) -> None:
        """Put the result into the log after whatever came in meanwhile, which joins every member by being newer than its basis.

        Raises:
            Conflict: others came first every time.
        """
        for attempt in range(MOST_CONFLICTS):
            state = await self._store.users.fast_weights(tenant=tenant, user=user)
            event = PopulationEvent(
                revision=state.revision + 1,
                at=self._clock(),
                basis=work.state.revision,
                basis_clock=work.state.clock,
                adapter=adapter,
                members=found.members,
                inferred=found.inferred,
                merged=found.merged,
                report=found.report,
            )
            after = apply(state, event)
            again = optimize_at(
                after,
                now=event.at,
                feedbacks=self._settings.optimize_feedbacks,
                seconds=self._settings.optimize_silence_seconds,
                edited=await self._edited_after(event.basis, tenant=tenant, user=user),
            )
            try:
                await self._store.users.append(event, after, tenant=tenant, user=user, optimize_at=again)
                return
            except Conflict:
                if attempt == MOST_CONFLICTS - 1:
                    raise

    async def _in_use(self, chat: ChatState, *, tenant: str, user: str) -> tuple[str, frozenset[str]]:
        """The version that serves the user and what it makes unnecessary; the base where there is none."""
        if not chat.adapters:
            return BASE, frozenset()
        scope, name = chat.adapters[0]
        try:
            version = await self._store.scopes.version(name, scope, tenant=tenant)
        except NotFound:
            return BASE, frozenset()
        return name, absorbed(version, chat.fast_weights, user=user)

    async def _is_done(self, state: FastWeights, *, adapter: str, tenant: str, user: str) -> bool:
        """Whether the population was computed from all that was said or edited, under the adapter in use: a message that came twice."""
        population = state.population_under(adapter)
        if not population.members or population.clock != state.clock:
            return False
        return not await self._edited_after(population.basis, tenant=tenant, user=user)

    async def _edited_after(self, revision: int, *, tenant: str, user: str) -> bool:
        # The clock counts feedback alone.
        events = await self._store.users.events(tenant=tenant, user=user, after=revision)
        return any(isinstance(event, EditEvent) for event in events)
