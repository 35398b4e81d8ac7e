"""Guidelines that nobody has said: where they come from, and what they must prove."""

import asyncio

from service.domain.fold import fold
from tests.context_search_data import PlantedScorer, corrections, feedback, means, work
from workers.context_search.search import search
from workers.context_search.trials import on_trial

BRIEF = "Keep replies under about 5 words."


def found(events, effects):
    return asyncio.run(search(work(events), means(PlantedScorer(effects)), seed=0))


def test_what_wanted_replies_have_in_common_goes_on_trial() -> None:
    job = work(corrections(6))
    trials = on_trial(job.state, job.examples)
    assert BRIEF in [g.text for g in trials]
    assert all(g.origin == "inferred" and not g.stated for g in trials)


def test_a_guideline_that_hinges_on_an_example_is_not_proven_by_it() -> None:
    two, many = work(corrections(2)), work(corrections(6))
    assert all(set(g.sources) == {e.id for e in two.examples} for g in on_trial(two.state, two.examples))
    assert all(g.sources == {} for g in on_trial(many.state, many.examples))


def test_what_contradicts_the_user_s_own_words_is_not_tried() -> None:
    job = work([*corrections(6), feedback(7, comment="Please write longer replies")])
    assert BRIEF not in [g.text for g in on_trial(job.state, job.examples)]


def test_what_the_user_has_removed_is_not_tried_again() -> None:
    job = work(corrections(6))
    removed = {g.id: 7 for g in on_trial(job.state, job.examples)}
    assert on_trial(job.state.model_copy(update={"removed": removed}), job.examples) == []


def test_an_inferred_guideline_that_raises_the_margins_is_kept() -> None:
    result = found(corrections(12), {BRIEF: 0.4})
    assert [g.text for g in result.inferred] == [BRIEF]
    assert result.inferred[0].id in result.members[0].items


def test_an_inferred_guideline_that_does_not_is_not() -> None:
    result = found(corrections(12), {"Wanted 2.": 0.4})
    assert result.inferred == ()


def test_an_inferred_guideline_that_stopped_helping_leaves_the_population() -> None:
    events = corrections(12)
    first = found(events, {BRIEF: 0.4})
    [brief] = first.inferred
    state = fold(events)
    state = state.model_copy(update={"guidelines": {**state.guidelines, brief.id: brief}})
    result = asyncio.run(
        search(work(events, state=state), means(PlantedScorer({BRIEF: -0.1, "Wanted 2.": 0.2})), seed=0)
    )
    assert all(brief.id not in member.items for member in result.members)
