"""Fast weights as this process parsed or wrote them last, so that a user's next request need not parse the same bytes again.

While they stay the same they are the same object, by which others know that what they made of it still holds (`service/contexts.py`).
"""

from collections import OrderedDict

from service.domain.fast_weights import FastWeights

# Of JSON, at the most; parsed it takes five times as much.
MOST_BYTES = 16 * 2**20
# What an entry takes besides.
OVERHEAD_BYTES = 1024


class States:
    """By key of the cached fold. What is found is what the bytes say, for they are compared: nothing can be stale."""

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._states: OrderedDict[str, tuple[bytes, FastWeights]] = OrderedDict()

    def parsed(self, key: str, raw: bytes) -> FastWeights:
        """The fast weights that `raw` holds."""
        known = self._states.get(key)
        if known is not None and known[0] == raw:
            self._states.move_to_end(key)
            return known[1]
        state = FastWeights.model_validate_json(raw)
        self.keep(key, raw, state)
        return state

    def keep(self, key: str, raw: bytes, state: FastWeights) -> None:
        """Remember what `raw` holds; the least recently used make room."""
        replaced = self._states.pop(key, None)
        self._bytes -= _size(replaced[0]) if replaced else 0
        if _size(raw) > self._most_bytes:
            return
        self._states[key] = raw, state
        self._bytes += _size(raw)
        while self._bytes > self._most_bytes:
            _, (oldest, _) = self._states.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(raw: bytes) -> int:
    return len(raw) + OVERHEAD_BYTES
