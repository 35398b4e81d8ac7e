"""Every Redis key is read and written here and nowhere else; each Lua script lives in one typed method.

`keys` names them, `users` holds interactions and logs, `archives` takes the oldest events out of long ones, `scopes` adapter versions and
pointers, `budgets` how far adapters may drift, `jobs` consolidations, `optimizations` whose contexts want optimizing, `embeddings` vectors
of exemplars, `cold_start` what new users start from, `norms` what replies should be like, `members` reads over many users at once,
`counts` what workers count, `backlog` what waits for them, `rate_limits` how much anybody has left.
"""

from service.settings import Settings
from service.store.archives import ArchiveStore
from service.store.backlog import BacklogStore
from service.store.budgets import BudgetStore
from service.store.cold_start import ColdStartStore
from service.store.connection import Connection
from service.store.counts import CountStore
from service.store.embeddings import EmbeddingStore
from service.store.jobs import JobStore
from service.store.members import MemberStore
from service.store.norms import NormStore
from service.store.optimizations import OptimizationStore
from service.store.rate_limits import RateLimitStore
from service.store.scopes import ScopeStore
from service.store.users import UserStore


class Store:
    """The parts over one connection."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.connection = connection
        self.users = UserStore(
            connection,
            state_cache_seconds=settings.state_cache_seconds,
            log_most_events=settings.log_most_events,
        )
        self.members = MemberStore(connection, self.users)
        self.cold_start = ColdStartStore(connection)
        self.norms = NormStore(connection)
        self.archives = ArchiveStore(connection)
        self.embeddings = EmbeddingStore(connection, cache_seconds=settings.state_cache_seconds)
        self.scopes = ScopeStore(connection)
        self.budgets = BudgetStore(connection)
        self.optimizations = OptimizationStore(connection)
        self.counts = CountStore(connection)
        self.backlog = BacklogStore(connection)
        self.rate_limits = RateLimitStore(connection)
        self.jobs = JobStore(connection, retention_seconds=settings.job_retention_seconds)

    async def close(self) -> None:
        await self.connection.close()


def open_store(settings: Settings) -> Store:
    """The store of these settings. Nothing is sent until the first call."""
    connection = Connection(
        settings.effective_redis_url,
        timeout_seconds=settings.redis_timeout_seconds,
        wait_replicas=settings.redis_wait_replicas,
    )
    return Store(connection, settings)
