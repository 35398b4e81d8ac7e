"""Publishing an adapter version: written aside, verified, put into the store as a whole; a name is never written twice."""

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from service.domain.slow_weights import NAME, AdapterVersion
from service.errors import JobFailed
from workers.adapter_store import AdapterRefused, AdapterStore
from workers.adapter_store.versions import CONFIG, PROVENANCE, WEIGHTS, sha256_of
from workers.consolidation.checkpoint import SUFFIX as CHECKPOINT
from workers.files import ASIDE, remove_orphans


class NameTaken(JobFailed):
    """Another job has published under the name."""


@contextmanager
def aside(store: AdapterStore, *, job: str) -> Iterator[Path]:
    """A local folder to prepare a version in, gone afterwards.

    Also removes folders and checkpoints of killed workers.

    Raises:
        JobFailed: the store can't be written to, when it is made or while the body writes: the disk is full, say.
    """
    try:
        store.work.mkdir(parents=True, exist_ok=True)
        remove_orphans(store.work, f"{ASIDE}*", f".*{CHECKPOINT}*", now=time.time())
        folder = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{job}-", dir=store.work))
    except OSError as error:
        raise JobFailed(_unwritable(store, error)) from error
    try:
        yield folder
    except (OSError, SafetensorError, AdapterRefused) as error:
        raise JobFailed(_unwritable(store, error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, version: AdapterVersion, *, store: AdapterStore) -> None:
    """Put a folder made `aside`, which holds the PEFT files, into the store as a version.

    A version that is there already with the same job and weights is left as it is: a worker was killed after it had published.

    Raises:
        NameTaken: by another job.
        JobFailed: what has the name can't be read, or the files are not what `version` says.
        OSError: the disk is full, or the store is away.
    """
    (folder / PROVENANCE).write_text(version.model_dump_json(indent=2))
    verify(folder, version)
    try:
        store.put(folder, version.name)
    except FileExistsError:
        _check_published_before(store, version)


def verify(folder: Path, version: AdapterVersion) -> None:
    """Check that a folder holds a version whole: weights that open and have the hash, a config that parses, its provenance.

    Raises:
        JobFailed: it does not.
    """
    if not NAME.fullmatch(version.name):
        raise JobFailed(f"{version.name} is not a name of an adapter version")
    try:
        sha256 = sha256_of(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            empty = not list(weights.keys())
        json.loads((folder / CONFIG).read_text())
        provenance = AdapterVersion.model_validate_json((folder / PROVENANCE).read_bytes())
    except (SafetensorError, ValueError, ValidationError) as error:
        raise JobFailed(f"the files of {version.name} can't be read back: {error}") from error
    if empty or sha256 != version.content_sha256 or provenance != version:
        raise JobFailed(f"the files of {version.name} are not what was written: their SHA-256 is {sha256}")


def _check_published_before(store: AdapterStore, version: AdapterVersion) -> None:
    try:
        with store.reading(version.name) as folder:
            there = AdapterVersion.model_validate_json((folder / PROVENANCE).read_bytes())
            if (there.job, there.content_sha256) == (version.job, version.content_sha256):
                verify(folder, there)
                return
    except (FileNotFoundError, AdapterRefused, ValidationError) as error:
        raise JobFailed(
            f"{version.name} is in the store already and can't be read: {error}; nothing was written"
        ) from error
    raise NameTaken(f"{version.name} is in the store already, from job {there.job}; nothing was written")


def _unwritable(store: AdapterStore, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk of {store.work} is full: make room and start again"
    return f"the adapter store {store} can't be used: {error}"
