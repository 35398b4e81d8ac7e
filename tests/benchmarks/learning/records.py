"""What a run has done so far, one JSON object a line: a run that was interrupted goes on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]


class Records:
    """Records by key, each written to the file before it counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[Key, dict[str, Any]] = {}
        whole = path.read_bytes() if path.exists() else b""
        lines = whole[: whole.rfind(b"\n") + 1]
        for line in lines.splitlines():
            record = json.loads(line)
            self._found[tuple(record["key"])] = record
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever was killed in the middle of a line left one without an end.
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(len(lines))
        self._file.seek(0, 2)

    def get(self, *key: str | int) -> dict[str, Any] | None:
        return self._found.get(key)

    def put(self, *key: str | int, **fields: Any) -> dict[str, Any]:
        """Record something; what has been recorded stays as it is.

        Raises:
            ValueError: the key has been used.
        """
        if key in self._found:
            raise ValueError(f"recorded twice: {key}")
        record = {"key": list(key), **fields}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._found[key] = record
        return record

    def under(self, *beginning: str | int) -> Iterator[dict[str, Any]]:
        """The records whose key begins so, in the order in which they were made."""
        for key, record in self._found.items():
            if key[: len(beginning)] == beginning:
                yield record

    def close(self) -> None:
        self._file.close()
