"""A user's population of contexts: what the optimizer leaves, and which member a chat draws."""

import random
from collections.abc import Callable

from service.domain.events import Member, PopulationEvent
from service.domain.fast_weights import MAX_GUIDELINES, FastWeights, Population, bounded, remembered
from service.domain.items import Guideline, bounded_sources, item_id

MAX_MEMBERS = 4
# Adapter versions whose populations are kept.
MAX_POPULATIONS = 3
# How many ratings the optimizer's own judgement of a member weighs.
PRIOR_STRENGTH = 4.0


def member_id(items: tuple[str, ...]) -> str:
    """A member is named by what is in it, so that its credit stays with it."""
    return item_id("m", *items)


def leading(state: FastWeights, *, adapter: str) -> Member | None:
    """The best member under an adapter version by the optimizer's judgement, None before it has run."""
    return next(iter(state.population_under(adapter).members), None)


def draw(state: FastWeights, *, adapter: str, seed: Callable[[], bytes]) -> Member | None:
    """The member that serves a chat, by Thompson sampling: one draw from each member's Beta posterior, the highest serves.

    Args:
        adapter: the version in use, or `base`: members are judged under one.
        seed: tells what the draw depends on besides the state, where there is a choice: the same seed and state give the same member.
    """
    members = state.population_under(adapter).members
    if len(members) < 2:
        return members[0] if members else None
    source = random.Random(seed())

    def sample(member: Member) -> float:
        credit = state.credit(member.id)
        return source.betavariate(
            credit.helpful + PRIOR_STRENGTH * member.win, credit.harmful + PRIOR_STRENGTH * (1 - member.win)
        )

    return max([(sample(member), -n, member) for n, member in enumerate(members)])[2]


def repopulated(state: FastWeights, event: PopulationEvent) -> FastWeights:
    """The fast weights with the optimizer's result; feedback and edits that came in meanwhile stand."""
    state = _merged(state, event.merged)
    members = tuple(_as_folded(member, state, event) for member in event.members)[:MAX_MEMBERS]
    new = Population(basis=event.basis, clock=event.basis_clock, adapter=event.adapter, members=members)
    others = [_under_new_names(p, state) for p in state.populations if p.adapter != event.adapter]
    populations = (*others, new)[-MAX_POPULATIONS:]
    held = {name for population in populations for member in population.members for name in member.items}
    inferred = {
        g.id: g.model_copy(update={"origin": "inferred", "since": event.basis})
        for g in event.inferred
        if g.id not in state.removed and state.resolve(g.id) == g.id and g.id in held
    }
    # A candidate that no member holds any more has lost; one that the user has said meanwhile is theirs.
    kept = {name: item for name, item in state.guidelines.items() if item.stated or name in held}
    there = {member.id for population in populations for member in population.members}
    left = {member.id for population in state.populations for member in population.members} - there
    return state.model_copy(
        update={
            "guidelines": bounded({**inferred, **kept}, MAX_GUIDELINES),
            "credits": {name: credit for name, credit in state.credits.items() if name not in left},
            "populations": populations,
        }
    )


def _as_folded(member: Member, state: FastWeights, event: PopulationEvent) -> Member:
    items = tuple(dict.fromkeys(state.resolve(name) for name in member.items if name not in state.removed))
    return member.model_copy(update={"items": items, "basis": event.basis})


def _under_new_names(population: Population, state: FastWeights) -> Population:
    """A population of another adapter version, whose items may have been merged or changed since: what one now stands for is held by it."""
    members = tuple(
        member.model_copy(update={"items": tuple(dict.fromkeys(map(state.resolve, member.items)))})
        for member in population.members
    )
    return population.model_copy(update={"members": members})


def _merged(state: FastWeights, merged: dict[str, str]) -> FastWeights:
    guidelines, aliases, credits = dict(state.guidelines), dict(state.aliases), dict(state.credits)
    for duplicate, target in merged.items():
        into, gone = guidelines.get(target), guidelines.get(duplicate)
        if into is None or gone is None or duplicate == target or gone.by_hand:
            continue
        del guidelines[duplicate]
        guidelines[target] = _joined(into, gone)
        aliases = {name: target if points == duplicate else points for name, points in aliases.items()}
        aliases[duplicate] = target
        if duplicate in credits:
            ours, theirs = state.credit(target), state.credit(duplicate)
            sums = {"helpful": ours.helpful + theirs.helpful, "harmful": ours.harmful + theirs.harmful}
            credits[target] = ours.model_copy(update=sums)
            del credits[duplicate]
    return state.model_copy(update={"guidelines": guidelines, "aliases": remembered(aliases), "credits": credits})


def _joined(into: Guideline, gone: Guideline) -> Guideline:
    origin = into.origin if into.origin != "inferred" or not gone.support else gone.origin
    return into.model_copy(
        update={
            "sources": bounded_sources({**gone.sources, **into.sources}),
            "support": into.support + gone.support,
            "origin": origin,
        }
    )
