"""Scopes: adapter versions, the pointer to the one in use, and the audit of who moved it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from service.domain.feedback import BASE, Frozen
from service.domain.slow_weights import NAME, AdapterVersion, Scope
from service.errors import Conflict, InvalidRequest, NotFound
from service.store.connection import Connection
from service.store.counts import CountStore
from service.store.keys import BUCKETS, ScopeKeys, UserKeys, audit, base, scopes_index

# Moves the pointer. {'ok'} | {'moved', active}: somebody else moved it first | {'barred'}: the target may not be promoted |
# {'retired'}: its files are gone, or will be. `bar` is a version to bar, `lift` whether the target's own bar is lifted, `forget` whether
# the feedback that was looked at counts as new again.
MOVE = """#!lua
local scope, audit, shared, due = unpack(KEYS)
local target, expected, bar, lift, forget, shared_name, entry, due_member, at = unpack(ARGV)
local active = redis.call('HGET', scope, 'active') or 'base'
if active ~= expected then return {'moved', active} end
if redis.call('HEXISTS', scope, 'retired:' .. target) == 1 then return {'retired'} end
if lift == '1' then redis.call('HDEL', scope, 'barred:' .. target)
elseif redis.call('HEXISTS', scope, 'barred:' .. target) == 1 then return {'barred'} end
if bar ~= '' then redis.call('HSET', scope, 'barred:' .. bar, at) end
if forget == '1' then redis.call('HDEL', scope, 'attempted') end
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

# Marks versions as retired, but for the one in use; returns those that are retired now.
RETIRE = """#!lua
local retired = {}
for i = 2, #ARGV do
  if redis.call('HGET', KEYS[1], 'active') ~= ARGV[i] then
    redis.call('HSETNX', KEYS[1], 'retired:' .. ARGV[i], ARGV[1])
    table.insert(retired, ARGV[i])
  end
end
return retired
"""

REFUSED = {
    b"barred": "is barred since it was rolled back: promote it by name to lift that",
    b"retired": "is retired: its files were deleted, for newer versions had taken its place",
}
# A record is a few kilobytes: some tens of megabytes, read again when there are more.
CACHED_VERSIONS = 10_000


class AuditEntry(Frozen):
    """One move of a scope's pointer, or one setting: what its new users start from, how far its adapters may drift, its norms."""

    at: float
    action: Literal["promote", "rollback", "quarantine", "cold-start", "guidelines", "budgets", "norms"]
    tenant: str
    scope: str
    """Empty where the tenant as a whole is meant."""
    from_version: str | None = None
    """Of a pointer, as is `to_version`."""
    to_version: str | None = None
    actor: str
    """`admin` with the last four characters of the key, or `job` with its id."""
    reason: str = ""
    set_to: tuple[str, ...] = ()
    """Of a setting: `on` or `off`, the guidelines, the budgets, or the norms."""


@dataclass(frozen=True)
class ScopeState:
    """Where a scope stands."""

    active: str
    """The version in use, or `base`."""
    number: int
    """The highest number that a version of this scope was given."""
    barred: frozenset[str]
    retired: frozenset[str]
    """Versions that can't be used any more, for their files are deleted, or will be."""
    attempted: dict[str, int]
    """User id -> revision that the last consolidation, promoted or not, has looked at."""


