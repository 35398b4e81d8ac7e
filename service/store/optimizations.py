"""Whose contexts want optimizing, and who is at it."""

from collections.abc import Iterable

from service.store.connection import Connection
from service.store.keys import BUCKETS, UserKeys, optimize

# No more work, unless the log has moved on meanwhile.
SETTLE = """#!lua
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if #last == 0 or last[1][1] == ARGV[1] .. '-0' then redis.call('ZREM', KEYS[2], ARGV[2]) end
return 1
"""

RELEASE = """#!lua
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""

# At one tick; the rest waits for the next.
MOST_AT_ONCE = 64


class OptimizationStore:
    """The queue of users whose contexts want optimizing."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def due(self, *, now: float) -> list[tuple[str, str]]:
        """(tenant, user) of those whose time has come, the longest due first."""
        pages = await self._redis.pipeline(
            [
                ("ZRANGEBYSCORE", optimize(b), "-inf", now, "WITHSCORES", "LIMIT", 0, MOST_AT_ONCE)
                for b in range(BUCKETS)
            ]
        )
        found = [(float(at), member.decode()) for page in pages for member, at in page]
        return [(tenant, user) for tenant, _, user in (m.partition("\0") for _, m in sorted(found)[:MOST_AT_ONCE])]

    async def ask_for(self, *, tenant: str, user: str, at: float) -> None:
        """Have a user's contexts optimized at a time, whatever was planned."""
        keys = UserKeys(tenant=tenant, user=user)
        await self._redis.call("ZADD", keys.optimize, at, keys.member)

    async def plan(self, *, tenant: str, user: str, at: float) -> None:
        """Have a user's contexts optimized at a time, unless some other time is planned."""
        keys = UserKeys(tenant=tenant, user=user)
        await self._redis.call("ZADD", keys.optimize, "NX", at, keys.member)

    async def ask_for_all(self, users: Iterable[str], *, tenant: str, at: float) -> None:
        """Have the contexts of many users optimized at a time, whatever was planned."""
        keys = [UserKeys(tenant=tenant, user=user) for user in users]
        await self._redis.pipeline([("ZADD", key.optimize, at, key.member) for key in keys])

    async def settle(self, *, tenant: str, user: str, revision: int) -> None:
        """There is nothing to optimize up to this revision."""
        keys = UserKeys(tenant=tenant, user=user)
        await self._redis.script(SETTLE, [keys.log, keys.optimize], revision, keys.member)

    async def pending(self, *, tenant: str, user: str) -> bool:
        """Whether an optimization of this user is planned or runs."""
        keys = UserKeys(tenant=tenant, user=user)
        planned, running = await self._redis.pipeline(
            [("ZSCORE", keys.optimize, keys.member), ("EXISTS", keys.optimizing)]
        )
        return planned is not None or bool(running)

    async def acquire(self, *, tenant: str, user: str, token: str, seconds: int) -> bool:
        """Take the user's lease; false if another worker has it."""
        key = UserKeys(tenant=tenant, user=user).optimizing
        return bool(await self._redis.call("SET", key, token, "NX", "EX", seconds))

    async def release(self, *, tenant: str, user: str, token: str) -> None:
        await self._redis.script(RELEASE, [UserKeys(tenant=tenant, user=user).optimizing], token)
