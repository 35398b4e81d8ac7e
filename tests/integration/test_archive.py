"""Long logs over real Redis: their oldest events go into files and leave their fold, whatever happens in between."""

import asyncio
import gzip
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from service.domain.fast_weights import MAX_EXEMPLARS, MAX_GUIDELINES, FastWeights, Snapshot
from service.domain.fold import fold
from service.settings import Settings
from service.store import Store
from service.store.archives import ArchiveStore
from service.store.connection import Connection
from service.store.keys import UserKeys
from tests.factories import ALICE, give_feedback
from tests.folds import lose_fold
from workers.archive import archive_logs, archived, published
from workers.runner import gather

KEEP = 10
LONG_LIFE = 800
"""Feedbacks: several times what the fast weights have room for."""
KEYS = UserKeys(tenant="acme", user="alice")
NOW = 1e6
"""Later than all that was said."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_keep_events": KEEP})


@pytest.fixture
def folder(settings: Settings) -> Path:
    return settings.archive / KEYS.folder


async def state(store: Store) -> FastWeights:
    return await store.users.fast_weights(tenant="acme", user="alice")


async def length(store: Store) -> int:
    return await store.archives.length(tenant="acme", user="alice")


async def everything(store: Store, folder: Path) -> FastWeights:
    """The fold of all events there ever were, from the files and the log."""
    return fold([*archived(folder), *await store.users.events(tenant="acme", user="alice")])


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def put(path: Path, content: bytes | None) -> None:
    """Spoil a file, or take it away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


async def refolded(store: Store, redis_url: str) -> FastWeights:
    lose_fold(redis_url)
    return await state(store)


async def test_a_log_over_twice_its_length_leaves_its_oldest_events_to_the_archive(
    store: Store, settings: Settings, folder: Path, redis_url: str
) -> None:
    for n in range(1, 2 * KEEP + 1):
        await give_feedback(store, n)
    assert await archive_logs(store, settings, now=NOW) == 0
    await give_feedback(store, 2 * KEEP + 1)
    before = await state(store)

    assert await archive_logs(store, settings, now=NOW) == 1

    assert list(files(folder)) == [f"1-{KEEP}.jsonl.gz"]
    assert [event.revision for event in archived(folder)] == list(range(1, KEEP + 1))
    assert await length(store) == KEEP + 1
    assert before == await state(store) == await refolded(store, redis_url) == await everything(store, folder)
    assert await store.archives.due(most=1) == []


async def test_a_tick_does_no_more_than_it_may_and_the_next_goes_on(store: Store, settings: Settings) -> None:
    for n in range(1, 5 * KEEP + 1):
        await give_feedback(store, n)
    for user in ("bob", "alice"):
        await give_feedback(store, 1 if user == "bob" else 5 * KEEP + 1, user=user)
    assert await archive_logs(store, settings, now=NOW, most_parts=1) == 1
    assert await length(store) == 4 * KEEP + 1
    assert await archive_logs(store, settings, now=NOW) == 3
    assert await length(store) == KEEP + 1


class Dying(ArchiveStore):
    """A worker's store that dies before the log is touched."""

    async def replace(self, *_: Any, **__: Any) -> bool:
        raise asyncio.CancelledError


async def test_a_worker_that_dies_before_the_log_is_trimmed_costs_nothing(
    store: Store, settings: Settings, folder: Path, redis_url: str
) -> None:
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n)
    alive, store.archives = store.archives, Dying(store.connection)
    with pytest.raises(asyncio.CancelledError):
        await archive_logs(store, settings, now=NOW)
    store.archives = alive
    left = files(folder)
    assert await length(store) == 2 * KEEP + 1
    await give_feedback(store, 2 * KEEP + 2)

    await archive_logs(store, settings, now=NOW)

    assert files(folder) == left
    assert await length(store) == KEEP + 2
    assert await refolded(store, redis_url) == await everything(store, folder)


async def test_two_workers_at_once_archive_each_event_once(
    store: Store, settings: Settings, folder: Path, redis_url: str
) -> None:
    for n in range(1, 4 * KEEP + 1):
        await give_feedback(store, n)
    await asyncio.gather(*(archive_logs(store, settings, now=NOW) for _ in range(3)))
    assert await length(store) == 2 * KEEP
    assert [event.revision for event in archived(folder)] == list(range(1, 2 * KEEP + 1))
    assert await refolded(store, redis_url) == await everything(store, folder)


