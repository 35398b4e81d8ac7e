"""How much waits for workers and for how long, and how full Redis is: what a gateway tells Prometheus."""

from dataclasses import dataclass

from service.store.connection import Connection
from service.store.keys import BUCKETS, due, long, open_jobs, optimize

QUEUES = {"feedback": due, "consolidations": open_jobs, "optimizations": optimize, "archive": long}
"""Sorted sets, a bucket each, scored by a time: feedback that no consolidation has looked at, open consolidations, users whose contexts
are to be optimized, and those whose logs are to be archived."""

# In one pipeline: replies in flight wait for about a millisecond while it is packed and parsed.
BUCKETS_AT_ONCE = 32


@dataclass(frozen=True)
class Queue:
    """What is due in one of the queues."""

    waiting: int
    oldest_seconds: float


@dataclass(frozen=True)
class Memory:
    """Redis's memory in bytes, over all nodes."""

    used: int
    limit: int
    """`maxmemory`, or without one the machine's."""
    fullest: float
    """Share of its memory that the fullest node uses."""


class BacklogStore:
    """Reads over all users at once, a few commands a bucket."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def queues(self, *, now: float) -> dict[str, Queue]:
        """Each queue by its name: how many wait since before now, and since when the first of them does."""
        return {name: await self._queue(name, now=now) for name in QUEUES}

    async def _queue(self, name: str, *, now: float) -> Queue:
        key, waiting, first = QUEUES[name], 0, now
        for start in range(0, BUCKETS, BUCKETS_AT_ONCE):
            keys = [key(bucket) for bucket in range(start, min(BUCKETS, start + BUCKETS_AT_ONCE))]
            replies = await self._redis.pipeline(
                [command for k in keys for command in (("ZCOUNT", k, "-inf", now), ("ZRANGE", k, 0, 0, "WITHSCORES"))]
            )
            waiting += sum(replies[::2])
            first = min([first, *(float(score) for page in replies[1::2] for _, score in page)])
        return Queue(waiting, oldest_seconds=now - first)

    async def memory(self) -> Memory:
        """How full Redis is."""
        info = await self._redis.call("INFO", "memory")
        # A cluster answers node by node.
        nodes = [info] if "used_memory" in info else list(info.values())
        used = [node["used_memory"] for node in nodes]
        limits = [node["maxmemory"] or node["total_system_memory"] for node in nodes]
        return Memory(sum(used), sum(limits), fullest=max(u / limit for u, limit in zip(used, limits, strict=True)))
