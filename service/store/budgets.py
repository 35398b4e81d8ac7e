"""KL budgets that admins have set: of a scope in the scope's hash, of a tenant in a key of its own.

A tenant's default is not the global scope's entry: the global adapter serves everybody, so its own budget may well be tighter than what
the scopes of single users should fall back to.
"""

from collections.abc import Mapping

from service.domain.feedback import Frozen
from service.domain.slow_weights import Scope
from service.store.connection import Connection
from service.store.keys import ScopeKeys, TenantKeys
from service.store.scopes import AuditEntry

# Sets or clears fields of a hash, and says so in the audit: field, value, ... after the entry; an empty value clears.
SET = """#!lua
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[1], ARGV[i]) else redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
redis.call('XADD', KEYS[2], '*', 'entry', ARGV[1])
return 1
"""


class Budgets(Frozen):
    """KL budgets in nats per token; None where nobody has set one."""

    kl_text_nats: float | None = None
    kl_chat_nats: float | None = None

    def or_else(self, other: "Budgets") -> "Budgets":
        """These, and the other's where these are not set."""
        return Budgets(**(other.model_dump() | self.model_dump(exclude_none=True)))


class BudgetStore:
    """Reads and writes of budgets. `scope` None is the tenant's default."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    async def read(self, scope: Scope | None, *, tenant: str) -> Budgets:
        """What is set for this scope itself, or for the tenant."""
        names = tuple(Budgets.model_fields)
        found = await self._redis.call("HMGET", _key(scope, tenant=tenant), *names)
        return Budgets(**{name: float(raw) for name, raw in zip(names, found, strict=True) if raw is not None})

    async def in_force(self, scope: Scope, *, tenant: str) -> Budgets:
        """The scope's own, else the tenant's; None where the settings' default applies."""
        own = await self.read(scope, tenant=tenant)
        return own.or_else(await self.read(None, tenant=tenant))

    async def write(
        self, scope: Scope | None, given: Mapping[str, float | None], *, tenant: str, audit: AuditEntry
    ) -> None:
        """Set the fields of `Budgets` that are given; None clears one."""
        audit_key = ScopeKeys(scope, tenant=tenant).audit if scope else TenantKeys(tenant=tenant).audit
        fields = [text for name, nats in given.items() for text in (name, "" if nats is None else repr(nats))]
        await self._redis.script(SET, [_key(scope, tenant=tenant), audit_key], audit.model_dump_json(), *fields)


def _key(scope: Scope | None, *, tenant: str) -> str:
    return ScopeKeys(scope, tenant=tenant).scope if scope else TenantKeys(tenant=tenant).budgets
