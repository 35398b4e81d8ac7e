"""Copies of adapter versions on a machine: verified, held while they are needed, and within a limit."""

import errno
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.adapters import NAME, WEIGHTS, write_version
from workers.adapter_store import AdapterRefused, Copies, FolderStore
from workers.files import ORPHAN_SECONDS


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that holds version NAME of the base model `base`."""
    folder = write_version(tmp_path / "store")
    (folder / "notes.txt").write_text("not copied")
    return folder.parent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def copies_in(cache: Path, *, most_bytes: int = 1 << 30, base_model: str = "base") -> Copies:
    return Copies(cache, most_bytes=most_bytes, base_model=base_model)


def copy_of(name: str, store: Path, cache: Path, base_model: str = "base") -> Path | None:
    """The folder of a copy that nobody holds."""
    copy = copies_in(cache, base_model=base_model).take(name, FolderStore(store).copy_to)
    if copy is None:
        return None
    copy.release()
    return copy.folder


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
    assert list(cache.glob("*")) == []


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
    change_provenance(store, content_sha256="1" * 64)
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


def versions(store: Path, count: int) -> list[str]:
    """Names of so many versions of a hundred bytes of weights each."""
    return [write_version(store, weights=b"%100d" % n, number=n + 1).name for n in range(count)]


def taken(copies: Copies, store: Path, names: list[str]) -> None:
    """Copies in this order of use, a second apart, that nobody holds."""
    for age, name in enumerate(reversed(names)):
        copy = copies.take(name, FolderStore(store).copy_to)
        assert copy is not None
        copy.release()
        os.utime(copy.folder, (time.time() - 60 - age,) * 2)


def test_the_least_recently_used_copies_are_the_surplus(tmp_path, cache):
    names = versions(tmp_path / "store", 4)
    copies = copies_in(cache)
    taken(copies, tmp_path / "store", names)
    size = sum(file.stat().st_size for file in (cache / names[0]).iterdir())
    copies.used(names[0])
    assert copies_in(cache, most_bytes=2 * size + 50).surplus() == names[1:3]
    assert copies_in(cache, most_bytes=4 * size + 50).surplus() == []


def test_a_copy_that_is_held_stays_whoever_wants_it_removed(store, cache):
    held = copies_in(cache).take(NAME, FolderStore(store).copy_to)
    # As another process has it: a folder is locked by who opened it.
    other = copies_in(cache)
    assert not other.remove(NAME)
    second = other.take(NAME, FolderStore(store).copy_to)
    held.release()
    assert not other.remove(NAME)
    assert (second.folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    second.release()
    assert other.remove(NAME)
    assert list(cache.iterdir()) == []
    assert other.remove(NAME)


def test_eight_that_take_one_version_at_once_all_have_it_whole_while_another_removes_it(store, cache):
    start, stop = threading.Barrier(9), threading.Event()

    def remove() -> int:
        start.wait()
        removed = 0
        while not stop.is_set():
            removed += copies_in(cache).remove(NAME)
        return removed

    def take(_: int) -> bytes:
        copies = copies_in(cache)
        start.wait()
        read = b""
        for _ in range(20):
            copy = copies.take(NAME, FolderStore(store).copy_to)
            read = (copy.folder / "adapter_model.safetensors").read_bytes()
            assert read == WEIGHTS
            copy.release()
        return read

    with ThreadPoolExecutor(9) as pool:
        removing = pool.submit(remove)
        taking = [pool.submit(take, n) for n in range(8)]
        try:
            assert [done.result() for done in taking] == [WEIGHTS] * 8
        finally:
            stop.set()
    assert removing.result() > 0


def test_who_fetched_more_slowly_takes_the_copy_that_is_there_by_then(store, cache):
    def slowly(name: str, folder: Path) -> bool:
        assert copy_of(name, store, cache) == cache / NAME
        return FolderStore(store).copy_to(name, folder)

    copy = copies_in(cache).take(NAME, slowly)
    assert copy.folder == cache / NAME
    assert not copies_in(cache).remove(NAME), "it is held"
    copy.release()
    assert [folder.name for folder in cache.iterdir()] == [NAME]


def test_a_full_disk_is_refused_in_one_line_and_leaves_nothing(cache):
    def full(name: str, folder: Path) -> bool:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(AdapterRefused, match=r"can't be copied to .*No space left on device"):
        copies_in(cache).take(NAME, full)
    assert list(cache.iterdir()) == []


def test_a_version_that_never_fits_is_refused(store, cache):
    with pytest.raises(AdapterRefused, match="FASTSLOW_ADAPTER_CACHE_GIB"):
        copies_in(cache, most_bytes=10).take(NAME, FolderStore(store).copy_to)
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_goes_after_a_day(cache):
    for age, name in ((60.0, "young"), (ORPHAN_SECONDS + 60, "old")):
        (cache / f".aside-{name}").mkdir(parents=True)
        os.utime(cache / f".aside-{name}", (time.time() - age,) * 2)
    assert copies_in(cache).surplus() == []
    assert [path.name for path in cache.iterdir()] == [".aside-young"]
