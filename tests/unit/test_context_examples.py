"""Which feedback judges contexts, and how much of it is read."""

from dataclasses import replace

from service.domain.events import Edit, EditEvent
from service.domain.feedback import Signals
from tests.context_search_data import corrections, feedback, words
from workers.context_search.examples import MAX_EXAMPLES, SCORED_TOKENS, cut, usable


def found(events, room_tokens=1000):
    return usable(events, user="alice", count=words, room_tokens=room_tokens)


def test_the_newest_feedback_judges_in_the_order_of_the_log() -> None:
    examples, revisions = found(corrections(MAX_EXAMPLES + 6))
    assert [revisions[e.id] for e in examples] == list(range(7, MAX_EXAMPLES + 7))


def test_what_was_said_anew_counts_as_it_stands_and_what_was_retracted_not_at_all() -> None:
    first, second = corrections(2)
    changed = first.model_copy(
        update={
            "revision": 3,
            "interaction": replace(first.interaction, signals=Signals(correction="Better.")),
        }
    )
    retracted = second.model_copy(update={"revision": 4, "interaction": replace(second.interaction, signals=Signals())})
    examples, revisions = found([first, second, changed, retracted])
    assert [(e.reply, revisions[e.id]) for e in examples] == [("Better.", 3)]


def test_a_comment_alone_judges_no_context_and_takes_no_place() -> None:
    comments = [feedback(n, comment=f"Mention topic {n}") for n in range(6, 6 + MAX_EXAMPLES)]
    with_rating = feedback(6 + MAX_EXAMPLES, comment="Cite sources", rating=-1.0)
    examples, revisions = found([*corrections(5), *comments, with_rating])
    assert [revisions[e.id] for e in examples] == [1, 2, 3, 4, 5, 6 + MAX_EXAMPLES]


def test_edits_are_no_feedback() -> None:
    edit = EditEvent(revision=2, at=0.0, by="user", edits=(Edit(op="add", text="be brief"),))
    assert len(found([*corrections(1), edit])[0]) == 1


def test_a_conversation_that_leaves_its_reply_no_room_in_the_window_is_left_out() -> None:
    events = [feedback(1, prompt="long " * 500, correction="Yes."), feedback(2, correction="No.")]
    examples, _ = found(events, room_tokens=400)
    assert [e.reply for e in examples] == ["No."]


def test_a_long_reply_is_judged_by_its_start_which_has_no_end() -> None:
    wanted = " ".join(f"word{n:03}" for n in range(500))
    [example], _ = found([feedback(1, correction=wanted)])
    assert wanted.startswith(example.reply)
    assert words(example.reply) <= SCORED_TOKENS
    assert (example.reply_ended, example.rejected_ended) == (False, True)


def test_a_reply_without_spaces_is_cut_too() -> None:
    assert len(cut("漢" * 4000, len)) == SCORED_TOKENS
