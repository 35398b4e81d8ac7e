"""A verified copy of an adapter version on this replica.

vLLM reads an adapter's files again whenever it needs room for others in between, and dies if they are gone by then. So it is given a
copy that nobody else deletes, and the store's folder may go at any time.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from service.domain.feedback import Frozen
from service.domain.slow_weights import NAME
from service.errors import FastslowError

WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "provenance.json"
FILES = ("adapter_config.json", WEIGHTS, PROVENANCE)
"""All that vLLM or we read of a version's folder; anything else in it is left behind."""


class AdapterRefused(FastslowError):
    """The version's files are not what its provenance says, or can't be read or copied."""


class _Provenance(Frozen):
    """The part of an `AdapterVersion` that is checked here, so that a version outlives changes of its report."""

    name: str
    base_model: str
    content_sha256: str


def local_copy(name: str, *, store: Path, cache: Path, base_model: str) -> Path | None:
    """The folder of a verified copy of version `name`, made now if there is none; None if the store knows no such version.

    Blocks on disk: call it off the event loop.

    Args:
        store: folder that consolidation publishes versions to.
        cache: this replica's own folder.
        base_model: the served base model's name.

    Raises:
        AdapterRefused: the files fail a check, or can't be copied.
    """
    if not NAME.fullmatch(name):
        return None
    copy = cache / name
    if copy.exists():
        try:
            verify(copy, name=name, base_model=base_model)
        except AdapterRefused:
            # A copy that a disk spoilt is no reason to refuse the original.
            shutil.rmtree(copy)
        else:
            return copy
    if not (store / name).is_dir():
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _copy(store / name, copy, base_model=base_model)
    except OSError as error:
        raise AdapterRefused(f"{store / name} can't be copied to {cache}: {error}.") from error


def verify(folder: Path, *, name: str, base_model: str) -> None:
    """Check that `folder` holds version `name` of `base_model`, unchanged.

    Raises:
        AdapterRefused: it does not; the message says what differs.
    """
    try:
        provenance = _Provenance.model_validate_json((folder / PROVENANCE).read_bytes())
        with (folder / WEIGHTS).open("rb") as file:
            content_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterRefused(f"{error.filename} can't be read: {error.strerror}.") from error
    except ValidationError as error:
        raise AdapterRefused(f"{folder / PROVENANCE} is not an adapter version: {error.errors()[0]['msg']}.") from None
    if provenance.name != name:
        raise AdapterRefused(f"its provenance is of {provenance.name}.")
    if provenance.base_model != base_model:
        raise AdapterRefused(f"it was trained on {provenance.base_model}, and {base_model} is served.")
    # The name ends with the hash's first digits, so a provenance that was changed with the file is found out too.
    if content_sha256 != provenance.content_sha256 or not name.endswith(content_sha256[:12]):
        raise AdapterRefused(
            f"{WEIGHTS} has SHA-256 {content_sha256}, but {provenance.content_sha256} was published under this name."
        )


def _copy(source: Path, target: Path, *, base_model: str) -> Path:
    """Copy to a temporary folder, verify the copy, publish it by one rename."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for file in FILES:
            shutil.copyfile(source / file, temporary / file)
        verify(temporary, name=target.name, base_model=base_model)
        try:
            os.rename(temporary, target)
        except OSError:
            # Another replica that shares this folder was faster, or the rename failed for good.
            verify(target, name=target.name, base_model=base_model)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
