"""Publishing an adapter version: written aside, verified, put in place by one rename; a name is never written twice."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from service.domain.slow_weights import NAME, AdapterVersion
from service.errors import JobFailed
from workers.consolidation.checkpoint import SUFFIX as CHECKPOINT
from workers.consolidation.lora import CONFIG, WEIGHTS
from workers.files import fsync

PROVENANCE = "provenance.json"
# Worker folders begin with this, so no version's name can be one; they lie in the store, because a rename must stay in one file system.
ASIDE = ".aside-"
# No job runs this long (`job_limit_seconds` is at most hours), so an older folder belongs to a worker that was killed.
ORPHAN_SECONDS = 86400.0


@contextmanager
def aside(store: Path, *, job: str) -> Iterator[Path]:
    """A folder in the store to prepare a version in, gone afterwards unless it was published.

    Also removes folders of killed workers.

    Raises:
        JobFailed: the store can't be written to, when it is made or while the body writes: the disk is full, say.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        clean_orphans(store, now=time.time())
        folder = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{job}-", dir=store))
    except OSError as error:
        raise JobFailed(_unwritable(store, error)) from error
    try:
        yield folder
    except (OSError, SafetensorError) as error:
        raise JobFailed(_unwritable(store, error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, version: AdapterVersion, *, store: Path) -> Path:
    """Turn a folder made `aside`, which holds the PEFT files, into the version's folder in the store.

    A version that is there already with the same job and weights is left as it is: a worker was killed after its rename.

    Raises:
        JobFailed: another version has the name, or the files are not what `version` says.
        OSError: the disk is full.
    """
    target = store / version.name
    if target.exists():
        return _published_before(target, version)
    (folder / PROVENANCE).write_text(version.model_dump_json(indent=2))
    for name in (WEIGHTS, CONFIG, PROVENANCE):
        fsync(folder / name)
    verify(folder, version)
    folder.chmod(0o755)
    fsync(folder)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return _published_before(target, version)
        raise
    fsync(store)
    return target


def verify(folder: Path, version: AdapterVersion) -> None:
    """Check that a folder holds a version whole: weights that open and have the hash, a config that parses, its provenance.

    Raises:
        JobFailed: it does not.
    """
    if not NAME.fullmatch(version.name):
        raise JobFailed(f"{version.name} is not a name of an adapter version")
    try:
        with (folder / WEIGHTS).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            empty = not list(weights.keys())
        json.loads((folder / CONFIG).read_text())
        provenance = AdapterVersion.model_validate_json((folder / PROVENANCE).read_bytes())
    except (SafetensorError, ValueError, ValidationError) as error:
        raise JobFailed(f"the files of {version.name} can't be read back: {error}") from error
    if empty or sha256 != version.content_sha256 or provenance != version:
        raise JobFailed(f"the files of {version.name} are not what was written: their SHA-256 is {sha256}")


def clean_orphans(store: Path, *, now: float) -> None:
    """Remove folders and checkpoints that killed workers left behind.

    Args:
        now: seconds since the epoch.
    """
    for path in (*store.glob(f"{ASIDE}*"), *store.glob(f".*{CHECKPOINT}*")):
        # Another worker may just be removing it.
        with suppress(FileNotFoundError):
            if now - path.stat().st_mtime > ORPHAN_SECONDS:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _published_before(target: Path, version: AdapterVersion) -> Path:
    try:
        there = AdapterVersion.model_validate_json((target / PROVENANCE).read_bytes())
    except (OSError, ValidationError):
        there = None
    if there is None or (there.job, there.content_sha256) != (version.job, version.content_sha256):
        raise JobFailed(f"{version.name} is in the store already and is another version; nothing was written")
    verify(target, there)
    return target


def _unwritable(store: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk of the adapter store {store} is full: make room and start again"
    return f"the adapter store {store} can't be written to: {error}"
