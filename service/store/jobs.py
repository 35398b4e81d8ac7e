"""Consolidation jobs: one at a time per scope, under a lease, ended once whatever dies."""

import json
import logging
from collections.abc import Mapping
from typing import Literal

from pydantic import ValidationError

from service.domain.feedback import Frozen
from service.domain.slow_weights import AdapterVersion, Scope, TrainReport
from service.errors import Conflict, InvalidRequest, NotFound
from service.store.connection import Connection
from service.store.counts import CountStore
from service.store.keys import BUCKETS, ScopeKeys, UserKeys, due, in_bucket, job_by_id, job_id, open_jobs
from service.store.scopes import AuditEntry

log = logging.getLogger(__name__)

State = Literal["queued", "running", "promoted", "rejected", "failed"]

# Opens a job unless the scope has an open one: id of the scope's job. While it is open its record has no TTL: it may wait for a worker
# for longer than what has ended is kept.
OPEN = """#!lua
local scope, open, job = unpack(KEYS)
local id, record, at = unpack(ARGV)
local current = redis.call('HGET', scope, 'job')
if current and redis.call('ZSCORE', open, current) then return current end
redis.call('SET', job, record)
redis.call('ZADD', open, at, id)
redis.call('HSET', scope, 'job', id)
return id
"""

# Has a job count as open no more if its record is gone, for nobody can do it: 1 or 0. It frees memory, so it may do so where there is none.
FORGET = """#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
return redis.call('ZREM', KEYS[1], ARGV[1])
"""

# Extends the lease and shows progress, if the lease is still this worker's: 1 or 0. One that ran out while Redis was away is this worker's
# still if nobody else has taken the job up or ended it.
RENEW = """#!lua
local lease, job, open = unpack(KEYS)
local token, id, milliseconds, record = unpack(ARGV)
local holder = redis.call('GET', lease)
if holder and holder ~= token then return 0 end
if not redis.call('ZSCORE', open, id) then return 0 end
redis.call('SET', lease, token, 'PX', milliseconds)
redis.call('SET', job, record)
return 1
"""

# Ends a job, and promotes its version in the same step.
# 'ok' | 'lost': another worker has the lease, or has ended the job | 'moved': the pointer has moved | 'barred': the same weights were
# rolled back before.
FINISH = """#!lua
local lease, job, open, scope, versions, scopes, audit, shared = unpack(KEYS)
local token, id, record, ttl, attempted, name, version, number, expected, scope_name, shared_name, entry = unpack(ARGV)
local holder = redis.call('GET', lease)
if (holder and holder ~= token) or not redis.call('ZSCORE', open, id) then return 'lost' end
if name ~= '' then
  if (redis.call('HGET', scope, 'active') or 'base') ~= expected then return 'moved' end
  for _, field in ipairs(redis.call('HKEYS', scope)) do
    if string.sub(field, 1, 7) == 'barred:' and string.sub(field, -12) == string.sub(name, -12) then return 'barred' end
  end
  redis.call('HSET', versions, name, version)
  redis.call('SADD', scopes, scope_name)
  redis.call('HSET', scope, 'active', name, 'number', number)
  if shared_name ~= '' then redis.call('HSET', shared, shared_name, name) end
  redis.call('XADD', audit, '*', 'entry', entry)
end
redis.call('SET', job, record, 'EX', ttl)
redis.call('ZREM', open, id)
redis.call('HDEL', scope, 'job')
if attempted ~= '' then redis.call('HSET', scope, 'attempted', attempted) end
redis.call('DEL', lease)
return 'ok'
"""

# Takes a user off the due set if nothing came after the revision that was looked at, else restarts the clock.
SETTLE = """#!lua
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local head = #last > 0 and string.match(last[1][1], '^%d+') or '0'
if head == ARGV[2] then redis.call('ZREM', KEYS[1], ARGV[1]) else redis.call('ZADD', KEYS[1], 'XX', ARGV[3], ARGV[1]) end
return 1
"""