class ScopeStore:
    """Reads and writes of the adapter versions of one tenant's scopes."""

    def __init__(self, connection: Connection) -> None:
        self._redis = connection
        self._counts = CountStore(connection)
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
            retired=frozenset(name.removeprefix("retired:") for name in fields if name.startswith("retired:")),
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
            Conflict: nothing to roll back, the target is barred, retired, of another base, in use or newer, or the pointer has just moved.
        """
        state = await self.state(scope, tenant=tenant)
        if state.active == BASE:
            raise Conflict(
                f"{scope} is served by the base model: there is nothing to roll back.", code="nothing_to_roll_back"
            )
        active = await self.version(state.active, scope, tenant=tenant)
        target = await self.previous(state, scope, tenant=tenant) if to is None else to
        if target == state.active:
            raise Conflict(f"'{target}' is the version in use.", param="to", code="already_in_use")
        if target != BASE:
            older = await self.version(target, scope, tenant=tenant)
            if older.number > active.number:
                raise Conflict(
                    f"'{target}' is newer than the version in use: promote it instead.", param="to", code="not_older"
                )
            await self._check_base(older)
        return await self._move(
            scope, "rollback", tenant=tenant, target=target, expected=state.active, bar=state.active, lift=False,
            actor=actor, reason=reason, now=now,
        )  # fmt: skip

    async def promote(self, scope: Scope, *, tenant: str, name: str, actor: str, reason: str, now: float) -> AuditEntry:
        """Move the pointer to a named version by an admin's decision, which lifts a bar.

        Raises:
            NotFound: no such version.
            Conflict: it is in use already, retired or of another base, or the pointer has just moved.
        """
        if name == BASE:
            raise InvalidRequest("Use rollback with to='base' to serve the base model again.", param="version")
        version = await self.version(name, scope, tenant=tenant)
        state = await self.state(scope, tenant=tenant)
        if state.active == name:
            raise Conflict(f"'{name}' is the version in use.", param="version", code="already_in_use")
        await self._check_base(version)
        return await self._move(
            scope, "promote", tenant=tenant, target=name, expected=state.active, bar="", lift=True,
            actor=actor, reason=reason, now=now,
        )  # fmt: skip

    async def quarantine(self, scope: Scope, *, tenant: str, actor: str, now: float) -> AuditEntry | None:
        """Serve the base instead of a version in use that was trained on another base than is served, and bar it; None if it is not so.

        The feedback that it had consolidated counts as unconsolidated again.

        Raises:
            NotFound: the version in use has no record.
            Conflict: the pointer has just moved.
        """
        active = (await self.state(scope, tenant=tenant)).active
        problem = await self._other_base(await self.version(active, scope, tenant=tenant)) if active != BASE else ""
        if not problem:
            return None
        return await self._move(
            scope, "quarantine", tenant=tenant, target=BASE, expected=active, bar=active, lift=False,
            actor=actor, reason=problem, now=now,
        )  # fmt: skip

    async def retire(self, names: Sequence[str], scope: Scope, *, tenant: str, now: float) -> list[str]:
        """Mark versions as retired, so that no pointer moves to them again; those that are, all but one in use.

        Their records stay. Their files may be deleted from now on.
        """
        if not names:
            return []
        retired = await self._redis.script(RETIRE, [ScopeKeys(scope, tenant=tenant).scope], now, *names)
        return [name.decode() for name in retired]

    async def note_base(self, model: str, sha256: str) -> None:
        """A worker has loaded this base model: adapters of others must not be served."""
        await self._redis.call("HSET", base(), "model", model, "sha256", sha256)

    async def audit(self, *, tenant: str, limit: int) -> list[AuditEntry]:
        """The last moves of a tenant's pointers, newest first."""
        pages = await self._redis.pipeline(
            [("XREVRANGE", audit(b, tenant), "+", "-", "COUNT", limit) for b in range(BUCKETS)]
        )
        entries = [AuditEntry.model_validate_json(fields[b"entry"]) for page in pages for _, fields in page]
        return sorted(entries, key=lambda entry: entry.at, reverse=True)[:limit]

    async def previous(self, state: ScopeState, scope: Scope, *, tenant: str) -> str:
        """Where a rollback goes: the nearest ancestor of the version in use that may serve, or the base."""
        name = state.active
        while name != BASE:
            version = await self.version(name, scope, tenant=tenant)
            if name not in {state.active, *state.barred, *state.retired} and not await self._other_base(version):
                break
            name = version.parent
        return name

    async def _other_base(self, version: AdapterVersion) -> str:
        """Why the base that is served now is not the version's own; nothing where it is, or where no worker has loaded one yet."""
        model, sha256 = await self._redis.call("HMGET", base(), "model", "sha256")
        if model is None or (model.decode(), sha256.decode()) == (version.base_model, version.base_sha256):
            return ""
        return (
            f"'{version.name}' was trained on {version.base_model} with SHA-256 {version.base_sha256[:12]}…, "
            f"and the base is {model.decode()} with {sha256.decode()[:12]}… now"
        )

    async def _check_base(self, version: AdapterVersion) -> None:
        if problem := await self._other_base(version):
            raise Conflict(f"{problem}: start a consolidation instead.", param="version", code="other_base")

    async def _move(
        self, scope: Scope, action: Literal["promote", "rollback", "quarantine"], *, tenant: str, target: str, expected: str, bar: str,
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
            "1" if action == "quarantine" else "0",
            "" if user_scope else str(scope),
            entry.model_dump_json(),
            UserKeys(tenant=tenant, user=scope.name).member if user_scope else "",
            now,
        )
        if outcome == b"moved":
            where = rest[0].decode()
            raise Conflict(f"The pointer of {scope} has just moved to '{where}': look again.", code="pointer_moved")
        if outcome != b"ok":
            raise Conflict(f"'{target}' {REFUSED[outcome]}.", code=f"version_{outcome.decode()}")
        await self._counts.add("move", action)
        return entry
