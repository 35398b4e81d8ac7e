"""Candidates of the search: ordered choices of the user's items, rendered by the rules that serve them."""

import json
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

from service.domain.context import Context, Count, choose
from service.domain.events import Member, PopulationEvent
from service.domain.fast_weights import FastWeights
from service.domain.items import Exemplar, Guideline, Item, guideline_id
from service.domain.population import member_id, repopulated
from service.domain.ranking import without_contradicted
from workers.consolidation.dataset import Example, without_own

# What a rendered token costs, in nats per token of a reply: a full context of 512 tokens must gain 0.05 over an empty one.
TOKEN_NATS = 1e-4
# What the user put in words counts this much beyond what is measured: only clear harm drops it, neither its tokens nor a whim of the
# smallest models, which follow exemplars better.
WORDS_NATS = 0.05
COMPONENT = "context"


class Candidate(NamedTuple):
    """An ordered choice of items by id, as gepa's one text component."""

    guidelines: tuple[str, ...] = ()
    exemplars: tuple[str, ...] = ()

    @property
    def items(self) -> tuple[str, ...]:
        return self.guidelines + self.exemplars

    def components(self) -> dict[str, str]:
        return {COMPONENT: json.dumps([self.guidelines, self.exemplars])}

    @classmethod
    def of(cls, components: dict[str, str]) -> "Candidate":
        guidelines, exemplars = json.loads(components[COMPONENT])
        return cls(tuple(guidelines), tuple(exemplars))

    @classmethod
    def serving(cls, context: Context, *, order: Iterable[str]) -> "Candidate":
        """The candidate that a context amounts to; its items in this order."""
        guidelines, chosen = {g.id for g in context.guidelines}, set(context.items)
        kept = [name for name in order if name in chosen]
        return cls(
            tuple(name for name in kept if name in guidelines), tuple(name for name in kept if name not in guidelines)
        )

    def without(self, names: Iterable[str]) -> "Candidate":
        gone = set(names)
        return Candidate(
            tuple(name for name in self.guidelines if name not in gone),
            tuple(name for name in self.exemplars if name not in gone),
        )


class Pool:
    """What candidates are made of, and how a candidate would be served.

    Args:
        state: the user's fast weights.
        inferred: guidelines that nobody has said, on trial.
        merged: guideline that says the same as an older one -> that one.
        absorbed: ids of items that the adapter in use makes unnecessary.
        budget_tokens: most tokens of a rendered context.
        count: tokens of a text.
        fixed: ids of items that every candidate holds, where they fit.
        folds: examples that are judged over the same context, without what any of them supports itself: it is computed once for all.
            An example that is in none is judged alone.
    """

    def __init__(
        self,
        state: FastWeights,
        *,
        inferred: Iterable[Guideline] = (),
        merged: dict[str, str] | None = None,
        absorbed: frozenset[str] = frozenset(),
        budget_tokens: int,
        count: Count,
        fixed: frozenset[str] = frozenset(),
        folds: Sequence[Sequence[Example]] = (),
    ) -> None:
        self.absorbed = absorbed
        self.merged = merged or {}
        self._budget = budget_tokens
        self._count = count
        self.state = _everything(state, tuple(inferred), self.merged)
        items = self.state.items
        held = {name for name in map(self.state.resolve, fixed) if name in items}
        self.fixed = tuple(item.id for item in sorted((items[name] for name in held), key=_by_age))
        self._folds = {example.id: tuple(fold) for fold in folds for example in fold}
        self._left_out: dict[str, FastWeights] = {}
        standing = without_contradicted(self.state.guidelines.values())
        self.guidelines: list[Guideline] = sorted(filter(self._renders, standing), key=_by_age)
        """What may be rendered, the oldest first: neither absorbed nor blamed nor contradicted since."""
        self.exemplars: list[Exemplar] = sorted(filter(self._renders, self.state.exemplars.values()), key=_by_age)
        """Likewise."""

    def fitted(self, candidate: Candidate) -> Candidate:
        """The candidate as it would be served, with what is fixed: what does not fit or must not be rendered is left out."""
        names = dict.fromkeys((*map(self.state.resolve, candidate.items), *self.fixed))
        return Candidate.serving(self.context(names), order=names)

    def context(self, items: Iterable[str], *, judged_by: Example | None = None) -> Context:
        """The context that serves a choice of items, by the very rules that serve chats.

        Args:
            judged_by: a feedback that judges the choice: what its fold supports is left out, its own answer with it.
        """
        items = tuple(items)
        return choose(
            self.state if judged_by is None else self._without(judged_by),
            absorbed=self.absorbed,
            budget_tokens=self._budget,
            count=self._count,
            member=Member(id=member_id(items), items=items, basis=self.state.revision),
        )

    def price(self, candidate: Candidate) -> float:
        """What a candidate's gain must exceed, in nats per token: its tokens cost, what the user put in words is worth something."""
        context = self.context(candidate.items)
        return TOKEN_NATS * context.tokens - WORDS_NATS * sum(g.stated for g in context.guidelines)

    def try_out(self, text: str, *, sources: dict[str, int]) -> Guideline | None:
        """Add a guideline that nobody has said, on trial; None where it is there already or was removed by hand."""
        name = guideline_id(text)
        if name in self.state.guidelines or name in self.state.removed or self.state.resolve(name) != name:
            return None
        new = Guideline(id=name, text=text, sources=sources, origin="inferred", since=self.state.revision)
        self.state = self.state.model_copy(update={"guidelines": {**self.state.guidelines, name: new}})
        self._left_out.clear()
        if not self._renders(new) or new not in without_contradicted((*self.guidelines, new)):
            return None
        self.guidelines.append(new)
        return new

    def _renders(self, item: Item) -> bool:
        return item.id in self.context((item.id,)).items

    def _without(self, example: Example) -> FastWeights:
        fold = self._folds.get(example.id, (example,))
        first = fold[0].id
        if first not in self._left_out:
            self._left_out[first] = reduce(without_own, fold, self.state)
        return self._left_out[first]


def _by_age(item: Item) -> tuple[int, str]:
    return (item.born, item.id)


def _everything(state: FastWeights, inferred: tuple[Guideline, ...], merged: dict[str, str]) -> FastWeights:
    """The fast weights as they will stand when all inferred guidelines and mergers are taken over: a member holds no more than it lists."""
    names = (*state.items, *(g.id for g in inferred))
    event = PopulationEvent(
        revision=state.revision + 1,
        at=state.updated,
        basis=state.revision,
        basis_clock=state.clock,
        members=(Member(id="all", items=names),),
        inferred=inferred,
        merged=merged,
    )
    return repopulated(state, event)
