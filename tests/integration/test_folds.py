"""Cached folds and the processes that know them: gateways that take turns, another version's gateway, a cache that goes."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis import Redis

from service.domain.fast_weights import FastWeights
from service.domain.fold import fold
from service.settings import Settings
from service.store import Store, open_store, users
from service.store.keys import UserKeys
from tests.factories import give_feedback

WHO = {"tenant": "acme", "user": "alice"}
KEYS = UserKeys(**WHO)


@pytest_asyncio.fixture
async def other(settings: Settings) -> AsyncIterator[Store]:
    """Another process's."""
    store = open_store(settings)
    yield store
    await store.close()


async def known(store: Store) -> FastWeights:
    found = await store.users.fast_weights(**WHO)
    assert found == fold(await store.users.events(**WHO))
    return found


async def test_processes_that_take_turns_see_each_others_feedback(store: Store, other: Store) -> None:
    for n, writer in enumerate([store, store, other, store, other, other, store], start=1):
        await give_feedback(writer, n)
        for reader in (store, other):
            assert (await known(reader)).revision == n


async def test_fast_weights_that_have_not_changed_are_not_read_again(
    store: Store, other: Store, redis_url: str
) -> None:
    for n in (1, 2):
        await give_feedback(store, n)
    first = await known(other)
    with Redis.from_url(redis_url) as redis:
        redis.hset(KEYS.state, "guidelines", "spoilt, if anybody looked")
    assert await known(store) == first
    assert await known(other) is first


async def test_a_feedback_writes_what_it_changed(store: Store, redis_url: str) -> None:
    await give_feedback(store, 1)
    with Redis.from_url(redis_url) as redis:
        before = redis.hgetall(KEYS.state)
        redis.hset(KEYS.state, "credits", "left as it is")
        await give_feedback(store, 2)
        after = redis.hgetall(KEYS.state)
    assert {name for name in after if after[name] != before.get(name)} == {
        b"stamp",
        b"rest",
        b"guidelines",
        b"exemplars",
        b"credits",
    }
    assert after[b"credits"] == b"left as it is"


async def test_a_process_of_another_version_may_write_meanwhile(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await give_feedback(store, 1)
    await known(other)

    class OtherKeys(UserKeys):
        """Its folds lie elsewhere, for it has other rules of folding."""

        def __init__(self, *, tenant: str, user: str) -> None:
            super().__init__(tenant=tenant, user=user)
            self.state += "-other"

    for n in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(users, "UserKeys", OtherKeys)
            patch.setattr(users, "user_keys", OtherKeys)
            await give_feedback(other, n)
        assert (await known(store)).revision == n
        await give_feedback(store, n + 1)
        with monkeypatch.context() as patch:
            patch.setattr(users, "UserKeys", OtherKeys)
            assert (await known(other)).revision == n + 1


async def test_a_cache_that_expired_is_no_ones_loss(store: Store, other: Store, redis_url: str) -> None:
    await give_feedback(store, 1)
    with Redis.from_url(redis_url) as redis:
        redis.delete(KEYS.state)
        await give_feedback(store, 2)
        # Only a part was written, and there was nothing for it to be a part of.
        assert redis.exists(KEYS.state) == 0
        assert (await known(store)).revision == 2
        assert (await known(other)).revision == 2
        assert redis.exists(KEYS.state) == 1
        await give_feedback(store, 3)
        assert redis.exists(KEYS.state) == 1
    assert (await known(other)).revision == 3


async def test_a_log_from_before_there_were_heads_is_folded_once(
    store: Store, other: Store, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await give_feedback(store, 1)
    with Redis.from_url(redis_url) as redis:
        redis.delete(KEYS.state, KEYS.user)
    rebuilt: list[float] = []
    for each in (store, other):
        each.users.folds.on_rebuild = rebuilt.append
    for _ in range(2):
        assert (await known(store)).revision == (await known(other)).revision == 1
    assert len(rebuilt) == 1
