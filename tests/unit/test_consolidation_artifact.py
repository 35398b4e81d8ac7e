"""Publishing is all or nothing, and a name is written once."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import save_file

from service.domain.slow_weights import AdapterVersion, Scope, version_name
from service.errors import JobFailed
from tests.factories import train_report
from workers.adapter_store import FolderStore
from workers.consolidation.artifact import aside, publish
from workers.files import ASIDE, ORPHAN_SECONDS, remove_orphans

REPORT = train_report()


def fill(folder, *, value=1.0):
    """PEFT's two files; SHA-256 of the weights."""
    save_file({"layer.lora_A.weight": torch.full((2, 2), value)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def version_of(sha256, *, job="job-1", number=1):
    scope = Scope(kind="user", name="ann")
    return AdapterVersion(
        name=version_name(scope, tenant="acme", number=number, content_sha256=sha256),
        tenant="acme",
        scope=str(scope),
        number=number,
        base_model="tiny",
        base_sha256="0" * 64,
        content_sha256=sha256,
        created=1.0,
        job=job,
        watermark={"ann": 16},
        report=REPORT,
    )


def test_a_published_version_is_whole_and_nothing_lies_beside_it(tmp_path):
    with aside(FolderStore(tmp_path), job="job-1") as folder:
        version = version_of(fill(folder))
        publish(folder, version, store=FolderStore(tmp_path))
    target = tmp_path / version.name
    assert [path.name for path in tmp_path.iterdir()] == [version.name]
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    assert AdapterVersion.model_validate_json((target / "provenance.json").read_bytes()) == version


def test_the_same_name_is_not_written_again_by_another_job(tmp_path):
    with aside(FolderStore(tmp_path), job="job-1") as folder:
        publish(folder, version_of(fill(folder)), store=FolderStore(tmp_path))
    with aside(FolderStore(tmp_path), job="job-2") as folder, pytest.raises(JobFailed, match="in the store already"):
        publish(folder, version_of(fill(folder), job="job-2"), store=FolderStore(tmp_path))
    (target,) = tmp_path.iterdir()
    assert AdapterVersion.model_validate_json((target / "provenance.json").read_bytes()).job == "job-1"


def test_a_job_done_again_after_its_rename_ends_with_the_one_version(tmp_path):
    for _ in range(2):
        with aside(FolderStore(tmp_path), job="job-1") as folder:
            publish(folder, version_of(fill(folder)), store=FolderStore(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_that_are_not_what_was_measured_are_not_published(tmp_path):
    with aside(FolderStore(tmp_path), job="job-1") as folder:
        version = version_of(fill(folder))
        fill(folder, value=2.0)
        with pytest.raises(JobFailed, match="not what was written"):
            publish(folder, version, store=FolderStore(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_cut_off_weights_file_is_not_published(tmp_path):
    with aside(FolderStore(tmp_path), job="job-1") as folder:
        fill(folder)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        version = version_of(hashlib.sha256(weights.read_bytes()).hexdigest())
        with pytest.raises(JobFailed, match="can't be read back"):
            publish(folder, version, store=FolderStore(tmp_path))
    assert list(tmp_path.iterdir()) == []


def write_to_a_full_disk(store):
    with aside(FolderStore(store), job="job-1") as folder:
        fill(folder)
        # The kernel's own refusal: this device is always full.
        with open("/dev/full", "w") as device:
            device.write("weights")


def test_a_full_disk_fails_the_job_and_leaves_nothing(tmp_path):
    with pytest.raises(JobFailed, match="is full"):
        write_to_a_full_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_no_folder_fails_the_job(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobFailed, match="can't be used"), aside(FolderStore(tmp_path / "file"), job="job-1"):
        pass


def test_other_errors_pass_through_and_the_folder_goes(tmp_path):
    with pytest.raises(ZeroDivisionError), aside(FolderStore(tmp_path), job="job-1"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_worker_killed_while_it_writes_leaves_no_version(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from workers.adapter_store import FolderStore
        from workers.consolidation.artifact import aside
        with aside(FolderStore(Path(sys.argv[1])), job="job-1") as folder:
            (folder / "adapter_model.safetensors").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
        """
    )
    worker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "writing\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    assert all(path.name.startswith(ASIDE) for path in tmp_path.iterdir())
    remove_orphans(tmp_path, f"{ASIDE}*", now=time.time())
    assert len(list(tmp_path.iterdir())) == 1, "a folder this young may belong to a worker that lives"
    remove_orphans(tmp_path, f"{ASIDE}*", now=time.time() + ORPHAN_SECONDS + 60)
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_told_from_other_troubles(tmp_path):
    with pytest.raises(JobFailed, match="is full"), aside(FolderStore(tmp_path), job="job-1"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(JobFailed, match="Permission denied"), aside(FolderStore(tmp_path), job="job-1"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
