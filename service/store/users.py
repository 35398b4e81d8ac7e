"""Users: interactions, the log of feedback, the cached fold of it."""

from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import TypeAdapter

from service.domain.events import Event
from service.domain.fast_weights import FastWeights
from service.domain.feedback import FeedbackEvent, Interaction, Message
from service.domain.slow_weights import Scope
from service.errors import Conflict, NotFound
from service.store.connection import Connection
from service.store.folds import Folds
from service.store.keys import BUCKETS, UserKeys, own_scope, shared_adapters, user_keys, users_index
from service.store.lane import Command
from service.store.logs import Logs, UserHistory

# Appends the event, brings the cached fold up to it and, of a feedback, the interaction's standing signals; marks the user as due for
# consolidation (a feedback does), for optimization (or as settled), and for the archive where the log is long; remembers the idempotency
# key. A cached fold that is not the one of which parts stay goes: the log is folded again when it is wanted.
# {'ok'} | {'replayed', receipt}: the key was used | {'conflict'}: the log has moved on | {'expired'}: the interaction is gone.
# With Redis full no new interactions are stored, but what users say of those that are is: it is little beside them, and said once.
APPEND = """#!lua flags=allow-oom
local log, state, who, due, optimize, long, users, idem, interaction = unpack(KEYS)
local revision, event, stays, stamp, state_ttl, member, user, at, optimize_at, most, receipt, idem_ttl, snapshot = unpack(ARGV, 1, 13)
if receipt ~= '' then
  local before = redis.call('GET', idem)
  if before then return {'replayed', before} end
end
local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)
local head = #last > 0 and tonumber(string.match(last[1][1], '^%d+')) or 0
if head + 1 ~= tonumber(revision) then return {'conflict'} end
if interaction then
  if redis.call('EXISTS', interaction) == 0 then return {'expired'} end
  redis.call('SET', interaction, snapshot, 'KEEPTTL')
  redis.call('ZADD', due, 'NX', at, member)
end
redis.call('XADD', log, revision .. '-0', 'event', event)
redis.call('HSET', who, 'head', stamp)
local there = redis.call('HGET', state, 'stamp') == stays
if not there then redis.call('DEL', state) end
if there or stays == '' then
  redis.call('HSET', state, 'stamp', stamp, unpack(ARGV, 14))
  redis.call('EXPIRE', state, state_ttl)
end
if optimize_at == '' then redis.call('ZREM', optimize, member) else redis.call('ZADD', optimize, optimize_at, member) end
if redis.call('XLEN', log) > tonumber(most) then redis.call('ZADD', long, 'NX', at, member) end
redis.call('ZADD', users, at, user)
if receipt ~= '' then redis.call('SET', idem, receipt, 'EX', idem_ttl) end
return {'ok'}
"""

# Keeps the answer to an idempotency key, as APPEND does.
REMEMBER = """#!lua flags=allow-oom
redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2])
return 1
"""


@dataclass(frozen=True)
class ChatState:
    """What a chat needs to know of its user."""

    fast_weights: FastWeights
    cohort: str | None
    adapters: tuple[tuple[Scope, str], ...]
    """Versions in use that may serve this user, most specific first."""


@dataclass(frozen=True)
class FeedbackInputs:
    """What a feedback needs to know before it is applied."""

    interaction: Interaction | None
    other: Interaction | None
    fast_weights: FastWeights
    receipt: bytes | None
    """What was answered to this idempotency key before."""


