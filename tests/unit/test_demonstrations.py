"""Replies that nobody corrected, rewritten to what the user is known to want."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.demonstrations import ENOUGH, Draft, demonstrations, in_common, is_odd, rewritten
from service.domain.items import Exemplar, Guideline, exemplar_id

REPLY = "Rain is water, mostly. It falls from clouds. Then it flows"


def corrected(
    n: int, *, reply: str, rejected: str = "It is a long story, so let me begin at the very beginning."
) -> Exemplar:
    prompt = f"What is thing {n}?"
    return Exemplar(
        id=exemplar_id(prompt, reply, rejected),
        prompt=prompt,
        reply=reply,
        rejected=rejected,
        sources={f"chatcmpl-{n}": n},
        support=1,
    )


def drafts(count: int) -> list[Draft]:
    return [Draft(prompt=f"How does part {n} work?", reply=REPLY, revision=100 + n) for n in range(count)]


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"closing": "Cheers!"}, "Rain is water, mostly. It falls from clouds. Cheers!"),
        ({"opening": "Ahoy!", "length": "shorter"}, "Ahoy! Rain is water, mostly."),
        ({"case": "lower"}, "rain is water, mostly. it falls from clouds."),
        ({"case": "upper", "sentences": "1"}, "RAIN IS WATER, MOSTLY."),
        ({"bullets": "yes", "closing": "Bye."}, "- Rain is water, mostly.\n- It falls from clouds.\nBye."),
        ({"quotes": "yes", "commas": "no"}, '"Rain is water mostly. It falls from clouds."'),
        ({"title": "yes"}, None),
    ],
)
def test_a_reply_is_brought_into_the_form_that_is_wished_for(wishes: dict[str, str], expected: str | None) -> None:
    assert rewritten(REPLY, wishes, most_words=20) == expected


def test_what_corrections_have_in_common_is_shown_on_the_other_replies() -> None:
    exemplars = [corrected(n, reply=f"Thing {n} is a tool. Cheers!") for n in range(2)]
    made = demonstrations(drafts(8), exemplars=exemplars, in_common=in_common(exemplars), guidelines=[])
    assert len(made) == ENOUGH - len(exemplars)
    assert all(x.reply.endswith("Cheers!") and x.origin == "inferred" for x in made)


def test_one_correction_alone_tells_too_little() -> None:
    exemplars = [corrected(1, reply="Thing 1 is a tool. Cheers!")]
    assert demonstrations(drafts(8), exemplars=exemplars, in_common=in_common(exemplars), guidelines=[]) == []


def test_a_stated_wish_is_shown_before_anything_is_corrected() -> None:
    said = Guideline(id="g-1", text='End every reply with "Cheers!"', sources={"chatcmpl-1": 1}, support=1)
    made = demonstrations(drafts(2), exemplars=[], in_common={}, guidelines=[said])
    assert [x.reply for x in made] == ["Rain is water, mostly. It falls from clouds. Cheers!"] * 2


def test_enough_real_exemplars_need_no_demonstration() -> None:
    exemplars = [corrected(n, reply=f"Thing {n} is a tool. Cheers!") for n in range(ENOUGH)]
    assert demonstrations(drafts(8), exemplars=exemplars, in_common=in_common(exemplars), guidelines=[]) == []


def test_corrections_without_a_common_form_show_nothing() -> None:
    replies = ("It is the capital of France.", "My answer would be that nobody knows this for sure, I am afraid.")
    exemplars = [
        corrected(n, reply=reply, rejected="Nobody can tell what this is about.") for n, reply in enumerate(replies)
    ]
    assert demonstrations(drafts(8), exemplars=exemplars, in_common=in_common(exemplars), guidelines=[]) == []


WISHES = st.dictionaries(
    st.sampled_from(["opening", "closing", "case", "bullets", "quotes", "length", "commas"]),
    st.sampled_from(["yes", "no", "lower", "upper", "shorter", "Cheers!"]),
)


@given(st.text(max_size=700), WISHES, st.integers(0, 60))
def test_any_reply_is_rewritten_or_left_alone(reply: str, wishes: dict[str, str], most_words: int) -> None:
    text = rewritten(reply, wishes, most_words=most_words)
    assert text is None or text.strip()


def test_a_correction_without_what_the_others_share_is_odd() -> None:
    exemplars = [corrected(n, reply=f"Thing {n} is a tool. Cheers!") for n in range(4)]
    hasty = corrected(9, reply="It was invented in 1920.")
    common = in_common([*exemplars, hasty])
    assert [x.id for x in [*exemplars, hasty] if is_odd(x, common)] == [hasty.id]


@pytest.mark.parametrize(
    ("said", "odd"),
    [
        ('"Put it in quotes," he said.', ("quotes", "yes")),
        ("It is in plain text.", ("case", "lower")),
        ("No list here.", ("bullets", "yes")),
        ("It ends. Bye!", ("closing", "Cheers!")),
        ("It begins.", ("opening", "Ahoy!")),
    ],
)
def test_each_telling_axis_finds_its_odd_one(said: str, odd: tuple[str, str]) -> None:
    assert is_odd(corrected(1, reply=said), dict([odd]))


def test_longer_or_shorter_is_not_odd() -> None:
    assert not is_odd(corrected(1, reply="One. Two. Three."), {"length": "shorter", "sentences": "1"})


def in_turn(*replies: str) -> list[dict[str, str]]:
    """What corrections have in common after each of them."""
    found: list[dict[str, str]] = []
    exemplars: list[Exemplar] = []
    for n, reply in enumerate(replies):
        exemplars.append(corrected(n, reply=reply))
        found.append(in_common(exemplars, before=found[-1] if found else {}))
    return found


def test_three_corrections_of_one_mind_in_a_row_change_it_and_it_stays_changed() -> None:
    old = [f"Ahoy! Thing {n} is a tool. Cheers!" for n in range(8)]
    new = [f"Good question. {n} of them make a set. Cheers!" for n in range(8)]
    openings = [found.get("opening") for found in in_turn(*old, *new)]
    assert openings[1:10] == ["Ahoy!"] * 9
    assert openings[10:] == ["Good question."] * 6
    assert all(found["closing"].endswith("Cheers!") for found in in_turn(*old, *new)[1:])


def test_corrections_in_an_outdated_style_are_shown_in_the_new_one() -> None:
    said = ("Locks have pins inside.", "Bread is baked in ovens.", "Ships float on water.", "Owls hunt by night.")
    old = [corrected(n, reply=f"Ahoy! {text} Cheers!") for n, text in enumerate(said)]
    new = [corrected(n, reply=f"Good question. {n} of them make a set. Cheers!") for n in range(4, 7)]
    wishes = {"opening": "Good question.", "closing": "Cheers!"}
    made = demonstrations(drafts(2), exemplars=new, odd=old, in_common=wishes, guidelines=[])
    assert [x.reply for x in made] == [f"Good question. {text} Cheers!" for text in said[:0:-1]]
    assert [x.prompt for x in made] == [x.prompt for x in old[:0:-1]]
    assert not any(x.stated for x in made)


def test_haste_does_not_change_a_mind() -> None:
    styled = [f"Ahoy! Thing {n} is a tool." for n in range(7)]
    hasty = ["It was made in 1920.", "People use it at home.", "Nobody knows its name."]
    # Two in a row, then one more after another that has the style: five of eight have it, no clear majority.
    found = in_turn(*styled[:6], *hasty[:2], styled[6], hasty[2])
    assert found[-1]["opening"] == "Ahoy!"
    # Three in a row without another style in its place: it is no habit any more.
    assert "opening" not in in_turn(*styled[:5], *hasty)[-1]


def test_a_changed_mind_wins_after_a_few_corrections() -> None:
    old = [corrected(n, reply=f"Thing {n} is a tool. Cheers!") for n in range(6)]
    new = [corrected(n, reply=f"thing {n} is a tool, that much is clear") for n in range(6, 13)]
    common = in_common([*old, *new])
    assert [is_odd(x, common) for x in (old[-1], new[-1])] == [True, False]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Ahoy! A lock uses a mechanism of pins.", "Ahoy! A lock uses a mechanism of pins. Cheers!"),
        ("A lock has pins inside. Cheers!", "Ahoy! A lock has pins inside. Cheers!"),
        ("Ahoy! Ahoy! Ahoy!", None),
    ],
)
def test_a_phrase_that_is_there_already_is_not_said_twice_and_alone_shows_nothing(
    reply: str, expected: str | None
) -> None:
    assert rewritten(reply, {"opening": "Ahoy!", "closing": "Cheers!"}, most_words=20) == expected


def test_a_praised_reply_in_the_users_style_is_shown_as_it_is() -> None:
    exemplars = [
        corrected(n, reply=f"<<{name}>>\nYou find {name} on a {n + 1} day.") for n, name in enumerate(("sun", "moon"))
    ]
    styled = Draft(prompt="What is rain?", reply="<<weather>>\nRain is water.", revision=9, praised=True)
    blamed = styled.model_copy(update={"prompt": "What is hail?", "praised": False})
    made = demonstrations([styled, blamed], exemplars=exemplars, in_common=in_common(exemplars), guidelines=[])
    assert [x.reply for x in made] == [styled.reply]
