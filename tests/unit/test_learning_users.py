"""The learning benchmark's simulation: what users want is checkable and balanced, what they say is noisy and drawn from the seed alone."""

from collections import Counter
from itertools import islice
from statistics import fmean

import pytest

from tests.benchmarks.learning.preferences import PREFERENCES, Draft, Preference, compatible, opposite, write
from tests.benchmarks.learning.prompts import Prompt, answers, load
from tests.benchmarks.learning.users import (
    CARELESS,
    COMMENTED,
    CORRECTED,
    FLIPPED,
    GRUMBLES,
    UNSPECIFIC,
    WITHHELD,
    Mood,
    Person,
    curriculum,
    judge,
    mood,
    population,
    react,
)

TRAIN, TEST = load()
RAIN = TRAIN[0]
EVERY = pytest.mark.parametrize("preference", PREFERENCES.values(), ids=lambda p: p.name)
LONG = (
    "The answer to this question lies in the intricate dance of light and water, which many people have studied for a very long time. "
    "It is said that rain falls from the clouds when the drops have grown too heavy to stay up there."
)
CALM = Mood(False, False, False, False, False, False, False, 0.0)


def draft(prompt: Prompt) -> Draft:
    return Draft((prompt.answer, prompt.more), prompt.topic)


@EVERY
def test_what_a_user_would_have_written_satisfies_and_answers(preference: Preference) -> None:
    for prompt in (*TRAIN, *TEST):
        reply = write([preference], draft(prompt))
        assert preference.check(reply), reply
        assert answers(reply, prompt, TRAIN), reply


@EVERY
def test_no_reply_in_ones_style_satisfies_the_opposite(preference: Preference) -> None:
    other = opposite(preference)
    assert opposite(other) == preference
    assert not any(other.check(write([preference], draft(prompt))) for prompt in (*TRAIN, *TEST))


@EVERY
def test_an_untaught_reply_satisfies_nothing(preference: Preference) -> None:
    assert not preference.check(LONG)


@EVERY
def test_users_never_say_it_in_the_words_of_the_oracle(preference: Preference) -> None:
    assert len(preference.hints) >= 3
    assert not {preference.told, *GRUMBLES} & set(preference.hints)


def test_compatible_preferences_can_all_be_satisfied_at_once() -> None:
    people = population(60, (1, 2, 3), seed=1)
    assert {len(p.preferences) for p in people} == {1, 2, 3}
    for person in people:
        assert compatible(person.preferences)
        assert all(judge(person, person.wanted(prompt), prompt, TRAIN).satisfied for prompt in TEST)


def test_every_user_has_a_twin_who_wants_the_opposite_of_it_all() -> None:
    people = population(24, (1, 2), seed=3)
    for a, b in zip(people[::2], people[1::2], strict=True):
        assert tuple(map(opposite, a.preferences)) == b.preferences
        assert a.at_odds(b)
    wanted = Counter(p.name for person in people for p in person.preferences)
    assert all(wanted[p.name] == wanted[opposite(p).name] for p in PREFERENCES.values())


@EVERY
def test_a_policy_blind_to_the_user_satisfies_at_most_half(preference: Preference) -> None:
    people = population(24, (1, 2), seed=3)
    replies = [(write([preference], draft(prompt)), prompt) for prompt in TEST]
    assert fmean(judge(p, reply, prompt, TRAIN).satisfied for p in people for reply, prompt in replies) <= 0.5


def test_an_odd_number_of_users_is_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        population(3, (1,), seed=0)


def test_training_and_test_questions_have_no_topic_in_common() -> None:
    assert not {p.topic for p in TRAIN} & {p.topic for p in TEST}
    assert len({p.ask for p in (*TRAIN, *TEST)}) == len(TRAIN) + len(TEST) == 60


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("", "empty"),
        ("Cheers!", "too short"),
        ("Boats are nice to look at, I think. Cheers!", "off its topic"),
        ("Rain is wet. Rain is wet. Rain is wet. Rain is wet.", "a loop"),
        (f"{TRAIN[10].answer} Rain.", "a copy of another answer"),
    ],
)
def test_a_reply_that_does_not_answer_is_told(reply: str, why: str) -> None:
    assert not answers(reply, RAIN, TRAIN), why


