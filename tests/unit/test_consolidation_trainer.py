"""Training scopes side by side: as one by one, each by itself when something goes wrong, resumed as if never stopped."""

import dataclasses
import math

import pytest
import torch

from service.domain.feedback import Message
from service.domain.norms import Norm
from service.errors import JobFailed
from workers.consolidation.anchors import load_anchors
from workers.consolidation.checkpoint import Checkpoints
from workers.consolidation.dataset import Example
from workers.consolidation.learner import IDLE_STEPS, Learner, schedule
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.prepare import Prepared
from workers.consolidation.rows import Row, pack, token_logprobs
from workers.consolidation.sampling import GumbelNoise, sample
from workers.consolidation.scoring import reply_logprobs
from workers.consolidation.trainer import CHECKPOINT_STEPS, Passes, activations_checkpointed, prepare_learners, train
from workers.consolidation.work import LeaseLost

NOWHERE = Checkpoints(None)


def example(kind, number, *, rating=0.0, comment=None):
    return Example(
        id=f"int-{number}",
        user="ann",
        kind=kind,
        messages=(Message(role="user", content=f"prompt {number}"),),
        reply="x",
        rejected="y" if kind in ("correction", "preference") else None,
        rating=rating,
        comment=comment,
    )


def prepared(number, *, seed, kind="correction", context=True, comment=False):
    generator = torch.Generator().manual_seed(1000 * seed + number)

    def tokens(count):
        return tuple(torch.randint(2, 200, (count,), generator=generator).tolist())

    prompt, replies = tokens(4 + number % 3), (tokens(5 + number % 4), tokens(7))
    rating = (1.0 if number % 2 else -1.0) if kind == "rating" else 0.0
    shown = Row(tokens(9) + prompt, replies)
    return Prepared(
        example=example(kind, number, rating=rating, comment="shorter" if comment else None),
        alone=Row(prompt, replies),
        with_context=shown if context else None,
        full_context=shown if context else None,
        with_comment=Row(tokens(3) + prompt, replies[:1]) if comment else None,
    )


@pytest.fixture
def anchors(tiny_base, tmp_path):
    return load_anchors(tiny_base, cache=tmp_path / "anchors", limit=8, progress=lambda *_: None)


@pytest.fixture
def settings(tiny_settings):
    return tiny_settings.model_copy(update={"train_steps": 8, "learning_rate": 3e-3})


@pytest.fixture
def learner_of(anchors, settings):
    def made(number, *, slot=0, **changes):
        kinds = ["correction", "preference", "rating", "comment"]
        examples = [
            prepared(n, seed=number, kind=kinds[n % (1 + number % 4)], comment=n % 3 == 0) for n in range(6 + number)
        ]
        fields = {"examples": examples, "settings": settings, **changes}
        budgets = {"text": 0.02 * (number + 1), "chat": 0.1}
        return Learner(f"job-{number}", slot, budgets=budgets, anchors=anchors, **fields)

    return made


def run(base, learners, settings, *, checkpoints=NOWHERE, on_step=lambda *_: None):
    """The weights after training, by job."""
    slots = max(learner.slot for learner in learners) + 1
    with LoraStack.attached(base, Shape.of(settings), slots=slots, seed=settings.train_seed) as stack:
        train(base, stack, learners, settings=settings, checkpoints=checkpoints, on_step=on_step)
        return {learner.job: stack.weights_U_N.detach()[learner.slot].clone() for learner in learners}


def test_side_by_side_is_as_one_by_one(tiny_base, settings, learner_of):
    together = [learner_of(number, slot=number) for number in range(3)]
    weights = run(tiny_base, together, settings)
    for number, beside in enumerate(together):
        alone = learner_of(number)
        by_itself = run(tiny_base, [alone], settings)[alone.job]
        assert alone.progress.losses == pytest.approx(beside.progress.losses, abs=1e-5)
        assert alone.progress.beta == pytest.approx(beside.progress.beta, rel=1e-5)
        assert torch.allclose(weights[alone.job], by_itself, atol=1e-5)
    assert not torch.allclose(weights["job-0"], weights["job-1"], atol=1e-3)


@pytest.fixture
def loose(anchors, settings):
    """A learner of given examples whose budgets don't bind, and long enough to see a loss fall."""
    settings = settings.model_copy(update={"train_steps": 24, "learning_rate": 1e-2})

    def made(examples):
        budgets = {"text": 50.0, "chat": 50.0}
        return Learner("job", 0, examples=examples, budgets=budgets, anchors=anchors, settings=settings)

    return made


