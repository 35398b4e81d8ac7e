"""A folder that all nodes share: a folder in it for each version, put in place by one rename."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.domain.slow_weights import NAME
from workers.adapter_store.versions import FILES, PROVENANCE, Provenance, provenance_of
from workers.files import ASIDE, fsync


class FolderStore:
    """See `AdapterStore`. What is prepared for it lies in it, and other nodes see that too.

    Args:
        folder: made when the first version is prepared.
    """

    def __init__(self, folder: Path) -> None:
        self.work = folder

    def __str__(self) -> str:
        return str(self.work)

    def names(self) -> list[str]:
        return [path.name for path in self.work.iterdir() if NAME.fullmatch(path.name)] if self.work.is_dir() else []

    def provenance(self, name: str) -> Provenance | None:
        try:
            return provenance_of((self.work / name / PROVENANCE).read_bytes())
        except OSError:
            return None

    def put(self, folder: Path, name: str) -> None:
        target = self.work / name
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        for file in FILES:
            fsync(folder / file)
        folder.chmod(0o755)
        fsync(folder)
        try:
            os.rename(folder, target)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            raise
        fsync(self.work)

    def copy_to(self, name: str, folder: Path) -> bool:
        if not (self.work / name).is_dir():
            return False
        for file in FILES:
            shutil.copyfile(self.work / name / file, folder / file)
        return True

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        if not (self.work / name).is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.work / name))
        yield self.work / name

    def delete(self, name: str) -> None:
        # Nobody sees half of a version: its name goes first.
        doomed = self.work / f"{ASIDE}retired-{name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(self.work / name, doomed)
        shutil.rmtree(doomed)

    def clean(self, *, now: float) -> None:
        """Nothing: whoever prepares a version removes what is left of others."""

    def share(self, path: Path) -> None:
        """Nothing: it lies where all see it."""

    def shared(self, path: Path) -> None:
        """Nothing: it lies where all see it."""

    def unshare(self, path: Path) -> None:
        """Nothing: it is gone for all."""
