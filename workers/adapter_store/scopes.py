"""Whose versions the adapter store has."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from service.domain.slow_weights import Scope
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from workers.adapter_store import AdapterStore

log = logging.getLogger(__name__)


def by_scope(store: "AdapterStore") -> Iterator[tuple[str, Scope, list[str]]]:
    """(tenant, scope, names of its versions, the oldest first) of each scope with any. Blocks on disk and network.

    Versions of which none tells whose they are stay out of it, and are named in the log.

    Raises:
        OSError: the store can't be read.
    """
    names: dict[str, list[str]] = {}
    for name in store.names():
        names.setdefault(name.split("-")[1], []).append(name)
    for found in names.values():
        found.sort(key=lambda name: (int(name.split("-")[2]), name))
        # All names of one digest are of one scope.
        if whose := next((known for name in reversed(found) if (known := _whose(store, name))), None):
            yield *whose, found
        else:
            log.error("%s can't be looked after: no provenance in %s tells whose they are", ", ".join(found), store)


def _whose(store: "AdapterStore", name: str) -> tuple[str, Scope] | None:
    """A version's tenant and scope by its provenance; None where that can't be read, or is of another scope than the name."""
    provenance = store.provenance(name)
    if provenance is None:
        return None
    try:
        scope = Scope.parse(provenance.scope)
    except InvalidRequest:
        return None
    return (provenance.tenant, scope) if scope.digest(provenance.tenant) == name.split("-")[1] else None