async def test_a_worker_that_comes_late_changes_nothing(store: Store, settings: Settings) -> None:
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n)
    early = Snapshot(state=(await store.users.log(tenant="acme", user="alice", after=3)).start)
    await archive_logs(store, settings, now=NOW)
    before = await store.archives.snapshot(tenant="acme", user="alice")

    assert not await store.archives.replace(early, first=1, stale=True, tenant="acme", user="alice")

    assert await store.archives.snapshot(tenant="acme", user="alice") == before
    assert await length(store) == KEEP + 1


def test_a_file_that_is_not_what_was_written_is_not_published(tmp_path: Path) -> None:
    def publish_spoilt() -> None:
        with published(tmp_path / "1-1.jsonl.gz") as add:
            add(b'{"kind": "feedback"}')
            [aside] = tmp_path.iterdir()
            put(aside, gzip.compress(b"{}\n"))

    with pytest.raises(ValueError, match="not what was written"):
        publish_spoilt()
    assert list(tmp_path.iterdir()) == []


async def test_feedback_that_arrives_while_a_log_is_trimmed_is_all_there(
    store: Store, settings: Settings, folder: Path, redis_url: str
) -> None:
    async def speak() -> None:
        for n in range(1, 6 * KEEP + 1):
            await give_feedback(store, n)

    speaking = asyncio.create_task(speak())
    while not speaking.done():
        await archive_logs(store, settings, now=NOW)
    await speaking
    await archive_logs(store, settings, now=NOW)

    assert KEEP <= await length(store) <= 2 * KEEP
    now = await state(store)
    assert now.clock == now.revision == 6 * KEEP
    assert now == await refolded(store, redis_url) == await everything(store, folder)


class Slow(Connection):
    """A connection on which the log is trimmed after the snapshot was read, once."""

    def __init__(self, settings: Settings, store: Store) -> None:
        super().__init__(settings.effective_redis_url, timeout_seconds=settings.redis_timeout_seconds)
        self._settings, self._store = settings, store

    async def call(self, *command: str | bytes | int | float) -> Any:
        reply = await super().call(*command)
        if command == ("GET", KEYS.snapshot):
            await archive_logs(self._store, self._settings, now=NOW)
        return reply


async def test_a_log_that_is_trimmed_while_it_is_read_is_read_again(store: Store, settings: Settings) -> None:
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n)
    expected = await state(store)
    slow = Store(Slow(settings, store), settings)
    history = await slow.users.log(tenant="acme", user="alice")
    await slow.close()
    assert (history.start.revision, len(history.events)) == (KEEP, KEEP + 1)
    assert history.fold() == expected


async def test_a_log_is_read_from_any_revision_that_is_left(store: Store, settings: Settings) -> None:
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n)
    await archive_logs(store, settings, now=NOW)
    for after, start in ((0, KEEP), (KEEP, KEEP), (KEEP + 3, KEEP + 3), (100, 2 * KEEP + 1)):
        history = await store.users.log(tenant="acme", user="alice", after=after)
        assert history.start.revision == start
        assert history.fold() == await state(store)


async def test_feedback_is_retracted_exactly_when_its_event_is_long_archived(
    client: httpx.AsyncClient, store: Store, settings: Settings, folder: Path, redis_url: str
) -> None:
    async def chat() -> str:
        body = {"model": settings.model_name, "messages": [{"role": "user", "content": "What is a noun?"}]}
        return str((await client.post("/v1/chat/completions", json=body)).json()["id"])

    async def give(interaction: str, **signals: object) -> None:
        response = await client.post("/v1/feedback", json={"interaction_id": interaction, **signals})
        assert response.status_code == 200, response.text

    async def said() -> list[str]:
        listed = (await client.get("/v1/users/alice/context")).json()["items"]
        return [item["text"] or item["reply"] for item in listed]

    first = await chat()
    await give(first, comment="Answer in rhymes.", correction="A naming word.", rating=-1)
    for n in range(2 * KEEP):
        await give(await chat(), rating=n % 2 == 0)
    await archive_logs(store, settings, now=NOW)
    assert next(archived(folder)).interaction.id == first
    assert await said() == ["Answer in rhymes.", "A naming word."]

    await give(first, comment=None, correction=None, rating=None)

    assert await said() == []
    assert await state(store) == await refolded(store, redis_url) == await everything(store, folder)


async def test_a_consolidation_works_on_what_the_log_still_has_and_on_all_of_the_fold(
    store: Store, settings: Settings
) -> None:
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n)
    await archive_logs(store, settings, now=NOW)
    job, _ = await store.jobs.open(ALICE, tenant="acme", unique="1", now=0.0)

    log = (await gather(job, store)).users["alice"]

    assert [i.id for i in log.interactions] == [f"chatcmpl-alice-{n}" for n in range(KEEP + 1, 2 * KEEP + 2)]
    assert (log.head, log.fast_weights) == (2 * KEEP + 1, await state(store))
    assert await store.users.feedback_after(0, tenant="acme", user="alice") == KEEP + 1


