"""One user's search: from feedback to a population of contexts. Knows nothing of Redis, leases or Celery."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from service.domain.context import Count, choose
from service.domain.events import Member, OptimizeReport
from service.domain.fast_weights import FastWeights
from service.domain.feedback import BASE
from service.domain.items import Guideline, Item
from workers.consolidation.dataset import Example, split
from workers.context_search.adapter import ContextAdapter, evolve
from workers.context_search.candidates import Candidate, Pool
from workers.context_search.duplicates import Duplicates
from workers.context_search.generated import Generator, compare, not_losing
from workers.context_search.judge import Judge, Scorer, median
from workers.context_search.mutations import Mutations
from workers.context_search.proof import Gains, Proof
from workers.context_search.reflection import Reflection
from workers.context_search.selection import members, ranked, standing
from workers.context_search.trials import on_trial

# Fewer say nothing of a context.
MIN_EXAMPLES = 3
# From here on a third of them is kept from the search, to tell what it found from what it made up.
HELDOUT_FROM = 6
HELDOUT_SHARE = 1 / 3
# More would be nearer to what is served, and each costs a pass over the context.
FOLDS = 3
# An item is dropped only on the word of so many later feedbacks.
JUDGES = 3
# Challengers that are compared on generated replies.
MAX_CHALLENGERS = 2


@dataclass(frozen=True)
class Work:
    """What one search works on."""

    state: FastWeights
    examples: tuple[Example, ...]
    """The user's standing feedback that can judge, oldest first."""
    revisions: dict[str, int]
    """Interaction id -> revision of its latest feedback."""
    model: str
    """What vLLM knows the base model by."""
    adapter: str
    """The version in use, or `base`: contexts are scored under it."""
    absorbed: frozenset[str]
    """What it makes unnecessary."""
    budget_tokens: int
    count: Count

    @property
    def served_model(self) -> str:
        """What vLLM is asked for."""
        return self.model if self.adapter == BASE else self.adapter


@dataclass(frozen=True)
class Means:
    """What a search asks of the world, and how much."""

    scorer: Scorer
    generator: Generator
    find_duplicates: Callable[[Sequence[Guideline]], Awaitable[Duplicates]]
    reflection: Callable[[Pool], Reflection | None]
    metric_calls: int
    """Most scorings of a context on one feedback while it searches."""
    cancelled: Callable[[], bool]


@dataclass(frozen=True)
class Found:
    """What a search found: the fields of a population event."""

    members: tuple[Member, ...]
    inferred: tuple[Guideline, ...]
    merged: dict[str, str]
    report: OptimizeReport
    improved: bool = False
    """Whether something new leads."""


async def search(work: Work, means: Means, *, seed: int) -> Found:
    """The user's population, evolved from what serves now. With too little feedback nothing but near-duplicates is looked at.

    Raises:
        EngineUnavailable: vLLM is away; what serves now should stay.
    """
    started = time.monotonic()
    train, heldout = sides(work.examples)
    pool, similar = await _pool(work, means, train, heldout)
    if len(train) < MIN_EXAMPLES:
        kept = _as_they_serve(work.state, work.adapter)
        return Found(kept, _inferred(pool, kept), pool.merged, OptimizeReport(instances=len(train)))
    run = _Run(work, means, train, pool, Judge(pool, scorer=means.scorer, model=work.served_model))
    gains = await run.evolve(similar, seed=seed)
    generated, verified = await run.compare(gains)
    allowed = {c: gains[c] for c in gains if c in run.incumbents or c in verified}
    chosen = standing(run.ranked(allowed), allowed)
    found = members(chosen, allowed)
    before, after = await run.judge.gains([(run.served[0], heldout), (chosen[0], heldout)])
    report = OptimizeReport(
        instances=len(train),
        heldout=len(heldout),
        candidates=run.tried,
        metric_calls=run.judge.calls,
        margin_before=median(run.margins_before),
        margin_after=median(gains[chosen[0]]),
        heldout_before=median(before) if before else None,
        heldout_after=median(after) if after else None,
        generated=generated,
        reflective=run.reflective,
        seconds=round(time.monotonic() - started, 3),
    )
    improved = chosen[0] not in run.served
    return Found(found, _inferred(pool, found), pool.merged, report, improved)


async def _pool(
    work: Work, means: Means, train: Sequence[Example], heldout: Sequence[Example]
) -> tuple[Pool, dict[str, set[str]]]:
    """What candidates are made of, and which of its guidelines say nearly the same as newer ones."""
    trials = on_trial(work.state, train)
    found = await means.find_duplicates([*work.state.guidelines.values(), *trials])
    pool = Pool(
        work.state,
        inferred=[g for g in trials if g.id not in found.merged],
        merged={name: into for name, into in found.merged.items() if name in work.state.guidelines},
        absorbed=work.absorbed,
        budget_tokens=work.budget_tokens,
        count=work.count,
        fixed=fixed(work),
        folds=[*([train[n] for n in places] for places in folds(train)), heldout],
    )
    return pool, found.similar