RELEASE = """#!lua
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class Job(Frozen):
    """One consolidation, as the admin sees it."""

    id: str
    tenant: str
    scope: str
    state: State = "queued"
    stage: str = "queued"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    kl_text: float | None = None
    """KL to the base on the plain-text anchors that steer training, nats per token."""
    kl_chat: float | None = None
    """Likewise on chat anchors. What was measured on the judge anchors is in the report."""
    beta: float | None = None
    """The larger of the two KL coefficients that hold it there."""
    reasons: tuple[str, ...] = ()
    """Why it was rejected or failed; of one that runs, why its last worker could not end it."""
    version: str | None = None
    """The version that it promoted."""
    report: TrainReport | None = None
    attempts: int = 0
    """How many workers have taken it up."""
    created: float
    updated: float

    @property
    def ended(self) -> bool:
        return self.state in ("promoted", "rejected", "failed")


class JobStore:
    """Reads and writes of consolidation jobs."""

    def __init__(self, connection: Connection, *, retention_seconds: int) -> None:
        self._redis = connection
        self._counts = CountStore(connection)
        self._retention = retention_seconds

    async def open(self, scope: Scope, *, tenant: str, unique: str, now: float) -> tuple[Job, bool]:
        """The scope's open job, and whether it was opened by this call.

        Raises:
            Conflict: the scope has an open job whose record can't be read.
        """
        keys = ScopeKeys(scope, tenant=tenant)
        job = Job(id=job_id(keys.bucket, unique), tenant=tenant, scope=str(scope), created=now, updated=now)
        while True:
            found = await self._redis.script(
                OPEN, [keys.scope, keys.open, keys.job(job.id)], job.id, job.model_dump_json(), now
            )
            current = found.decode()
            if current == job.id:
                return job, True
            if raw := await self._redis.call("GET", keys.job(current)):
                if (open_job := _parsed(raw, job=current)) is None:
                    raise Conflict(
                        f"{scope} has an open consolidation, '{current}', whose record can't be read: see the log.",
                        code="unreadable_consolidation",
                    )
                return open_job, False
            await self._forget(current, bucket=keys.bucket)

    async def load(self, job: str) -> Job | None:
        """A job by its id, whatever its tenant: for workers. None, and said, where its record can't be read."""
        key = job_by_id(job)
        raw = await self._redis.call("GET", key) if key else None
        return _parsed(raw, job=job) if raw else None

    async def get(self, job: str, *, tenant: str) -> Job:
        """A tenant's job by its id.

        Raises:
            NotFound: there is none of this tenant, it has expired, or its record can't be read.
        """
        found = await self.load(job)
        if found is None or found.tenant != tenant:
            raise NotFound(
                f"There is no consolidation '{job[:80]}', or its record can't be read.",
                param="id",
                code="unknown_consolidation",
            )
        return found

    async def unfinished(self) -> list[tuple[Job, bool]]:
        """Every open job of every tenant, and whether a worker holds its lease.

        One whose record is gone is open no more. One whose record can't be read stays open, for who wrote it may know better (a worker of
        another release); it is left out, told and counted.
        """
        pages = await self._redis.pipeline([("ZRANGE", open_jobs(b), 0, -1) for b in range(BUCKETS)])
        ids = [(b, member.decode()) for b, page in enumerate(pages) for member in page]
        records = await self._redis.pipeline([("GET", in_bucket(b, f"job:{i}")) for b, i in ids]) if ids else []
        for (b, i), raw in zip(ids, records, strict=True):
            if raw is None:
                await self._forget(i, bucket=b)
        found = [_parsed(raw, job=i) for (_, i), raw in zip(ids, records, strict=True) if raw]
        jobs = [job for job in found if job is not None]
        if unreadable := len(found) - len(jobs):
            await self._counts.add_all({("undone", "sweep"): unreadable})
        leases = [ScopeKeys(Scope.parse(job.scope), tenant=job.tenant).lease for job in jobs]
        held = await self._redis.pipeline([("EXISTS", lease) for lease in leases]) if leases else []
        return [(job, bool(lease)) for job, lease in zip(jobs, held, strict=True)]

    async def _forget(self, job: str, *, bucket: int) -> None:
        if await self._redis.script(FORGET, [open_jobs(bucket), in_bucket(bucket, f"job:{job}")], job):
            log.warning("job %s is open no more: its record is gone", job)

    async def acquire(self, job: Job, *, token: str, lease_seconds: float) -> bool:
        """Take the lease of the job's scope; false if another worker holds it."""
        lease = ScopeKeys(Scope.parse(job.scope), tenant=job.tenant).lease
        return bool(await self._redis.call("SET", lease, token, "NX", "PX", int(lease_seconds * 1000)))

    async def release(self, job: Job, *, token: str) -> None:
        """Give the lease back without ending the job."""
        await self._redis.script(RELEASE, [ScopeKeys(Scope.parse(job.scope), tenant=job.tenant).lease], token)

    async def renew(self, job: Job, *, token: str, lease_seconds: float) -> bool:
        """Extend the lease and show the job's progress; false if another worker has the job, or has ended it."""
        keys = ScopeKeys(Scope.parse(job.scope), tenant=job.tenant)
        kept = await self._redis.script(
            RENEW,
            [keys.lease, keys.job(job.id), keys.open],
            token,
            job.id,
            int(lease_seconds * 1000),
            job.model_dump_json(),
        )
        return bool(kept)

    async def finish(
        self,
        job: Job,
        *,
        token: str,
        attempted: Mapping[str, int] | None,
        version: AdapterVersion | None = None,
        audit: AuditEntry | None = None,
    ) -> Literal["ok", "lost", "moved", "barred"]:
        """End a job under its lease; with a version, promote it in the same step.

        Args:
            attempted: user id -> revision that the job has looked at, so that a sweep waits for more; None leaves it.

        Returns:
            What was written: all with `ok`, else nothing. `lost`: another worker has the job, or has ended it. `moved`: the version in
            use is no longer the candidate's parent. `barred`: the very same weights (a name ends with their hash) were rolled back before.
        """
        scope = Scope.parse(job.scope)
        keys = ScopeKeys(scope, tenant=job.tenant)
        outcome = await self._redis.script(
            FINISH,
            [keys.lease, keys.job(job.id), keys.open, keys.scope, keys.versions, keys.scopes, keys.audit, keys.shared],
            token,
            job.id,
            job.model_dump_json(),
            self._retention,
            "" if attempted is None else json.dumps(dict(attempted)),
            version.name if version else "",
            version.model_dump_json() if version else "",
            version.number if version else 0,
            version.parent if version else "",
            str(scope),
            "" if scope.kind == "user" else str(scope),
            audit.model_dump_json() if audit else "",
        )
        result: Literal["ok", "lost", "moved", "barred"] = outcome.decode()
        return result

    async def due(self) -> list[tuple[str, str, float]]:
        """(tenant, user, time of the oldest unsettled feedback) of every user with any."""
        pages = await self._redis.pipeline([("ZRANGE", due(b), 0, -1, "WITHSCORES") for b in range(BUCKETS)])
        found = []
        for page in pages:
            for member, since in page:
                tenant, _, user = member.decode().partition("\0")
                found.append((tenant, user, float(since)))
        return found

    async def head(self, *, tenant: str, user: str) -> int:
        """The revision of the user's last feedback, 0 without any."""
        last = await self._redis.call("XREVRANGE", UserKeys(tenant=tenant, user=user).log, "+", "-", "COUNT", 1)
        return int(last[0][0].split(b"-")[0]) if last else 0

    async def settle(self, *, tenant: str, user: str, revision: int, now: float) -> None:
        """The sweep has dealt with a user's feedback up to `revision`."""
        keys = UserKeys(tenant=tenant, user=user)
        await self._redis.script(SETTLE, [keys.due, keys.log], keys.member, revision, now)


def _parsed(raw: bytes, *, job: str) -> Job | None:
    """A job's record; None, and said, where it can't be read."""
    try:
        parsed = Job.model_validate_json(raw)
        Scope.parse(parsed.scope)
    except (ValidationError, InvalidRequest) as error:
        log.error(
            "job %s can't be done or ended, for its record can't be read (deleted, it counts as gone): %s", job, error
        )
        return None
    return parsed
