"""Medium speed: which of a user's exemplars resemble this prompt, asked when they don't all fit into the context.

Recall only ever improves a choice that can be made without it: it answers within a time limit or not at all, and what it computes too
late is there for the next chat.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from service.domain.items import Exemplar
from service.embedding import Embedder, Vectors
from service.errors import Unavailable
from service.metrics import Metrics
from service.settings import Settings
from service.store.embeddings import EmbeddingStore

log = logging.getLogger(__name__)

# Most exemplars embedded for one chat or feedback, about half a second of one core; the next call does more.
MAX_COMPUTED = 64
# Users whose exemplars' vectors are kept at hand, 100 KB each of those who have many.
CACHED_USERS = 256
# Chats and feedbacks whose embeddings are under way; past this the model is what everybody waits for.
MAX_PENDING = 100

ResultT = TypeVar("ResultT")


class Recall:
    """Cosines of prompts and exemplars, from stored embeddings where there are any."""

    def __init__(self, store: EmbeddingStore, embedder: Embedder | None, settings: Settings, metrics: Metrics) -> None:
        self._store = store
        self._embedder = embedder
        self._enabled = settings.recall
        self._timeout_seconds = settings.recall_timeout_seconds
        self._metrics = metrics
        self._tasks: set[asyncio.Task[Any]] = set()
        self._at_hand: OrderedDict[tuple[str, str], tuple[list[str], Vectors]] = OrderedDict()
        """By tenant and user: the exemplars' ids, and a row for each."""

    async def similarities(
        self, prompt: str, exemplars: Sequence[Exemplar], *, tenant: str, user: str
    ) -> dict[str, float] | None:
        """The cosine of the prompt and of each exemplar's prompt, by the exemplar's id.

        Args:
            exemplars: oldest first. Where more than `MAX_COMPUTED` have no stored embedding, the oldest of those are left out.

        Returns:
            None where recall is switched off or, and counted, where they are not to be had within the time limit.
        """
        if not self._enabled or not exemplars:
            return None
        if self._embedder is None or len(self._tasks) >= MAX_PENDING:
            self._count("unavailable")
            return None
        task = self._start(self._similarities(self._embedder, prompt, exemplars, tenant=tenant, user=user))
        try:
            found = await asyncio.wait_for(asyncio.shield(task), self._timeout_seconds)
        except TimeoutError:
            self._count("timeout")
            return None
        except Unavailable:
            self._count("unavailable")
            return None
        self._count("ok")
        return found

    def remember(self, exemplars: Sequence[Exemplar], *, tenant: str, user: str) -> None:
        """Begin to store the embeddings of all exemplars that a user has now, oldest first, and to drop those of others."""
        if self._embedder is None:
            return
        if len(self._tasks) >= MAX_PENDING:
            self._count("not-remembered")
            return
        task = self._start(self._remember(self._embedder, exemplars, tenant=tenant, user=user))
        task.add_done_callback(self._remembered)

    async def aclose(self) -> None:
        """Drop what is under way: the next recall computes it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._embedder is not None:
            self._embedder.close()

    async def _similarities(
        self, embedder: Embedder, prompt: str, exemplars: Sequence[Exemplar], *, tenant: str, user: str
    ) -> dict[str, float]:
        # The prompt first: it is all that most chats have to wait for.
        (prompt_D,) = await embedder.embed([prompt])
        key, wanted = (tenant, user), [e.id for e in exemplars]
        known = self._at_hand.pop(key, None)
        if known is None or known[0] != wanted:
            vectors = await self._vectors(embedder, exemplars, tenant=tenant, user=user)
            if not vectors:
                return {}
            known = list(vectors), np.stack(list(vectors.values()))
        self._at_hand[key] = known
        if len(self._at_hand) > CACHED_USERS:
            self._at_hand.popitem(last=False)
        ids, rows_N_D = known
        return dict(zip(ids, (rows_N_D @ prompt_D).tolist(), strict=True))

    async def _remember(self, embedder: Embedder, exemplars: Sequence[Exemplar], *, tenant: str, user: str) -> None:
        # Not the other way round: an earlier feedback's task that is late would drop what a later one's has stored.
        await self._store.keep([e.id for e in exemplars], tenant=tenant, user=user, model=embedder.name)
        await self._vectors(embedder, exemplars, tenant=tenant, user=user)

    async def _vectors(
        self, embedder: Embedder, exemplars: Sequence[Exemplar], *, tenant: str, user: str
    ) -> dict[str, Vectors]:
        """The exemplars' embeddings; missing ones are computed and stored."""
        stored = await self._store.get([e.id for e in exemplars], tenant=tenant, user=user, model=embedder.name)
        missing = [e for e in exemplars if e.id not in stored][-MAX_COMPUTED:]
        rows = await embedder.embed([e.prompt for e in missing])
        computed = {e.id: row for e, row in zip(missing, rows, strict=True)}
        await self._store.put(computed, tenant=tenant, user=user, model=embedder.name)
        return stored | computed

    def _start(self, work: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Run in the background, where nobody may be waiting any more."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Unavailable):
            log.warning("embeddings were not computed or not stored: %s", error)
        elif error is not None:
            log.error("recall failed", exc_info=error)

    def _remembered(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._count("not-remembered")

    def _count(self, outcome: str) -> None:
        self._metrics.recall.labels(outcome).inc()
