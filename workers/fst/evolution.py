"""The fast weights' half of a cycle: gepa evolves the population with the weights fixed.

gepa (PyPI, arXiv 2507.19457) picks a parent from the Pareto front over problems, tries a child on a minibatch, and scores on all anchor
problems what did better. A child is one small edit away, of several the one that replies of before speak for (`promise.py`). A context is
scored on a problem once: what gepa asks for again is remembered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gepa.api import optimize
from gepa.core.adapter import EvaluationBatch
from gepa.core.state import GEPAState
from gepa.proposer.base import CandidateProposal
from gepa.strategies.acceptance import StrictImprovementAcceptance

from service.verifiers import Problem
from workers.fst.contexts import TaskContext
from workers.fst.edits import Edits
from workers.fst.reflection import Reflection
from workers.fst.rollouts import Asked, Rollout
from workers.fst.standing import Standing

COMPONENT = "context"
# A child is tried on so many problems first.
MINIBATCH = 4
# So many children are drawn for each that is tried, where replies of before tell which of them promises most.
SCREENED = 6
# One edit in so many is left to the reflection model, where there is one.
REFLECT_EVERY = 3

Roll = Callable[[Sequence[Asked]], list[Rollout]]
"""One scored reply to each that is asked, with the weights as they are."""
Promise = Callable[[TaskContext, Sequence[TaskContext]], Sequence[float]]
"""(a parent, its children) -> how much more than the parent each child may earn."""


@dataclass(frozen=True)
class Evolved:
    """What came of an evolution."""

    population: tuple[TaskContext, ...]
    """K contexts, the best first; where fewer were found, the best ones again."""
    rewards: tuple[float, ...]
    """Mean reward of each on the anchor problems."""
    samples: int
    """Replies that it took."""
    tried: int
    """Contexts that were scored on some problem."""
    replies: tuple[Rollout, ...]
    """To the anchor problems, under the contexts of the population: drawn by the weights that training goes on from."""


def evolve(
    members: Sequence[TaskContext],
    problems: Sequence[Problem],
    *,
    size: int,
    budget: int,
    roll: Roll,
    edits: Edits,
    price: Callable[[TaskContext], int],
    reflection: Reflection | None,
    seed: int,
    standings: Sequence[Standing] = (),
    promise: Promise | None = None,
) -> Evolved:
    """The best `size` contexts that can be found from `members`.

    Args:
        problems: the anchor subset of the coming problems, each once.
        budget: most replies scored for new contexts; the members' own on the anchors come before that.
        price: of equally good contexts the cheaper one is kept: tokens.
        standings: of members on the same task. Half a dozen replies are mostly luck, so those of the last cycle's steps count beside them.
        promise: which children are worth a try; without it they are tried as they are drawn.
    """
    search = _Search(problems, roll=roll, edits=edits, reflection=reflection, standings=standings, promise=promise)
    members = list(dict.fromkeys(members))
    for member in members:
        edits.unseen(member)
    search.score(members, problems)
    search.begin(members, budget=budget)
    best = max(members, key=search.worth)
    if budget >= len(problems):
        _optimize(search, best, seed=seed)
    ranked = sorted(search.complete, key=lambda c: (-search.worth(c), price(c)))[:size]
    population = [ranked[n % len(ranked)] for n in range(size)]
    return Evolved(
        population=tuple(population),
        rewards=tuple(search.mean(context) for context in population),
        samples=search.samples,
        tried=len(search.found),
        replies=tuple(reply for context in dict.fromkeys(population) for reply in search.found[context].values()),
    )


def _optimize(search: "_Search", start: TaskContext, *, seed: int) -> None:
    optimize(
        seed_candidate=components(start),
        trainset=list(search.problems),
        # Its protocol has the proposer as an attribute that may be None.
        adapter=cast(Any, search),
        reflection_minibatch_size=min(MINIBATCH, len(search.problems)),
        skip_perfect_score=False,
        acceptance_criterion=_MembersToo(search),
        stop_callbacks=search.stops,
        logger=_Silent(),
        track_best_outputs=False,
        seed=seed,
    )
    if search.failed is not None:
        raise search.failed


def components(context: TaskContext) -> dict[str, str]:
    """A context as gepa's one text component."""
    return {COMPONENT: context.model_dump_json()}


