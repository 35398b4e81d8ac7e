"""The names of every Redis key.

All keys of a user carry the hash tag of the user's bucket, so one script may touch them together on a Redis Cluster; so do all keys of a
scope. A user's own scope lies in the user's bucket, a tenant's cohorts and its global scope in the tenant's. A fixed number of buckets,
never changed, makes each tenant-wide question a pipeline of that many reads.

Durable (no TTL): log, snapshot, users, user, due, optimize, long, scope, versions, scopes, shared, audit, open, counts, cold,
opted-in, budgets, base, norms, and job while it is open.
All else is a cache or expires: fold, embeddings, int, idem, confirm, job, lease, optimizing, and the buckets of rate limits.
"""

import hashlib
import zlib
from functools import lru_cache

from service.domain.fast_weights import FOLD
from service.domain.slow_weights import Scope

BUCKETS = 256
# Of one user or tenant each: a kilobyte or two. Who chats comes again.
CACHED_NAMES = 4096


def _bucket(*parts: str) -> int:
    return zlib.crc32("\0".join(parts).encode()) % BUCKETS


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def in_bucket(bucket: int, name: str) -> str:
    return f"fs:{{{bucket:03d}}}:{name}"


def due(bucket: int) -> str:
    """Sorted set of `tenant\\0user` with feedback that no sweep has settled, scored by the time of the oldest such feedback."""
    return in_bucket(bucket, "due")


def open_jobs(bucket: int) -> str:
    """Sorted set of the ids of unfinished consolidations, scored by the time they were queued."""
    return in_bucket(bucket, "open")


def optimize(bucket: int) -> str:
    """Sorted set of `tenant\\0user` whose contexts want optimizing, scored by the time when to."""
    return in_bucket(bucket, "optimize")


def long(bucket: int) -> str:
    """Sorted set of `tenant\\0user` whose log has grown long enough to be archived, scored by when it had, or could last not be."""
    return in_bucket(bucket, "long")


def users_index(bucket: int, tenant: str) -> str:
    """Sorted set of the users of a tenant that ever gave feedback, scored by the time of the last."""
    return in_bucket(bucket, f"users:{tenant}")


def scopes_index(bucket: int, tenant: str) -> str:
    """Set of a tenant's scopes that have adapter versions."""
    return in_bucket(bucket, f"scopes:{tenant}")


def audit(bucket: int, tenant: str) -> str:
    """Stream of who moved which pointer, when and why."""
    return in_bucket(bucket, f"audit:{tenant}")


def opted_in(bucket: int) -> str:
    """Set of the tenants of this bucket that have cold start on."""
    return in_bucket(bucket, "opted-in")


def counts() -> str:
    """Hash of what workers count and measure, for the gateway's metrics: `name\\0label` -> a number."""
    return in_bucket(0, "counts")


def base() -> str:
    """Hash of the base model that a worker loaded last: its `model` name and the `sha256` of its weights."""
    return in_bucket(0, "base")


LIMITS = "fs:limits"
"""Begins the names of the buckets of rate limits, which the library that keeps them makes: `fs:limits:v1:gcra:<rate_limit(...)>`."""


def rate_limit(what: str, *, tenant: str, user: str | None = None) -> str:
    """The rest of the name of one bucket: of a user's chats, tokens or feedback, or (no user) of the tenant's."""
    whose = (tenant,) if user is None else (tenant, user)
    return f"{{{_bucket(*whose):03d}}}:{what}:{_digest(*whose)}"


