"""What slow weights add, measured in one process: on a tiny random model, so what is said means nothing and how it is counted does."""

import json
import math

import pytest

from service.domain.feedback import FeedbackEvent
from service.domain.fold import fold
from tests.benchmarks.learning.prompts import load
from tests.benchmarks.learning.users import population
from tests.benchmarks.slow.__main__ import consolidated, record, summary, up_to
from tests.benchmarks.slow.answers import ARMS, answered
from tests.benchmarks.slow.teaching import taught
from tests.benchmarks.terminal import terminal
from tests.consolidation_data import LENIENT

TRAIN, TESTS = load()
FEEDBACKS = 6


def teach(base, people):
    given = []
    pupils = taught(base, people, TRAIN, feedbacks=FEEDBACKS, budget_tokens=200, seed=0, on_feedback=given.append)
    assert given == sorted(given)
    assert given[-1] == FEEDBACKS * len(people)
    return pupils


@pytest.fixture(scope="module")
def pupils(tiny_base):
    return teach(tiny_base, population(2, (1,), seed=0))


def test_users_say_what_the_learning_benchmarks_users_would(pupils):
    [preference] = pupils[0].person.preferences
    wanted = {pupils[0].person.wanted(prompt) for prompt in TRAIN} | {prompt.plain for prompt in TRAIN}
    corrections = [e.interaction.signals.correction for e in pupils[0].events if e.interaction.signals.correction]
    assert corrections
    assert set(corrections) <= wanted
    assert any(preference.check(correction) for correction in corrections)


def test_a_users_state_is_the_fold_of_their_log_and_every_feedback_is_another_interaction(pupils):
    for pupil in pupils:
        assert [event.revision for event in pupil.events] == list(range(1, FEEDBACKS + 1))
        assert len({event.interaction.id for event in pupil.events}) == FEEDBACKS
        assert pupil.state == fold(pupil.events)
        shown = [event.interaction.items for event in pupil.events]
        assert shown[0] == ()
        assert any(shown)


def test_the_same_users_say_the_same_again_whoever_else_is_taught(tiny_base, pupils):
    alone = teach(tiny_base, [pupils[1].person])
    assert alone[0].events == pupils[1].events


def test_logs_come_back_from_json_as_they_were(pupils):
    events = json.loads(json.dumps([event.model_dump() for event in pupils[0].events]))
    assert [FeedbackEvent.model_validate(event) for event in events] == pupils[0].events


def test_who_has_no_adapter_is_answered_by_the_base_in_every_arm(tiny_base, tiny_settings, pupils, tmp_path):
    some = up_to(pupils, 2)
    assert [len(pupil.events) for pupil in some] == [2, 2]
    # Four feedbacks are needed.
    ends = consolidated(tiny_base, tiny_settings, some, 1, terminal())
    assert ends == [None, None]
    answers = answered(tiny_base, tiny_settings, some, ends, train=TRAIN, tests=TESTS[:2], seed=0)
    for n in range(2):
        assert answers["slow"][n] == answers["base"][n]
        assert answers["both"][n] == answers["fast"][n]
        assert answers["fast"][n].prompt_tokens > answers["base"][n].prompt_tokens
    figures = summary(answers, ends)
    assert figures["promoted"] == figures["over_budget"] == 0
    assert figures["scale"] is None
    record(tmp_path, 2, some, answers, ends)
    lines = [json.loads(line) for line in (tmp_path / "after-2.jsonl").read_text().splitlines()]
    assert [len(line["replies"]["oracle"]) for line in lines] == [2, 2]


def test_what_is_promoted_answers_and_its_report_is_counted(tiny_base, tiny_settings, pupils):
    roomy = tiny_settings.model_copy(
        update={"kl_text_budget_nats": 50.0, "kl_chat_budget_nats": 50.0, "learning_rate": 1e-2}
    )
    ends = consolidated(tiny_base, roomy, pupils, 2, terminal(), limits=LENIENT)
    answers = answered(tiny_base, roomy, pupils, ends, train=TRAIN, tests=TESTS[:2], seed=0)
    promoted = [n for n, end in enumerate(ends) if end.version is not None]
    assert promoted
    for n in range(2):
        same = answers["slow"][n].replies == answers["base"][n].replies
        assert same == (n not in promoted)
    figures = summary(answers, ends)
    assert figures["promoted"] == len(promoted)
    assert all(0 <= figures[arm] <= 1 for arm in ARMS)
    assert math.isfinite(figures["steps"])
