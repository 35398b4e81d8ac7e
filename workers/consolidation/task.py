"""One work on its way through a consolidation: its feedback in tokens, its training, where its candidate lies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from service.domain.fast_weights import FastWeights
from service.domain.feedback import BASE
from service.domain.norms import Norm
from service.errors import JobFailed
from service.settings import Settings
from service.verifiers.norms import adherence
from workers.consolidation.anchors import Anchors, Kind
from workers.consolidation.base import Base
from workers.consolidation.candidates import Adherence, Candidate, OwnContext, Style
from workers.consolidation.dataset import Dataset, build
from workers.consolidation.learner import Learner
from workers.consolidation.prepare import TRAIN_CONTEXT_TOKENS, Prepared, prepare
from workers.consolidation.work import Work
from workers.context_search.style import closeness, is_broken, weights

# As long as the longest that a norm may ask for, so that every checker asks its packages.
CHECKED_REPLY = "This is a reply. " * 300


@dataclass(frozen=True)
class Material:
    """What a work's feedback is in tokens."""

    work: Work
    training: list[Prepared]
    heldout: list[Prepared]


@dataclass(frozen=True)
class Task:
    """A work in training and judging."""

    work: Work
    heldout: list[Prepared]
    folder: Path
    """Where its candidate is exported."""
    learner: Learner


def material(work: Work, *, base: Base, settings: Settings) -> Material:
    """The two sides of a work's feedback.

    Raises:
        JobFailed: too little of it, with the counts.
        VerifiersMissing: its norms can't be checked here.
    """
    # Asked here, where the answer ends this scope alone.
    adherence(work.norms, "", CHECKED_REPLY)
    least = settings.user_min_feedbacks if work.scope.kind == "user" else settings.min_feedbacks
    dataset = build(work, min_examples=least, max_train=settings.train_steps * settings.train_batch)
    return Material(
        work,
        training=_encoded(base, work, dataset, settings, heldout=False),
        heldout=_encoded(base, work, dataset, settings, heldout=True),
    )


def _encoded(base: Base, work: Work, dataset: Dataset, settings: Settings, *, heldout: bool) -> list[Prepared]:
    budget = settings.most_context_tokens
    found = prepare(
        base,
        dataset.heldout if heldout else dataset.train,
        {user: log.fast_weights for user, log in work.users.items()},
        budget_tokens=budget if heldout else min(budget, TRAIN_CONTEXT_TOKENS),
        full_tokens=0 if heldout else budget,
        dropped=dataset.dropped,
    )
    if not found:
        raise JobFailed(f"too little data: none of it can be encoded ({dict(dataset.dropped)})")
    return found


def task(found: Material, *, slot: int, folder: Path, anchors: Anchors, settings: Settings) -> Task:
    """A work about to be trained in a slot; it starts from the version in use, else from the pooled one, else from nothing."""
    work = found.work
    budgets: dict[Kind, float] = {
        "text": work.kl_text_budget_nats or settings.kl_text_budget_nats,
        "chat": work.kl_chat_budget_nats or settings.kl_chat_budget_nats,
    }
    start = work.pooled if work.parent == BASE else work.parent
    held = _adherence(work.norms)
    learner = Learner(
        work.job, slot, found.training, budgets, anchors, settings, start=start, norms=work.norms, adherence=held
    )
    return Task(work, found.heldout, folder, learner)


def _adherence(norms: Sequence[Norm]) -> Adherence | None:
    return (lambda prompt, reply: adherence(norms, prompt, reply).reward) if norms else None


def style_of(examples: Sequence[Prepared], state: FastWeights) -> Style | None:
    """What the user's pairs tell of the style that they want; None where they tell nothing.

    A reply is as near as it is to the median of all that they wanted, whatever was asked: one of ten corrections forgets the style. What
    they only praised says nothing here, since it was said by what serves now, which would always be nearest to it.
    """
    pairs = [(p.example.reply, p.example.rejected) for p in examples if p.example.rejected is not None]
    by = weights(pairs)
    if not any(by.values()):
        return None
    shown = tuple(exemplar.reply for exemplar in state.exemplars.values())

    def near(prompt: str, reply: str) -> float:
        if is_broken(reply, prompt=prompt, shown=shown):
            return 0.0
        return median(closeness(reply, wanted, by) for wanted, _ in pairs)

    return near


def candidate(of: Task, *, slot: int, versions: Mapping[str, int], settings: Settings) -> Candidate:
    """A trained work about to be judged.

    Args:
        slot: the judges' slot for its exports.
        versions: slots of the versions in use that it is judged against, by name.
    """
    work = of.work
    log = work.users.get(work.scope.name) if work.scope.kind == "user" else None
    return Candidate(
        trained=of.learner.slot,
        slot=slot,
        folder=of.folder,
        budgets=of.learner.budgets,
        heldout=of.heldout,
        current=versions.get(work.parent),
        pooled=versions.get(work.pooled),
        context=OwnContext(log.fast_weights, log.absorbed, settings.most_context_tokens) if log else None,
        adherence=of.learner.adherence,
        style=style_of(of.learner.examples, log.fast_weights) if log else None,
    )
