"""The parts of our vLLM plugin that need no model: the order of an eviction, and who makes room for others."""

import asyncio
import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.adapters import NAME, write_version
from tests.waiting import PATIENCE_SECONDS, until
from workers.adapter_store import AdapterRefused, Copies, FolderStore
from workers.vllm_plugin.eviction import Adapters, Readers
from workers.vllm_plugin.held_copies import HeldCopies

# Two of the small versions of these tests.
MOST_BYTES = 600


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_version(tmp_path / "store").parent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class RecordingEngine:
    """Stands for vLLM's engine: notes which adapters it was told to drop, and what lay on disk then."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.removed: list[tuple[int, bool]] = []
        self.failing: Exception | None = None

    async def remove_lora(self, lora_int_id: int) -> bool:
        if self.failing is not None:
            raise self.failing
        self.removed.append((lora_int_id, self.copy.exists()))
        return True


class FailingCopies(HeldCopies):
    """Can't say what has to go, for as long as it is told so."""

    failing: Exception | None = None

    def surplus(self) -> list[str]:
        if self.failing is not None:
            raise self.failing
        return super().surplus()


@pytest.fixture
def loaded(store: Path, cache: Path) -> SimpleNamespace:
    """A replica that has loaded NAME as number 7."""
    copies = FailingCopies(Copies(cache, most_bytes=MOST_BYTES, base_model="base"), FolderStore(store))
    copy = copies.take(NAME)
    models = SimpleNamespace(
        lora_requests={NAME: SimpleNamespace(lora_int_id=7)}, lora_resolver_lock=defaultdict(asyncio.Lock)
    )
    engine, readers = RecordingEngine(copy), Readers()
    adapters = Adapters(models=models, engine=engine, readers=readers, copies=copies, abort_grace_seconds=0.0)
    return SimpleNamespace(adapters=adapters, models=models, engine=engine, readers=readers, copies=copies, copy=copy)


async def test_an_eviction_drops_the_name_then_the_weights_then_the_copy(loaded):
    assert await loaded.adapters.evict(NAME)
    assert loaded.adapters.names() == []
    assert loaded.engine.removed == [(7, True)]
    assert not loaded.copy.exists()


async def test_an_eviction_touches_no_file_while_an_earlier_request_runs(loaded):
    with loaded.readers.reading():
        eviction = asyncio.ensure_future(loaded.adapters.evict(NAME))
        done, _ = await asyncio.wait({eviction}, timeout=0.05)
        assert not done
        assert loaded.adapters.names() == []
        assert loaded.copy.exists()
        assert loaded.engine.removed == []
    assert await eviction
    assert not loaded.copy.exists()


async def test_an_eviction_does_not_wait_for_a_later_request(loaded):
    with loaded.readers.reading():
        eviction = asyncio.ensure_future(loaded.adapters.evict(NAME))
        await asyncio.sleep(0)
        later = loaded.readers.reading()
        later.__enter__()
    assert await asyncio.wait_for(eviction, PATIENCE_SECONDS)
    later.__exit__(None, None, None)


async def test_an_adapter_that_was_asked_for_again_keeps_its_copy(loaded):
    with loaded.readers.reading():
        eviction = asyncio.ensure_future(loaded.adapters.evict(NAME))
        await asyncio.sleep(0)
        loaded.models.lora_requests[NAME] = SimpleNamespace(lora_int_id=8)
    assert not await eviction
    assert loaded.engine.removed == [(7, True)]
    assert loaded.copy.exists()


async def test_evicting_what_is_not_there_is_fine(loaded):
    assert await loaded.adapters.evict("fs-0123456789ab-0009-000000000000")
    assert loaded.engine.removed == []
    assert loaded.copy.exists()


def more(store: Path, count: int) -> list[str]:
    return [write_version(store, weights=b"%20d" % n, number=n + 2).name for n in range(count)]


