"""An object store, or whatever else fsspec knows by a URL.

Objects can't be renamed, so a version is there when its manifest is, which is written last and only once:

    <url>/<name>/<first digits of its SHA-256>-<file>     each file of a version
    <url>/<name>.json                                     its manifest: their sizes and SHA-256
    <url>/.jobs/<file>                                    checkpoints

Files are named by their content: whoever uploads other files under the same name, before he is refused for the manifest, spoils nothing.
"""

import errno
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from pydantic import ValidationError

from service.domain.feedback import Frozen
from service.domain.slow_weights import NAME
from workers.adapter_store.copies import Copies
from workers.adapter_store.versions import (
    FILES,
    PROVENANCE,
    AdapterRefused,
    Provenance,
    StoreAway,
    provenance_of,
    sha256_of,
)
from workers.files import ASIDE, ORPHAN_SECONDS

log = logging.getLogger(__name__)

JOBS = ".jobs"
# A training must not wait for a store that hangs at each of its checkpoints.
SHARE_AGAIN_SECONDS = 300.0
# In seconds without a byte. s3fs tries five times: a store that hangs is given up after a minute, one that is away after a second;
# botocore's own limits are five minutes.
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"connect_timeout": 3, "read_timeout": 5, "retries": {"total_max_attempts": 2}}
}
# Of this machine's disk, whatever the store.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Part(Frozen):
    """One file of a version."""

    bytes: int
    sha256: str


class Manifest(Frozen):
    """What makes a version visible."""

    files: dict[str, Part]
    provenance: Provenance | None


class ObjectStore:
    """See `AdapterStore`. What is prepared for it lies in the folder of the copies.

    Args:
        url: with a prefix where it does not have the bucket for itself.
        options: fsspec's for this protocol.
        copies: where `reading` reads.
    """

    def __init__(self, url: str, *, options: Mapping[str, Any], copies: Copies) -> None:
        self._url = url.rstrip("/")
        self._options = dict(options)
        self._copies = copies
        self._share_again = 0.0

    def __str__(self) -> str:
        return self._url

    @property
    def work(self) -> Path:
        return self._copies.folder

    def names(self) -> list[str]:
        with self._asked():
            found = (PurePosixPath(path) for path in self._listed(self._root))
            return [path.stem for path in found if path.suffix == ".json" and NAME.fullmatch(path.stem)]

    def provenance(self, name: str) -> Provenance | None:
        try:
            manifest = self._manifest(name)
        except AdapterRefused:
            return None
        return manifest.provenance if manifest else None

    def put(self, folder: Path, name: str) -> None:
        with self._asked():
            if self._fs.exists(self._manifest_key(name)):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._manifest_key(name))
            parts = {file: _part(folder / file) for file in FILES}
            for file, part in parts.items():
                self._fs.put_file(str(folder / file), self._key(name, file, part))
            manifest = Manifest(files=parts, provenance=provenance_of((folder / PROVENANCE).read_bytes()))
            self._fs.pipe_file(self._manifest_key(name), manifest.model_dump_json(indent=2).encode(), mode="create")

    def copy_to(self, name: str, folder: Path) -> bool:
        manifest = self._manifest(name)
        if manifest is None:
            return False
        for file in FILES:
            part = manifest.files.get(file)
            if part is None:
                raise AdapterRefused(f"its manifest in {self} names no {file}.")
            key = self._key(name, file, part)
            try:
                with self._asked():
                    self._fs.get_file(key, str(folder / file))
            except FileNotFoundError as error:
                raise AdapterRefused(f"{key} is not there, though its manifest is.") from error
            if (found := _part(folder / file)) != part:
                raise AdapterRefused(
                    f"{key} has {found.bytes} bytes with SHA-256 {found.sha256}, and {part.bytes} with {part.sha256} were published."
                )
        return True

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        copy = self._copies.take(name, self.copy_to)
        if copy is None:
            raise FileNotFoundError(errno.ENOENT, "no such version", f"{self}/{name}")
        try:
            for surplus in self._copies.surplus():
                self._copies.remove(surplus)
            yield copy.folder
        finally:
            copy.release()

    def delete(self, name: str) -> None:
        # Nobody sees half of a version: its manifest goes first.
        with self._asked():
            for key in (self._manifest_key(name), f"{self._root}/{name}"):
                with suppress(FileNotFoundError):
                    self._fs.rm(key, recursive=True)

    def clean(self, *, now: float) -> None:
        with self._asked():
            paths = [PurePosixPath(path) for path in self._listed(self._root)]
            names = {path.name for path in paths}
            half = [path for path in paths if NAME.fullmatch(path.name) and f"{path.name}.json" not in names]
            checkpoints = [PurePosixPath(path) for path in self._listed(f"{self._root}/{JOBS}")]
            for path in (*half, *checkpoints):
                if now - self._modified(str(path)) > ORPHAN_SECONDS:
                    self._fs.rm(str(path), recursive=True)

    def share(self, path: Path) -> None:
        if time.monotonic() < self._share_again:
            return
        try:
            with self._asked():
                self._fs.put_file(str(path), f"{self._root}/{JOBS}/{path.name}")
        except OSError as error:
            self._share_again = time.monotonic() + SHARE_AGAIN_SECONDS
            log.warning("%s is kept on this node alone: %s", path.name, error)

    def shared(self, path: Path) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=ASIDE, dir=path.parent)
        os.close(descriptor)
        try:
            with self._asked():
                self._fs.get_file(f"{self._root}/{JOBS}/{path.name}", temporary)
            os.replace(temporary, path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("what another node may have kept of %s can't be fetched: %s", path.name, error)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def unshare(self, path: Path) -> None:
        try:
            with self._asked(), suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{JOBS}/{path.name}")
        except OSError as error:
            log.warning("%s stays in %s for a day: %s", path.name, self, error)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the URL as it has it."""
        protocol = self._url.partition("://")[0]
        options = (S3_OPTIONS if protocol in ("s3", "s3a") else {}) | {"use_listings_cache": False} | self._options
        fs, root = fsspec.core.url_to_fs(self._url, **options)
        return fs, root.rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Around questions to the store, whose errors are as many kinds as there are protocols.

        Raises:
            FileNotFoundError, FileExistsError: as the store says.
            OSError: the disk of this machine, or the store (`StoreAway`).
        """
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise
            raise StoreAway(f"{self} refuses or can't be reached: {error}") from error
        except (ImportError, ValueError) as error:
            raise StoreAway(f"{self} can't be opened: {error}") from error
        except Exception as error:
            raise StoreAway(f"{self} does not answer: {str(error) or type(error).__name__}") from error

    def _listed(self, path: str) -> list[str]:
        try:
            return [str(found).rstrip("/") for found in self._fs.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def _manifest(self, name: str) -> Manifest | None:
        try:
            with self._asked():
                text = self._fs.cat_file(self._manifest_key(name))
        except FileNotFoundError:
            return None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            raise AdapterRefused(f"its manifest in {self} can't be read: {error.errors()[0]['msg']}.") from None

    def _manifest_key(self, name: str) -> str:
        return f"{self._root}/{name}.json"

    def _key(self, name: str, file: str, part: Part) -> str:
        return f"{self._root}/{name}/{part.sha256[:12]}-{file}"

    def _modified(self, path: str) -> float:
        """When an object, or the newest of a folder, was written, in seconds since the epoch; of what is just being removed: never."""
        return max((self._fs.modified(found).timestamp() for found in self._fs.find(path)), default=math.inf)


def _part(path: Path) -> Part:
    return Part(bytes=path.stat().st_size, sha256=sha256_of(path))
