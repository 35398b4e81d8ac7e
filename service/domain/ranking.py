"""How the items of one user compete for a place in the context."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from service.domain.cold_start import posterior
from service.domain.comments import stances
from service.domain.events import Member
from service.domain.fast_weights import FastWeights
from service.domain.items import DECAY, Exemplar, Guideline, Item, ItemT, Prior

# Under this posterior mean of being helpful an item is no longer rendered: two blames more than praises, say.
MIN_HELPFUL = 1 / 3
# An epoch ends after so many events, whether or not its room is used up.
EPOCH_EVENTS = 32


@dataclass(frozen=True)
class Ranking:
    """How the items of one user compete."""

    state: FastWeights
    member: Member | None
    _weighed: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Each is asked for several times, and a full state has two hundred items."""

    def weighed(self, item: Item) -> tuple[float, int]:
        """Posterior gain of rendering an item, in (-1, 1), negative where it is not worth rendering; revision of its newest support."""
        found = self._weighed.get(item.id)
        if found is None:
            renewed = item.renewed
            found = self._weighed[item.id] = self._gain(item, renewed), renewed
        return found

    def _gain(self, item: Item, renewed: int) -> float:
        credit = self.state.credit(item.id)
        if isinstance(item, Prior):
            return posterior(item, credit, clock=self.state.clock) - MIN_HELPFUL
        gain = credit.mean() - MIN_HELPFUL
        return gain * DECAY ** (self.state.revision - renewed) if gain > 0 else gain

    @property
    def since(self) -> int:
        """What is newer was said since the population was computed (or just now), so that the next chat must have it."""
        return self.member.basis if self.member else self.state.revision - 1

    @cached_property
    def _places(self) -> dict[str, int]:
        """The member's items in the optimizer's order, each as what stands for it since: a changed one has another id, and one in a
        style that the user has given up is shown in the new one.
        """
        exemplars = self.state.exemplars
        shown = {x.prompt: x.id for x in exemplars.values() if not x.stated}

        def stands(listed: str) -> str:
            name = self.state.resolve(listed)
            return shown.get(exemplars[name].prompt, name) if name in self.state.odd and name in exemplars else name

        return {name: n for n, name in enumerate(dict.fromkeys(map(stands, self.member.items if self.member else ())))}

    def epoch(self, items: Iterable[ItemT], cost: Callable[[ItemT], int], *, room: int) -> int:
        """The revision since which items have this room to themselves.

        A new epoch begins when the room is used up, and every `EPOCH_EVENTS`, so that what was long ago decides nothing.
        """
        last, used = self.state.revision - 1, 0
        since = newest = last - last % EPOCH_EVENTS
        said = ((self.weighed(item)[1], cost(item)) for item in items if item.stated)
        for renewed, tokens in sorted(entry for entry in said if entry[0] > since):
            if used and used + tokens > room:
                since, used = newest, 0
            newest, used = renewed, used + tokens
        return since

    def allowed(self, item: Item) -> bool:
        """Whether it may be rendered at all: the member's choice and what is newer; without a member, what the user said."""
        if item.pinned:
            return True
        if isinstance(item, Prior):
            chosen = True
        elif self.member is None:
            # An inferred guideline must be proven first; a demonstration only stands in for exemplars that are missing.
            chosen = item.stated or isinstance(item, Exemplar)
        else:
            chosen = item.id in self._places or self.weighed(item)[1] > self.since
        return chosen and self.heard(item)

    def heard(self, item: Item) -> bool:
        """Whether it is worth rendering: not blamed, and not odd unless it was said last."""
        gain, renewed = self.weighed(item)
        return gain >= 0 and (item.id not in self.state.odd or renewed == self.state.revision)

    def order(self, items: Iterable[ItemT], cost: Callable[[ItemT], int]) -> list[ItemT]:
        """Who gets a place first: pinned, then what was said, then fresh, then by gain per token; ties to the newest."""
        since = self.since

        def place(item: ItemT) -> tuple[bool, bool, bool, float, int, str]:
            gain, renewed = self.weighed(item)
            return item.pinned, item.stated, renewed > since, gain / max(cost(item), 1), renewed, item.id

        return sorted(filter(self.allowed, items), key=place, reverse=True)

    def rendered(self, items: Iterable[ItemT]) -> tuple[ItemT, ...]:
        """In the optimizer's order, then by age."""
        places = self._places
        return tuple(sorted(items, key=lambda i: (places.get(i.id, len(places)), i.born, i.id)))


def without_contradicted(guidelines: Iterable[Guideline]) -> list[Guideline]:
    """The guidelines that no later one contradicts ("shorter" after "more detail"). What is inferred gives way to what was said.

    Nothing is deleted: when the later one is retracted, the older one is back.
    """
    guidelines = list(guidelines)
    newest: dict[str, Guideline] = {}
    for g in sorted(guidelines, key=_authority):
        for axis in _stances(g.text):
            newest[axis] = g
    return [
        g
        for g in guidelines
        if g.pinned or all(_stances(newest[axis].text)[axis] == value for axis, value in _stances(g.text).items())
    ]


def _authority(guideline: Guideline) -> tuple[bool, bool, int, str]:
    return (guideline.pinned, guideline.stated, guideline.renewed, guideline.id)


@lru_cache(4096)
def _stances(text: str) -> dict[str, str]:
    return stances(text)
