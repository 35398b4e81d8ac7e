"""A whole consolidation on a tiny random model: its order, what it publishes, and how it fails."""

import json
import math

import pytest
import torch

from service.domain.feedback import FeedbackEvent, Interaction, Message, Signals, VersionTuple
from service.domain.slow_weights import NAME, AdapterVersion, Promote, Reject, Scope
from service.errors import JobFailed
from service.settings import Settings
from tests.consolidation_data import corrections, user_log
from workers.consolidation.adapters import TRAINED, Adapters
from workers.consolidation.anchors import KINDS, load_anchors, prompts
from workers.consolidation.base import load_base
from workers.consolidation.job import consolidate
from workers.consolidation.rows import Row, pack, token_logprobs
from workers.consolidation.trainer import schedule
from workers.consolidation.work import Work


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


def roomy(settings, **changes):
    """Budgets that a random model's training stays inside."""
    return settings.model_copy(update={"kl_text_budget_nats": 50.0, "kl_chat_budget_nats": 50.0, **changes})


def quiet(_):
    pass


@pytest.fixture(scope="module")
def log():
    return user_log(corrections("ann", count=8))


def test_a_consolidation_publishes_what_it_measured(tiny_base, tiny_settings, log):
    seen = []
    settings = roomy(tiny_settings, learning_rate=1e-2)
    outcome = consolidate(work(log), base=tiny_base, settings=settings, progress=seen.append)
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
    consolidate(work(log), base=tiny_base, settings=roomy(tiny_settings), progress=quiet)
    after = tiny_base.model(input_ids=ids).logits.detach()
    assert torch.equal(before, after)
    assert {name for name, _ in tiny_base.model.named_modules()} == modules
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


def test_the_same_work_gives_the_same_version(tiny_base, tiny_settings, log, tmp_path):
    names = []
    for data in ("one", "two"):
        settings = roomy(tiny_settings, learning_rate=1e-2, data_dir=tmp_path / data)
        names.append(consolidate(work(log), base=tiny_base, settings=settings, progress=quiet).version.name)
    assert names[0] == names[1]


def test_a_tight_budget_scales_down_and_the_published_file_keeps_to_it(tiny_base, tiny_settings, log):
    settings = tiny_settings.model_copy(update={"learning_rate": 1e-2, "kl_text_budget_nats": 1e-3})
    outcome = consolidate(work(log), base=tiny_base, settings=settings, progress=quiet)
    assert 0.0 < outcome.report.scale < 1.0
    assert outcome.report.kl_text.within
    assert outcome.report.kl_chat.within


def test_a_rejected_candidate_is_not_published_and_its_figures_are_told(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-12)
    outcome = consolidate(work(log), base=tiny_base, settings=settings, progress=quiet)
    assert isinstance(outcome.decision, Reject)
    assert "does not beat" in " ".join(outcome.decision.reasons)
    assert outcome.version is None
    assert outcome.report.kl_text.anchors == 8
    assert list(settings.adapter_store_dir.iterdir()) == []


def test_the_next_version_starts_from_its_parent_and_is_judged_against_it(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=1e-2)
    first = consolidate(work(log), base=tiny_base, settings=settings, progress=quiet)
    more = user_log(corrections("ann", count=12), watermark=8)
    following = work(more, job="job-2", number=2, parent=first.version.name)
    second = consolidate(following, base=tiny_base, settings=settings, progress=quiet)
    assert second.report.margins.current != second.report.margins.base
    assert second.report.first_loss < first.report.first_loss
    with Adapters.attached(tiny_base, settings) as adapters:
        assert adapters.start_from(settings.adapter_store_dir / first.version.name)
        other_rank = settings.model_copy(update={"lora_rank": 2})
    with Adapters.attached(tiny_base, other_rank) as adapters:
        assert not adapters.start_from(settings.adapter_store_dir / first.version.name)


def test_a_parent_that_is_gone_fails_the_job(tiny_base, tiny_settings, log):
    missing = f"fs-{'0' * 12}-0001-{'0' * 12}"
    with pytest.raises(JobFailed, match=missing):
        consolidate(work(log, parent=missing), base=tiny_base, settings=tiny_settings, progress=quiet)


def test_a_loss_that_is_not_finite_fails_the_job_at_its_step(tiny_base, tiny_settings, log):
    settings = roomy(tiny_settings, learning_rate=math.inf)
    with pytest.raises(JobFailed, match=r"the loss is nan at step \d of 6"):
        consolidate(work(log), base=tiny_base, settings=settings, progress=quiet)
    assert list(settings.adapter_store_dir.iterdir()) == []


def test_a_job_that_is_stopped_leaves_nothing(tiny_base, tiny_settings, log):
    class Stopped(Exception):
        pass

    def stop_while_training(progress):
        if progress.stage == "train" and progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        consolidate(work(log), base=tiny_base, settings=tiny_settings, progress=stop_while_training)
    assert list(tiny_settings.adapter_store_dir.iterdir()) == []
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


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
    report = consolidate(work(user_log(rated)), base=tiny_base, settings=settings, progress=quiet).report
    assert report.last_loss < report.first_loss


def test_many_users_make_one_version_with_a_watermark_each_and_absorb_nothing(tiny_base, tiny_settings):
    users = {name: user_log(corrections(name, count=6)) for name in ("ann", "bob", "cleo")}
    together = work(users["ann"], users=users, scope=Scope(kind="global"))
    settings = roomy(tiny_settings, learning_rate=1e-2)
    outcome = consolidate(together, base=tiny_base, settings=settings, progress=quiet)
    assert outcome.version.watermark == {"ann": 6, "bob": 6, "cleo": 6}
    assert outcome.absorbed == ()


def test_the_gradient_descends_on_what_is_trained(tiny_base, tiny_settings):
    row = Row((5, 6, 7), ((20, 21, 22),))
    with Adapters.attached(tiny_base, tiny_settings) as adapters:
        optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            packed = pack([row], device=tiny_base.device)
            loss = -token_logprobs(tiny_base.states(packed), tiny_base.head, packed.target_N).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3


def test_an_export_at_half_scale_is_half_of_the_change(tiny_base, tiny_settings, tmp_path):
    ids = torch.arange(10)[None]
    with Adapters.attached(tiny_base, tiny_settings) as adapters, torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(1e-4)
        logits = {}
        for scale in (0.0, 0.5, 1.0):
            adapters.export(tmp_path, scale=scale)
            adapters.load(tmp_path, f"at{scale * 100:.0f}")
            with adapters.on(f"at{scale * 100:.0f}"):
                logits[scale] = tiny_base.model(input_ids=ids).logits.double()
        with adapters.on(TRAINED):
            trained = tiny_base.model(input_ids=ids).logits.double()
        with adapters.on(None):
            base = tiny_base.model(input_ids=ids).logits.double()
    assert torch.equal(logits[0.0], base)
    assert torch.equal(logits[1.0], trained)
    whole, half = trained - base, logits[0.5] - base
    assert (half - whole / 2).abs().max() < 0.05 * whole.abs().max()


def test_every_example_is_drawn_equally_often_and_about_half_with_context():
    plan = schedule(12, steps=30, batch=4, seed=0)
    draws = [draw for step in plan for draw in step]
    assert {sum(i == example for i, _ in draws) for example in range(12)} == {10}
    assert 0.35 < sum(seen for _, seen in draws) / len(draws) < 0.65
    assert plan == schedule(12, steps=30, batch=4, seed=0)


def test_anchors_are_96_of_each_kind_and_judges_never_steer():
    for kind in KINDS:
        steer, judge = prompts(kind, "steer"), prompts(kind, "judge")
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
