"""Fast weights as this process parsed or wrote them last, so that a user's next request need not parse the same bytes again."""

from collections import OrderedDict

from service.domain.fast_weights import FastWeights

# Of JSON, at the most; parsed it takes five times as much.
MOST_BYTES = 16 * 2**20
# Less is parsed as fast as it is looked up.
LEAST_BYTES = 4096


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
        self._bytes -= len(replaced[0]) if replaced else 0
        if not LEAST_BYTES <= len(raw) <= self._most_bytes:
            return
        self._states[key] = raw, state
        self._bytes += len(raw)
        while self._bytes > self._most_bytes:
            _, (oldest, _) = self._states.popitem(last=False)
            self._bytes -= len(oldest)
