"""Embeddings of a user's exemplars: a cache, so that recall need not run the model for each at every chat."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.store.connection import Connection
from service.store.keys import UserKeys

# Half the memory of float32, and a cosine that is off by less than 0.001.
STORED = np.float16

# Drops the fields that are not among the arguments.
KEEP = """#!lua
local kept = {}
for _, id in ipairs(ARGV) do kept[id] = true end
for _, id in ipairs(redis.call('HKEYS', KEYS[1])) do
  if not kept[id] then redis.call('HDEL', KEYS[1], id) end
end
return 1
"""


class EmbeddingStore:
    """Vectors by item, of one user and one model; each method names all three."""

    def __init__(self, connection: Connection, *, cache_seconds: int) -> None:
        self._redis = connection
        self._seconds = cache_seconds

    async def get(self, items: Sequence[str], *, tenant: str, user: str, model: str) -> dict[str, NDArray[np.float32]]:
        """The stored vectors of these items, kept for another while; those that are not stored are left out."""
        if not items:
            return {}
        key = UserKeys(tenant=tenant, user=user).embeddings(model)
        rows, _ = await self._redis.pipeline([("HMGET", key, *items), ("EXPIRE", key, self._seconds)])
        return {
            item: np.frombuffer(row, STORED).astype(np.float32)
            for item, row in zip(items, rows, strict=True)
            if row is not None
        }

    async def put(self, vectors: Mapping[str, NDArray[np.float32]], *, tenant: str, user: str, model: str) -> None:
        """Store vectors, and keep all of the user's for another while."""
        if not vectors:
            return
        key = UserKeys(tenant=tenant, user=user).embeddings(model)
        fields = [part for item, vector in vectors.items() for part in (item, vector.astype(STORED).tobytes())]
        await self._redis.pipeline([("HSET", key, *fields), ("EXPIRE", key, self._seconds)], atomic=True)

    async def keep(self, items: Iterable[str], *, tenant: str, user: str, model: str) -> None:
        """Drop the vectors of all other items: the user's exemplars as they are now bound what is stored."""
        await self._redis.script(KEEP, [UserKeys(tenant=tenant, user=user).embeddings(model)], *items)
