"""The search for contexts on a planted truth: it finds what helps, drops what harms, and judges nothing by its own answer."""

import asyncio
from dataclasses import replace

import pytest

from service.domain.events import Member, PopulationEvent
from service.domain.feedback import FeedbackEvent, Signals
from service.domain.fold import apply, fold
from service.domain.items import Guideline, guideline_id
from service.errors import EngineUnavailable
from tests.context_search_data import PlantedScorer, Says, corrections, exemplar_for, feedback, means, work
from workers.context_search.search import JUDGES, fixed, search

HELPFUL = {"Wanted 2.": 0.5, "Wanted 5.": 0.4}
HARMFUL = {"Always shout": -0.7}


def planted(count=12):
    events = corrections(count, comments={1: "Always shout", 4: "Be kind to me"})
    return events, PlantedScorer(HELPFUL | HARMFUL)


def run(job, tools, seed=0):
    return asyncio.run(search(job, tools, seed=seed))


def test_what_helps_is_found_and_what_harms_is_dropped() -> None:
    events, scorer = planted()
    found = run(work(events), means(scorer))
    state = fold(events)
    best = found.members[0]
    assert {exemplar_for(state, 2), exemplar_for(state, 5)} <= set(best.items)
    shouting = next(g.id for g in state.guidelines.values() if g.text == "Always shout")
    assert shouting not in best.items
    assert found.report.margin_after == pytest.approx(0.9)
    assert found.report.margin_after > found.report.margin_before


def test_the_held_out_feedback_gains_too_and_the_search_never_saw_it() -> None:
    events, scorer = planted()
    found = run(work(events), means(scorer))
    assert found.report.heldout >= 2
    assert found.report.instances + found.report.heldout == 12
    assert found.report.heldout_after > found.report.heldout_before


def test_the_same_seed_finds_the_same_population() -> None:
    events, scorer = planted()
    first, second = (run(work(events), means(scorer), seed=7) for _ in range(2))
    assert first.members == second.members
    assert first.report.model_copy(update={"seconds": 0.0}) == second.report.model_copy(update={"seconds": 0.0})


def test_no_reply_is_scored_after_itself() -> None:
    events, scorer = planted()
    seen = []

    class Watching(PlantedScorer):
        async def score(self, model, items):
            seen.extend((messages, replies) for messages, replies in items)
            return await super().score(model, items)

    run(work(events), means(Watching(scorer.effects)))
    for messages, replies in seen:
        for reply, _ in replies:
            assert all(reply not in (m.content or "") for m in messages)


@pytest.mark.parametrize("budget", [20, 60, 200])
def test_the_search_ends_within_its_budget(budget: int) -> None:
    events, scorer = planted()
    report = run(work(events), means(scorer, metric_calls=budget)).report
    # Beyond it: what serves now and no context at all on everything, the best on what was held out, inferred guidelines left out.
    assert report.metric_calls <= budget + 3 * 12 + 2 * report.instances


def test_an_empty_budget_still_tells_how_good_what_serves_now_is() -> None:
    events, scorer = planted()
    found = run(work(events), means(scorer, metric_calls=1))
    assert len(found.members) == 1
    assert found.report.margin_after == found.report.margin_before


def test_the_newest_feedback_stays_however_little_it_helps() -> None:
    events, scorer = planted()
    newest = [f"Wanted {n}." for n in range(12 - JUDGES + 1, 13)]
    found = run(work(events), means(PlantedScorer(scorer.effects | dict.fromkeys(newest, -0.3))))
    state = fold(events)
    for member in found.members:
        assert {exemplar_for(state, n) for n in range(12 - JUDGES + 1, 13)} <= set(member.items)


def test_what_the_user_put_in_words_stays_unless_it_measurably_harms() -> None:
    events, scorer = planted()
    found = run(work(events), means(scorer))
    kind = next(g.id for g in fold(events).guidelines.values() if g.text == "Be kind to me")
    assert kind in found.members[0].items


def test_what_was_put_there_by_hand_is_in_every_member() -> None:
    events, scorer = planted()
    job = work(events)
    name = exemplar_for(job.state, 1)
    pinned = job.state.exemplars[name].model_copy(update={"pinned": True})
    state = job.state.model_copy(update={"exemplars": {**job.state.exemplars, name: pinned}})
    found = run(work(events, state=state), means(PlantedScorer({**scorer.effects, "Wanted 1.": -0.5})))
    assert all(name in member.items for member in found.members)
    assert name in fixed(work(events, state=state))


def test_what_the_adapter_has_absorbed_is_not_in_the_population() -> None:
    events, scorer = planted()
    absorbed = frozenset({exemplar_for(fold(events), 2)})
    found = run(work(events, absorbed=absorbed, adapter="adapter-1"), means(scorer))
    assert all(not absorbed & set(member.items) for member in found.members)
    assert set(scorer.models) == {"adapter-1"}


def test_too_little_feedback_leaves_everything_as_it_is() -> None:
    events, scorer = planted(2)
    found = run(work(events), means(scorer))
    assert (found.members, scorer.scored) == ((), 0)


