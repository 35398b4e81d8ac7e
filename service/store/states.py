"""Fast weights as Redis caches them, and as this process parsed or wrote them last.

Every event that joins a log draws a *stamp* anew, the log's head. The cached fold has the stamp of the log that it was folded from, so one
that is not the head's is not taken for the log's: a process with other rules of folding may have written to it meanwhile.

The cached fold is a hash with a field for each part of the fast weights, of which a feedback writes those that it changed; and whoever has
parsed the fast weights of a stamp need not read them. So a chat of a user with a long history reads as little as that of a new one. While
they stay the same they are the same object, by which others know that what they made of it still holds (`service/contexts.py`).
"""

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.domain.fast_weights import FastWeights
from service.store.lane import Command

# What is large, and mostly stays when something is said.
PARTS = ("guidelines", "exemplars", "credits", "populations")
FIELDS = ("stamp", "rest", *PARTS)
# Of JSON, at the most; parsed it takes five times as much.
MOST_BYTES = 16 * 2**20
# What an entry takes besides.
OVERHEAD_BYTES = 1024


@dataclass(frozen=True)
class Known:
    """Fast weights that this process has parsed or written."""

    stamp: bytes
    state: FastWeights
    part_bytes: Mapping[str, int]
    """By field."""

    @property
    def size(self) -> int:
        """Bytes of JSON, and what an entry takes besides."""
        return sum(self.part_bytes.values()) + OVERHEAD_BYTES


def new_stamp() -> bytes:
    """For a log's new head."""
    return secrets.token_hex(8).encode()


def whole(key: str) -> Command:
    """The command that reads a cached fold: the values of `FIELDS`, all None where nothing is cached."""
    return ("HMGET", key, *FIELDS)


def parsed(values: Sequence[bytes | None]) -> FastWeights:
    """The fast weights of what `whole` has read."""
    parts = [value[1:-1] for value in values[1:] if value is not None]
    return FastWeights.model_validate_json(b"{" + b",".join(parts) + b"}")


@dataclass(frozen=True)
class Write:
    """What makes fast weights the cached ones."""

    stays: bytes
    """The stamp of those that all other parts stay of; empty: there are no others."""
    stamp: bytes
    fields: tuple[bytes | str, ...]
    """Names and values of the hash, in turn."""
    state: FastWeights
    part_bytes: dict[str, int]

    def known(self, stamp: bytes) -> Known:
        """What is cached once it is written under this stamp."""
        return Known(stamp, self.state, self.part_bytes)


def write(state: FastWeights, known: Known | None) -> Write:
    """The parts in which fast weights differ from those that are cached now, as far as this process knows; all of them if None."""
    before = known.state if known else FastWeights()
    parts = {"rest": state.model_dump_json(exclude=set(PARTS)).encode()}
    for part in PARTS:
        if getattr(state, part) != getattr(before, part):
            parts[part] = state.model_dump_json(include={part}).encode()
    return Write(
        stays=known.stamp if known else b"",
        stamp=new_stamp(),
        fields=tuple(x for field in parts.items() for x in field),
        state=state,
        part_bytes={**(known.part_bytes if known else {}), **{part: len(value) for part, value in parts.items()}},
    )


class States:
    """By key of the cached fold. What is found has the stamp of the log's head: nothing can be stale."""

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._known: OrderedDict[str, Known] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        """Whether some are known, which may not be the newest."""
        return key in self._known

    def last(self, key: str) -> Known | None:
        """What was cached in Redis when this process last read or wrote it."""
        return self._known.get(key)

    def stamped(self, key: str, stamp: bytes) -> FastWeights | None:
        """The fast weights of this stamp, if they are known here."""
        known = self._known.get(key)
        if known is None or known.stamp != stamp:
            return None
        self._known.move_to_end(key)
        return known.state

    def read(self, key: str, values: Sequence[bytes | None]) -> FastWeights:
        """The fast weights that `whole` has read, known from now on."""
        state = parsed(values)
        stamp, *parts = values
        sizes = {field: len(value) for field, value in zip(FIELDS[1:], parts, strict=True) if value is not None}
        self.keep(key, Known(stamp or b"", state, sizes))
        return state

    def keep(self, key: str, known: Known) -> None:
        """Remember fast weights that were read or written; the least recently used make room."""
        replaced = self._known.pop(key, None)
        self._bytes -= replaced.size if replaced else 0
        if known.size > self._most_bytes:
            return
        self._known[key] = known
        self._bytes += known.size
        while self._bytes > self._most_bytes:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= oldest.size
