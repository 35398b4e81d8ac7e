"""Reading users' logs: the snapshot of what was archived, and the events since."""

import logging
from dataclasses import dataclass

from service.domain.events import Event, parse_event
from service.domain.fast_weights import FOLD, FastWeights, Snapshot
from service.domain.fold import fold
from service.store.connection import Connection
from service.store.keys import UserKeys

PAGE = 500
# A log is trimmed once in thousands of feedbacks: twice during one read does not happen.
READS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserHistory:
    """A part of a user's log up to its end."""

    start: FastWeights
    """The fold of all that came before."""
    events: list[Event]

    def fold(self) -> FastWeights:
        """The fast weights as they are now."""
        return fold(self.events, self.start)

    def past(self, revision: int) -> "UserHistory":
        """Only what is past a revision."""
        late = [event for event in self.events if event.revision > revision]
        return UserHistory(fold(self.events[: len(self.events) - len(late)], self.start), late)


class Logs:
    """Logs by their users' keys."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def read(self, keys: UserKeys) -> UserHistory:
        """All that Redis has of a log."""
        for _ in range(READS):
            start = await self._snapshot(keys)
            events = await self.events(keys, after=start.revision)
            # Else it was trimmed between the two; `fold` refuses a log with a gap.
            if not events or events[-1].revision - start.revision == len(events):
                break
        return UserHistory(start, events)

    async def events(self, keys: UserKeys, *, after: int) -> list[Event]:
        """The events past a revision; archived ones are not there."""
        events: list[Event] = []
        while True:
            page = await self._redis.call("XRANGE", keys.log, f"({after}-0", "+", "COUNT", PAGE)
            events += [parse_event(event_field(fields)) for _, fields in page]
            if len(page) < PAGE:
                return events
            after = events[-1].revision

    async def _snapshot(self, keys: UserKeys) -> FastWeights:
        raw = await self._redis.call("GET", keys.snapshot)
        if raw is None:
            return FastWeights()
        snapshot = Snapshot.model_validate_json(raw)
        if snapshot.fold != FOLD:
            log.warning("a snapshot was folded by older rules; it serves until the archive has been folded anew")
            await self._redis.call("ZADD", keys.long, 0, keys.member)
        return snapshot.state


def event_field(fields: dict[bytes, bytes] | list[bytes]) -> bytes:
    """The event of a stream's entry."""
    return fields[b"event"] if isinstance(fields, dict) else fields[fields.index(b"event") + 1]