@pytest.mark.parametrize("kind", ["correction", "preference", "rating"])
def test_each_signal_is_learnt(tiny_base, loose, kind):
    learner = loose([prepared(n, seed=5, kind=kind, context=False) for n in range(4)])
    run(tiny_base, [learner], learner.settings)
    losses = learner.progress.losses
    assert sum(losses[-4:]) < sum(losses[:4]) - 1e-2


def test_a_comment_raises_what_it_would_have_had_said(tiny_base, loose):
    learner = loose([prepared(n, seed=5, kind="comment", context=False, comment=True) for n in range(4)])
    with LoraStack.attached(tiny_base, Shape.of(learner.settings)) as stack:
        train(tiny_base, stack, [learner], settings=learner.settings, checkpoints=NOWHERE, on_step=lambda *_: None)
        gained = []
        for p in learner.examples:
            packed = pack([Row(p.alone.prompt, p.alone.replies[:1])], device=tiny_base.device)
            said = learner.hindsight[p.alone]
            with torch.no_grad(), stack.on(0):
                now_N = token_logprobs(tiny_base.states(packed), tiny_base.head, packed.target_N)
            gained.append(float((said.advantages_N * (now_N - said.reference_N)).sum()))
    assert min(gained) > 0
    assert sum(gained) > 0.1


def test_one_that_runs_away_leaves_the_others_as_they_would_be(tiny_base, settings, learner_of):
    wild = settings.model_copy(update={"learning_rate": math.inf})
    learners = [learner_of(0, slot=0), learner_of(1, slot=1, settings=wild)]
    weights = run(tiny_base, learners, settings)
    assert isinstance(learners[1].failure, JobFailed)
    assert "at step 2 of 8" in str(learners[1].failure)
    assert learners[0].progress.ended == "all steps taken"
    alone = learner_of(0)
    assert torch.allclose(weights["job-0"], run(tiny_base, [alone], settings)["job-0"], atol=1e-5)


def test_one_that_is_stopped_by_its_caller_leaves_the_others_going(tiny_base, settings, learner_of):
    def stop_the_second(job, step):
        if (job, step.step) == ("job-1", 3):
            raise LeaseLost(job)

    learners = [learner_of(0, slot=0), learner_of(1, slot=1)]
    run(tiny_base, learners, settings, on_step=stop_the_second)
    assert isinstance(learners[1].failure, LeaseLost)
    assert [learner.progress.step for learner in learners] == [8, 3]


def test_a_killed_training_goes_on_from_its_checkpoint_and_ends_the_same(tiny_base, settings, learner_of, tmp_path):
    class Killed(BaseException):
        pass

    def kill_at_seven(job, step):
        if step.step == CHECKPOINT_STEPS + 2:
            raise Killed

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Killed):
        run(tiny_base, [learner_of(2)], settings, checkpoints=checkpoints, on_step=kill_at_seven)
    steps = []
    # Beside another that begins, as when the sweep packs what was left behind with what is due.
    learners = [learner_of(2, slot=1), learner_of(0, slot=0)]
    resumed = run(
        tiny_base, learners, settings, checkpoints=checkpoints, on_step=lambda job, step: steps.append((job, step.step))
    )
    assert [n for job, n in steps if job == "job-2"] == [6, 7, 8]
    assert [n for job, n in steps if job == "job-0"] == list(range(1, 9))
    unbroken = learner_of(2)
    weights = run(tiny_base, [unbroken], settings)["job-2"]
    assert torch.allclose(resumed["job-2"], weights, atol=1e-5)
    assert learners[0].progress.losses == pytest.approx(unbroken.progress.losses, abs=1e-5)


@pytest.mark.parametrize("change", ["data", "settings", "full context", "norms", "anchors", "base", "spoilt"])
def test_a_checkpoint_of_another_training_is_left_alone(tiny_base, settings, learner_of, tmp_path, change):
    checkpoints = Checkpoints(tmp_path)
    run(tiny_base, [learner_of(2)], settings, checkpoints=checkpoints)
    path = checkpoints.path("job-2")
    assert path.exists()
    following = learner_of(2)
    if change == "data":
        following = learner_of(2, examples=following.examples[:-1])
    if change == "settings":
        settings = settings.model_copy(update={"learning_rate": 1e-4})
        following = learner_of(2, settings=settings)
    if change == "full context":
        longer = [dataclasses.replace(p, full_context=p.alone) for p in following.examples]
        following = learner_of(2, examples=longer)
    if change == "norms":
        following = learner_of(2, norms=(Norm(name="title", checker="title"),))
    if change == "anchors":
        following.anchors = load_anchors(tiny_base, cache=tmp_path / "fewer", limit=4, progress=lambda *_: None)
    if change == "base":
        tiny_base = dataclasses.replace(tiny_base, sha256="1" * 64)
    if change == "spoilt":
        path.write_bytes(path.read_bytes()[:100])
    steps = []
    run(tiny_base, [following], settings, checkpoints=checkpoints, on_step=lambda _, step: steps.append(step.step))
    assert steps[0] == 1
    checkpoints.remove("job-2")
    assert list(tmp_path.glob(".job-2*")) == []


