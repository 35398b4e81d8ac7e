"""What background tasks leave undone: one user's, scope's or tenant's trouble is told and counted, and the others are done."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import StoreUnavailable
from service.store import Store

log = logging.getLogger(__name__)


@asynccontextmanager
async def sparing_others(
    store: Store, task: str, told: str, *about: object, but: tuple[type[Exception], ...] = ()
) -> AsyncIterator[None]:
    """Around what is done for one of many: an error inside goes no further.

    Args:
        task: that it is counted under, in `fastslow_background_undone_total`.
        told, about: what the log says of it, and what that is filled in with.
        but: errors that are everybody's.

    Raises:
        StoreUnavailable: Redis is away, which is everybody's too.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (StoreUnavailable, *but)):
            raise
        log.exception(told, *about)
        await store.counts.add("undone", task)
