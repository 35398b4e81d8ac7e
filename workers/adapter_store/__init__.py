"""Where adapter versions lie: immutable, named by scope, number and content, each there whole or not at all.

- `versions.py` the files of a version, and whether they are what they claim
- `folder.py`   a folder that all nodes share
- `objects.py`  an object store, or whatever else fsspec has a URL for
- `copies.py`   verified copies on this machine, within a limit
- `scopes.py`   whose versions are there
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from service.settings import Settings
from workers.adapter_store.copies import GIB, Copies
from workers.adapter_store.folder import FolderStore
from workers.adapter_store.scopes import by_scope
from workers.adapter_store.versions import AdapterRefused, Provenance, StoreAway

__all__ = [
    "AdapterRefused",
    "AdapterStore",
    "Copies",
    "FolderStore",
    "StoreAway",
    "adapter_store",
    "by_scope",
    "local_copies",
]


class AdapterStore(Protocol):
    """The published versions. All calls block on disk or network, and raise OSError where the store can't be read or written."""

    @property
    def work(self) -> Path:
        """A local folder for what is not published (yet)."""
        ...

    def names(self) -> list[str]:
        """The names of all versions, in no particular order."""
        ...

    def provenance(self, name: str) -> Provenance | None:
        """Whose version it is, by its own word; None where it has none that can be read."""
        ...

    def put(self, folder: Path, name: str) -> None:
        """Publish the files in a folder below `work`, which may be gone afterwards.

        Raises:
            FileExistsError: there is a version of this name; nothing was changed.
        """
        ...

    def copy_to(self, name: str, folder: Path) -> bool:
        """Write a version's files into an empty folder; False where there is no such version.

        Raises:
            AdapterRefused: they are not what was published.
        """
        ...

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with a version's files, which stay while it is read.

        Raises:
            FileNotFoundError: there is no such version.
            AdapterRefused: its files are not what was published, or can't be had.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove a version. Half of it is never seen."""
        ...

    def clean(self, *, now: float) -> None:
        """Remove what killed workers left in the store, a day after.

        Args:
            now: seconds since the epoch.
        """
        ...

    def share(self, path: Path) -> None:
        """Let other nodes have a file of `work`, if they can be reached; otherwise it is logged."""
        ...

    def shared(self, path: Path) -> None:
        """Get what a node has shared last into this file of `work`, if any has."""
        ...

    def unshare(self, path: Path) -> None:
        """Take back what was shared of a file that is removed here."""
        ...


def adapter_store(settings: Settings) -> AdapterStore:
    """The store of these settings. Nothing is asked of it until the first call."""
    if settings.adapter_store_dir is not None:
        return FolderStore(settings.adapter_store_dir)
    # Only here, so that a folder needs neither fsspec nor a protocol's package.
    from workers.adapter_store.objects import ObjectStore

    return ObjectStore(settings.adapter_store, options=settings.adapter_store_options, copies=local_copies(settings))


def local_copies(settings: Settings) -> Copies:
    """The copies on this machine."""
    return Copies(
        settings.adapter_cache, most_bytes=int(settings.adapter_cache_gib * GIB), base_model=settings.model_name
    )
