"""Whole consolidations on a tiny random model: their order, what they publish, and how they fail."""

import json
import math
import sys

import pytest
import torch

from service.domain.feedback import FeedbackEvent, Interaction, Message, Signals, VersionTuple
from service.domain.norms import Norm
from service.domain.slow_weights import NAME, AdapterVersion, Promote, Reject, Scope
from service.errors import JobFailed, VerifiersMissing
from service.settings import Settings
from tests.consolidation_data import LENIENT, corrections, user_log
from workers.adapter_store import adapter_store
from workers.consolidation.anchors import KINDS, load_anchors, own_topics, prompts
from workers.consolidation.base import load_base
from workers.consolidation.checkpoint import Checkpoints
from workers.consolidation.job import consolidate
from workers.consolidation.work import LeaseLost, NotNow, Work


def work(log, **changes):
    fields = {
        "tenant": "acme",
        "scope": Scope(kind="user", name="ann"),
        "job": "job-1",
        "number": 1,
        "created": 1.0,
        "users": {"ann": log},
    }
    return Work(**{**fields, **changes})


def of_user(name, *, count):
    log = user_log(corrections(name, count=count))
    return work(log, job=f"job-{name}", scope=Scope(kind="user", name=name), users={name: log})


def roomy(settings, **changes):
    """Budgets that a random model's training stays inside."""
    return settings.model_copy(update={"kl_text_budget_nats": 50.0, "kl_chat_budget_nats": 50.0, **changes})


def quiet(*_):
    pass


def forget(job, settings):
    """As at the job's end."""
    store = adapter_store(settings)
    Checkpoints(store.work, elsewhere=store).remove(job)


def end_of(base, settings, of, progress=quiet):
    """How one work ends, and its job with it; what stopped it is raised."""
    ends = consolidate([of], base=base, settings=settings, progress=progress, limits=LENIENT)
    assert list(ends) == [of.job]
    end = ends[of.job]
    if not isinstance(end, LeaseLost | NotNow):
        forget(of.job, settings)
    if isinstance(end, Exception):
        raise end
    return end


@pytest.fixture(scope="module")
def log():
    return user_log(corrections("ann", count=8))


def test_a_consolidation_publishes_what_it_measured(tiny_base, tiny_settings, log):
    seen = []
    settings = roomy(tiny_settings, learning_rate=1e-2)
    outcome = end_of(tiny_base, settings, work(log), lambda _, p: seen.append(p))
    assert outcome.decision == Promote(), outcome
    version = outcome.version
    assert NAME.fullmatch(version.name)
    assert version.watermark == {"ann": 8}
    assert [p.name for p in settings.adapter_store_dir.iterdir()] == [version.name]
    folder = settings.adapter_store_dir / version.name
    assert AdapterVersion.model_validate_json((folder / "provenance.json").read_bytes()) == version
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tiny")
    assert "lm_head" not in config["target_modules"]
    stages = list(dict.fromkeys(p.stage for p in seen))
    assert stages == ["data", "anchors", "train", "measure", "judge", "publish"]
    assert [p.step for p in seen if p.stage == "train"] == list(range(1, 7))
    assert outcome.report.margins.candidate > outcome.report.margins.base


def test_the_base_is_the_same_after_a_job_as_before(tiny_base, tiny_settings, log):
    ids = torch.arange(20)[None]
    modules = {name for name, _ in tiny_base.model.named_modules()}
    before = tiny_base.model(input_ids=ids).logits.detach()
    end_of(tiny_base, roomy(tiny_settings), work(log))
    after = tiny_base.model(input_ids=ids).logits.detach()
    assert torch.equal(before, after)
    assert {name for name, _ in tiny_base.model.named_modules()} == modules
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


def test_the_same_work_gives_the_same_version(tiny_base, tiny_settings, log, tmp_path):
    names = []
    for data in ("one", "two"):
        settings = roomy(tiny_settings, learning_rate=1e-2, data_dir=tmp_path / data)
        names.append(end_of(tiny_base, settings, work(log)).version.name)
    assert names[0] == names[1]


