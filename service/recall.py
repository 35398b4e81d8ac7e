"""Medium speed: which of a user's exemplars resemble this prompt, asked when they don't all fit into the context.

Workers embed the exemplars, when they optimize the user's contexts (`workers/context_search/embedded.py`); a chat's prompt is encoded
here. Recall only ever improves a choice that can be made without it: what has no embedding yet is left out.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from service.domain.items import Exemplar
from service.embedding import Vectors
from service.errors import Unavailable
from service.metrics import Metrics
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)

# Users whose exemplars' vectors are kept at hand, 100 KB each of those who have many.
CACHED_USERS = 256
# How long until vectors that were not stored are looked for again.
LOOK_AGAIN_SECONDS = 5.0


class Encoder(Protocol):
    """Tells where an embedding model would put a prompt."""

    @property
    def teacher(self) -> str:
        """The embedding model: its vectors alone are compared with the encoder's."""

    def encode(self, text: str) -> Vectors:
        """A vector of length 1, within a fraction of a millisecond: float32 [WIDTH]."""


@dataclass(frozen=True)
class _AtHand:
    """What is known of one user's exemplars."""

    wanted: Sequence[Exemplar]
    """What was looked for."""
    ids: list[str]
    """Those that have a vector."""
    rows: Vectors
    """A row for each of these: [len(ids), WIDTH]."""
    until: float
    """When to look for the others; seconds of the monotonic clock."""


class Recall:
    """Cosines of prompts and exemplars, where these have been embedded."""

    def __init__(
        self,
        store: Store,
        encoder: Encoder | None,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._enabled = settings.recall
        self._optimizes = settings.optimize
        self._metrics = metrics
        self._clock = clock
        self._at_hand: OrderedDict[tuple[str, str], _AtHand] = OrderedDict()
        """By tenant and user."""

    async def similarities(
        self, prompt: str, exemplars: Sequence[Exemplar], *, tenant: str, user: str
    ) -> dict[str, float] | None:
        """The cosine of the prompt and of each embedded exemplar's prompt, by the exemplar's id.

        Returns:
            None where recall is switched off or, and counted, where no vectors are to be had.
        """
        if not self._enabled or not exemplars:
            return None
        if self._encoder is None:
            self._metrics.recall.labels("unavailable").inc()
            return None
        try:
            known = await self._vectors(self._encoder.teacher, exemplars, tenant=tenant, user=user)
        except Unavailable as error:
            log.warning("exemplars that don't all fit were chosen without recall: %s", error)
            self._metrics.recall.labels("unavailable").inc()
            return None
        if not known.ids:
            self._metrics.recall.labels("not-embedded").inc()
            return None
        self._metrics.recall.labels("ok").inc()
        return dict(zip(known.ids, (known.rows @ self._encoder.encode(prompt)).tolist(), strict=True))

    async def _vectors(self, model: str, wanted: Sequence[Exemplar], *, tenant: str, user: str) -> _AtHand:
        """What is at hand where the exemplars are the same, and what is stored where they are not, or some were missing."""
        key, now = (tenant, user), self._clock()
        known = self._at_hand.pop(key, None)
        if known is not None and known.wanted is not wanted and _ids(known.wanted) == _ids(wanted):
            known = replace(known, wanted=wanted)
        others = known is None or known.wanted is not wanted
        if known is None or others or (len(known.ids) < len(wanted) and now >= known.until):
            stored = await self._store.embeddings.get(_ids(wanted), tenant=tenant, user=user, model=model)
            rows = np.stack(list(stored.values())) if stored else np.empty((0, 0), np.float32)
            if len(stored) < len(wanted) and others and self._optimizes:
                # Once: a worker that can't embed would be asked by every chat.
                await self._store.optimizations.plan(tenant=tenant, user=user, at=time.time())
            known = _AtHand(wanted, list(stored), rows, until=now + LOOK_AGAIN_SECONDS)
        self._at_hand[key] = known
        if len(self._at_hand) > CACHED_USERS:
            self._at_hand.popitem(last=False)
        return known


def _ids(exemplars: Sequence[Exemplar]) -> list[str]:
    return [e.id for e in exemplars]