class _Run:
    """One search's candidates and what is known of them."""

    def __init__(self, work: Work, means: Means, train: Sequence[Example], pool: Pool, judge: Judge) -> None:
        self.served = serving_now(work, pool)
        """What serves now, the leading one first."""
        self.incumbents = self.served
        """The same, without inferred guidelines that have failed since."""
        self.margins_before: list[float] = []
        self.judge = judge
        self.tried = 0
        self.reflective = False
        self._work = work
        self._means = means
        self._train = train
        self._pool = pool

    def ranked(self, gains: Gains) -> list[Candidate]:
        prices = {candidate: self._pool.price(candidate) for candidate in gains}
        return ranked(gains, prices, incumbents=self.incumbents)

    async def evolve(self, similar: dict[str, set[str]], *, seed: int) -> Gains:
        """The gains of all candidates that were scored on all examples, unproven guidelines taken out."""
        known = await self.judge.gains([(candidate, self._train) for candidate in self.incumbents])
        gains: Gains = dict(zip(self.incumbents, known, strict=True))
        self.margins_before = known[0]
        start = self.ranked(gains)[0]
        mutations = Mutations(self._pool, random=Random(seed), similar=similar)
        mutations.unseen(start)
        reflection = self._means.reflection(self._pool)
        loop = asyncio.get_running_loop()

        def on_loop(work: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        adapter = ContextAdapter(
            self.judge,
            mutations,
            examples=self._train,
            start=gains[start],
            queued=[*self.incumbents, *seeds(self._work, self._pool)],
            budget=self._means.metric_calls,
            on_loop=on_loop,
            cancelled=self._means.cancelled,
            reflection=reflection,
        )
        await asyncio.to_thread(evolve, adapter, start, self._train, folds=folds(self._train), seed=seed)
        self.tried = mutations.tried
        self.reflective = reflection is not None and reflection.edits > 0
        proven = await Proof(self.judge, self._train, self.incumbents).of({**gains, **adapter.full})
        return await self._with_incumbents(proven)

    async def _with_incumbents(self, proven: Gains) -> Gains:
        """The gains with those of what serves now, which may have held a guideline that failed its proof."""
        guidelines = self._pool.state.guidelines
        held = {name for candidate in proven for name in candidate.guidelines}
        failed = {name for name, g in guidelines.items() if not g.stated and name not in held}
        self.incumbents = list(dict.fromkeys(self._pool.fitted(c.without(failed)) for c in self.served))
        missing = [c for c in self.incumbents if c not in proven]
        found = await self.judge.gains([(c, self._train) for c in missing])
        return proven | dict(zip(missing, found, strict=True))

    async def compare(self, gains: Gains) -> tuple[dict[str, float], list[Candidate]]:
        """The scores of generated replies by who made them, and the challengers that did not lose by them."""
        order = self.ranked(gains)
        challengers = [c for c in standing(order, gains) if c not in self.incumbents][:MAX_CHALLENGERS]
        if not challengers:
            return {}, []
        incumbent = next(c for c in order if c in self.incumbents)
        scores = await compare(
            [incumbent, *challengers],
            self._train,
            pool=self._pool,
            generator=self._means.generator,
            model=self._work.served_model,
        )
        names = ("incumbent", "challenger", "runner_up")
        return dict(zip(names, scores.values(), strict=False)), not_losing(scores, incumbent)


def sides(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(search, held-out): where there is enough, a third by the hash of its prompt is kept from the search."""
    return split(examples, share=HELDOUT_SHARE) if len(examples) >= HELDOUT_FROM else (list(examples), [])


def folds(examples: Sequence[Example]) -> list[range]:
    """The places of examples that judge together, old and new in each fold."""
    return [range(n, len(examples), FOLDS) for n in range(min(FOLDS, len(examples)))]


def fixed(work: Work) -> frozenset[str]:
    """What every candidate holds: what was put there by hand, and what too little feedback came after to judge it."""

    def judges(item: Item) -> int:
        return sum(work.revisions[e.id] >= item.renewed and e.id not in item.sources for e in work.examples)

    items = work.state.items.values()
    return frozenset(item.id for item in items if item.by_hand or (item.stated and judges(item) < JUDGES))


def serving_now(work: Work, pool: Pool) -> list[Candidate]:
    """The contexts that chats are served with now, the leading one first."""
    members = work.state.population_under(work.adapter).members
    served = [_served(work, member) for member in members or (None,)]
    return list(dict.fromkeys(map(pool.fitted, served)))


def seeds(work: Work, pool: Pool) -> list[Candidate]:
    """Where else to start: the newest population, whatever its adapter; without one; all that fits, and of each kind alone."""
    guidelines, exemplars = tuple(g.id for g in pool.guidelines), tuple(x.id for x in pool.exemplars)
    return [
        *(_served(work, member) for member in work.state.population.members),
        _served(work, None),
        Candidate(guidelines, exemplars),
        Candidate(exemplars=exemplars),
        Candidate(guidelines),
    ]


def _as_they_serve(state: FastWeights, adapter: str) -> tuple[Member, ...]:
    """The population's members with what has joined them: computed anew, they hold no more than they list."""

    def items(member: Member) -> tuple[str, ...]:
        newer = sorted((i for i in state.items.values() if i.renewed > member.basis), key=lambda i: (i.born, i.id))
        names = dict.fromkeys((*map(state.resolve, member.items), *(item.id for item in newer)))
        return tuple(name for name in names if name in state.items)

    members = state.population_under(adapter).members
    return tuple(member.model_copy(update={"items": items(member)}) for member in members)


def _served(work: Work, member: Member | None) -> Candidate:
    context = choose(
        work.state, absorbed=work.absorbed, budget_tokens=work.budget_tokens, count=work.count, member=member
    )
    return Candidate.serving(context, order=context.items)


def _inferred(pool: Pool, chosen: Sequence[Member]) -> tuple[Guideline, ...]:
    """The guidelines that nobody has said and that the population holds."""
    held = {name for member in chosen for name in member.items}
    return tuple(g for name, g in pool.state.guidelines.items() if name in held and not g.stated)
