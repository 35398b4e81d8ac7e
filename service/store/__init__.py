"""Every Redis key is read and written here and nowhere else; each Lua script lives in one typed method.

`keys` names them, `users` holds interactions and logs, `scopes` adapter versions and pointers, `jobs` consolidations,
`embeddings` vectors of exemplars.
"""

from service.settings import Settings
from service.store.connection import Connection
from service.store.embeddings import EmbeddingStore
from service.store.jobs import JobStore
from service.store.scopes import ScopeStore
from service.store.users import UserStore


class Store:
    """The parts over one connection."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.connection = connection
        self.users = UserStore(connection, state_cache_seconds=settings.state_cache_seconds)
        self.embeddings = EmbeddingStore(connection, cache_seconds=settings.state_cache_seconds)
        self.scopes = ScopeStore(connection)
        self.jobs = JobStore(connection, retention_seconds=settings.job_retention_seconds)

    async def close(self) -> None:
        await self.connection.close()


def open_store(settings: Settings) -> Store:
    """The store of these settings. Nothing is sent until the first call."""
    return Store(Connection(settings.effective_redis_url, timeout_seconds=settings.redis_timeout_seconds), settings)