class _Search:
    """gepa's view of one evolution."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        roll: Roll,
        edits: Edits,
        reflection: Reflection | None,
        standings: Sequence[Standing],
        promise: Promise | None,
    ) -> None:
        self.problems = problems
        self.found: dict[TaskContext, dict[str, Rollout]] = {}
        """Context -> problem's id -> its one reply."""
        self.samples = 0
        self.members: set[TaskContext] = set()
        self.failed: Exception | None = None
        """gepa goes on where an edit fails; we don't hide it."""
        self._roll = roll
        self._edits = edits
        self._reflection = reflection
        self._standings = {standing.context: standing for standing in standings}
        self._promise = promise
        self._queue: list[TaskContext] = []
        self._most = 0
        self._tried = 0
        self._exhausted = False

    def begin(self, members: Sequence[TaskContext], *, budget: int) -> None:
        self.members = set(members)
        # The best starts the search; the others are put before gepa as children that cost nothing.
        self._queue = sorted(members, key=self.worth, reverse=True)[1:]
        self._most = self.samples + budget

    @property
    def complete(self) -> list[TaskContext]:
        """Contexts that were scored on all problems."""
        return [context for context, replies in self.found.items() if len(replies) == len(self.problems)]

    def mean(self, context: TaskContext) -> float:
        replies = self.found[context]
        return sum(r.reward for r in replies.values()) / len(replies)

    def worth(self, context: TaskContext) -> float:
        """What a context is ranked by: its mean on the anchor problems and, for a member, what it earned in the steps.

        The latter as if it had been earned now, since the weights have moved: the members' common mean and its own advantage.
        """
        standing = self._standings.get(context)
        if standing is None:
            return self.mean(context)
        peers = [self.mean(other) for other in self._standings if other in self.found]
        earned = sum(peers) / len(peers) + standing.advantage
        anchors = len(self.found[context])
        return (anchors * self.mean(context) + standing.replies * earned) / (anchors + standing.replies)

    def score(self, contexts: Sequence[TaskContext], problems: Sequence[Problem]) -> int:
        """Score what was not scored before; how many replies that took."""
        asked = [
            Asked(problem, context)
            for context in contexts
            for problem in problems
            if problem.id not in self.found.get(context, {})
        ]
        for rollout in self._roll(asked) if asked else []:
            self.found.setdefault(rollout.asked.context, {})[rollout.asked.problem.id] = rollout
            self.samples += 1
        return len(asked)

    def evaluate(
        self, batch: list[Problem], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Rollout, Rollout]:
        context = context_of(candidate)
        calls = self.score([context], batch)
        replies = [self.found[context][problem.id] for problem in batch]
        return EvaluationBatch(
            outputs=replies, scores=[r.reward for r in replies], trajectories=replies, num_metric_calls=calls
        )

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: EvaluationBatch[Rollout, Rollout], components_to_update: list[str]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """The minibatch's replies."""
        return {COMPONENT: [{"rollout": rollout} for rollout in eval_batch.outputs]}

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A child of the candidate, or nothing where there is none to try."""
        try:
            child = self._child(context_of(candidate), [record["rollout"] for record in reflective_dataset[COMPONENT]])
        except Exception as error:
            self.failed = error
            raise
        return components(child) if child is not None else {}

    def _child(self, parent: TaskContext, replies: Sequence[Rollout]) -> TaskContext | None:
        if self._queue:
            return self._queue.pop(0)
        self._tried += 1
        if self._reflection is not None and self._tried % REFLECT_EVERY == 0:
            edited = self._reflection.edit(parent, replies)
            if edited is not None and (child := self._edits.unseen(edited)):
                return child
        children = self._drawn(parent, replies)
        self._exhausted = not children
        if len(children) < 2 or self._promise is None:
            return children[0] if children else None
        promised = self._promise(parent, children)
        return children[max(range(len(children)), key=promised.__getitem__)]

    def _drawn(self, parent: TaskContext, replies: Sequence[Rollout]) -> list[TaskContext]:
        said = [r.verdict.feedback for r in replies if r.verdict is not None and r.verdict.reward < 1.0]
        others = [other for other in self.complete if other != parent]
        found = (self._edits.child(parent, others, said) for _ in range(SCREENED if self._promise else 1))
        return [child for child in found if child is not None]

    def stops(self, gepa_state: object) -> bool:
        """gepa's stopper: no budget for one more context on all problems, nothing left to try, or an edit failed."""
        spent = self.samples + len(self.problems) > self._most
        return (spent and not self._queue) or self._exhausted or self.failed is not None


class _MembersToo:
    """gepa's acceptance: a strict gain on the minibatch, and members of the population, which were scored on everything already."""

    def __init__(self, search: _Search) -> None:
        self._search = search
        self._strict = StrictImprovementAcceptance()

    def should_accept(self, proposal: CandidateProposal[Any], state: GEPAState[Any, Any]) -> bool:
        member = context_of(proposal.candidate) in self._search.members
        return member or self._strict.should_accept(proposal, state)


def context_of(candidate: dict[str, str]) -> TaskContext:
    """The inverse of `components`."""
    return TaskContext.model_validate_json(candidate[COMPONENT])


class _Silent:
    """gepa prints its progress; ours is in the run's folder."""

    def log(self, message: str) -> None:
        pass
