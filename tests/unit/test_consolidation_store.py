"""Consolidations of a tiny random model whose versions lie in a real S3 server."""

import pytest

from service.errors import JobFailed
from service.settings import Settings
from tests.consolidation_data import corrections, user_log
from tests.s3_server import BUCKET, s3_server
from tests.unit.test_consolidation_job import end_of, roomy, work
from workers.adapter_store import adapter_store
from workers.consolidation.trainer import CHECKPOINT_STEPS
from workers.consolidation.work import NotNow


class Killed(BaseException):
    pass


def test_a_killed_job_ends_on_another_machine_and_the_next_starts_from_its_version_on_a_third(
    tiny_base, tiny_settings, tmp_path
):
    steps = []

    def watch(_, progress):
        if progress.stage == "train":
            steps.append(progress.step)
            if steps == list(range(1, CHECKPOINT_STEPS + 2)):
                raise Killed

    with s3_server() as s3:
        away = {"adapter_store": f"s3://{BUCKET}/{tmp_path.name}", "adapter_store_options": s3.options}

        def machine(name: str) -> Settings:
            here = {"adapter_cache_dir": str(tmp_path / name)}
            return roomy(tiny_settings, learning_rate=1e-2, **away, **here)

        job = work(user_log(corrections("ann", count=8)))
        with pytest.raises(Killed):
            end_of(tiny_base, machine("one"), job, watch)
        first = end_of(tiny_base, machine("two"), job, watch).version
        assert steps[CHECKPOINT_STEPS + 1 :] == [CHECKPOINT_STEPS + 1]
        assert adapter_store(machine("one")).names() == [first.name]
        more = user_log(corrections("ann", count=10), watermark=8)
        following = work(more, job="job-2", number=2, parent=first.name)
        second = end_of(tiny_base, machine("three"), following)
        assert second.report.margins.current != second.report.margins.base
        assert {path.name for path in (tmp_path / "three").iterdir()} == {first.name}
        assert not any(".jobs" in key for key in s3.fs.find(away["adapter_store"]))


@pytest.fixture
def settings_of(tiny_settings, tmp_path):
    def made(s3) -> Settings:
        away = {"adapter_store": f"s3://{BUCKET}/{tmp_path.name}", "adapter_store_options": s3.options}
        return roomy(tiny_settings, learning_rate=1e-2, **away, adapter_cache_dir=str(tmp_path / "copies"))

    return made


def test_a_store_that_is_away_at_the_end_costs_no_training(tiny_base, settings_of):
    job, steps = work(user_log(corrections("ann", count=8))), []

    def stop(_, progress):
        if progress.stage == "publish":
            s3.stop()

    with s3_server() as s3, pytest.raises(NotNow, match="can't be published"):
        end_of(tiny_base, settings_of(s3), job, stop)
    with s3_server() as s3:
        version = end_of(tiny_base, settings_of(s3), job, lambda _, progress: steps.append(progress)).version
        assert adapter_store(settings_of(s3)).names() == [version.name]
    assert [progress.step for progress in steps if progress.stage == "train"] == []


def test_a_store_that_is_away_is_told_from_one_that_lacks_the_version_in_use(tiny_base, settings_of):
    log = user_log(corrections("ann", count=8))
    following = work(log, job="job-2", number=2, parent=f"fs-{'0' * 12}-0001-{'0' * 12}")
    with s3_server() as s3:
        with pytest.raises(JobFailed, match="roll back"):
            end_of(tiny_base, settings_of(s3), following)
        s3.stop()
        with pytest.raises(NotNow, match="can't be loaded"):
            end_of(tiny_base, settings_of(s3), following)