class SmallMemory:
    """A base that runs out of memory on a pass of more than so many tokens."""

    def __init__(self, base, tokens):
        self._base, self._tokens = base, tokens

    def __getattr__(self, name):
        return getattr(self._base, name)

    def states(self, packed):
        if torch.is_grad_enabled() and packed.tokens_B_T.numel() > self._tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._base.states(packed)


def gradient_of(base, learner, settings, *, most_tokens=10_000):
    with LoraStack.attached(base, Shape.of(settings)) as stack:
        prepare_learners(base, [learner])
        passes = Passes(base, stack, most_tokens=most_tokens)
        [sums] = passes.run(learner.items(0), 1)
        return stack.weights_U_N.grad.clone(), sums, passes.most_tokens


def test_out_of_memory_halves_the_passes_and_the_gradient_is_the_same(tiny_base, settings, learner_of):
    whole, sums, _ = gradient_of(tiny_base, learner_of(1), settings)
    halved, same, tokens = gradient_of(SmallMemory(tiny_base, 130), learner_of(1), settings)
    assert tokens < 10_000
    assert torch.allclose(whole, halved, atol=1e-6)
    assert same.loss == pytest.approx(sums.loss, abs=1e-5)
    assert whole.abs().max() > 1e-4


class Counting(SmallMemory):
    """A base that counts the tokens which it runs with a gradient, padding too."""

    def __init__(self, base, memory_tokens=math.inf):
        super().__init__(base, memory_tokens)
        self.tokens = 0

    def states(self, packed):
        self.tokens += packed.tokens_B_T.numel() if torch.is_grad_enabled() else 0
        return super().states(packed)


def test_what_rows_have_in_common_is_run_once_and_their_gradient_is_that_of_each_alone(tiny_base, settings, learner_of):
    def shown(number, begins):
        plain = prepared(number, seed=3)
        row = Row((*range(begins, begins + 60), *plain.alone.prompt), plain.alone.replies)
        return dataclasses.replace(plain, alone=row, with_context=row)

    def passes_of(most_tokens, *, differing=0, memory_tokens=math.inf):
        learner = learner_of(1, examples=[shown(n, 2 + differing * n) for n in range(4)])
        base = Counting(tiny_base, memory_tokens)
        gradient, sums, _ = gradient_of(base, learner, settings, most_tokens=most_tokens)
        assert sums.tokens == sum(len(item.row) for item in learner.items(0))
        return gradient, sums.loss, base.tokens

    apart, loss, _ = passes_of(1)
    together, same, tokens = passes_of(160)
    *_, of_others = passes_of(160, differing=1)
    # Two rows a step, so their context once less.
    assert tokens <= of_others - 60
    assert same == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(apart, together, atol=1e-6)
    assert apart.abs().max() > 1e-4
    # The two together have 96 tokens, each alone 78.
    split, *_ = passes_of(160, memory_tokens=90)
    assert torch.allclose(apart, split, atol=1e-6)


def test_a_row_that_fits_no_memory_fails_its_scope_alone(tiny_base, settings, learner_of):
    first = learner_of(1)
    anchored = [anchor.row for anchors in first.anchors.sets.values() for anchor in anchors]
    longest = max(len(row) for row in (*first.rows(), *learner_of(0).rows(), *anchored))
    learners = [learner_of(0, slot=0), learner_of(1, slot=1)]
    first = learners[1].examples[0]
    long = dataclasses.replace(first, with_context=None, alone=Row(tuple(range(2, 250)), first.alone.replies))
    learners[1] = learner_of(1, slot=1, examples=[long, *learners[1].examples[1:]])
    run(SmallMemory(tiny_base, longest + 10), learners, settings)
    assert "does not fit the device's memory" in str(learners[1].failure)
    assert learners[0].failure is None
    assert learners[0].progress.step == 8


def test_activations_computed_again_give_the_same_gradient(tiny_base, settings, learner_of, monkeypatch):
    plain, *_ = gradient_of(tiny_base, learner_of(1), settings)
    monkeypatch.setattr("workers.consolidation.trainer.CHECKPOINTED_FROM_PARAMETERS", 1)
    with activations_checkpointed(tiny_base):
        again, *_ = gradient_of(tiny_base, learner_of(1), settings)
        assert tiny_base.model.is_gradient_checkpointing
    assert torch.allclose(plain, again, atol=1e-6)
    assert not tiny_base.model.training


