"""Scopes: adapter versions, the pointer to the one in use, and the audit of who moved it."""

import json
from dataclasses import dataclass
from typing import Literal

from service.domain.feedback import BASE, Frozen
from service.domain.slow_weights import NAME, AdapterVersion, Scope
from service.errors import Conflict, InvalidRequest, NotFound
from service.store.connection import Connection
from service.store.keys import BUCKETS, ScopeKeys, UserKeys, audit, scopes_index

# Moves the pointer. {'ok'} | {'moved', active}: somebody else moved it first | {'barred'}: the target may not be promoted.
# `bar` is a version to bar, `lift` whether the target's own bar is lifted.
MOVE = """#!lua
local scope, audit, shared, due = unpack(KEYS)
local target, expected, bar, lift, shared_name, entry, due_member, at = unpack(ARGV)
local active = redis.call('HGET', scope, 'active') or 'base'
if active ~= expected then return {'moved', active} end
if lift == '1' then redis.call('HDEL', scope, 'barred:' .. target)
elseif redis.call('HEXISTS', scope, 'barred:' .. target) == 1 then return {'barred'} end
if bar ~= '' then redis.call('HSET', scope, 'barred:' .. bar, at) end
if target == 'base' then
  redis.call('HDEL', scope, 'active')
  if shared_name ~= '' then redis.call('HDEL', shared, shared_name) end
else
  redis.call('HSET', scope, 'active', target)
  if shared_name ~= '' then redis.call('HSET', shared, shared_name, target) end
end
redis.call('XADD', audit, '*', 'entry', entry)
if due_member ~= '' then redis.call('ZADD', due, 'NX', at, due_member) end
return {'ok'}
"""


# A record is a few kilobytes: some tens of megabytes, read again when there are more.
CACHED_VERSIONS = 10_000


class AuditEntry(Frozen):
    """One move of a scope's pointer, or one setting of what its new users start from."""

    at: float
    action: Literal["promote", "rollback", "cold-start", "guidelines"]
    tenant: str
    scope: str
    from_version: str | None = None
    """Of a pointer, as is `to_version`."""
    to_version: str | None = None
    actor: str
    """`admin` with the last four characters of the key, or `job` with its id."""
    reason: str = ""
    set_to: tuple[str, ...] = ()
    """Of a setting: `on` or `off`, or the guidelines."""


@dataclass(frozen=True)
class ScopeState:
    """Where a scope stands."""

    active: str
    """The version in use, or `base`."""
    number: int
    """The highest number that a version of this scope was given."""
    barred: frozenset[str]
    attempted: dict[str, int]
    """User id -> revision that the last consolidation, promoted or not, has looked at."""


