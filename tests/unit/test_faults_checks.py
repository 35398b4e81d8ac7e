"""The suite of faults finds what it looks for: each check is shown what it must and what it must not report."""

from collections import Counter

import pytest

from service.domain.events import EditEvent, Event
from service.domain.feedback import FeedbackEvent, Interaction, Message, Signals, VersionTuple
from tests.faults.checks import Acknowledged, Echo, Loss, Person, crossing, doubled, gaps, losses
from tests.faults.records import Records, Request, clean_from

BASE_MODEL = "smol"
ALICE = Person("acme", "alice", "zq0123456789ab", "fs-of-alice")
BOB = Person("globex", "bob", "zqba9876543210", "fs-of-bob")


def event(revision: int, *, interaction: str, comment: str, before: str | None = None) -> FeedbackEvent:
    about = Interaction(
        id=interaction,
        tenant="acme",
        user="alice",
        created=0.0,
        messages=(Message(role="user", content="A question"),),
        reply="A reply",
        version=VersionTuple(model=BASE_MODEL),
        signals=Signals(comment=comment),
    )
    return FeedbackEvent(revision=revision, at=0.0, interaction=about, previous=Signals(comment=before))


def told(n: int, person: Person = ALICE) -> Acknowledged:
    return Acknowledged(person, f"chat-{n}", f"Say {n}.", n)


LOG: list[Event] = [
    event(1, interaction="chat-1", comment="Say 1."),
    EditEvent(revision=2, at=0.0, by="user", edits=()),
    event(3, interaction="chat-2", comment="Say 2."),
]


def test_what_is_there_once_is_not_lost() -> None:
    assert losses([told(1), told(2)], {ALICE: LOG}) == []
    assert (doubled({ALICE: LOG}), gaps({ALICE: LOG})) == (0, 0)


def test_what_is_not_there_is_lost() -> None:
    assert losses([told(1), told(2), told(3)], {ALICE: LOG}) == [Loss(told(3), times=0)]
    assert losses([told(1)], {ALICE: []}) == [Loss(told(1), times=0)]


def test_what_is_in_somebody_elses_log_is_lost() -> None:
    assert losses([told(1, BOB)], {ALICE: LOG, BOB: []}) == [Loss(told(1, BOB), times=0)]


def test_what_is_there_twice_is_as_bad() -> None:
    twice = [*LOG, event(4, interaction="chat-2", comment="Say 2.")]
    assert losses([told(1), told(2)], {ALICE: twice}) == [Loss(told(2), times=2)]
    assert doubled({ALICE: twice, BOB: []}) == 1


def test_another_signal_of_the_same_reply_does_not_say_the_comment_again() -> None:
    again = [*LOG, event(4, interaction="chat-2", comment="Say 2.", before="Say 2.")]
    assert losses([told(2)], {ALICE: again}) == []


def test_a_log_that_lacks_a_revision_has_a_gap() -> None:
    assert gaps({ALICE: LOG[:1] + LOG[2:], BOB: LOG}) == 1


def echoed(model: str, *texts: str) -> Echo:
    messages = [{"role": "system", "content": text} for text in texts]
    messages += [{"role": "user", "content": "An example?"}, {"role": "user", "content": "What now?"}]
    written = Echo.of(model, messages).written()
    return Echo.read(f"{written}\n and so on")


@pytest.mark.parametrize("model", [BASE_MODEL, ALICE.adapter])
def test_ones_own_context_and_adapter_do_not_cross(model: str) -> None:
    echo = echoed(model, f"Mention {ALICE.secret} and {ALICE.secret}.")
    assert echo.secrets == (ALICE.secret,)
    assert crossing(echo, ALICE, asked="What now?", base_model=BASE_MODEL) == ""


@pytest.mark.parametrize(
    ("echo", "says"),
    [
        (echoed(BASE_MODEL, f"Mention {BOB.secret}."), "somebody else"),
        (echoed(BASE_MODEL, f"Mention {ALICE.secret}.", f"Mention {BOB.secret}."), "somebody else"),
        (echoed(BOB.adapter, f"Mention {ALICE.secret}."), "somebody else's"),
    ],
)
def test_anothers_context_or_adapter_crosses(echo: Echo, says: str) -> None:
    assert says in crossing(echo, ALICE, asked="What now?", base_model=BASE_MODEL)


def test_the_answer_to_another_question_crosses() -> None:
    echo = echoed(BASE_MODEL)
    assert "got the answer to 'What now?'" in crossing(echo, ALICE, asked="What then?", base_model=BASE_MODEL)


def served(*moments: float, took: float = 0.1) -> list[Request]:
    """All three kinds of request at each moment, which is when they end."""
    return [Request(kind, at - took, at) for at in moments for kind in ("chat", "stream", "feedback")]


STEADY = served(*(n / 4 for n in range(1, 40)))


def test_a_second_without_errors_is_clean_from_its_begin() -> None:
    assert clean_from(Records(requests=STEADY), since=2.0, until=9.0) == 2.0


def test_a_second_that_is_not_over_yet_is_not_clean_yet() -> None:
    assert clean_from(Records(requests=STEADY), since=2.0, until=2.9) is None


def test_a_failed_attempt_puts_the_clean_second_off_to_after_it() -> None:
    records = Records(requests=STEADY, attempts=[(1.0, "503"), (2.7, "503"), (2.8, "ReadTimeout")])
    assert clean_from(records, since=2.0, until=9.0) == 2.8


def test_so_does_a_request_that_failed_for_good() -> None:
    records = Records(requests=[*STEADY, Request("chat", 1.5, 3.1, "503")])
    assert clean_from(records, since=2.0, until=9.0) == 3.1
    assert records.errors() == Counter({"chat: 503": 1})


def test_a_second_is_not_clean_while_one_hangs_or_one_kind_is_not_served() -> None:
    hangs = [*STEADY, Request("chat", 1.9, 4.1)]
    assert clean_from(Records(requests=hangs), since=2.0, until=9.0) == 3.25
    no_streams = [r for r in STEADY if r.kind != "stream" or r.ended >= 5.0]
    assert clean_from(Records(requests=no_streams), since=2.0, until=9.0) == 4.0


def test_none_is_clean_where_nothing_comes() -> None:
    assert clean_from(Records(), since=0.0, until=100.0) is None