async def test_the_least_recently_used_adapters_make_room_and_a_reader_keeps_its_files_until_it_ends(
    loaded, store, cache
):
    names = [NAME, *more(store, 3)]
    for age, name in enumerate(reversed(names)):
        loaded.copies.take(name)
        loaded.models.lora_requests[name] = SimpleNamespace(lora_int_id=7)
        os.utime(cache / name, (time.time() - 60 - age,) * 2)
    loaded.copies.seen(b'{"model":"%b","messages":[]}' % NAME.encode())
    with loaded.readers.reading():
        making_room = asyncio.ensure_future(loaded.adapters.make_room())
        done, _ = await asyncio.wait({making_room}, timeout=0.1)
        assert not done
        assert (cache / names[1]).exists()
    assert await making_room == names[1:3]
    assert loaded.adapters.names() == sorted([NAME, names[3]])
    assert sorted(path.name for path in cache.iterdir()) == sorted([NAME, names[3]])
    assert await loaded.adapters.make_room() == []


async def test_an_error_that_nobody_foresaw_is_told_with_its_stack_and_room_is_made_at_the_next_look(
    store, cache, loaded, caplog
):
    error = RuntimeError("boom")
    loaded.copies.failing = error
    for name in more(store, 3):
        loaded.copies.take(name)
    keeping = asyncio.create_task(loaded.adapters.keep_room(seconds=0.01))
    await until(lambda: asyncio.sleep(0, caplog.records or keeping.done()), what="the first look")
    loaded.copies.failing = None

    await until(lambda: asyncio.sleep(0, keeping.done() or len(list(cache.iterdir())) == 2), what="room")

    assert not keeping.done()
    assert caplog.records[0].exc_info[1] is error
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_an_adapter_that_the_engine_can_not_drop_is_told_and_the_others_make_room(store, cache, loaded, caplog):
    for age, name in enumerate([NAME, *more(store, 3)]):
        loaded.copies.take(name)
        os.utime(cache / name, (time.time() - 60 + age,) * 2)
    loaded.engine.failing = error = RuntimeError("boom")

    [gone] = await loaded.adapters.make_room()

    assert [path.name for path in cache.iterdir() if path.name in (NAME, gone)] == [NAME]
    [told] = caplog.records
    assert NAME in told.getMessage()
    assert told.exc_info[1] is error


async def test_what_another_process_needs_stays_on_the_disk(loaded, store, cache):
    beside = HeldCopies(Copies(cache, most_bytes=MOST_BYTES, base_model="base"), FolderStore(store))
    beside.take(NAME)
    assert await loaded.adapters.evict(NAME)
    assert loaded.copy.exists()
    beside.let_go(NAME)
    assert not loaded.copy.exists()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"model":"%b","messages":[]}', True),
        (b'{"messages": [], "model": "%b"}', True),
        (b'{"model":"base","messages":[{"role":"user","content":"\\"model\\":\\"%b\\""}]}', False),
        (b'{"model":"fs-../%b"}', False),
    ],
)
def test_a_request_names_its_adapter_as_its_model_and_nowhere_else(loaded, body, named):
    os.utime(loaded.copy, (1.0, 1.0))
    loaded.copies.seen(body % NAME.encode())
    assert (loaded.copy.stat().st_mtime > 1.0) == named


class SlowStore(FolderStore):
    """Hands nothing out until it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may = threading.Event()

    def copy_to(self, name: str, folder: Path) -> bool:
        self.may.wait()
        return super().copy_to(name, folder)


async def test_a_fetch_that_takes_too_long_is_not_waited_for_and_is_there_for_the_next(store, cache):
    slow = SlowStore(store)
    copies = HeldCopies(Copies(cache, most_bytes=MOST_BYTES, base_model="base"), slow)
    try:
        with pytest.raises(TimeoutError):
            await copies.taken(NAME, seconds=0.05)
    finally:
        slow.may.set()
    await until(lambda: asyncio.sleep(0, (cache / NAME).exists()), what="the copy")
    slow.may.clear()
    assert await copies.taken(NAME, seconds=10) == cache / NAME


async def test_a_fetch_that_nobody_waits_for_may_fail(store, cache):
    slow = SlowStore(store)
    copies = HeldCopies(Copies(cache, most_bytes=MOST_BYTES, base_model="other"), slow)
    with pytest.raises(TimeoutError):
        await copies.taken(NAME, seconds=0.05)
    slow.may.set()
    with pytest.raises(AdapterRefused, match="trained on base"):
        await copies.taken(NAME, seconds=10)