def test_ratings_judge_too() -> None:
    events = corrections(3) + [feedback(n, rating=1.0) for n in range(4, 10)]
    found = run(work(events), means(PlantedScorer({"Wanted 1.": 0.5})))
    assert exemplar_for(fold(events), 1) in found.members[0].items
    assert found.report.margin_after == pytest.approx(0.5)


def test_what_helps_stays_however_many_comments_come_after_it() -> None:
    events = corrections(5) + [feedback(n, comment=f"Mention topic {n}") for n in range(6, 14)]
    state = fold(events)
    found = run(work(events), means(PlantedScorer({f"Wanted {n}.": 0.3 for n in range(1, 6)})))
    assert found.report.margin_after == pytest.approx(0.9)
    assert set(found.members[0].items) == {*state.exemplars, *state.guidelines}


def test_what_only_comments_came_after_is_in_every_member() -> None:
    events = corrections(5) + [feedback(n, comment=f"Mention topic {n}") for n in range(6, 14)]
    state = fold(events)
    newest = {exemplar_for(state, n) for n in range(5 - JUDGES + 1, 6)}
    assert fixed(work(events)) == newest | state.guidelines.keys()


def test_comments_alone_take_no_demonstration_away() -> None:
    events = [feedback(n, comment="Write in lower case.") for n in range(1, 7)]
    assert fold(events).exemplars
    assert run(work(events), means(PlantedScorer({}))).members == ()


def test_what_was_said_since_stays_where_too_little_is_left_to_judge_it() -> None:
    events = corrections(3)
    first = events[0].interaction
    members = (Member(id="m-1", items=(exemplar_for(fold(events), 2),)),)
    retraction = FeedbackEvent(
        revision=5,
        at=5.0,
        interaction=replace(first, signals=Signals()),
        previous=first.signals,
    )
    log = [
        *events,
        PopulationEvent(revision=4, at=4.0, basis=3, basis_clock=3, members=members),
        retraction,
        feedback(6, comment="Use rhymes"),
    ]
    found = run(work(log), means(PlantedScorer({})))
    state = fold([*log, PopulationEvent(revision=7, at=7.0, basis=6, basis_clock=5, members=found.members)])
    assert [(m.id, m.items) for m in state.population.members] == [("m-1", (*members[0].items, *state.guidelines))]


def test_a_challenger_whose_replies_are_worse_replaces_nothing() -> None:
    events, scorer = planted()
    # The incumbent holds all that fits, so a reply in its style needs the guideline that the search wants to drop.
    generator = Says(lambda context: "Wanted." if "Always shout" in context else "")
    found = run(work(events), means(scorer, generator=generator))
    assert found.report.margin_after == found.report.margin_before
    assert found.report.generated["challenger"] < found.report.generated["incumbent"]


def test_members_are_ranked_and_none_is_clearly_worse_than_the_best() -> None:
    events, scorer = planted()
    found = run(work(events), means(scorer))
    scores = [member.score for member in found.members]
    assert 1 <= len(found.members) <= 4
    assert all(score > max(scores) - 0.1 for score in scores)
    assert all(0 < member.win < 1 for member in found.members)


def test_the_next_search_starts_from_the_population_and_keeps_what_is_not_beaten() -> None:
    events, scorer = planted()
    first = run(work(events), means(scorer))
    state = apply(
        fold(events),
        PopulationEvent(revision=13, at=0.0, basis=12, basis_clock=12, members=first.members, inferred=first.inferred),
    )
    again = run(work(events, state=state), means(scorer, metric_calls=1))
    assert again.members[0].id == first.members[0].id
    assert again.report.margin_before == pytest.approx(first.report.margin_after)


def test_a_member_whose_items_are_gone_does_not_break_the_search() -> None:
    events, scorer = planted()
    gone = PopulationEvent(
        revision=13, at=0.0, basis=12, basis_clock=12, members=(Member(id="m-1", items=("x-gone", "g-gone")),)
    )
    found = run(work(events, state=apply(fold(events), gone)), means(scorer))
    assert found.report.margin_after == pytest.approx(0.9)


def test_a_scorer_that_goes_away_ends_the_search_with_its_error() -> None:
    class Leaving(PlantedScorer):
        async def score(self, model, items):
            if self.scored > 40:
                raise EngineUnavailable("gone")
            return await super().score(model, items)

    events, scorer = planted()
    with pytest.raises(EngineUnavailable):
        run(work(events), means(Leaving(scorer.effects)))


def test_a_cancelled_search_ends_with_what_it_has() -> None:
    events, scorer = planted()
    found = run(work(events), means(scorer, cancelled=lambda: True))
    assert len(found.members) == 1


def test_an_inferred_guideline_that_all_members_hold_and_that_fails_by_now_leaves_them_all() -> None:
    events = corrections(12)
    state = fold(events)
    helpful = {f"Wanted {n}.": 0.1 for n in range(12)}
    failed = Guideline(id=guideline_id("Use no commas."), text="Use no commas.", origin="inferred")
    population = PopulationEvent(
        revision=13,
        at=13.0,
        basis=12,
        basis_clock=12,
        members=(Member(id="m-1", items=(failed.id, *state.exemplars)),),
        inferred=(failed,),
    )
    found = run(work(events, state=apply(state, population)), means(PlantedScorer(helpful)))
    assert found.members
    assert all(failed.id not in member.items for member in found.members)
    assert found.inferred == ()
