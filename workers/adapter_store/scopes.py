"""Whose versions the adapter store has."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from service.domain.slow_weights import Scope

if TYPE_CHECKING:
    from workers.adapter_store import AdapterStore


def by_scope(store: "AdapterStore") -> Iterator[tuple[str, Scope, list[str]]]:
    """(tenant, scope, names of its versions, the oldest first) of each scope with any. Blocks on disk and network.

    Raises:
        OSError: the store can't be read.
    """
    names: dict[str, list[str]] = {}
    for name in store.names():
        names.setdefault(name.split("-")[1], []).append(name)
    for found in names.values():
        found.sort(key=lambda name: (int(name.split("-")[2]), name))
        # All names of one digest are of one scope.
        if version := next((known for name in reversed(found) if (known := store.provenance(name))), None):
            yield version.tenant, Scope.parse(version.scope), found