class UserStore:
    """Reads and writes of one user's data. Every method names tenant and user, so none can reach across."""

    def __init__(self, connection: Connection, *, state_cache_seconds: int, log_most_events: int) -> None:
        self._redis = connection
        self._state_seconds = state_cache_seconds
        self._log_most_events = log_most_events
        self._logs = Logs(connection)
        self.folds = Folds(connection, self._logs, seconds=state_cache_seconds)

    async def chat_state(self, *, tenant: str, user: str) -> ChatState:
        """The fast weights and the versions in use, in one round trip (more where others wrote the fold, or it must be rebuilt)."""
        keys = user_keys(tenant=tenant, user=user)
        head, (cohort, own_adapter, shared) = await self.folds.read(
            keys,
            ("HGET", keys.user, "cohort"),
            ("HGET", own_scope(tenant=tenant, user=user), "active"),
            ("HGETALL", shared_adapters(tenant)),
        )
        fast_weights, _ = await self.folds.at(head, keys)
        cohort_name = cohort.decode() if cohort else None
        return ChatState(
            fast_weights=fast_weights,
            cohort=cohort_name,
            adapters=_in_use(user, cohort_name, own_adapter, shared) if own_adapter or shared else (),
        )

    async def fast_weights(self, *, tenant: str, user: str) -> FastWeights:
        """The user's fast weights, from the cache or by folding the log."""
        keys = UserKeys(tenant=tenant, user=user)
        head, _ = await self.folds.read(keys)
        found, _ = await self.folds.at(head, keys)
        return found

    async def record(self, interaction: Interaction, *, retention_seconds: int) -> None:
        """Keep an interaction for as long as it may be given feedback."""
        key = user_keys(tenant=interaction.tenant, user=interaction.user).interaction(interaction.id)
        await self._redis.brief(("SET", key, _as_json(interaction), "EX", retention_seconds))

    async def feedback_inputs(
        self, interaction_id: str, *, tenant: str, user: str, other_id: str | None, idempotency_key: str | None
    ) -> FeedbackInputs:
        """Everything that one feedback is computed from, in one round trip (more where others wrote the fold, or it must be rebuilt).

        The interaction is read after the fast weights: what came in between makes `append` refuse, for the log has moved on.
        """
        keys = user_keys(tenant=tenant, user=user)
        reads: list[Command] = [("GET", keys.interaction(interaction_id))]
        if other_id is not None:
            reads.append(("GET", keys.interaction(other_id)))
        if idempotency_key is not None:
            reads.append(("GET", keys.idempotency(idempotency_key)))
        head, (found, *more) = await self.folds.read(keys, *reads)
        fast_weights, later = await self.folds.at(head, keys)
        if later:
            found = await self._redis.call("GET", keys.interaction(interaction_id))
        other = more.pop(0) if other_id is not None else None
        return FeedbackInputs(
            interaction=_PARSED.validate_json(found) if found else None,
            other=_PARSED.validate_json(other) if other else None,
            fast_weights=fast_weights,
            receipt=more[0] if more else None,
        )

    async def append(
        self,
        event: Event,
        after: FastWeights,
        *,
        tenant: str,
        user: str,
        optimize_at: float | None,
        idempotency_key: str | None = None,
        receipt: bytes = b"",
        idempotency_seconds: int = 60,
    ) -> bytes | None:
        """Append one event and all that follows from it, in one atomic step.

        Args:
            after: the fast weights with the event folded in.
            optimize_at: when the user's contexts should be optimized, seconds since the epoch; None if there is no need.
            receipt: what to answer to a retry with the same idempotency key.

        Returns:
            None if the event was appended, else the receipt of an earlier request with the same idempotency key.

        Raises:
            Conflict: another event came first; read again and retry.
            NotFound: the interaction has expired meanwhile.
        """
        keys = user_keys(tenant=tenant, user=user)
        names = [keys.log, keys.state, keys.user, keys.due, keys.optimize, keys.long, keys.users]
        names.append(keys.idempotency(idempotency_key or ""))
        cached = self.folds.write(after, keys)
        args: list[str | bytes | int | float] = [
            event.revision,
            event.model_dump_json(),
            cached.stays,
            cached.stamp,
            self._state_seconds,
            keys.member,
            user,
            event.at,
            "" if optimize_at is None else optimize_at,
            self._log_most_events,
            receipt if idempotency_key else b"",
            idempotency_seconds,
        ]
        if isinstance(event, FeedbackEvent):
            names.append(keys.interaction(event.interaction.id))
            args.append(_as_json(event.interaction))
        else:
            args.append("")
        outcome, *rest = await self._redis.script(APPEND, names, *args, *cached.fields)
        if outcome == b"conflict":
            raise Conflict("Other feedback of this user came first.", code="log_moved_on")
        if outcome == b"expired":
            raise NotFound("The interaction has expired.")
        if outcome == b"ok":
            self.folds.written(cached, keys)
        return rest[0] if rest else None

    async def receipt(self, *, tenant: str, user: str, idempotency_key: str | None) -> bytes | None:
        """What was answered to this idempotency key before."""
        if idempotency_key is None:
            return None
        receipt: bytes | None = await self._redis.call(
            "GET", UserKeys(tenant=tenant, user=user).idempotency(idempotency_key)
        )
        return receipt

    async def remember(self, *, tenant: str, user: str, idempotency_key: str, receipt: bytes, seconds: int) -> None:
        """Keep the answer to a feedback that changed nothing, so that its key can't be used with another body."""
        key = UserKeys(tenant=tenant, user=user).idempotency(idempotency_key)
        await self._redis.script(REMEMBER, [key], receipt, seconds)

    async def confirm(self, *, tenant: str, user: str) -> None:
        """What was written of a user is where the settings want it before it is acknowledged.

        Raises:
            StoreUnavailable: too few replicas have it, in time. It stays written.
        """
        await self._redis.confirm(user_keys(tenant=tenant, user=user).confirm)

    async def log(self, *, tenant: str, user: str, after: int = 0) -> UserHistory:
        """The user's log past revision `after`, or past the archived events where those reach further."""
        return (await self._logs.read(UserKeys(tenant=tenant, user=user))).past(after)

    async def events(self, *, tenant: str, user: str, after: int = 0) -> list[Event]:
        """The user's log past revision `after`; archived events are not in it."""
        return await self._logs.events(UserKeys(tenant=tenant, user=user), after=after)

    async def feedback_after(self, revision: int, *, tenant: str, user: str) -> int:
        """How many feedbacks the user's log has past a revision; edits and optimizations are none."""
        return sum(isinstance(e, FeedbackEvent) for e in await self.events(tenant=tenant, user=user, after=revision))

    async def set_cohort(self, cohort: str | None, *, tenant: str, user: str) -> None:
        """Put a user into a cohort, or in none."""
        key = UserKeys(tenant=tenant, user=user).user
        await (self._redis.call("HSET", key, "cohort", cohort) if cohort else self._redis.call("HDEL", key, "cohort"))

    async def cohort(self, *, tenant: str, user: str) -> str | None:
        cohort = await self._redis.call("HGET", UserKeys(tenant=tenant, user=user).user, "cohort")
        return cohort.decode() if cohort else None

    async def users(self, *, tenant: str) -> list[str]:
        """Every user of a tenant that ever gave feedback."""
        pages = await self._redis.pipeline([("ZRANGE", users_index(b, tenant), 0, -1) for b in range(BUCKETS)])
        return [user.decode() for page in pages for user in page]


def _in_use(
    user: str, cohort: str | None, own: bytes | None, shared: dict[bytes, bytes]
) -> tuple[tuple[Scope, str], ...]:
    """Versions that may serve a user, most specific first.

    Args:
        own: of the user's own scope.
        shared: scope -> version, of the tenant's cohorts and its global scope.
    """
    scopes = [Scope(kind="user", name=user)]
    scopes += ([Scope(kind="cohort", name=cohort)] if cohort else []) + [Scope(kind="global")]
    found = [own, *(shared.get(str(scope).encode()) for scope in scopes[1:])]
    return tuple((scope, name.decode()) for scope, name in zip(scopes, found, strict=True) if name)


_PARSED = TypeAdapter(Interaction)


def _as_json(interaction: Interaction) -> bytes:
    """As pydantic writes it, in half of the time: every chat is recorded."""
    return orjson.dumps(vars(interaction), default=_fields, option=orjson.OPT_PASSTHROUGH_DATACLASS)


def _fields(value: object) -> dict[str, Any]:
    return value.sent() if isinstance(value, Message) else vars(value)
