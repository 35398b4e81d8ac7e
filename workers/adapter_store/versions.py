"""The files of an adapter version, and whether they are what they claim."""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from service.domain.feedback import Frozen
from service.errors import FastslowError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROVENANCE = "provenance.json"
FILES = (CONFIG, WEIGHTS, PROVENANCE)
"""All that vLLM or we read of a version's folder; anything else in it is left behind."""


class AdapterRefused(FastslowError):
    """The version's files are not what its provenance says, or can't be read or copied."""


class StoreAway(OSError):
    """The object store does not answer, or refuses."""


class Provenance(Frozen):
    """Whose version it is: the part of an `AdapterVersion` that is needed without its record, so that it outlives changes of the report."""

    tenant: str
    scope: str
    job: str


class Content(Frozen):
    """What a version's files are checked against."""

    name: str
    base_model: str
    content_sha256: str


class Unreported(Provenance, Content):
    """The provenance of a version that was never judged and serves nobody: vLLM draws replies from it for its own training."""


def verify(folder: Path, *, name: str, base_model: str) -> None:
    """Check that `folder` holds version `name` of `base_model`, unchanged.

    Args:
        base_model: the served base model's name.

    Raises:
        AdapterRefused: it does not; the message says what differs.
    """
    try:
        content = Content.model_validate_json((folder / PROVENANCE).read_bytes())
        content_sha256 = sha256_of(folder / WEIGHTS)
    except OSError as error:
        raise AdapterRefused(f"{error.filename} can't be read: {error.strerror}.") from error
    except ValidationError as error:
        raise AdapterRefused(f"{folder / PROVENANCE} is not an adapter version: {error.errors()[0]['msg']}.") from None
    if content.name != name:
        raise AdapterRefused(f"its provenance is of {content.name}.")
    if content.base_model != base_model:
        raise AdapterRefused(f"it was trained on {content.base_model}, and {base_model} is served.")
    # The name ends with the hash's first digits, so a provenance that was changed with the file is found out too.
    if content_sha256 != content.content_sha256 or not name.endswith(content_sha256[:12]):
        raise AdapterRefused(
            f"{WEIGHTS} has SHA-256 {content_sha256}, but {content.content_sha256} was published under this name."
        )


def sha256_of(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance_of(text: bytes) -> Provenance | None:
    """Whose version it is, by its own word; None where that can't be read."""
    try:
        return Provenance.model_validate_json(text)
    except ValidationError:
        return None
