"""Adapter versions in a real S3 server: there whole or not at all, and verified on each machine that fetches them."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.adapters import NAME, WEIGHTS, name_of, write_version
from tests.s3_server import BUCKET, S3, s3_server
from workers.adapter_store import AdapterRefused, Copies
from workers.adapter_store.objects import ObjectStore, StoreAway
from workers.files import ORPHAN_SECONDS

PREFIXES = itertools.count()
MUCH = 1 << 30


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as found:
        yield found


@pytest.fixture
def url() -> str:
    """A part of the bucket that no other test uses."""
    return f"s3://{BUCKET}/test-{next(PREFIXES)}"


@pytest.fixture
def node(s3: S3, url: str, tmp_path: Path) -> Callable[..., ObjectStore]:
    """Makes the store as a machine of this name has it."""

    def made(name: str = "one", *, kind: type[ObjectStore] = ObjectStore, most_bytes: int = MUCH) -> ObjectStore:
        copies = Copies(tmp_path / name, most_bytes=most_bytes, base_model="base")
        return kind(url, options=s3.options, copies=copies)

    return made


@pytest.fixture
def put(node: Callable[..., ObjectStore], tmp_path: Path) -> Callable[..., str]:
    """Publishes a version of these weights; its name."""

    def publish(weights: bytes = WEIGHTS, *, number: int = 1) -> str:
        folder = write_version(tmp_path, weights=weights, number=number, folder=tmp_path / f"made-{number}")
        name = name_of(weights, number=number)
        node().put(folder, name)
        return name

    return publish


def weights_in(store: ObjectStore, name: str) -> bytes:
    with store.reading(name) as folder:
        return (folder / "adapter_model.safetensors").read_bytes()


def key_of(s3: S3, url: str, file: str) -> str:
    """Of the one object in the store whose name ends so."""
    [key] = [key for key in s3.fs.find(url) if key.endswith(file)]
    return str(key)


def test_what_one_machine_publishes_another_reads(node, put):
    name = put()
    other = node("two")
    assert other.names() == [name]
    assert other.provenance(name).model_dump() == {"tenant": "acme", "scope": "user:alice", "job": "job-1"}
    assert weights_in(other, name) == WEIGHTS
    with other.reading(name) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "provenance.json",
        ]


def test_a_store_that_is_empty_or_lacks_a_version_says_so(node):
    assert node().names() == []
    assert node().provenance(NAME) is None
    with pytest.raises(FileNotFoundError, match="no such version"), node().reading(NAME):
        pass


def test_half_an_upload_is_no_version_and_goes_after_a_day(node, put, s3, url):
    name = put()
    s3.fs.rm(f"{url}/{name}.json")
    store = node("two")
    assert store.names() == []
    with pytest.raises(FileNotFoundError), store.reading(name):
        pass
    store.clean(now=time.time())
    assert len(s3.fs.find(url)) == 3, "an upload this young may be going on"
    store.clean(now=time.time() + ORPHAN_SECONDS + 60)
    assert s3.fs.find(url) == []


def test_what_is_whole_is_never_cleaned_away(node, put, s3, url):
    name = put()
    node().clean(now=time.time() + 2 * ORPHAN_SECONDS)
    assert len(s3.fs.find(url)) == 4
    assert weights_in(node(), name) == WEIGHTS


def test_a_name_is_written_once(node, put, tmp_path):
    name = put()
    folder = write_version(tmp_path, weights=b"other weights", folder=tmp_path / "other")
    with pytest.raises(FileExistsError):
        node("two").put(folder, name)
    assert weights_in(node("two"), name) == WEIGHTS


def test_the_slower_of_two_that_publish_one_name_spoils_nothing(node, put, s3, url, tmp_path):
    class Overtaken(ObjectStore):
        """Another publishes the name between its look and its own upload."""

        def _key(self, *args):
            if not self.names():
                put()
            return super()._key(*args)

    folder = write_version(tmp_path, weights=b"other weights", folder=tmp_path / "other")
    with pytest.raises(FileExistsError):
        node("two", kind=Overtaken).put(folder, NAME)
    assert len(s3.fs.find(url)) > 4, "it has uploaded its own"
    assert weights_in(node("three"), NAME) == WEIGHTS


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "provenance.json"])
def test_a_corrupted_object_is_refused_leaves_nothing_and_is_served_once_repaired(node, put, s3, url, file):
    name, store = put(), node("two")
    key = key_of(s3, url, file)
    right = s3.fs.cat_file(key)
    s3.fs.pipe_file(key, bytes([right[0] ^ 1]) + right[1:])
    with pytest.raises(AdapterRefused, match=f"{file} has {len(right)} bytes with SHA-256"), store.reading(name):
        pass
    assert list(store.work.iterdir()) == []
    s3.fs.pipe_file(key, right)
    assert weights_in(store, name) == WEIGHTS


def test_a_cut_off_or_missing_object_and_a_spoilt_manifest_are_refused(node, put, s3, url):
    name = put()
    key = key_of(s3, url, "safetensors")
    s3.fs.pipe_file(key, WEIGHTS[:-1])
    with pytest.raises(AdapterRefused, match="has 20 bytes"), node("two").reading(name):
        pass
    s3.fs.rm(key)
    with pytest.raises(AdapterRefused, match="is not there, though its manifest is"), node("two").reading(name):
        pass
    s3.fs.pipe_file(f"{url}/{name}.json", b'{"files": ')
    with pytest.raises(AdapterRefused, match=r"manifest .* can't be read"), node("two").reading(name):
        pass
    assert node("two").provenance(name) is None


def test_a_deleted_version_is_gone_and_its_name_free_of_leftovers(node, put, s3, url):
    name = put()
    node("two").delete(name)
    assert s3.fs.find(url) == []
    node("two").delete(name)


def test_copies_stay_within_their_limit_and_come_again(node, put):
    names = [put(b"%100d" % n, number=n + 1) for n in range(3)]
    # Of some 300 bytes each.
    store = node("two", most_bytes=700)
    for n in (0, 1, 0, 2):
        assert weights_in(store, names[n]) == b"%100d" % n
    assert sorted(path.name for path in store.work.iterdir()) == sorted([names[0], names[2]])
    assert weights_in(store, names[1]) == b"%100d" % 1


def test_a_version_stays_on_the_disk_while_it_is_read(node, put):
    names = [put(b"%100d" % n, number=n + 1) for n in range(3)]
    store = node("two", most_bytes=350)
    with store.reading(names[0]) as folder:
        assert weights_in(store, names[1]) == b"%100d" % 1
        assert weights_in(store, names[2]) == b"%100d" % 2
        assert (folder / "adapter_model.safetensors").read_bytes() == b"%100d" % 0


def test_a_copy_serves_while_the_store_is_away_and_what_is_not_there_is_refused_soon(tmp_path):
    with s3_server() as own:
        store = ObjectStore(
            f"s3://{BUCKET}/away",
            options=own.options,
            copies=Copies(tmp_path / "c", most_bytes=MUCH, base_model="base"),
        )
        folder = write_version(tmp_path / "made")
        store.put(folder, NAME)
        assert weights_in(store, NAME) == WEIGHTS
        own.stop()
        assert weights_in(store, NAME) == WEIGHTS
        store._copies.remove(NAME)
        with pytest.raises(AdapterRefused, match=f"s3://{BUCKET}/away does not answer"), store.reading(NAME):
            pass
        for ask in (store.names, lambda: store.put(folder, NAME), lambda: store.delete(NAME)):
            with pytest.raises(StoreAway, match="does not answer"):
                ask()
        # What is shared is a convenience: nothing ends because of it.
        store.share(folder / "provenance.json")
        store.unshare(folder / "provenance.json")


def test_a_bucket_that_may_not_be_read_is_told_in_one_line(s3, tmp_path):
    copies = Copies(tmp_path, most_bytes=MUCH, base_model="base")
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        ObjectStore("s3://no-such-bucket/p", options=s3.options, copies=copies).put(
            write_version(tmp_path / "made"), NAME
        )
    with pytest.raises(StoreAway, match=r"can't be opened: .*nosuch"):
        ObjectStore("nosuch://bucket", options={}, copies=copies).names()


def test_four_that_fetch_one_version_at_once_all_have_it_whole(node, put, s3):
    """On one machine, each as a process of its own has it: what they have in common is the folder."""
    weights = WEIGHTS * 100_000
    name, start = put(weights), threading.Barrier(4)

    def read(store: ObjectStore) -> bytes:
        start.wait()
        return weights_in(store, name)

    stores = [node("same") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(found == weights for found in pool.map(read, stores))
    assert [path.name for path in stores[0].work.iterdir()] == [name]


def test_what_a_node_shares_another_gets_until_it_is_taken_back(node, tmp_path, s3, url):
    one, two = node("one"), node("two")
    for store in (one, two):
        store.work.mkdir()
    mine, theirs = one.work / ".job-1.checkpoint", two.work / ".job-1.checkpoint"
    two.shared(theirs)
    assert list(two.work.iterdir()) == []
    for content in (b"step 5", b"step 10"):
        mine.write_bytes(content)
        one.share(mine)
        two.shared(theirs)
        assert theirs.read_bytes() == content
    assert two.names() == []
    two.clean(now=time.time())
    assert len(s3.fs.find(url)) == 1
    two.unshare(theirs)
    assert s3.fs.find(url) == []
    two.unshare(theirs)


def test_what_was_shared_of_a_job_that_never_ended_goes_after_a_day(node, s3, url):
    one = node()
    one.work.mkdir()
    (one.work / ".job-1.checkpoint").write_bytes(b"step 5")
    one.share(one.work / ".job-1.checkpoint")
    one.clean(now=time.time() + ORPHAN_SECONDS + 60)
    assert s3.fs.find(url) == []
