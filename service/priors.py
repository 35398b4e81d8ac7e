"""Guidelines that new users start from, kept in this process for a few seconds: every chat asks for them."""

import time

from service.domain.items import Prior
from service.store.cold_start import ColdStartStore

# A few lists of some kilobytes each; more cohorts at once than this just read Redis more often.
MAX_CACHED = 4096


class Priors:
    """Read at most once in `seconds` for each cohort, so a change reaches every gateway within that."""

    def __init__(self, store: ColdStartStore, *, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._cached: dict[tuple[str, str | None], tuple[float, tuple[Prior, ...]]] = {}

    async def of(self, *, tenant: str, cohort: str | None) -> tuple[Prior, ...]:
        """What a new user of this cohort starts from; nothing where the tenant has not opted in.

        Raises:
            StoreUnavailable: Redis is away, and what was read before is too old.
        """
        until, priors = self._cached.get((tenant, cohort), (0.0, ()))
        now = time.monotonic()
        if now < until:
            return priors
        priors = await self._store.priors(tenant=tenant, cohort=cohort)
        if len(self._cached) >= MAX_CACHED:
            self._cached.clear()
        self._cached[tenant, cohort] = now + self._seconds, priors
        return priors
