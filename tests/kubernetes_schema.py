"""Holds Kubernetes manifests against the API's own types, which lightkube-models generates from its OpenAPI document."""

import importlib
from collections.abc import Iterator
from typing import Any

import msgspec


def problems(manifest: dict[str, Any]) -> list[str]:
    """What of a manifest is not as its kind has it: the first field that is missing or of another type, else all that are unknown."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    module = importlib.import_module(f"lightkube.models.{group.partition('.')[0] or 'core'}_{version}")
    try:
        read = msgspec.convert(manifest, getattr(module, manifest["kind"]))
    except msgspec.ValidationError as error:
        return [str(error)]
    return list(_unknown(manifest, msgspec.to_builtins(read), "$"))


def _unknown(written: Any, read: Any, path: str) -> Iterator[str]:
    """The fields that were passed over when the manifest was read."""
    if isinstance(written, dict):
        for name, value in written.items():
            if name in read:
                yield from _unknown(value, read[name], f"{path}.{name}")
            else:
                yield f"{path}.{name} is unknown"
    elif isinstance(written, list):
        for n, (item, other) in enumerate(zip(written, read, strict=True)):
            yield from _unknown(item, other, f"{path}[{n}]")
