"""Which way an instruction goes on which axis of style, which two clash, and which are the same: what retires or merges guidelines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.comments import canonical, contradicts, stances

STANCES: dict[str, dict[str, str]] = {
    # length and detail are one axis
    "Keep it short.": {"length": "shorter"}, "be brief": {"length": "shorter"}, "too long": {"length": "shorter"},
    "a bit long": {"length": "shorter"}, "not too long": {"length": "shorter"}, "use fewer words": {"length": "shorter"},
    "I don't like long answers": {"length": "shorter"}, "could you be less verbose": {"length": "shorter"},
    "skip the details": {"length": "shorter"}, "no more than 20 words": {"length": "shorter"}, "15 words max": {"length": "shorter"},
    "more detail": {"length": "longer"}, "too short": {"length": "longer"}, "not detailed enough": {"length": "longer"},
    "your replies lack detail": {"length": "longer"}, "at least 200 words": {"length": "longer"},
    "zu lang": {"length": "shorter"}, "trop long": {"length": "shorter"}, "demasiado largo": {"length": "shorter"},
    "plus de détails": {"length": "longer"}, "mais curto": {"length": "shorter"}, "più corto": {"length": "shorter"},
    "Answer in one sentence.": {"sentences": "1", "length": "shorter"}, "at most three sentences": {"sentences": "<=3"},
    "under three sentences": {"sentences": "<=2", "length": "shorter"}, "2-3 sentences": {"sentences": "<=3"},
    "at least five sentences": {"sentences": ">=5", "length": "longer"}, "don't write more than 3 sentences": {"sentences": "<=3"},
    # asked for or refused
    "use bullets": {"bullets": "yes"}, "bullet points!": {"bullets": "yes"}, "no bullets": {"bullets": "no"},
    "don't use bullet points": {"bullets": "no"}, "stop using bullet points": {"bullets": "no"}, "fewer bullets": {"bullets": "no"},
    "You use too many bullets": {"bullets": "no"}, "no longer use bullets": {"bullets": "no"},
    "I prefer prose over lists": {"bullets": "no"}, "use bullets instead of prose": {"bullets": "yes"},
    "don't use bullets, use prose": {"bullets": "no"}, "numbered lists please": {"bullets": "numbered"},
    "no emoji, bullets or headings": {"emoji": "no", "bullets": "no", "headings": "no"},
    "no emoji, short answers": {"emoji": "no", "length": "shorter"},
    "no bullets and use short answers": {"bullets": "no", "length": "shorter"},
    "use more examples and fewer emojis": {"examples": "yes", "emoji": "no"}, "too few examples": {"examples": "yes"},
    "don't skip examples": {"examples": "yes"}, "keine Emojis": {"emoji": "no"}, "pas d'emoji": {"emoji": "no"},
    "sin emojis": {"emoji": "no"}, "avoid commas": {"commas": "no"}, "never use exclamation marks!": {"exclamation": "no"},
    "write without code": {"code": "no"}, "just the code": {"code": "yes"}, "no markdown": {"formatting": "no"},
    "plain text only": {"formatting": "no"}, "no title": {"title": "no"}, "no PS please": {"postscript": "no"},
    "put it in quotation marks": {"quotes": "yes"}, "use digits": {"numbers": "digits"}, "spell out numbers": {"numbers": "words"},
    "don't ask questions": {"questions": "no"}, "end with a question": {"questions": "yes"},
    # manners
    "too formal": {"formality": "casual"}, "don't be so formal": {"formality": "casual"},
    "it's not formal enough": {"formality": "formal"},
    "no slang": {"formality": "formal"}, "förmlicher": {"formality": "formal"}, "friendlier": {"tone": "friendly"},
    "too robotic": {"tone": "friendly"}, "no jokes": {"humor": "no"}, "short and friendly": {"length": "shorter", "tone": "friendly"},
    "all lowercase": {"case": "lower"}, "write in all caps": {"case": "upper"}, "don't use all caps": {"case": "not upper"},
    "reply in German": {"language": "german"}, "auf Deutsch": {"language": "german"}, "English only": {"language": "english"},
    "not in English but in German": {"language": "german"}, "not in German": {"language": "not german"},
    # opening and closing phrases
    'End every reply with "Cheers!"': {"closing": "cheers"}, "sign off with “Yours, Bob”": {"closing": "yours bob"},
    "end with Cheers": {"closing": "cheers"}, 'Don\'t end with "Bye"': {"closing": "not bye"},
    'start with "Ahoy" and end with "Bye!"': {"opening": "ahoy", "closing": "bye"}, 'always put "Cheers" at the end': {"closing": "cheers"},
}  # fmt: skip

# What reads like a stance and is none, or is one that can't be told.
SILENT = (
    "", "use metres", "the intro is too long", "Keep the title short", "write short sentences", "give a short summary at the end",
    "how long is it", "as long as you can", "long-term goals", "my kids are short", "The short answer is no", "no comments in code",
    "explain the code", "the code is wrong", "no swear words", "there are no examples", "Your answer is not formal",
    "Why do you use emoji?",
    "list German cities", "no need to answer the question twice", "don't repeat the question", "add one sentence about cats",
    "10 words per sentence", "keep sentences under 20 words", "if I ask for code, use bullets", "use bullets when listing",
    "not only bullets", "don't mind bullets", "shorter but more detail", "use German or English", "for example this was wrong",
    'never say "in short" or "no bullets"', "end with a summary", "the variable names should be lowercase", "say hello like a pirate",
    "Don't apologise and don't ask whether that helps.", "Name the street or the bridge, never just left and right.",
)  # fmt: skip

CONTRADICTIONS = (
    ("more detail", "shorter"), ("I like long answers", "too long"), ("use bullets", "no bullets"), ("no lists", "use a numbered list"),
    ("be formal", "more casual please"), ('end with "Cheers!"', 'end with "Bye"'), ('end with "Cheers!"', "don't end with “Cheers”"),
    ("reply in German", "in French please"), ("Answer in one sentence.", "at least five sentences"), ("all lowercase", "use all caps"),
    ("Answer in one sentence.", "more detail please"), ("keine Emojis", "use emoji"), ("end with a question", "stop asking questions"),
)  # fmt: skip

COMPATIBLE = (
    ("more detail", "no bullets"), ("be brief", "too long"), ('end with "Cheers!"', 'End every reply with "cheers"'),
    ('end with "Cheers!"', "don't end with “Bye”"), ('end with "Cheers!"', 'start with "Hi!"'),
    ("under three sentences", "Answer in one sentence."),
    ("reply in German", "not in French"), ("under 50 words", "under 20 words"), ("use metres", "use feet"), ("no bullets", "use prose"),
    ("no emoji", "keep the title short"), ("shorter", "write longer variable names"),
)  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), STANCES.items())
def test_an_instruction_takes_a_stance(text: str, expected: dict[str, str]) -> None:
    assert stances(text) == expected


@pytest.mark.parametrize("text", SILENT)
def test_what_is_ambiguous_or_of_something_else_takes_none(text: str) -> None:
    assert stances(text) == {}


@pytest.mark.parametrize(("older", "newer"), CONTRADICTIONS)
def test_opposite_stances_contradict_each_other(older: str, newer: str) -> None:
    assert contradicts(older, newer)
    assert contradicts(newer, older)


@pytest.mark.parametrize(("older", "newer"), COMPATIBLE)
def test_what_one_reply_can_follow_does_not(older: str, newer: str) -> None:
    assert not contradicts(older, newer)
    assert not contradicts(newer, older)


@given(
    st.lists(
        st.sampled_from([*STANCES, *SILENT, ", ", ". ", " ", "\n", '"', "not ", "no ", "or ", "\ue000"]), max_size=6
    ).map("".join)
)
def test_no_instruction_contradicts_itself(text: str) -> None:
    assert not contradicts(text, text)


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    assert not contradicts(text, text)
    assert canonical(canonical(text)) == canonical(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Please be brief.", "be brief"),
        ("Could you answer in German?", "reply in German"),
        ("Keep your answers short, thanks!", "keep your response short"),
        ("Don't use bullets", "do not use bullet"),
        ("In-depth replies", "in depth reply"),
        ("End with “Cheers!”", 'end with "cheers"'),
        ("be brief\u200b !", "BE BRIEF"),
    ],
)
def test_the_same_in_nearly_the_same_words_has_one_key(text: str, same: str) -> None:
    assert canonical(text) == canonical(same)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("use bullets", "do not use bullets"),
        ("no emoji", "emoji"),
        ("less formal", "formal"),
        ("use C++", "use C#"),
        ('end with "!"', 'end with "?"'),
        ('end with "Thanks"', 'end with "Please"'),
        ("end with thanks", "end with please"),
        ("use 👍", "use 👎"),
        ("first bullets, then prose", "first prose, then bullets"),
    ],
)
def test_what_differs_in_sense_has_another_key(text: str, other: str) -> None:
    assert canonical(text) != canonical(other)


def test_only_the_beginning_of_a_huge_text_is_read() -> None:
    assert stances("x " * 5_000 + "be brief") == {}
    assert len(canonical("word " * 2_000)) < 1_000
