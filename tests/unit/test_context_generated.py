"""Challenger against incumbent on generated replies."""

import asyncio

from tests.context_search_data import Says, corrections, exemplar_for, feedback, words, work
from tests.fakes import MODEL
from workers.context_search.candidates import Candidate, Pool
from workers.context_search.generated import PROMPTS, compare, not_losing

EMPTY = Candidate()


def compared(events, candidates, generator):
    job = work(events)
    pool = Pool(job.state, budget_tokens=400, count=words)
    return asyncio.run(compare(candidates, job.examples, pool=pool, generator=generator, model=MODEL))


def with_exemplar(events, revision):
    return Candidate((), (exemplar_for(work(events).state, revision),))


def test_the_context_whose_replies_are_nearer_to_the_wanted_ones_wins() -> None:
    events = corrections(6)
    shown = with_exemplar(events, 1)
    generator = Says(
        lambda context: "Wanted this." if "Wanted 1." in context else "A long reply that nobody asked for."
    )
    scores = compared(events, [EMPTY, shown], generator)
    assert scores[shown] > scores[EMPTY]
    assert not_losing(scores, EMPTY) == [shown]
    assert not_losing(scores, shown) == []


def test_as_good_is_not_lost() -> None:
    events = corrections(6)
    shown = with_exemplar(events, 1)
    scores = compared(events, [EMPTY, shown], Says(lambda context: "Wanted this."))
    assert not_losing(scores, EMPTY) == [shown]


def test_only_the_newest_prompts_are_answered() -> None:
    generator = Says(lambda context: "Wanted this.")
    compared(corrections(12), [EMPTY], generator)
    assert generator.asked == PROMPTS


def test_a_reply_that_is_copied_from_the_context_is_none() -> None:
    events = corrections(6)
    shown = with_exemplar(events, 1)
    scores = compared(events, [EMPTY, shown], Says(lambda context: "Wanted 1."))
    assert scores[shown] < scores[EMPTY]


def test_where_nothing_was_wanted_a_sound_reply_is_all_that_is_asked_for() -> None:
    events = [feedback(n, rating=-1.0) for n in range(1, 5)]
    assert compared(events, [EMPTY], Says(lambda context: "Something."))[EMPTY] == 1.0
    assert compared(events, [EMPTY], Says(lambda context: "again " * 40))[EMPTY] == 0.0
