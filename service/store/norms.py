"""The norms of each tenant's scopes."""

from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter

from service.domain.norms import Norm, union
from service.domain.slow_weights import Scope
from service.errors import Conflict
from service.store.connection import Connection
from service.store.keys import TenantKeys
from service.store.scopes import AuditEntry

# Every gateway holds all of a tenant's norms. More scopes with norms than this belong into cohorts.
MAX_SCOPES = 1000

# Replaces a scope's norms ('' removes them) with an audit entry; 0 where too many scopes have norms already.
WRITE = """#!lua
local norms, audit = unpack(KEYS)
local scope, list, most, entry = unpack(ARGV)
if list == '' then redis.call('HDEL', norms, scope)
elseif redis.call('HEXISTS', norms, scope) == 0 and redis.call('HLEN', norms) >= tonumber(most) then return 0
else redis.call('HSET', norms, scope, list) end
redis.call('XADD', audit, '*', 'entry', entry)
return 1
"""

_NORMS: TypeAdapter[tuple[Norm, ...]] = TypeAdapter(tuple[Norm, ...])


class NormStore:
    """Reads and writes of norms."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def write(self, norms: Sequence[Norm], *, scope: Scope, tenant: str, audit: AuditEntry) -> None:
        """Replace a scope's norms; none removes them.

        Raises:
            Conflict: too many of the tenant's scopes have norms.
        """
        keys = TenantKeys(tenant=tenant)
        listed = _NORMS.dump_json(tuple(norms)) if norms else b""
        if not await self._redis.script(
            WRITE, [keys.norms, keys.audit], str(scope), listed, MAX_SCOPES, audit.model_dump_json()
        ):
            raise Conflict(
                f"{MAX_SCOPES} scopes have norms already: give them to cohorts or to global, or remove some.",
                param="scope",
                code="too_many_scopes",
            )

    async def of(self, *, tenant: str, scopes: Sequence[Scope]) -> tuple[Norm, ...]:
        """The norms that hold in all of these scopes together, given most specific first: of a name that is there twice, the first."""
        if not scopes:
            return ()
        found = await self._redis.call("HMGET", TenantKeys(tenant=tenant).norms, *map(str, scopes))
        return union(_NORMS.validate_json(listed) for listed in found if listed is not None)

    async def all(self, *, tenant: str) -> dict[str, bytes]:
        """Scope -> its norms as they are stored, of every scope that has any; see `parsed`."""
        stored = await self._redis.call("HGETALL", TenantKeys(tenant=tenant).norms)
        return {scope.decode(): listed for scope, listed in stored.items()}


def parsed(stored: Mapping[str, bytes], scopes: Sequence[str]) -> tuple[Norm, ...]:
    """As `NormStore.of`, from what `NormStore.all` has read."""
    return union(_NORMS.validate_json(stored[scope]) for scope in scopes if scope in stored)
