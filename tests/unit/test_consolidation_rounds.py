"""Ten consolidations of one scope in a row, each from the version before, while the user's wish changes every time.

The KL of what was published is measured here by itself: the file as PEFT loads it, over a model of its own, logits and all.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import pytest

from service.domain.feedback import BASE
from service.domain.slow_weights import Scope
from service.settings import Settings
from tests.benchmarks.learning.prompts import load
from tests.consolidation_data import CORRECTIONS, LENIENT, correction, user_log
from tests.plain_divergence import kl_nats, load_plain
from workers.consolidation.anchors import KINDS, load_anchors
from workers.consolidation.base import Base
from workers.consolidation.dataset import REPLAY_PER_NEW, Dataset, build
from workers.consolidation.job import consolidate
from workers.consolidation.work import Outcome, Work

ROUNDS = 10
NEW = 6
"""Corrections of a round; two of them are held out."""
ENDINGS = (
    "indeed",
    "for sure",
    "mind you",
    "you know",
    "in short",
    "as a rule",
    "I think",
    "of course",
    "no doubt",
    "so they say",
)
# Student's t at 95 %, one-sided, for eight anchors: seven degrees of freedom.
T95_OF_EIGHT = 1.895


@dataclass(frozen=True)
class Round:
    """A consolidation, what it was given and what came of it."""

    work: Work
    dataset: Dataset
    outcome: Outcome


@dataclass(frozen=True)
class Rounds:
    settings: Settings
    rounds: list[Round]

    @property
    def published(self) -> list[Round]:
        return [one for one in self.rounds if one.outcome.version is not None]


@pytest.fixture(scope="module")
def ten(tiny_base: Base, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    """The ten rounds with the default budgets; each begins with new corrections past the watermark of what is in use then."""
    settings = Settings(
        _env_file=None,
        model=str(tiny_model_path),
        model_name="tiny",
        worker_device="cpu",
        data_dir=tmp_path_factory.mktemp("ten-rounds"),
        anchors=8,
        user_min_feedbacks=4,
        train_steps=6,
        train_batch=2,
        learning_rate=1e-2,
        lora_rank=4,
        lora_alpha=8,
        context_budget_tokens=400,
    )
    taught, tested = load()
    asked = list({p.ask: p.answer for p in (*taught, *tested)}.items()) + list(CORRECTIONS.items())
    events, parent, watermark, rounds = [], BASE, 0, []
    for number, ending in enumerate(ENDINGS):
        for ask, answer in asked[number * NEW : (number + 1) * NEW]:
            wanted = f"{answer[:40].rstrip('.')}, {ending}."
            events.append(correction("ann", len(events) + 1, ask, wanted, reply="That is a great question! There is"))
        work = Work(
            tenant="acme",
            scope=Scope(kind="user", name="ann"),
            job=f"job-{number}",
            number=number + 1,
            parent=parent,
            created=float(number),
            users={"ann": user_log(events, watermark=watermark)},
        )
        [end] = consolidate(
            [work], base=tiny_base, settings=settings, progress=lambda *_: None, limits=LENIENT
        ).values()
        assert isinstance(end, Outcome), end
        rounds.append(Round(work, build(work, min_examples=4, max_train=settings.train_steps * 2), end))
        if end.version is not None:
            parent, watermark = end.version.name, len(events)
    return Rounds(settings, rounds)


@pytest.fixture(scope="module")
def plain(tiny_model_path: Path):
    """The base model as anybody loads it, none of ours in it."""
    return load_plain(tiny_model_path)


def test_no_published_file_of_ten_rounds_is_over_either_budget_from_the_base(ten, plain, tiny_base, tiny_model_path):
    anchors = load_anchors(tiny_base, cache=ten.settings.data_dir / "anchors", limit=8, progress=lambda *_: None)
    assert len(ten.published) >= ROUNDS // 2
    for one in ten.published:
        version = one.outcome.version
        adapted = load_plain(tiny_model_path, ten.settings.adapter_store_dir / version.name)
        for kind in KINDS:
            reported = version.report.kl_text if kind == "text" else version.report.kl_chat
            kl_A = [kl_nats(plain, adapted, anchor.row) for anchor in anchors.of(kind, "judge")]
            budget = ten.settings.kl_text_budget_nats if kind == "text" else ten.settings.kl_chat_budget_nats
            assert fmean(kl_A) + T95_OF_EIGHT * stdev(kl_A) / math.sqrt(len(kl_A)) <= budget * 1.001, version.name
            assert max(kl_A) <= 10 * budget
            assert reported.mean_nats == pytest.approx(fmean(kl_A), rel=1e-3)


def test_without_the_budget_the_rounds_would_have_gone_further(ten):
    """Or the test above would hold by itself."""
    scaled = [one for one in ten.rounds if one.outcome.report.scale < 1.0]
    assert len(scaled) >= ROUNDS // 2
    used = [one.outcome.report.kl_text.upper95_nats / ten.settings.kl_text_budget_nats for one in ten.published]
    assert max(used) > 0.8


def test_each_round_goes_on_from_the_version_before(ten):
    parent, watermark = BASE, 0
    for one in ten.published:
        version = one.outcome.version
        assert (version.parent, one.work.users["ann"].watermark) == (parent, watermark)
        assert version.hyperparameters["started_from"] == parent
        parent, watermark = version.name, version.watermark["ann"]
    assert watermark > ROUNDS // 2 * NEW


def test_a_third_of_what_a_round_trains_on_is_older_feedback(ten):
    for one in ten.rounds[1:]:
        old = [example for example in one.dataset.train if not example.new]
        new = [example for example in one.dataset.train if example.new]
        assert len(old) == math.ceil(REPLAY_PER_NEW * len(new)) == len(one.dataset.train) // 3
        assert one.outcome.report.train_examples == len(one.dataset.train)
    replayed = {example.id for one in ten.rounds for example in one.dataset.train if not example.new}
    assert len(replayed) > NEW


def test_each_version_is_better_than_the_one_before_on_what_the_user_wants_by_then(ten):
    for one in ten.published:
        margins = one.outcome.report.margins
        assert margins.candidate > max(margins.base, margins.current)
