"""What the history tells of each event, by a property: replaying it gives the fast weights' items and credit."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.events import Edit, EditEvent, Event, Member, PopulationEvent
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Signals
from service.domain.fold import apply, fold
from service.domain.history import page
from service.domain.items import Credit, Guideline, guideline_id
from service.domain.population import member_id
from tests.unit.test_fast_weights import KNOWN_ITEMS, SIGNALS, TEXTS, log_of

IDS = st.sampled_from([*KNOWN_ITEMS, guideline_id("Use bullets"), guideline_id("No bullets please")])
EDITS = st.one_of(
    st.builds(Edit, op=st.just("add"), text=TEXTS),
    st.builds(Edit, op=st.just("add"), prompt=TEXTS, reply=TEXTS),
    st.builds(Edit, op=st.just("change"), id=IDS, text=TEXTS),
    st.builds(Edit, op=st.sampled_from(["pin", "unpin", "remove"]), id=IDS),
)
EDIT_EVENTS = st.builds(
    EditEvent, revision=st.just(1), at=st.just(0.0), by=st.just("user"), edits=st.lists(EDITS, min_size=1).map(tuple)
)


def population(items: list[str], inferred: list[str], merged: dict[str, str]) -> PopulationEvent:
    found = tuple(Guideline(id=guideline_id(text), text=text, origin="inferred") for text in inferred)
    held = (*items, *(g.id for g in found))
    members = (Member(id=member_id(held), items=held),)
    return PopulationEvent(revision=1, at=0, basis=0, basis_clock=0, members=members, inferred=found, merged=merged)


POPULATION_EVENTS = st.builds(
    population, st.lists(IDS, max_size=3), st.lists(TEXTS, max_size=2), st.dictionaries(IDS, IDS, max_size=2)
)


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """Feedback, edits and optimizations in any order."""
    steps = draw(st.lists(st.tuples(st.integers(0, 4), SIGNALS), max_size=12))
    events: list[Event] = log_of(*steps, items=KNOWN_ITEMS)
    for other in draw(st.lists(EDIT_EVENTS | POPULATION_EVENTS, max_size=6)):
        events.insert(draw(st.integers(0, len(events))), other)
    return [event.model_copy(update={"revision": n}) for n, event in enumerate(events, start=1)]


@given(logs())
def test_replaying_what_was_added_and_removed_gives_the_items(events: list[Event]) -> None:
    ids: set[str] = set()
    state = FastWeights()
    for event, change in zip(events, page(state, events, after=0, limit=1000), strict=True):
        state = apply(state, event)
        added, removed = {i.id for i in change.added}, {i.id for i in change.removed}
        assert removed <= ids
        assert not added & ids
        ids = ids - removed | added
        assert ids == state.items.keys()
        assert {i.id for i in change.changed} <= ids


@given(logs())
def test_fading_what_was_there_and_adding_what_moved_gives_the_credit(events: list[Event]) -> None:
    credits: dict[str, Credit] = {}
    state = FastWeights()
    for event, change in zip(events, page(state, events, after=0, limit=1000), strict=True):
        state = apply(state, event)
        credits = {name: credit.at(state.clock) for name, credit in credits.items()}
        for name, move in change.credit.items():
            old = credits.get(name, Credit(clock=state.clock))
            moved = {"helpful": old.helpful + move.helpful, "harmful": old.harmful + move.harmful}
            credits[name] = old.model_copy(update=moved)
    for name, credit in credits.items():
        now = state.credit(name)
        assert (credit.helpful, credit.harmful) == pytest.approx((now.helpful, now.harmful), abs=1e-4)


@given(logs(), st.integers(0, 20), st.integers(1, 5))
def test_pages_are_parts_of_the_whole_history(events: list[Event], after: int, limit: int) -> None:
    whole = page(FastWeights(), events, after=0, limit=1000)
    assert page(FastWeights(), events, after=after, limit=limit) == whole[after : after + limit]


@given(logs())
def test_members_after_one_event_are_those_before_the_next(events: list[Event]) -> None:
    told = page(FastWeights(), events, after=0, limit=1000)
    assert all(one.members_after == other.members_before for one, other in pairwise(told))


def test_a_merged_guideline_is_told_with_the_one_that_stands_for_it() -> None:
    log = log_of((0, Signals(comment="Use rhymes")), (1, Signals(comment="Write in verse")))
    first, second = fold(log).guidelines
    merge = population([first], [], {second: first}).model_copy(update={"revision": 3})
    *_, change = page(FastWeights(), [*log, merge], after=0, limit=10)
    assert [(i.id, i.became) for i in change.removed] == [(second, first)]
    assert change.changed[0].changed["support"] == (1, 2)
