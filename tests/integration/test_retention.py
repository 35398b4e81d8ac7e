"""Old adapter versions over real Redis and a folder: marked, evicted from every replica, deleted, in this order."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from redis import Redis

from service.domain.feedback import BASE
from service.domain.slow_weights import AdapterVersion, Scope
from service.errors import EngineUnavailable
from service.settings import Settings
from service.store import Store, open_store
from service.store.keys import ScopeKeys
from tests.factories import ALICE, give_feedback, one_by_one, outcome_of
from tests.fakes import FakeVllm
from tests.jobs import Trainer, active, opened, run, user
from tests.s3_server import BUCKET, s3_server
from workers.adapter_store import adapter_store
from workers.consolidation.work import Outcome, Work
from workers.files import ASIDE
from workers.retention import AT_ONCE, replicas, retire_old, superseded

NOBODY_THERE = "http://127.0.0.1:9"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"versions_kept": 2})


def publishing(settings: Settings) -> Callable[[Work], Outcome]:
    """Trains versions whose folders lie in the adapter store, each with weights of its own."""

    def make(work: Work) -> Outcome:
        outcome = outcome_of(work, content=f"{work.number:02d}")
        assert outcome.version is not None
        publish(settings, outcome.version)
        return outcome

    return make


def publish(settings: Settings, version: AdapterVersion) -> None:
    """Into whichever store."""
    adapters = adapter_store(settings)
    folder = adapters.work / f"{ASIDE}{version.name}"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(version.model_dump_json())
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    adapters.put(folder, version.name)


async def promoted(
    store: Store, settings: Settings, vllm: FakeVllm, *, versions: int, scope: Scope = ALICE
) -> list[str]:
    """Names of so many versions of a user's own scope, each trained on the one before, the last in use."""
    trainer, names = Trainer(vllm, publishing(settings)), []
    await give_feedback(store, 1, user=scope.name)
    for _ in range(versions):
        ended = await run(await opened(store, scope), store, settings, trainer)
        assert ended.version is not None
        names.append(ended.version)
    return names


async def tick(store: Store, settings: Settings) -> list[str]:
    async with replicas(settings) as evict:
        return await retire_old(store, settings, evict=evict, now=time.time())


