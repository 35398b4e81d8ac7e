"""What each tenant's new users start from."""

from pydantic import TypeAdapter

from service.domain.cold_start import ColdStart, starting
from service.domain.items import Prior
from service.errors import Conflict
from service.store.connection import Connection
from service.store.keys import BUCKETS, ColdStartKeys, opted_in
from service.store.scopes import AuditEntry

# Writes what was computed from a revision, unless another write came first: 1 or 0. After `entry`: field, value (empty: none any more), ...
WRITE = """#!lua
local cold, opted, audit = unpack(KEYS)
local revision, tenant, enabled, entry = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if (redis.call('HGET', cold, 'revision') or '0') ~= revision then return 0 end
redis.call('HSET', cold, 'revision', revision + 1, 'enabled', enabled)
redis.call(enabled == '1' and 'SADD' or 'SREM', opted, tenant)
for i = 5, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', cold, ARGV[i]) else redis.call('HSET', cold, ARGV[i], ARGV[i + 1]) end
end
if entry ~= '' then redis.call('XADD', audit, '*', 'entry', entry) end
return 1
"""

_PRIORS: TypeAdapter[tuple[Prior, ...]] = TypeAdapter(tuple[Prior, ...])
# Before a scope's name: fields of the tenant's hash.
PREFIX = "priors:"


class ColdStartStore:
    """Reads and writes of the tenants' priors."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def read(self, *, tenant: str) -> ColdStart:
        """All of a tenant's."""
        flat = await self._redis.call("HGETALL", ColdStartKeys(tenant).cold)
        fields = {name.decode(): value for name, value in flat.items()}
        return ColdStart(
            revision=int(fields.get("revision", 0)),
            enabled=fields.get("enabled") == b"1",
            priors={
                name.removeprefix(PREFIX): _PRIORS.validate_json(value)
                for name, value in fields.items()
                if name.startswith(PREFIX)
            },
        )

    async def priors(self, *, tenant: str, cohort: str | None) -> tuple[Prior, ...]:
        """What a new user of this cohort starts from; nothing where the tenant has not opted in."""
        scopes = (f"{PREFIX}cohort:{cohort}", f"{PREFIX}global")
        enabled, *found = await self._redis.call("HMGET", ColdStartKeys(tenant).cold, "enabled", *scopes)
        if enabled != b"1":
            return ()
        ours, tenants = (_PRIORS.validate_json(raw) if raw else () for raw in found)
        return starting(ours, tenants)

    async def write(self, after: ColdStart, *, before: ColdStart, tenant: str, audit: AuditEntry | None = None) -> None:
        """Replace what was read by what came of it.

        Raises:
            Conflict: another write came first; read again.
        """
        keys = ColdStartKeys(tenant)
        args: list[str | bytes | int | float] = [before.revision, tenant, int(after.enabled)]
        args.append(audit.model_dump_json() if audit else "")
        for scope in sorted(before.priors.keys() | after.priors.keys()):
            priors = after.priors.get(scope, ())
            if priors != before.priors.get(scope, ()):
                args += [f"{PREFIX}{scope}", _PRIORS.dump_json(priors) if priors else ""]
        if not await self._redis.script(WRITE, [keys.cold, keys.opted_in, keys.audit], *args):
            raise Conflict("Cold start has just been changed by somebody else: look again.", code="cold_start_moved_on")

    async def opted_in(self) -> list[str]:
        """The tenants that have cold start on."""
        pages = await self._redis.pipeline([("SMEMBERS", opted_in(b)) for b in range(BUCKETS)])
        return sorted(tenant.decode() for page in pages for tenant in page)
