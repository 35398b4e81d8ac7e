"""The users of a scope, many at a time, for work in the background."""

from collections.abc import AsyncIterator, Sequence

from service.domain.fast_weights import FastWeights, Snapshot
from service.domain.slow_weights import Scope
from service.store.connection import Connection
from service.store.keys import UserKeys
from service.store.states import parsed, whole
from service.store.users import UserStore

# Users in one round trip: a fold may have a hundred kilobytes, and a gateway that reads many serves chats meanwhile.
AT_ONCE = 25


class MemberStore:
    """Reads over users of one tenant."""

    def __init__(self, connection: Connection, users: UserStore) -> None:
        self._redis = connection
        self._users = users

    async def of(self, scope: Scope, *, tenant: str) -> list[str]:
        """Whom the scope's adapter may serve."""
        if scope.kind == "user":
            return [scope.name]
        users = await self._users.users(tenant=tenant)
        if scope.kind == "global":
            return users
        cohorts = await self.cohorts(users, tenant=tenant)
        return [user for user, cohort in zip(users, cohorts, strict=True) if cohort == scope.name]

    async def cohorts(self, users: Sequence[str], *, tenant: str) -> list[str | None]:
        """Each user's cohort."""
        found: list[bytes | None] = []
        for chunk in _chunks(users):
            found += await self._redis.pipeline(
                [("HGET", UserKeys(tenant=tenant, user=user).user, "cohort") for user in chunk]
            )
        return [cohort.decode() if cohort else None for cohort in found]

    async def folds(self, users: Sequence[str], *, tenant: str) -> AsyncIterator[tuple[str, FastWeights]]:
        """Each user's fast weights as they are cached, else by the last snapshot; who has neither is left out, for no log is read."""
        for chunk in _chunks(users):
            keys = [UserKeys(tenant=tenant, user=user) for user in chunk]
            states = await self._redis.pipeline([whole(key.state) for key in keys])
            for user, key, state in zip(chunk, keys, states, strict=True):
                if state[0] is not None:
                    yield user, parsed(state)
                elif snapshot := await self._redis.call("GET", key.snapshot):
                    yield user, Snapshot.model_validate_json(snapshot).state


def _chunks(users: Sequence[str]) -> list[Sequence[str]]:
    return [users[n : n + AT_ONCE] for n in range(0, len(users), AT_ONCE)]
