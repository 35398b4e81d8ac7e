"""What pairs of replies say about a user's style, and that every guideline inferred so is understood as a stance again."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.comments import contradicts, guideline_text, stances
from service.domain.inference import MAX_CANDIDATES, Candidate, Pair, infer
from service.domain.inference.language import language_of

PLAIN = (
    "The cat sat on the mat because it was warm, quiet and clean. It stayed there for an hour. Then it left.",
    "Bread rises because yeast makes gas, and the gas is held by gluten. You should knead it well. Let it rest for two hours.",
    "Paris is the capital of France, and it lies on the Seine. Many people visit it every year. The river is long.",
    "A computer adds numbers with logic gates, which are made of transistors. They switch very fast. Modern chips have billions.",
    "Rain falls when drops in clouds grow heavy, as the air cools. The drops merge. Then they fall to the ground.",
)
GERMAN = (
    "Die Katze ist auf der Matte und sie ist nicht kalt. Das ist gut, denn im Haus zieht es sehr. Am Abend ging sie.",
    "Das Brot geht mit der Hefe auf und wird nicht flach. Man muss es gut kneten, aber nicht zu lang. Es ruht für eine Stunde.",
    "Paris liegt an der Seine und ist die größte Stadt im Land. Viele kommen auf dem Fluss. Er ist nicht kurz.",
    "Ein Rechner addiert mit Gattern, die von der Last nicht müde sind. Sie sind sehr schnell. Es gibt viele für das Geld.",
    "Der Regen fällt auf die Erde und ist nicht warm. Die Tropfen sind zu schwer für die Luft. Sie fallen auf den Boden.",
)
Style = Callable[[str], str]


def same(text: str) -> str:
    return text


def first_sentence(text: str) -> str:
    return text.split(". ", maxsplit=1)[0] + "."


def bulleted(text: str) -> str:
    return "\n".join(f"- {part}" for part in text.split(". "))


def numbered(text: str) -> str:
    return "\n".join(f"{n}. {part}" for n, part in enumerate(text.split(". "), 1))


def titled(text: str) -> str:
    return f"On {text.split()[1].title()}\n\n{text}"


def asking(text: str) -> str:
    return f"{text} Do you want to know more of {text.split()[1]}?"


def coded(text: str) -> str:
    return f"{text}\n```python\nprint({text[:5]!r})\n```"


def chatty(text: str) -> str:
    return text.replace(". ", ". Yeah, it's so and I don't know why. ", 1)


def pairs_of(wanted: Style, unwanted: Style = same) -> list[Pair]:
    return [Pair("Why?", wanted(text), unwanted(text)) for text in PLAIN]


DIFFERENCES: list[tuple[Style, Style, str, str, str]] = [
    (first_sentence, same, "length", "shorter", "Keep replies under about 15 words."),
    (first_sentence, same, "sentences", "1", "Answer in one sentence."),
    (lambda t: f"{t} {t} {t} {t} {t} {t}", same, "length", "longer", "Write at least about 100 words."),
    (bulleted, same, "bullets", "yes", "Use bullet points."),
    (numbered, same, "bullets", "numbered", "Use a numbered list."),
    (same, bulleted, "bullets", "no", "Write in prose, without bullet points or lists."),
    (str.lower, same, "case", "lower", "Write everything in lowercase letters."),
    (str.upper, same, "case", "upper", "Write everything in capital letters."),
    (same, str.lower, "case", "normal", "Use normal capitalization."),
    (lambda t: t.replace(",", ""), same, "commas", "no", "Use no commas."),
    (lambda t: t.replace(".", "!"), same, "exclamation", "yes", "Use exclamation marks."),
    (same, lambda t: t.replace(".", "!"), "exclamation", "no", "Use no exclamation marks."),
    (lambda t: t.replace(". ", " 😀. "), same, "emoji", "yes", "Use emoji."),
    (same, lambda t: t.replace(". ", " 😀. "), "emoji", "no", "Use no emoji."),
    (asking, same, "questions", "yes", "End with a question."),
    (same, asking, "questions", "no", "Do not end with a question."),
    (lambda t: f"{t}\n\nP.S. {t[:9]}", same, "postscript", "yes", "Add a P.S. at the end."),
    (same, lambda t: f"{t}\n\nP.S. {t[:9]}", "postscript", "no", "Add no P.S. at the end."),
    (titled, same, "title", "yes", "Begin with a title line."),
    (same, titled, "title", "no", "Write no title."),
    (lambda t: f'"{t}"', same, "quotes", "yes", "Put the whole reply in quotation marks."),
    (same, lambda t: f'"{t}"', "quotes", "no", "Do not put the reply in quotation marks."),
    (coded, same, "code", "yes", "Include a code block."),
    (same, coded, "code", "no", "Write without code."),
    (chatty, same, "formality", "casual", "Write casually, with contractions."),
    (same, chatty, "formality", "formal", "Write formally, without contractions."),
    (
        lambda t: t.replace(". ", ". It is, dear sir, therefore so. ", 1),
        same,
        "formality",
        "formal",
        "Write in a formal style.",
    ),
    (lambda t: GERMAN[PLAIN.index(t)], same, "language", "german", "Reply in German."),
    (lambda t: f"{t} Cheers!", same, "closing", "cheers", 'End every reply with "Cheers!"'),
    (lambda t: f"{t}\n\nOver and out.", same, "closing", "over and out", 'End every reply with "Over and out."'),
    (lambda t: f"{t} 🎉", same, "closing", "🎉", 'End every reply with "🎉"'),
    (lambda t: f"Ahoy! {t}", same, "opening", "ahoy", 'Begin every reply with "Ahoy!"'),
    (lambda t: f"Well, captain: {t}", same, "opening", "well captain", 'Begin every reply with "Well, captain"'),
]


@pytest.mark.parametrize(("wanted", "unwanted", "axis", "value", "text"), DIFFERENCES)
def test_a_difference_is_inferred_and_read_back(
    wanted: Style, unwanted: Style, axis: str, value: str, text: str
) -> None:
    is_ours = axis not in ("opening", "closing")
    assert Candidate(text, axis, value, shareable=is_ours, support=5, against=0) in infer(pairs_of(wanted, unwanted))
    assert stances(text)[axis] == value
    assert guideline_text(text) == text


def test_opposite_inferences_contradict_each_other() -> None:
    texts: dict[str, dict[str, str]] = {}
    for *_, axis, value, text in DIFFERENCES:
        texts.setdefault(axis, {})[value] = text
    for of_axis in texts.values():
        for value, text in of_axis.items():
            assert all(contradicts(text, other) for v, other in of_axis.items() if v != value)


def test_what_both_replies_have_is_no_difference() -> None:
    assert infer(pairs_of(same)) == []
    assert infer(pairs_of(str.lower, str.lower)) == []


def test_one_pair_is_not_enough() -> None:
    assert infer(pairs_of(str.lower)[:1]) == []


def test_noise_counts_against_and_a_clear_majority_still_holds() -> None:
    pairs = pairs_of(str.lower)
    pairs[0] = Pair("Why?", pairs[0].unwanted, pairs[0].wanted)
    assert [(c.value, c.support, c.against) for c in infer(pairs)] == [("lower", 4, 1)]
    pairs[1] = Pair("Why?", pairs[1].unwanted, pairs[1].wanted)
    assert infer(pairs) == []


def test_what_most_unwanted_replies_have_already_explains_nothing() -> None:
    pairs = pairs_of(str.lower)[:2] + pairs_of(str.lower, str.lower)[:3]
    assert infer(pairs) == []


def test_a_short_reply_without_commas_says_nothing_of_commas() -> None:
    pairs = pairs_of(lambda text: text.split()[0] + ".")
    assert "commas" not in {c.axis for c in infer(pairs)}


def test_a_common_first_word_is_no_opening() -> None:
    assert "opening" not in {c.axis for c in infer(pairs_of(lambda text: f"The {text}"))}


def test_what_the_phrase_brings_along_is_not_inferred_again() -> None:
    assert [c.axis for c in infer(pairs_of(lambda text: f"{text} Does that help you, my friend?!"))] == ["closing"]


def test_several_differences_are_found_at_once() -> None:
    found = infer(pairs_of(lambda text: f"Ahoy! {first_sentence(text).lower()}\nOver and out"))
    assert [c.axis for c in found] == ["closing", "opening", "length", "sentences", "case"]


@pytest.mark.parametrize("phrase", ["<|im_end|>", "{x} `y`", "<b>z</b>", "1."])
def test_a_phrase_that_is_markup_is_not_quoted(phrase: str) -> None:
    assert {"opening", "closing"}.isdisjoint(c.axis for c in infer(pairs_of(lambda t: f"{phrase}\n{t}\n{phrase}")))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat is on the mat and it is warm", "English"),
        ("Das ist die Katze und sie ist nicht im Haus", "German"),
        ("Le chat est sur la table et il ne dort pas", "French"),
        ("El gato está en la mesa y no se mueve por el ruido", "Spanish"),
        ("Il gatto è sul tavolo e non si muove per il rumore", "Italian"),
        ("O gato está na mesa e não se move com o ruído", "Portuguese"),
        ("猫はマットの上に座った", "Japanese"),
        ("猫坐在垫子上因为它暖和", "Chinese"),
        ("Кошка сидит на коврике", "Russian"),
        ("Кішка сидить на килимку і їсть", "Ukrainian"),
        ("القطة على السجادة", "Arabic"),
        ("बिल्ली चटाई पर बैठी", "Hindi"),
        ("hello", None),
        ("", None),
    ],
)
def test_a_language_is_told_by_its_script_or_commonest_words(text: str, language: str | None) -> None:
    assert language_of(text) == language


REPLIES = st.one_of(
    st.text(max_size=60),
    st.tuples(st.sampled_from(DIFFERENCES), st.sampled_from(PLAIN)).map(lambda made: made[0][0](made[1])),
)
PAIRS = st.lists(st.builds(Pair, st.text(max_size=5), REPLIES, REPLIES), max_size=8)


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(pairs: list[Pair], shuffle: random.Random) -> None:
    found = infer(pairs)
    shuffle.shuffle(pairs)
    assert infer(pairs) == found


@given(PAIRS)
def test_every_candidate_is_one_line_of_a_clear_majority(pairs: list[Pair]) -> None:
    found = infer(pairs)
    assert len(found) <= MAX_CANDIDATES
    for candidate in found:
        assert candidate.support >= max(2, 2 * candidate.against)
        assert candidate.text.isprintable()
        assert stances(candidate.text).get(candidate.axis) == candidate.value
