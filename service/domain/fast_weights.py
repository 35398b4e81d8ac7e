"""Fast weights: what a user's log folds into (`fold.py`): items, their credit, and a population of contexts."""

from collections.abc import Iterable, Mapping
from typing import Self, TypeVar

from service.domain.demonstrations import Draft
from service.domain.events import Member
from service.domain.feedback import BASE, Frozen
from service.domain.items import Credit, Exemplar, Guideline, Item, ItemT

# The state is read at every chat and written at every feedback, so its size is their latency. A context has room for some ten items; the
# others wait for their turn, or for a prompt that they resemble. The oldest go first.
MAX_GUIDELINES = 32
MAX_EXEMPLARS = 64
MAX_ITEM_CHARS = 32_000
"""Of all guidelines, and of all exemplars."""
MAX_ONE_ITEM_CHARS = 8_000
"""A longer one fits no context and must not push out all others: where there is no room it goes before them."""
# What was removed or merged is remembered this far back.
MAX_REMEMBERED = 128
# All items, the members of all populations, and some that may come back.
MAX_CREDITS = 160

ValueT = TypeVar("ValueT")

FOLD = 5
"""Goes up whenever the same log folds into another state, so that a cache of the old one is not taken for it."""


class Population(Frozen):
    """The contexts that chats draw from; empty until the optimizer has run."""

    basis: int = 0
    """Items born after this revision join every member."""
    clock: int = 0
    """Feedbacks in the log up to `basis`."""
    adapter: str = BASE
    """The version in use when it was scored."""
    members: tuple[Member, ...] = ()


NO_POPULATION = Population()


class FastWeights(Frozen):
    """The fold of a user's log up to `revision`."""

    revision: int = 0
    updated: float = 0.0
    clock: int = 0
    """How many of the events were feedback."""
    guidelines: dict[str, Guideline] = {}
    exemplars: dict[str, Exemplar] = {}
    credits: dict[str, Credit] = {}
    """Of items and of the population's members, by id."""
    removed: dict[str, int] = {}
    """Item taken out by hand -> the revision: only the user's own new word brings it back."""
    aliases: dict[str, str] = {}
    """Item that was merged or changed -> the one that stands for it."""
    drafts: dict[str, Draft] = {}
    """Interaction -> its reply, of the last that were spoken of and not corrected: what demonstrations are made of."""
    in_common: dict[str, str] = {}
    """What the last corrections have in common, by axis of style."""
    odd: tuple[str, ...] = ()
    """Exemplars without that: a correction in haste, which would teach the opposite."""
    populations: tuple[Population, ...] = ()
    """One for each of the last adapter versions that it was scored under, the newest last: a rollback finds its own again."""

    @property
    def population(self) -> Population:
        """The newest."""
        return self.populations[-1] if self.populations else NO_POPULATION

    def population_under(self, adapter: str) -> Population:
        """The one for an adapter version, empty if there is none."""
        return next((p for p in self.populations if p.adapter == adapter), NO_POPULATION)

    def under(self, adapter: str) -> Self:
        """The same with no population but that of an adapter version: as a chat that it serves sees them."""
        found = self.population_under(adapter)
        return self.model_copy(update={"populations": (found,) if found.members else ()})

    def credit(self, name: str) -> Credit:
        """An item's or a member's credit as it stands now."""
        found = self.credits.get(name)
        return found.at(self.clock) if found else Credit(clock=self.clock)

    def resolve(self, name: str) -> str:
        """The item that stands for this one now."""
        return self.aliases.get(name, name)

    @property
    def items(self) -> Mapping[str, Item]:
        """Guidelines and exemplars by id."""
        return {**self.guidelines, **self.exemplars}


class Snapshot(Frozen):
    """The fold of a log's oldest events, which were archived and are in the log no more."""

    fold: int = FOLD
    """`FOLD` when it was made."""
    state: FastWeights


def bounded(items: dict[str, ItemT], most: int) -> dict[str, ItemT]:
    """`items` without the oldest ones over the limits; overlong ones go first, what was put there by hand last."""
    chars = sum(item.chars for item in items.values())
    if len(items) <= most and chars <= MAX_ITEM_CHARS:
        return items
    items = dict(items)
    for item in sorted(items.values(), key=lambda i: (i.chars <= MAX_ONE_ITEM_CHARS, i.by_hand, i.renewed, i.id)):
        if len(items) <= most and chars <= MAX_ITEM_CHARS:
            break
        del items[item.id]
        chars -= item.chars
    return items


def bounded_credits(credits: dict[str, Credit], known: Iterable[str]) -> dict[str, Credit]:
    """`credits` without the oldest ones of what is no longer there, over the limit."""
    if len(credits) <= MAX_CREDITS:
        return credits
    there = set(known)
    order = sorted(credits, key=lambda name: (name in there, credits[name].clock, name))
    return {name: credits[name] for name in order[len(credits) - MAX_CREDITS :]}


def remembered(entries: dict[str, ValueT]) -> dict[str, ValueT]:
    """The newest entries of what was removed or merged, in the order of their making."""
    return dict(list(entries.items())[-MAX_REMEMBERED:])
