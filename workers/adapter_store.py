"""What lies in the adapter store: a folder for each published version, named by scope, number and content."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from service.domain.feedback import Frozen
from service.domain.slow_weights import NAME, Scope
from workers.vllm_plugin.local_copy import PROVENANCE


class Provenance(Frozen):
    """The part of an `AdapterVersion` that is needed here, so that a version outlives changes of its report."""

    tenant: str
    scope: str
    job: str


def by_scope(store: Path) -> Iterator[tuple[str, Scope, list[str]]]:
    """(tenant, scope, names of its versions, the oldest first) of each scope with any. Folders that hold no version are passed over.

    Raises:
        OSError: the store can't be read.
    """
    names: dict[str, list[str]] = {}
    for folder in store.iterdir() if store.is_dir() else ():
        if NAME.fullmatch(folder.name):
            names.setdefault(folder.name.split("-")[1], []).append(folder.name)
    for found in names.values():
        found.sort(key=lambda name: (int(name.split("-")[2]), name))
        # All names of one digest are of one scope.
        if version := next((known for name in reversed(found) if (known := provenance(store / name))), None):
            yield version.tenant, Scope.parse(version.scope), found


def provenance(folder: Path) -> Provenance | None:
    """Whose version a folder holds, by its own word; None where it has none that can be read."""
    try:
        return Provenance.model_validate_json((folder / PROVENANCE).read_bytes())
    except (OSError, ValidationError):
        return None