def half_deleted(folder: Path) -> None:
    """What a worker leaves behind that dies while it deletes."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"half")


def on_disk(settings: Settings) -> list[str]:
    return sorted(folder.name for folder in settings.adapter_store_dir.iterdir())


async def test_versions_that_newer_ones_have_replaced_are_evicted_and_deleted(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=6)

    deleted = await tick(store, settings)

    # In use, where a rollback goes, and two more.
    assert (deleted, vllm.evicted) == (names[:2], names[:2])
    assert on_disk(settings) == sorted(names[2:])
    assert await tick(store, settings) == []


async def test_a_retired_version_can_not_serve_again_and_its_record_stays(
    client: httpx.AsyncClient, as_admin: dict[str, str], store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=5)
    await tick(store, settings)
    path = "/v1/admin/scopes/user:alice"

    refused = [
        await client.post(f"{path}/promote", json={"version": names[0], "reason": "r"}, headers=as_admin),
        await client.post(f"{path}/rollback", json={"to": names[0], "reason": "r"}, headers=as_admin),
    ]
    listed = (await client.get("/v1/admin/adapters", headers=as_admin)).json()["data"]

    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(409, "version_retired")] * 2
    assert "its files were deleted" in refused[0].json()["error"]["message"]
    assert [(v["name"], v["retired"], v["in_use"]) for v in listed] == [
        (name, name == names[0], name == names[-1]) for name in names
    ]
    assert (await client.get(f"/v1/admin/adapters/{names[0]}", headers=as_admin)).json()["retired"] is True


async def test_rollbacks_go_back_as_far_as_versions_are_kept_and_then_to_the_base(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=5)
    await tick(store, settings)
    went = []
    while await active(store) != BASE:
        entry = await store.scopes.rollback(ALICE, tenant="acme", to=None, actor="a", reason="r", now=1.0)
        went.append(entry.to_version)
        await tick(store, settings)
    assert went == [*names[3:0:-1], BASE]
    assert on_disk(settings) == names[3:]


async def test_nothing_is_deleted_while_a_replica_is_away_and_all_of_it_when_it_is_back(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=6)
    away = settings.model_copy(update={"vllm_replica_urls": (vllm.url, NOBODY_THERE)})

    assert await tick(store, away) == []
    assert on_disk(settings) == sorted(names)
    assert (await store.scopes.state(ALICE, tenant="acme")).retired == set(names[:2])

    assert await tick(store, settings.model_copy(update={"vllm_replica_urls": (vllm.url, f"{vllm.url}/")})) == names[:2]
    assert on_disk(settings) == sorted(names[2:])


async def test_a_version_that_a_replica_fails_to_evict_keeps_no_other(
    store: Store, settings: Settings, vllm: FakeVllm, caplog: pytest.LogCaptureFixture
) -> None:
    names = await promoted(store, settings, vllm, versions=AT_ONCE + 6)
    *old, _, _, _, _ = names
    vllm.kept.add(old[0])

    assert await tick(store, settings) == old[1:]

    assert on_disk(settings) == sorted({*names} - {*old[1:]})
    assert f"{old[0]} is retired and stays, for it can't be evicted: {vllm.url} answers 500: the engine" in caplog.text
    assert (await store.counts.read())["undone", "retention"] == 1
    vllm.kept.clear()
    assert await tick(store, settings) == old[:1]


@pytest.mark.parametrize("error", [EngineUnavailable("it hangs"), RuntimeError("nobody foresaw it")])
async def test_an_eviction_that_hangs_or_breaks_keeps_no_other_version(
    store: Store, settings: Settings, vllm: FakeVllm, error: Exception
) -> None:
    old = (await promoted(store, settings, vllm, versions=AT_ONCE + 6))[:-4]

    async def evict(name: str) -> bool:
        if name == old[0]:
            raise error
        return True

    assert await retire_old(store, settings, evict=evict, now=time.time()) == old[1:]
    assert (await store.counts.read())["undone", "retention"] == 1


async def test_a_version_that_replies_in_flight_still_read_stays_until_the_next_tick(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=6)
    vllm.reading.add(names[0])
    assert await tick(store, settings) == [names[1]]
    vllm.reading.clear()
    assert await tick(store, settings) == [names[0]]


async def test_a_larger_number_to_keep_brings_nothing_back(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    names = await promoted(store, settings, vllm, versions=6)
    await tick(store, settings.model_copy(update={"vllm_replica_urls": (NOBODY_THERE,)}))
    assert await tick(store, settings.model_copy(update={"versions_kept": 9})) == names[:2]


async def test_what_was_published_and_never_promoted_goes_once_its_job_has_ended(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    await give_feedback(store, 1)
    make, during = publishing(settings), []

    def train(work: Work) -> Outcome:
        outcome = make(work)
        during.extend(on_disk(settings))
        return outcome

    job = await opened(store)
    # vLLM can't serve it, so it is not promoted.
    ended = await run(job, store, settings, one_by_one(lambda work, _: train(work)))
    assert (ended.state, on_disk(settings)) == ("failed", during)
    assert await tick(store, settings) == during
    assert on_disk(settings) == []


async def test_what_an_unfinished_or_unknown_job_has_published_stays(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=1)
    job = await opened(store)
    in_use = await store.scopes.version(names[0], ALICE, tenant="acme")
    for number, of in ((2, job.id), (3, "con-001-forgotten")):
        name = f"{in_use.name[:15]}-{number:04d}-{'c' * 12}"
        publish(settings, in_use.model_copy(update={"name": name, "job": of, "number": number}))
    assert await tick(store, settings) == []
    assert len(on_disk(settings)) == 3


async def test_the_version_in_use_is_never_retired(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    first, second = await promoted(store, settings, vllm, versions=2)
    assert await store.scopes.retire([first, second], ALICE, tenant="acme", now=1.0) == [first]


async def test_a_store_that_is_not_there_yet_has_nothing_old(store: Store, settings: Settings) -> None:
    assert await tick(store, settings) == []


async def test_an_object_store_loses_the_same_versions_and_nothing_else(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    with s3_server() as s3:
        away = {"adapter_store": f"s3://{BUCKET}/retention", "adapter_store_options": s3.options}
        of_objects = settings.model_copy(update=away)
        names = await promoted(store, of_objects, vllm, versions=6)
        assert await tick(store, of_objects) == names[:2]
        assert vllm.evicted == names[:2]
        assert sorted(adapter_store(of_objects).names()) == sorted(names[2:])
        assert not any(name in key for key in s3.fs.find(of_objects.adapter_store) for name in names[:2])
        s3.stop()
        with pytest.raises(OSError, match="does not answer"):
            await tick(store, of_objects)


async def test_half_a_deletion_is_not_seen_as_a_version(store: Store, settings: Settings, vllm: FakeVllm) -> None:
    names = await promoted(store, settings, vllm, versions=6)
    half_deleted(settings.adapter_store_dir / f".aside-retired-{names[0]}")
    assert await tick(store, settings) == names[:2]
    assert on_disk(settings) == sorted(names[2:])


async def test_a_version_that_can_not_be_deleted_stays_and_the_others_go(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=6)
    in_the_way = settings.adapter_store_dir / f".aside-retired-{names[0]}"
    in_the_way.touch()
    assert await tick(store, settings) == [names[1]]
    assert (await store.counts.read())["undone", "retention"] == 1
    in_the_way.unlink()
    assert await tick(store, settings) == [names[0]]


async def test_a_scope_whose_version_in_use_has_no_record_keeps_its_files_and_the_others_lose_their_old_ones(
    store: Store, settings: Settings, vllm: FakeVllm, redis_url: str
) -> None:
    old, gone = [], user("carol")
    for scope in (user("alice"), gone, user("bob")):
        names = await promoted(store, settings, vllm, versions=5, scope=scope)
        old += names[:1] if scope != gone else []
    in_use = await active(store, gone)
    with Redis.from_url(redis_url) as redis:
        assert redis.hdel(ScopeKeys(gone, tenant="acme").versions, in_use) == 1
    fresh = open_store(settings)

    assert sorted(await tick(fresh, settings)) == sorted(old)

    await fresh.close()
    assert (await store.counts.read())["undone", "retention"] == 1
    assert in_use in on_disk(settings)


def spoil(settings: Settings, name: str, provenance: str) -> None:
    (settings.adapter_store_dir / name / "provenance.json").write_text(provenance)


@pytest.mark.parametrize("scope", ["team", "user:bob", None])
async def test_versions_that_do_not_tell_whose_they_are_stay_and_the_others_go(
    store: Store, settings: Settings, vllm: FakeVllm, caplog: pytest.LogCaptureFixture, scope: str | None
) -> None:
    old = [(await promoted(store, settings, vllm, versions=5, scope=user(name)))[0] for name in ("alice", "carol")]
    nobodys = await promoted(store, settings, vllm, versions=5, scope=user("dave"))
    told = json.dumps({"tenant": "acme", "scope": scope, "job": "con-001-x"})
    for name in nobodys:
        spoil(settings, name, told)

    assert sorted(await tick(store, settings)) == sorted(old)

    assert set(nobodys) <= set(on_disk(settings))
    assert f"{', '.join(nobodys)} can't be looked after" in caplog.text


async def test_one_version_that_tells_whose_they_are_is_enough_for_its_scope(
    store: Store, settings: Settings, vllm: FakeVllm
) -> None:
    names = await promoted(store, settings, vllm, versions=5)
    for name in names[1:]:
        spoil(settings, name, '{"tenant": "acme", "scope": "team", "job": "con-001-x"}')
    assert await tick(store, settings) == names[:1]


@pytest.mark.parametrize(
    ("active", "previous", "kept", "old"),
    [
        ("6", "5", 2, ["1", "2"]),
        ("6", "1", 2, ["2", "3"]),
        ("2", "base", 3, ["1", "3"]),
        ("base", "base", 4, ["1", "2"]),
        ("6", "5", 9, []),
    ],
)
def test_kept_are_the_one_in_use_where_a_rollback_goes_and_the_newest_others(
    active: str, previous: str, kept: int, old: list[str]
) -> None:
    assert superseded(["1", "2", "3", "4", "5", "6"], active=active, previous=previous, kept=kept) == old