class ScopeStore:
    """Reads and writes of the adapter versions of one tenant's scopes."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection
        # Versions are immutable, so what was read once stays true.
        self._versions: dict[str, AdapterVersion] = {}

    async def state(self, scope: Scope, *, tenant: str) -> ScopeState:
        fields = {
            k.decode(): v.decode()
            for k, v in (await self._redis.call("HGETALL", ScopeKeys(scope, tenant=tenant).scope)).items()
        }
        return ScopeState(
            active=fields.get("active", BASE),
            number=int(fields.get("number", 0)),
            barred=frozenset(name.removeprefix("barred:") for name in fields if name.startswith("barred:")),
            attempted=json.loads(fields.get("attempted", "{}")),
        )

    async def version(self, name: str, scope: Scope, *, tenant: str) -> AdapterVersion:
        """One version of a scope.

        Raises:
            NotFound: the scope has no such version.
        """
        if name not in self._versions:
            raw = await self._redis.call("HGET", ScopeKeys(scope, tenant=tenant).versions, name)
            if raw is None:
                raise NotFound(f"{scope} has no adapter version '{name}'.", param="version", code="unknown_version")
            if len(self._versions) >= CACHED_VERSIONS:
                self._versions.clear()
            self._versions[name] = AdapterVersion.model_validate_json(raw)
        version = self._versions[name]
        if version.tenant != tenant or version.scope != str(scope):
            raise NotFound(f"{scope} has no adapter version '{name}'.", param="version", code="unknown_version")
        return version

    async def versions(self, *, tenant: str) -> list[AdapterVersion]:
        """All versions of a tenant, by scope and number."""
        pages = await self._redis.pipeline([("SMEMBERS", scopes_index(b, tenant)) for b in range(BUCKETS)])
        scopes = [Scope.parse(name.decode()) for page in pages for name in page]
        tables = await self._redis.pipeline([("HGETALL", ScopeKeys(s, tenant=tenant).versions) for s in scopes])
        found = [AdapterVersion.model_validate_json(raw) for table in tables for raw in table.values()]
        return sorted(found, key=lambda version: (version.scope, version.number))

    async def find(self, name: str, *, tenant: str) -> AdapterVersion:
        """A version of a tenant by its name alone.

        Raises:
            NotFound: there is none.
        """
        if NAME.fullmatch(name):
            for version in await self.versions(tenant=tenant):
                if version.name == name:
                    return version
        raise NotFound(f"There is no adapter version '{name[:80]}'.", param="name", code="unknown_version")

    async def rollback(
        self, scope: Scope, *, tenant: str, to: str | None, actor: str, reason: str, now: float
    ) -> AuditEntry:
        """Move the pointer back, to the version before (or `to`, which may be `base`), and bar the version left.

        The next chat of the scope is served by the older version; the feedback that the barred one had consolidated counts as
        unconsolidated again, and context items that it had absorbed are rendered again.

        Raises:
            NotFound: no such version.
            Conflict: nothing to roll back, the target is barred, in use or newer, or the pointer has just moved.
        """
        state = await self.state(scope, tenant=tenant)
        if state.active == BASE:
            raise Conflict(
                f"{scope} is served by the base model: there is nothing to roll back.", code="nothing_to_roll_back"
            )
        active = await self.version(state.active, scope, tenant=tenant)
        target = await self._previous(active, state, scope, tenant=tenant) if to is None else to
        if target == state.active:
            raise Conflict(f"'{target}' is the version in use.", param="to", code="already_in_use")
        if target != BASE:
            older = await self.version(target, scope, tenant=tenant)
            if older.number > active.number:
                raise Conflict(
                    f"'{target}' is newer than the version in use: promote it instead.", param="to", code="not_older"
                )
        return await self._move(
            scope, "rollback", tenant=tenant, target=target, expected=state.active, bar=state.active, lift=False,
            actor=actor, reason=reason, now=now,
        )  # fmt: skip

    async def promote(self, scope: Scope, *, tenant: str, name: str, actor: str, reason: str, now: float) -> AuditEntry:
        """Move the pointer to a named version by an admin's decision, which lifts a bar.

        Raises:
            NotFound: no such version.
            Conflict: it is in use already, or the pointer has just moved.
        """
        if name == BASE:
            raise InvalidRequest("Use rollback with to='base' to serve the base model again.", param="version")
        await self.version(name, scope, tenant=tenant)
        state = await self.state(scope, tenant=tenant)
        if state.active == name:
            raise Conflict(f"'{name}' is the version in use.", param="version", code="already_in_use")
        return await self._move(
            scope, "promote", tenant=tenant, target=name, expected=state.active, bar="", lift=True,
            actor=actor, reason=reason, now=now,
        )  # fmt: skip

    async def audit(self, *, tenant: str, limit: int) -> list[AuditEntry]:
        """The last moves of a tenant's pointers, newest first."""
        pages = await self._redis.pipeline(
            [("XREVRANGE", audit(b, tenant), "+", "-", "COUNT", limit) for b in range(BUCKETS)]
        )
        entries = [AuditEntry.model_validate_json(fields[b"entry"]) for page in pages for _, fields in page]
        return sorted(entries, key=lambda entry: entry.at, reverse=True)[:limit]

    async def _previous(self, active: AdapterVersion, state: ScopeState, scope: Scope, *, tenant: str) -> str:
        """The nearest ancestor that is not barred, or the base."""
        name = active.parent
        while name != BASE and name in state.barred:
            name = (await self.version(name, scope, tenant=tenant)).parent
        return name

    async def _move(
        self, scope: Scope, action: Literal["promote", "rollback"], *, tenant: str, target: str, expected: str, bar: str,
        lift: bool, actor: str, reason: str, now: float,
    ) -> AuditEntry:  # fmt: skip
        keys = ScopeKeys(scope, tenant=tenant)
        entry = AuditEntry(
            at=now, action=action, tenant=tenant, scope=str(scope), from_version=expected, to_version=target,
            actor=actor, reason=reason,
        )  # fmt: skip
        user_scope = scope.kind == "user"
        outcome, *rest = await self._redis.script(
            MOVE,
            [keys.scope, keys.audit, keys.shared, keys.due],
            target,
            expected,
            bar,
            "1" if lift else "0",
            "" if user_scope else str(scope),
            entry.model_dump_json(),
            UserKeys(tenant=tenant, user=scope.name).member if user_scope else "",
            now,
        )
        if outcome == b"moved":
            raise Conflict(
                f"The pointer of {scope} has just moved to '{rest[0].decode()}': look again.", code="pointer_moved"
            )
        if outcome == b"barred":
            raise Conflict(
                f"'{target}' is barred since it was rolled back: promote it by name to lift that.",
                code="version_barred",
            )
        return entry