def test_activations_computed_again_leave_the_models_own_samples_as_they_are(
    tiny_base, settings, learner_of, monkeypatch
):
    drawn = []
    for parameters in (math.inf, 1):
        monkeypatch.setattr("workers.consolidation.trainer.CHECKPOINTED_FROM_PARAMETERS", parameters)
        learner = learner_of(1, adherence=lambda _, reply: sum(ord(c) % 2 == 0 for c in reply) / max(len(reply), 1))
        run(tiny_base, [learner], settings)
        drawn.append([row for row, _ in learner.rewarded])
    assert drawn[0]
    assert drawn[1] == drawn[0]


def test_a_scope_that_goes_on_learning_takes_all_its_steps(tiny_base, loose):
    learner = loose([prepared(n, seed=5, context=False) for n in range(4)])
    run(tiny_base, [learner], learner.settings)
    assert (learner.progress.step, learner.progress.ended) == (24, "all steps taken")
    assert learner.progress.step > IDLE_STEPS


def test_a_scope_that_learns_no_more_is_left_alone(tiny_base, settings, learner_of):
    idle = settings.model_copy(update={"learning_rate": 1e-12, "train_steps": 40})
    learner = learner_of(0, settings=idle)
    run(tiny_base, [learner], idle)
    assert learner.progress.ended == "no better for an epoch"
    assert 2 * IDLE_STEPS <= learner.progress.step < 40


def test_steps_on_easier_and_harder_examples_are_no_sign_that_nothing_is_learnt(settings, learner_of):
    """The losses that ended trainings after eleven steps: the first step's examples were the easiest."""
    longer = settings.model_copy(update={"train_steps": 40})
    learner = learner_of(0, settings=longer)
    for step in range(40):
        hard = 0.3 if step == 0 else 1.0 + 0.5 * (step % 3)
        learner.took(loss=1.0, feedback_loss=hard * 0.97**step, kl_nats={"text": 0.0, "chat": 0.0}, tokens=1)
    assert learner.progress.ended == "all steps taken"


def test_a_limit_of_tokens_ends_the_training_with_what_it_has(tiny_base, settings, learner_of):
    limited = settings.model_copy(update={"train_token_limit": 300})
    learner = learner_of(0, settings=limited)
    run(tiny_base, [learner], limited)
    assert learner.progress.ended == "the limit of tokens is reached"
    assert 0 < learner.progress.step < 8


def test_a_context_teaches_only_where_it_helps(tiny_base, settings, loose):
    examples = [prepared(n, seed=11, kind="preference") for n in range(24)]

    def gain(p):
        alone, shown = reply_logprobs(tiny_base, [p.alone, p.full_context])
        return float((shown[0] - shown[1]) - (alone[0] - alone[1]))

    helped = [p for p in examples if gain(p) > 0.05][:5]
    hurt = [p for p in examples if gain(p) < -0.05][:5]
    for chosen, distills in ((helped, True), (hurt, False)):
        assert len(chosen) == 5
        learner = loose(chosen)
        run(tiny_base, [learner], settings)
        assert (learner.distills, bool(learner.distilled)) == (distills, distills)


def test_every_example_is_drawn_equally_often_and_about_half_with_context():
    plan = schedule(12, steps=30, batch=4, seed=0)
    draws = [draw for step in plan for draw in step]
    assert {sum(i == example for i, _ in draws) for example in range(12)} == {10}
    assert 0.35 < sum(seen for _, seen in draws) / len(draws) < 0.65
    assert plan == schedule(12, steps=30, batch=4, seed=0)


def test_norms_are_learnt_from_the_models_own_replies(tiny_base, loose):
    """The reward is for characters of even code, of which the random model says about a half; nothing else in the data speaks for them."""
    learner = loose([prepared(n, seed=5, kind="comment", context=False) for n in range(4)])
    learner.settings = learner.settings.model_copy(update={"train_steps": 120})
    learner.__post_init__()
    learner.adherence = lambda _, reply: sum(ord(c) % 2 == 0 for c in reply) / max(len(reply), 1)
    with LoraStack.attached(tiny_base, Shape.of(learner.settings)) as stack:
        train(tiny_base, stack, [learner], settings=learner.settings, checkpoints=NOWHERE, on_step=lambda *_: None)

        def held(slots):
            prompts = [p.alone.prompt for p in learner.examples] * 8
            with stack.on(slots):
                replies = sample(
                    tiny_base, prompts, max_new_tokens=16, noise=GumbelNoise(range(32), device=tiny_base.device)
                )
            return sum(learner.adherence("", tiny_base.tokenizer.decode(reply)) for reply in replies) / len(replies)

        assert learner.progress.step == learner.settings.train_steps
        assert held(0) > held(None) + 0.08
