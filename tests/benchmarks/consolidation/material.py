"""What all arms train on: users with corrections of their own, encoded by the very code that a consolidation uses.

A user has a dozen corrections to one question each, and an ending of their own that they want on every reply; which questions they
asked differs, so that no two users' rows have the same lengths. The context of each is the fold of their own log, as it is served.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from service.domain.slow_weights import Scope
from service.settings import Settings
from tests.benchmarks.learning.prompts import load
from tests.consolidation_data import CORRECTIONS, correction, user_log
from workers.consolidation.anchors import load_anchors
from workers.consolidation.base import Base
from workers.consolidation.learner import Learner, Progress
from workers.consolidation.task import material
from workers.consolidation.work import Work

TENANT = "bench"
CORRECTED = 12
"""Of each user; three of them are held out to judge by, so nine train."""
ENDINGS = ("indeed", "for sure", "mind you", "so they say", "in short", "as a rule", "I think", "of course")


def learners(base: Base, settings: Settings, *, users: int) -> list[Learner]:
    """So many users' trainings, not yet prepared; the same each time."""
    anchors = load_anchors(base, cache=settings.data_dir / "anchors", limit=settings.anchors, progress=lambda *_: None)
    budgets = {"text": settings.kl_text_budget_nats, "chat": settings.kl_chat_budget_nats}
    found = [material(work(number), base=base, settings=settings) for number in range(users)]
    return [Learner(of.work.job, slot, of.training, dict(budgets), anchors, settings) for slot, of in enumerate(found)]


def work(number: int) -> Work:
    """One user's consolidation."""
    user = f"user-{number:02d}"
    asked = random.Random(number).sample(list(questions().items()), CORRECTED)
    ending = ENDINGS[number % len(ENDINGS)]
    events = [
        correction(user, revision, ask, f"{answer.rstrip('.')}, {ending}.")
        for revision, (ask, answer) in enumerate(asked, start=1)
    ]
    return Work(
        tenant=TENANT,
        scope=Scope(kind="user", name=user),
        job=f"job-{number:02d}",
        number=1,
        created=1.0,
        users={user: user_log(events)},
    )


def questions() -> dict[str, str]:
    """Each question with a short plain answer."""
    taught, tested = load()
    plain = {prompt.ask: prompt.answer for prompt in (*taught, *tested)}
    return plain | {ask: wanted.replace(", indeed", "") for ask, wanted in CORRECTIONS.items()}


def afresh(prepared: Sequence[Learner], users: Sequence[int], *, step: int) -> list[Learner]:
    """These users' trainings as if they had just come to this step, in slots from 0 on."""
    chosen = [prepared[user % len(prepared)] for user in users]
    return [replace(of, slot=slot, progress=Progress(step=step)) for slot, of in enumerate(chosen)]
