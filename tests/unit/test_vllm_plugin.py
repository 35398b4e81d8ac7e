"""The parts of our vLLM plugin that need no vLLM: the verified copy, and the order of an eviction."""

import asyncio
import hashlib
import json
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from workers.vllm_plugin.eviction import Adapters, Readers
from workers.vllm_plugin.local_copy import AdapterRefused, local_copy

WEIGHTS = b"weights of an adapter"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
NAME = f"fs-0123456789ab-0001-{SHA256[:12]}"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that holds version NAME of the base model `base`."""
    folder = tmp_path / "store" / NAME
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text("{}")
    provenance = {"name": NAME, "base_model": "base", "content_sha256": SHA256}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "notes.txt").write_text("not copied")
    return folder.parent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def copy_of(name: str, store: Path, cache: Path, base_model: str = "base") -> Path | None:
    return local_copy(name, store=store, cache=cache, base_model=base_model)


def change_provenance(store: Path, **fields: str) -> None:
    file = store / NAME / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_version_is_copied_with_its_three_files_and_nothing_else(store, cache):
    copy = copy_of(NAME, store, cache)
    assert copy == cache / NAME
    assert sorted(file.name for file in copy.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    assert [folder.name for folder in cache.iterdir()] == [NAME]


@pytest.mark.parametrize(
    "name", ["fs-0123456789ab-0001-ffffffffffff", "base", "../store", f"../store/{NAME}", f"{NAME}\n", ""]
)
def test_an_unknown_or_malformed_name_has_no_copy(store, cache, name):
    assert copy_of(name, store, cache) is None
    assert not cache.exists()


def test_a_copy_serves_on_when_the_store_has_lost_the_version(store, cache):
    copy_of(NAME, store, cache)
    shutil.rmtree(store)
    assert copy_of(NAME, store, cache) == cache / NAME


def test_a_spoilt_copy_is_made_again(store, cache):
    weights = copy_of(NAME, store, cache) / "adapter_model.safetensors"
    weights.write_bytes(b"bits rot")
    copy_of(NAME, store, cache)
    assert weights.read_bytes() == WEIGHTS


def test_weights_that_differ_from_their_hash_are_refused_and_leave_nothing(store, cache):
    (store / NAME / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(AdapterRefused, match="SHA-256"):
        copy_of(NAME, store, cache)
    assert list(cache.iterdir()) == []


def test_a_provenance_changed_along_with_its_weights_is_refused_by_the_name(store, cache):
    (store / NAME / "adapter_model.safetensors").write_bytes(b"other weights")
    change_provenance(store, content_sha256=hashlib.sha256(b"other weights").hexdigest())
    with pytest.raises(AdapterRefused, match="SHA-256"):
        copy_of(NAME, store, cache)


def test_a_version_of_another_base_model_is_refused(store, cache):
    with pytest.raises(AdapterRefused, match="trained on base, and other is served"):
        copy_of(NAME, store, cache, base_model="other")


def test_another_versions_provenance_is_refused(store, cache):
    change_provenance(store, name="fs-0123456789ab-0002-000000000000")
    with pytest.raises(AdapterRefused, match="provenance is of"):
        copy_of(NAME, store, cache)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "provenance.json"])
def test_a_missing_file_is_refused_by_its_name(store, cache, file):
    (store / NAME / file).unlink()
    with pytest.raises(AdapterRefused, match=file):
        copy_of(NAME, store, cache)


def test_a_provenance_that_is_no_json_is_refused(store, cache):
    (store / NAME / "provenance.json").write_text("{")
    with pytest.raises(AdapterRefused, match="not an adapter version"):
        copy_of(NAME, store, cache)


def test_a_cache_that_cant_be_written_is_refused_in_one_line(store, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(AdapterRefused, match="can't be copied"):
        copy_of(NAME, store, tmp_path / "cache")


class RecordingEngine:
    """Stands for vLLM's engine: notes which adapters it was told to drop, and what lay on disk then."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.removed: list[tuple[int, bool]] = []

    async def remove_lora(self, lora_int_id: int) -> bool:
        self.removed.append((lora_int_id, self.copy.exists()))
        return True


@pytest.fixture
def loaded(store: Path, cache: Path) -> SimpleNamespace:
    """A replica that has loaded NAME as number 7."""
    copy = copy_of(NAME, store, cache)
    models = SimpleNamespace(
        lora_requests={NAME: SimpleNamespace(lora_int_id=7)}, lora_resolver_lock=defaultdict(asyncio.Lock)
    )
    engine, readers = RecordingEngine(copy), Readers()
    adapters = Adapters(models=models, engine=engine, readers=readers, cache=cache, abort_grace_seconds=0.0)
    return SimpleNamespace(adapters=adapters, models=models, engine=engine, readers=readers, copy=copy)


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
    assert await asyncio.wait_for(eviction, 1)
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