async def archived_under_older_rules(store: Store, settings: Settings, redis_url: str) -> FastWeights:
    """Alice's fast weights after a long log, whose snapshot is now of an older fold that knew no guidelines."""
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n)
    await archive_logs(store, settings, now=NOW)
    right = await state(store)
    snapshot = await store.archives.snapshot(tenant="acme", user="alice")
    assert snapshot is not None
    older = Snapshot(fold=1, state=snapshot.state.model_copy(update={"guidelines": {}}))
    with Redis.from_url(redis_url) as redis:
        redis.set(KEYS.snapshot, older.model_dump_json())
    lose_fold(redis_url)
    return right


async def test_a_snapshot_of_older_rules_serves_until_a_worker_has_folded_the_archive_anew(
    store: Store, settings: Settings, redis_url: str
) -> None:
    right = await archived_under_older_rules(store, settings, redis_url)
    assert len((await state(store)).guidelines) == KEEP + 1
    assert await store.archives.due(most=1) == [("acme", "alice")]

    await archive_logs(store, settings, now=NOW)

    assert await state(store) == right
    assert await store.archives.due(most=1) == []


@pytest.mark.parametrize("spoilt", [b"", b"not gzip", None])
async def test_a_snapshot_of_older_rules_stays_where_the_archive_can_not_be_read(
    store: Store, settings: Settings, folder: Path, redis_url: str, spoilt: bytes | None
) -> None:
    await archived_under_older_rules(store, settings, redis_url)
    put(folder / f"1-{KEEP}.jsonl.gz", spoilt)
    before = await state(store)
    await archive_logs(store, settings, now=NOW)
    snapshot = await store.archives.snapshot(tenant="acme", user="alice")
    assert (snapshot is not None and snapshot.fold, await state(store)) == (1, before)


async def test_an_archive_that_can_not_be_written_leaves_the_log_whole_and_the_others_are_done(
    store: Store, settings: Settings, folder: Path
) -> None:
    put(folder, b"in the way")
    for user in ("alice", "bob"):
        for n in range(1, 2 * KEEP + 2):
            await give_feedback(store, n, user=user)
    assert await archive_logs(store, settings, now=NOW) == 1
    assert await length(store) == 2 * KEEP + 1
    assert await store.archives.due(most=9) == [("acme", "alice")]
    assert (await store.counts.read())["undone", "archive"] == 1


def put_log_of_no_events(redis_url: str) -> None:
    """In the place of alice's, as none of ours writes it; longest due."""
    with Redis.from_url(redis_url) as redis:
        for n in range(1, 2 * KEEP + 2):
            redis.xadd(KEYS.log, {"nothing": "of ours"}, id=f"{n}-0")
        redis.zadd(KEYS.long, {KEYS.member: 0})


async def test_a_log_that_fails_as_nobody_foresaw_is_named_and_keeps_no_other_long(
    store: Store, settings: Settings, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    put_log_of_no_events(redis_url)
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n, user="bob")

    assert await archive_logs(store, settings, now=NOW) == 1

    assert await store.archives.due(most=9) == [("acme", "alice")]
    assert "the log of alice of acme stays long" in caplog.text
    assert (await store.counts.read())["undone", "archive"] == 1


async def test_logs_that_fail_at_each_tick_do_not_take_all_places(
    store: Store, settings: Settings, redis_url: str
) -> None:
    put_log_of_no_events(redis_url)
    for n in range(1, 2 * KEEP + 2):
        await give_feedback(store, n, user="bob")
    assert [await archive_logs(store, settings, now=NOW + tick, most_parts=1) for tick in (1, 2)] == [0, 1]


async def test_what_redis_holds_of_a_user_does_not_grow_with_their_history(
    store: Store, settings: Settings, redis_url: str, folder: Path
) -> None:
    for n in range(1, LONG_LIFE + 1):
        await give_feedback(store, n)
        if n % KEEP == 0:
            await archive_logs(store, settings, now=NOW)
    now = await state(store)
    assert now.clock == LONG_LIFE
    assert (len(now.guidelines), len(now.exemplars)) == (MAX_GUIDELINES, MAX_EXEMPLARS)
    assert await length(store) <= 2 * KEEP
    with Redis.from_url(redis_url) as redis:
        held = {key: redis.memory_usage(key, samples=0) or 0 for key in (KEYS.log, KEYS.state, KEYS.snapshot)}
    assert sum(held.values()) < 400_000, held
    assert await everything(store, folder) == now
