"""Logs that have grown long: which they are, their oldest events for the archive, and the step that takes those out of Redis.

A user's log holds what the fold can't give back, the events, but nobody needs a hundred thousand of them at hand: consolidation trains on
the newest, and the fold of the others is one value, the *snapshot*. So the fast weights are the snapshot with the log folded onto it.
"""

from collections.abc import AsyncIterator

from service.domain.fast_weights import Snapshot
from service.store.connection import Connection
from service.store.keys import BUCKETS, UserKeys, long
from service.store.logs import event_field
from service.store.states import new_stamp

# Replaces a log's oldest events by their fold, if the log still begins where it did when they were read. With another `stamp` for its head,
# the cached fold is of an older snapshot: it goes too, and whoever knows it reads anew. It frees memory, so it may do so where there is
# none.
REPLACE = """#!lua flags=allow-oom
local log, snapshot, state, who = unpack(KEYS)
local first, keep_from, fold, stamp = unpack(ARGV)
local oldest = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
if #oldest == 0 or oldest[1][1] ~= first .. '-0' then return 0 end
redis.call('SET', snapshot, fold)
redis.call('XTRIM', log, 'MINID', keep_from .. '-0')
if stamp ~= '' then
  redis.call('DEL', state)
  redis.call('HSET', who, 'head', stamp)
end
return 1
"""

PAGE = 100


class ArchiveStore:
    """Reads and writes of those who archive logs."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def due(self, *, most: int) -> list[tuple[str, str]]:
        """(tenant, user) of long logs, the longest due first."""
        pages = await self._redis.pipeline([("ZRANGE", long(b), 0, most - 1, "WITHSCORES") for b in range(BUCKETS)])
        found = sorted((float(since), member.decode()) for page in pages for member, since in page)
        return [(tenant, user) for tenant, _, user in (member.partition("\0") for _, member in found[:most])]

    async def settle(self, *, tenant: str, user: str) -> None:
        """The log is short enough. The next event of one that is not says so again."""
        keys = UserKeys(tenant=tenant, user=user)
        await self._redis.call("ZREM", keys.long, keys.member)

    async def postpone(self, *, tenant: str, user: str, now: float) -> None:
        """The log is due after those that are due now."""
        keys = UserKeys(tenant=tenant, user=user)
        await self._redis.call("ZADD", keys.long, "XX", now, keys.member)

    async def length(self, *, tenant: str, user: str) -> int:
        """Events in the log."""
        return int(await self._redis.call("XLEN", UserKeys(tenant=tenant, user=user).log))

    async def snapshot(self, *, tenant: str, user: str) -> Snapshot | None:
        """The fold of what was archived; None where nothing was."""
        raw = await self._redis.call("GET", UserKeys(tenant=tenant, user=user).snapshot)
        return Snapshot.model_validate_json(raw) if raw else None

    async def oldest(self, count: int, *, tenant: str, user: str) -> AsyncIterator[bytes]:
        """The oldest `count` events of the log as they lie there, in their order."""
        key, start = UserKeys(tenant=tenant, user=user).log, "-"
        while count > 0:
            page = await self._redis.call("XRANGE", key, start, "+", "COUNT", min(count, PAGE))
            for entry, fields in page:
                start = f"({entry.decode()}"
                yield event_field(fields)
            count = count - len(page) if page else 0

    async def replace(self, snapshot: Snapshot, *, first: int, stale: bool, tenant: str, user: str) -> bool:
        """Put a snapshot in place of the log's events up to its revision, in one step; at least one event must be left.

        Args:
            first: revision of the log's first event when the snapshot was made.
            stale: the cached fold is to be made again.

        Returns:
            False if the log begins elsewhere by now: another worker was here, and nothing was written.
        """
        keys = UserKeys(tenant=tenant, user=user)
        done = await self._redis.script(
            REPLACE,
            [keys.log, keys.snapshot, keys.state, keys.user],
            first,
            snapshot.state.revision + 1,
            snapshot.model_dump_json(),
            new_stamp() if stale else b"",
        )
        return bool(done)