def test_a_job_that_could_not_be_ended_is_measured_anew_and_not_trained_again(tiny_base, tiny_settings, log):
    settings, stages = roomy(tiny_settings, learning_rate=1e-2), []

    def version():
        works, seen = [work(log)], []
        ends = consolidate(
            works, base=tiny_base, settings=settings, progress=lambda _, p: seen.append(p.stage), limits=LENIENT
        )
        stages.append(set(seen))
        return ends["job-1"].version

    first, again = version(), version()
    assert stages[0] - stages[1] == {"train"}
    assert again.name == first.name
    assert [path.name for path in settings.adapter_store_dir.glob("fs-*")] == [first.name]
    assert again.report.kl_chat == first.report.kl_chat
    assert again.hyperparameters == first.hyperparameters
    forget("job-1", settings)
    assert [path.name for path in settings.adapter_store_dir.iterdir()] == [first.name]


def test_a_second_job_of_the_same_weights_publishes_them_under_the_next_number(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    first, second = (end_of(tiny_base, settings, work(log, job=job)).version for job in ("job-1", "job-2"))
    assert second.content_sha256 == first.content_sha256
    assert (first.number, second.number) == (1, 2)
    assert {path.name for path in settings.adapter_store_dir.iterdir()} == {first.name, second.name}
    assert end_of(tiny_base, settings, work(log, job="job-2")).version.name == second.name


def test_a_tight_budget_scales_down_and_the_published_file_keeps_to_it(tiny_base, tiny_settings, log):
    settings = tiny_settings.model_copy(update={"learning_rate": 1e-2, "kl_text_budget_nats": 1e-3})
    outcome = end_of(tiny_base, settings, work(log))
    assert 0.0 < outcome.report.scale < 1.0
    assert outcome.report.kl_text.within
    assert outcome.report.kl_chat.within


def test_a_rejected_candidate_is_not_published_and_its_figures_are_told(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-12)
    outcome = end_of(tiny_base, settings, work(log))
    assert isinstance(outcome.decision, Reject)
    assert "does not beat" in " ".join(outcome.decision.reasons)
    assert outcome.version is None
    assert outcome.report.kl_text.anchors == 8
    assert list(settings.adapter_store_dir.iterdir()) == []


def test_the_next_version_starts_from_its_parent_and_is_judged_against_it(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    first = end_of(tiny_base, settings, work(log))
    more = user_log(corrections("ann", count=12), watermark=8)
    following = work(more, job="job-2", number=2, parent=first.version.name)
    second = end_of(tiny_base, settings, following)
    assert second.report.margins.current != second.report.margins.base
    assert second.report.first_loss < first.report.first_loss
    other_rank = settings.model_copy(update={"lora_rank": 2, "lora_alpha": 4})
    anew = end_of(tiny_base, other_rank, following)
    assert anew.report.margins.current == pytest.approx(second.report.margins.current, abs=1e-4)
    assert anew.report.first_loss > second.report.first_loss


def test_a_version_of_more_layers_is_judged_against_and_leaves_other_scopes_alone(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    first = end_of(tiny_base, settings, work(log)).version.name
    more = user_log(corrections("ann", count=12), watermark=8)
    following = work(more, job="job-ann", number=2, parent=first)
    expected = end_of(tiny_base, settings, following).report
    fewer = settings.model_copy(update={"lora_target_modules": ("q_proj", "v_proj")})
    works = [following, of_user("bob", count=8)]
    ends = consolidate(works, base=tiny_base, settings=fewer, progress=quiet, limits=LENIENT)
    assert ends["job-bob"].decision == Promote()
    found = ends["job-ann"].report
    assert found.margins.current == pytest.approx(expected.margins.current, abs=1e-4)
    assert found.first_loss > expected.first_loss


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_rival_that_can_not_be_read_fails_those_alone_who_need_it(tiny_base, tiny_settings, log, file):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    parent = end_of(tiny_base, settings, work(log)).version.name
    spoilt = end_of(tiny_base, settings, work(log, job="job-0", scope=Scope(kind="global"))).version.name
    (settings.adapter_store_dir / spoilt / file).write_text("{}")
    works = [work(log, job="job-ann", number=2, parent=parent, pooled=spoilt), of_user("bob", count=8)]
    ends = consolidate(works, base=tiny_base, settings=settings, progress=quiet, limits=LENIENT)
    assert isinstance(ends["job-ann"], JobFailed)
    assert f"{spoilt}, can't be loaded" in str(ends["job-ann"])
    assert ends["job-bob"].decision == Promote()


def test_norms_that_can_not_be_checked_here_fail_their_scope_alone(tiny_base, tiny_settings, log, monkeypatch):
    monkeypatch.setitem(sys.modules, "if_verifiable.ifeval.instructions_registry", None)
    settings = roomy(tiny_settings, learning_rate=1e-2)
    brief = Norm(name="brief", checker="max_words", arguments={"words": 20})
    works = [work(log, job="job-ann", norms=(brief,)), of_user("bob", count=8)]
    ends = consolidate(works, base=tiny_base, settings=settings, progress=quiet, limits=LENIENT)
    assert isinstance(ends["job-ann"], VerifiersMissing)
    assert "install the extra `verifiers`" in str(ends["job-ann"])
    assert ends["job-bob"].decision == Promote()


def test_a_parent_that_is_gone_fails_the_job(tiny_base, tiny_settings, log):
    missing = f"fs-{'0' * 12}-0001-{'0' * 12}"
    with pytest.raises(JobFailed, match=missing):
        end_of(tiny_base, tiny_settings, work(log, parent=missing))


def test_a_loss_that_is_not_finite_fails_the_job_at_its_step(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=math.inf)
    with pytest.raises(JobFailed, match=r"the loss is nan at step \d of 6"):
        end_of(tiny_base, settings, work(log))
    assert list(settings.adapter_store_dir.iterdir()) == []


def test_a_job_that_is_stopped_leaves_nothing(tiny_base, tiny_settings, log):
    class Stopped(Exception):
        pass

    def stop_while_training(_, progress):
        if progress.stage == "train" and progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        end_of(tiny_base, tiny_settings, work(log), stop_while_training)
    assert list(tiny_settings.adapter_store_dir.iterdir()) == []
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


def test_scopes_side_by_side_end_as_they_would_alone(tiny_base, tiny_settings, tmp_path):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    works = [of_user(name, count=count) for name, count in (("ann", 8), ("bob", 12), ("cleo", 3))]
    ends = consolidate(works, base=tiny_base, settings=settings, progress=quiet, limits=LENIENT)
    assert set(ends) == {"job-ann", "job-bob", "job-cleo"}
    assert isinstance(ends["job-cleo"], JobFailed)
    assert "3 usable feedbacks" in str(ends["job-cleo"])
    for of in works[:2]:
        alone = end_of(tiny_base, settings.model_copy(update={"data_dir": tmp_path / of.job}), of)
        beside = ends[of.job]
        assert beside.report.margins.candidate == pytest.approx(alone.report.margins.candidate, abs=1e-3)
        assert beside.report.kl_chat.mean_nats == pytest.approx(alone.report.kl_chat.mean_nats, rel=1e-2)
        assert beside.report.last_loss == pytest.approx(alone.report.last_loss, abs=1e-3)
        assert (settings.adapter_store_dir / beside.version.name / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("stage", ["data", "train", "measure", "judge", "publish"])
def test_a_job_that_is_taken_away_at_any_stage_leaves_the_other_whole(tiny_base, tiny_settings, stage):
    def taken(job, progress):
        if (job, progress.stage) == ("job-bob", stage):
            raise LeaseLost(job)

    settings = roomy(tiny_settings, learning_rate=1e-2)
    works = [of_user(name, count=8) for name in ("ann", "bob")]
    ends = consolidate(works, base=tiny_base, settings=settings, progress=taken, limits=LENIENT)
    assert isinstance(ends["job-bob"], LeaseLost)
    assert [p.name for p in settings.adapter_store_dir.glob("fs-*")] == [ends["job-ann"].version.name]


def test_a_users_first_adapter_starts_from_the_pooled_one_and_must_beat_it(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    everybody = {name: user_log(corrections(name, count=8)) for name in ("bob", "cleo")}
    pooled = end_of(tiny_base, settings, work(None, job="job-0", scope=Scope(kind="global"), users=everybody)).version
    own = end_of(tiny_base, settings, work(log, pooled=pooled.name))
    fresh = end_of(tiny_base, settings.model_copy(update={"data_dir": settings.data_dir / "other"}), work(log))
    assert own.report.margins.pooled == pytest.approx(pooled.report.margins.candidate, abs=0.5)
    assert own.report.margins.against_pooled is not None
    assert own.report.first_loss < fresh.report.first_loss
    assert fresh.report.margins.against_pooled is None


def test_a_scopes_own_budget_is_kept_to(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    tight = end_of(tiny_base, settings, work(log, kl_chat_budget_nats=2e-3))
    assert tight.report.kl_chat.budget_nats == 2e-3
    assert tight.report.kl_chat.within
    assert tight.report.scale < 1.0


def test_ratings_alone_can_be_learnt_from(tiny_base, tiny_settings):
    rated = [
        FeedbackEvent(
            revision=i,
            at=float(i),
            interaction=Interaction(
                id=f"chatcmpl-{i}",
                tenant="acme",
                user="ann",
                created=float(i),
                messages=(Message(role="user", content=f"prompt {i}"),),
                reply=f"reply {i} " * 3,
                version=VersionTuple(model="tiny"),
                signals=Signals(rating=1.0 if i % 2 else -1.0),
            ),
        )
        for i in range(1, 13)
    ]
    settings = roomy(tiny_settings, learning_rate=1e-2, train_steps=12)
    report = end_of(tiny_base, settings, work(user_log(rated))).report
    assert report.last_loss < report.first_loss


def test_many_users_make_one_version_with_a_watermark_each_and_absorb_nothing(tiny_base, tiny_settings):
    users = {name: user_log(corrections(name, count=6)) for name in ("ann", "bob", "cleo")}
    together = work(users["ann"], users=users, scope=Scope(kind="global"))
    settings = roomy(tiny_settings, learning_rate=1e-2)
    outcome = end_of(tiny_base, settings, together)
    assert outcome.version.watermark == {"ann": 6, "bob": 6, "cleo": 6}
    assert outcome.absorbed == ()


def test_anchors_are_96_of_each_kind_and_judges_never_steer():
    for kind in KINDS:
        steer, judge = (prompts(own_topics()[kind], use) for use in ("steer", "judge"))
        assert len(steer) == len(judge) == 48
        assert len({*steer, *judge}) == 96


def test_anchors_are_made_once(tiny_base, tmp_path):
    calls = []
    first = load_anchors(tiny_base, cache=tmp_path, limit=8, progress=lambda *step: calls.append(step))
    made = len(calls)
    second = load_anchors(tiny_base, cache=tmp_path, limit=8, progress=lambda *step: calls.append(step))
    assert len(calls) == made > 0
    for key, anchors in first.sets.items():
        assert [a.row for a in anchors] == [a.row for a in second.sets[key]]


def test_more_anchors_can_be_given_and_count_beside_ours(tiny_base, tmp_path):
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"text": {"law": ["The lessee shall", "In witness whereof", "Notwithstanding"]}}))
    found = load_anchors(tiny_base, cache=tmp_path, limit=8, more=more, progress=quiet)
    counts = {key: len(anchors) for key, anchors in found.sets.items()}
    assert counts == {("text", "steer"): 10, ("text", "judge"): 9, ("chat", "steer"): 8, ("chat", "judge"): 8}


@pytest.mark.parametrize("text", ["{", '{"poems": {}}', '{"text": {"law": [""]}}', '{"text": ["a"]}'])
def test_a_file_of_anchors_that_is_none_is_refused_with_its_path(tiny_base, tmp_path, text):
    more = tmp_path / "more.json"
    more.write_text(text)
    with pytest.raises(JobFailed, match=r"more\.json can't be used"):
        load_anchors(tiny_base, cache=tmp_path, limit=8, more=more, progress=quiet)


@pytest.mark.parametrize("broken", ["no folder", "no weights", "cut off"])
def test_a_broken_base_model_fails_with_its_path(broken, tiny_model_path, tmp_path):
    folder = tmp_path / "model"
    if broken != "no folder":
        folder.mkdir()
        for file in tiny_model_path.iterdir():
            if not (broken == "no weights" and file.suffix == ".safetensors"):
                (folder / file.name).write_bytes(file.read_bytes())
    if broken == "cut off":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(JobFailed, match=str(folder)):
        load_base(Settings(_env_file=None, model=str(folder), worker_device="cpu"))