def test_the_same_seed_draws_the_same_users_questions_and_moods() -> None:
    first, again, other = (population(8, (1, 2), seed=seed) for seed in (5, 5, 6))
    assert first == again != other
    asked = [list(islice(curriculum(first[0], TRAIN, seed=seed), 50)) for seed in (5, 5, 6)]
    assert asked[0] == asked[1] != asked[2]
    assert set(asked[0]) == set(TRAIN)
    assert mood(first[0], 7, seed=5) == mood(again[0], 7, seed=5) != mood(first[0], 7, seed=6)


def test_users_are_as_noisy_as_they_are_said_to_be() -> None:
    moods = [mood(person, n, seed=0) for person in population(20, (1, 2), seed=0) for n in range(200)]
    shares = {name: fmean(getattr(m, name) for m in moods) for name in ("withheld", "flipped", "comments", "corrects")}
    expected = {"withheld": WITHHELD, "flipped": FLIPPED, "comments": COMMENTED, "corrects": CORRECTED}
    assert shares == pytest.approx(expected, abs=0.03)
    assert fmean(m.unspecific for m in moods if m.comments) == pytest.approx(UNSPECIFIC, abs=0.04)
    assert fmean(m.careless for m in moods if m.corrects) == pytest.approx(CARELESS, abs=0.03)


def person(*names: str) -> Person:
    return Person("p", tuple(PREFERENCES[name] for name in names))


def feedback(given: Mood, reply: str, *, who: Person, other: str | None = None) -> dict[str, object]:
    compared = None if other is None else ("other-id", judge(who, other, RAIN, TRAIN))
    return react(given, who, RAIN, judge(who, reply, RAIN, TRAIN), compared)


def test_a_satisfied_user_only_rates_and_an_unsatisfied_one_may_comment_and_correct() -> None:
    talkative = Mood(False, False, True, False, True, False, False, 0.9)
    who = person("cheers")
    assert feedback(talkative, "Rain falls from clouds. Cheers!", who=who) == {"rating": True}
    said = feedback(talkative, "Rain falls from clouds.", who=who)
    assert said == {"rating": False, "comment": PREFERENCES["cheers"].hints[-1], "correction": who.wanted(RAIN)}


def test_ratings_are_withheld_and_flipped() -> None:
    who = person("cheers")
    assert feedback(Mood(True, True, *[False] * 5, 0.0), "Rain.", who=who) == {}
    assert feedback(Mood(False, True, *[False] * 5, 0.0), "Rain.", who=who) == {"rating": True}


def test_a_careless_correction_mends_the_answer_and_forgets_the_style() -> None:
    careless = Mood(True, False, False, False, True, True, False, 0.0)
    assert feedback(careless, "Rain.", who=person("cheers")) == {"correction": RAIN.plain}


def test_an_unspecific_comment_names_no_preference() -> None:
    vague = Mood(True, False, True, True, False, False, False, 0.0)
    assert feedback(vague, "Rain falls.", who=person("cheers")) == {"comment": GRUMBLES[0]}


def test_a_comment_is_about_what_is_missing() -> None:
    blunt = Mood(True, False, True, False, False, False, False, 0.0)
    said = feedback(blunt, "rain falls from clouds.", who=person("cheers", "lowercase"))
    assert said == {"comment": PREFERENCES["cheers"].hints[0]}


@pytest.mark.parametrize(
    ("other", "better"), [("Rain falls from clouds. Cheers!", "other"), ("Clouds rain.", None), ("", None)]
)
def test_of_two_replies_the_one_that_satisfies_more_is_preferred(other: str, better: str | None) -> None:
    said = feedback(CALM, "Rain falls from clouds.", who=person("cheers"), other=other)
    assert said.get("preference") == (better and {"interaction_id": "other-id", "better": better})
