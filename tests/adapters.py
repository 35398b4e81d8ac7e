"""Small adapter versions on disk, whose weights are any bytes: for what looks at hashes and never loads them."""

import hashlib
import json
from pathlib import Path

WEIGHTS = b"weights of an adapter"
SCOPE = "0123456789ab"


def name_of(weights: bytes, *, number: int = 1, scope: str = SCOPE) -> str:
    return f"fs-{scope}-{number:04d}-{hashlib.sha256(weights).hexdigest()[:12]}"


NAME = name_of(WEIGHTS)


def write_version(store: Path, *, weights: bytes = WEIGHTS, number: int = 1, folder: Path | None = None) -> Path:
    """The three files of a version of the base model `base`, in `store` under its name, or in `folder`; that folder."""
    name = name_of(weights, number=number)
    target = folder or store / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_model.safetensors").write_bytes(weights)
    (target / "adapter_config.json").write_text("{}")
    content_sha256 = hashlib.sha256(weights).hexdigest()
    provenance = {"name": name, "base_model": "base", "content_sha256": content_sha256}
    provenance |= {"tenant": "acme", "scope": "user:alice", "job": f"job-{number}"}
    (target / "provenance.json").write_text(json.dumps(provenance))
    return target
