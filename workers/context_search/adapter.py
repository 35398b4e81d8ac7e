"""Our end of gepa's optimizer: candidates scored by the judge, edited by mutations that need no language model, or by one where there is.

gepa (PyPI, arXiv 2507.19457) picks the parent from the Pareto front over instances, judges a child on a minibatch first, and scores it on
all instances where it got better. It is synchronous and runs in a thread; what it asks for is computed on the event loop.
"""

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, cast

from gepa.api import optimize
from gepa.core.adapter import EvaluationBatch
from gepa.core.state import GEPAState

from workers.consolidation.dataset import Example
from workers.context_search.candidates import COMPONENT, Candidate
from workers.context_search.judge import Judge
from workers.context_search.mutations import Mutations
from workers.context_search.reflection import Reflection

# gepa sums scores over a minibatch. Squashed so, one example can't outvote the others: half a nat per token more than at the start is
# nearly all there is to win on one.
SQUASH_PER_NAT = 4.0
# One edit in so many is left to the reflection model, where there is one.
REFLECT_EVERY = 3

T = TypeVar("T")
OnLoop = Callable[[Coroutine[Any, Any, T]], T]
"""Runs a coroutine on the event loop and waits for it, from gepa's thread."""


class ContextAdapter:
    """gepa's view of one user's search.

    Args:
        start: the gains of the candidate that the search starts from.
        queued: candidates to try before any edit.
        budget: most scorings of a context on an example; the search ends before it would need more.
        cancelled: whether to stop at once.
    """

    def __init__(
        self,
        judge: Judge,
        mutations: Mutations,
        *,
        examples: Sequence[Example],
        start: Sequence[float],
        queued: Sequence[Candidate],
        budget: int,
        on_loop: OnLoop[Any],
        cancelled: Callable[[], bool],
        reflection: Reflection | None = None,
    ) -> None:
        self.full: dict[Candidate, list[float]] = {}
        """Candidate -> its gain on every example, of those that were scored on all."""
        self.failed: Exception | None = None
        """gepa goes on where an edit fails; we don't hide it."""
        self._judge = judge
        self._mutations = mutations
        self._examples = examples
        self._start = {example.id: gain for example, gain in zip(examples, start, strict=True)}
        self._queue = list(queued)
        self._most_calls = judge.calls + budget
        self._on_loop = on_loop
        self._cancelled = cancelled
        self._reflection = reflection
        self._edits = 0
        self._exhausted = False

    def evaluate(
        self, batch: list[Example], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Example, float]:
        return self.batch_evaluate([(candidate, batch)])[0]

    def batch_evaluate(
        self, items: list[tuple[dict[str, str], list[Example]]]
    ) -> list[EvaluationBatch[Example, float]]:
        """Scores in (0, 1), 0.5 for what serves as well as the start; outputs are gains in nats per token."""
        asked = [(Candidate.of(components), batch) for components, batch in items]
        before = self._judge.calls
        found = self._on_loop(self._judge.gains(asked))
        calls = self._judge.calls - before
        batches = []
        for (candidate, batch), gains in zip(asked, found, strict=True):
            by_id = {example.id: gain for example, gain in zip(batch, gains, strict=True)}
            if len(by_id) == len(self._examples):
                self.full[candidate] = [by_id[example.id] for example in self._examples]
            price = self._judge.pool.price(candidate)
            scores = [squashed(gain - self._start[e.id] - price) for e, gain in zip(batch, gains, strict=True)]
            batches.append(
                EvaluationBatch(outputs=gains, scores=scores, trajectories=list(batch), num_metric_calls=calls)
            )
            calls = 0
        return batches

    def make_reflective_dataset(
        self,
        candidate: dict[str, str],
        eval_batch: EvaluationBatch[Example, float],
        components_to_update: list[str],
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """The minibatch's examples with the gain on each."""
        pairs = zip(eval_batch.trajectories or [], eval_batch.outputs, strict=True)
        return {COMPONENT: [{"example": example, "gain": gain} for example, gain in pairs]}

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A child of the candidate, or nothing where there is none to try."""
        try:
            child = self._child(
                Candidate.of(candidate), [record["example"] for record in reflective_dataset[COMPONENT]]
            )
        except Exception as error:
            self.failed = error
            raise
        return child.components() if child is not None else {}

    def _child(self, parent: Candidate, examples: Sequence[Example]) -> Candidate | None:
        while self._queue:
            if queued := self._mutations.unseen(self._queue.pop(0)):
                return queued
        self._edits += 1
        if self._reflection is not None and self._edits % REFLECT_EVERY == 0:
            edited = self._on_loop(self._reflection.edit(parent, examples))
            if edited is not None and (child := self._mutations.unseen(edited)):
                return child
        child = self._mutations.child(parent, [other for other in self.full if other != parent])
        self._exhausted = child is None
        return child

    def stops(self, gepa_state: object) -> bool:
        """gepa's stopper: no budget for one more candidate, nothing left to try, or nobody waits any more."""
        spent = self._judge.calls + len(self._examples) > self._most_calls
        return spent or self._exhausted or self.failed is not None or self._cancelled()


class FoldByFold:
    """gepa's batch sampler: a child is judged on one fold first, whose examples share their context in the prefix cache.

    Args:
        folds: of the examples, as places in their sequence.
    """

    def __init__(self, folds: Sequence[Sequence[int]]) -> None:
        self._folds = folds

    def next_minibatch_ids(self, loader: object, state: GEPAState[float, int]) -> list[int]:
        return list(self._folds[state.i % len(self._folds)])


def squashed(better: float) -> float:
    """What is won or lost (nats per token) as a score in (0, 1)."""
    return 1 / (1 + math.exp(-SQUASH_PER_NAT * max(min(better, 8.0), -8.0)))


def evolve(
    adapter: ContextAdapter,
    start: Candidate,
    examples: Sequence[Example],
    *,
    folds: Sequence[Sequence[int]],
    seed: int,
) -> None:
    """Run gepa from `start` until the adapter stops it; what it found is in `adapter.full`.

    Raises:
        EngineUnavailable: the scorer is away.
    """
    optimize(
        seed_candidate=start.components(),
        trainset=list(examples),
        # Its protocol has the proposer as an attribute that may be None.
        adapter=cast(Any, adapter),
        batch_sampler=FoldByFold(folds),
        skip_perfect_score=False,
        stop_callbacks=adapter.stops,
        logger=_Silent(),
        track_best_outputs=False,
        seed=seed,
    )
    if adapter.failed is not None:
        raise adapter.failed


class _Silent:
    """gepa prints its progress; ours is in the report."""

    def log(self, message: str) -> None:
        pass
