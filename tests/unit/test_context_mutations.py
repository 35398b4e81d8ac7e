"""Edits of candidates, whatever the pool: what comes out can be served, and is new."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.fold import fold
from tests.context_search_data import corrections, exemplar_for, words
from workers.context_search.candidates import Candidate, Pool
from workers.context_search.mutations import Mutations

COMMENTS = ["be brief", "use bullet points", "end with Cheers", "no jargon please", "add an example"]


@st.composite
def pools(draw):
    count = draw(st.integers(2, 10))
    comments = {n: COMMENTS[n % len(COMMENTS)] for n in draw(st.sets(st.integers(1, count), max_size=4))}
    state = fold(corrections(count, comments=comments))
    names = sorted(state.items)
    return Pool(
        state,
        absorbed=frozenset(draw(st.sets(st.sampled_from(names), max_size=2))),
        budget_tokens=draw(st.integers(40, 300)),
        count=words,
        fixed=frozenset(draw(st.sets(st.sampled_from(names), max_size=2))),
    )


@given(pool=pools(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_children_can_be_served_as_they_are_and_none_comes_twice(pool: Pool, seed: int) -> None:
    mutations = Mutations(pool, random=Random(seed))
    parents = [Candidate()]
    for _ in range(15):
        child = mutations.child(parents[-1], parents[:-1])
        if child is None:
            break
        assert pool.fitted(child) == child
        assert child not in parents[1:]
        assert len(set(child.items)) == len(child.items)
        assert set(child.items) <= set(pool.state.items)
        assert not set(child.items) & pool.absorbed
        assert pool.context(child.items).items == child.items
        parents.append(child)


@given(pool=pools(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_is_fixed_is_in_every_child_that_has_room_for_it(pool: Pool, seed: int) -> None:
    there = set(pool.fitted(Candidate()).items)
    child = Mutations(pool, random=Random(seed)).child(pool.fitted(Candidate()), [])
    if child is not None and len(child.items) > len(there):
        assert there <= set(child.items)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_same_seed_makes_the_same_children(seed: int) -> None:
    pool = Pool(fold(corrections(6)), budget_tokens=200, count=words)
    one, other = (Mutations(pool, random=Random(seed)) for _ in range(2))
    assert [one.child(Candidate(), []) for _ in range(5)] == [other.child(Candidate(), []) for _ in range(5)]


def test_a_candidate_survives_its_way_through_gepa() -> None:
    candidate = Candidate(("g-1", "g-2"), ("x-1",))
    assert Candidate.of(candidate.components()) == candidate


def test_nothing_new_is_nothing() -> None:
    pool = Pool(fold(corrections(1)), budget_tokens=200, count=words)
    mutations = Mutations(pool, random=Random(0))
    only = exemplar_for(pool.state, 1)
    assert {mutations.child(Candidate(), []), mutations.child(Candidate((), (only,)), [])} == {
        Candidate((), (only,)),
        Candidate(),
    }
    assert mutations.child(Candidate(), []) is None


def test_merging_leaves_the_newer_of_two_guidelines_that_say_nearly_the_same() -> None:
    pool = Pool(fold(corrections(4, comments={1: "be brief", 3: "be brief and kind"})), budget_tokens=200, count=words)
    older, newer = (g.id for g in pool.guidelines)
    mutations = Mutations(pool, random=Random(0), similar={older: {newer}})
    assert mutations.merge(Candidate((older, newer))) == Candidate((newer,))
    assert mutations.merge(Candidate((older,))) is None


def test_a_cross_holds_what_both_parents_hold_and_nothing_that_neither_does() -> None:
    pool = Pool(fold(corrections(8)), budget_tokens=400, count=words)
    names = [x.id for x in pool.exemplars]
    one, other = Candidate((), tuple(names[:5])), Candidate((), tuple(names[3:8]))
    child = Mutations(pool, random=Random(3)).cross(one, other)
    assert child is not None
    assert set(names[3:5]) <= set(child.items) <= set(names)


def test_a_swap_keeps_the_place() -> None:
    pool = Pool(fold(corrections(4)), budget_tokens=400, count=words)
    names = [x.id for x in pool.exemplars]
    parent = Candidate((), tuple(names[:3]))
    child = Mutations(pool, random=Random(1)).swap(parent)
    assert child is not None
    assert [a == b for a, b in zip(parent.exemplars, child.exemplars, strict=True)].count(False) == 1