class UserKeys:
    """The keys of one user of one tenant."""

    def __init__(self, *, tenant: str, user: str) -> None:
        self.bucket = _bucket(tenant, user)
        self.member = f"{tenant}\0{user}"
        self._id = _digest(tenant, user)
        self.log = in_bucket(self.bucket, f"log:{self._id}")
        self.state = in_bucket(self.bucket, f"fold:{self._id}:{FOLD}")
        """Hash of the cached fold (`service/store/states.py`)."""
        self.snapshot = in_bucket(self.bucket, f"snapshot:{self._id}")
        """The fold of the events before the log's first, where some were archived."""
        self.folder = f"{_digest(tenant)}/{self._id}"
        """Where the archive keeps the user's oldest events, in file systems' terms."""
        self.long = long(self.bucket)
        self.optimize = optimize(self.bucket)
        self.optimizing = in_bucket(self.bucket, f"optimizing:{self._id}")
        self.user = in_bucket(self.bucket, f"user:{self._id}")
        """Hash of the user's `cohort`, and of `head`, the stamp of the log's last event."""
        self.confirm = in_bucket(self.bucket, "confirm")
        self.due = due(self.bucket)
        self.users = users_index(self.bucket, tenant)

    def embeddings(self, model: str) -> str:
        """Hash of the user's exemplars, item id -> vector under this model: float16, little-endian."""
        return in_bucket(self.bucket, f"embeddings:{self._id}:{model}")

    def interaction(self, interaction_id: str) -> str:
        return in_bucket(self.bucket, f"int:{self._id}:{_digest(interaction_id)}")

    def idempotency(self, key: str) -> str:
        return in_bucket(self.bucket, f"idem:{self._id}:{_digest(key)}")


@lru_cache(CACHED_NAMES)
def user_keys(*, tenant: str, user: str) -> UserKeys:
    """The keys of a user who is active: their names are ten hashes."""
    return UserKeys(tenant=tenant, user=user)


class ScopeKeys:
    """The keys of one scope of one tenant."""

    def __init__(self, scope: Scope, *, tenant: str) -> None:
        self.bucket = _bucket(tenant, scope.name) if scope.kind == "user" else _bucket(tenant)
        digest = scope.digest(tenant)
        self.scope = in_bucket(self.bucket, f"scope:{digest}")
        self.versions = in_bucket(self.bucket, f"versions:{digest}")
        self.lease = in_bucket(self.bucket, f"lease:{digest}")
        self.scopes = scopes_index(self.bucket, tenant)
        self.audit = audit(self.bucket, tenant)
        self.open = open_jobs(self.bucket)
        self.due = due(self.bucket)
        self.shared = in_bucket(self.bucket, f"shared:{tenant}")
        """Hash of the versions in use of the tenant's cohorts and its global scope; unused for a user's own scope."""

    def job(self, job_id: str) -> str:
        return in_bucket(self.bucket, f"job:{job_id}")


class ColdStartKeys:
    """The keys of one tenant's cold start."""

    def __init__(self, tenant: str) -> None:
        bucket = _bucket(tenant)
        self.cold = in_bucket(bucket, f"cold:{tenant}")
        """Hash of `revision`, `enabled`, and `priors:<scope>` -> JSON list of priors."""
        self.opted_in = opted_in(bucket)
        self.audit = audit(bucket, tenant)


class TenantKeys:
    """The keys of what a tenant has set for all its scopes."""

    def __init__(self, *, tenant: str) -> None:
        bucket = _bucket(tenant)
        self.budgets = in_bucket(bucket, f"budgets:{tenant}")
        """Hash of KL budgets, with the fields that a scope's own have in the scope's hash."""
        self.norms = in_bucket(bucket, f"norms:{tenant}")
        """Hash of scope -> JSON list of norms: of all scopes, a user's own too, so that one read tells a gateway of every user's."""
        self.audit = audit(bucket, tenant)


@lru_cache(CACHED_NAMES)
def own_scope(*, tenant: str, user: str) -> str:
    """The key of a user's own scope."""
    return ScopeKeys(Scope(kind="user", name=user), tenant=tenant).scope


@lru_cache(CACHED_NAMES)
def shared_adapters(tenant: str) -> str:
    """The tenant's hash of cohort and global versions in use."""
    return ScopeKeys(Scope(kind="global"), tenant=tenant).shared


def job_id(bucket: int, unique: str) -> str:
    """A job's id names its bucket, so that the job is found by id alone."""
    return f"con-{bucket:03d}-{unique}"


def job_by_id(job: str) -> str | None:
    """The key of a job, or None where the id is not one."""
    prefix, _, rest = job.partition("-")
    bucket, _, unique = rest.partition("-")
    if prefix != "con" or not bucket.isdigit() or int(bucket) >= BUCKETS or not unique.isalnum():
        return None
    return in_bucket(int(bucket), f"job:{job}")
