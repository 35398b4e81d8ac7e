"""Norms of a scope: what each checker holds and does not, what a bad one is told, how far a reply adheres."""

import pytest
from pydantic import ValidationError

from service.domain.norms import CHECKERS, CLASHES, MAX_NORMS, Norm, checked, union
from service.verifiers.checkers import CHECKS, checker_of
from service.verifiers.norms import adherence, findings

FRENCH = "Le chat est assis sur la table de la cuisine et il regarde par la fenêtre."

# Checker, arguments, replies that hold it, replies that don't, and a part of what the last of those is told.
CASES = [
    ("max_words", {"words": 3}, ["One two three."], ["One two three four."], "4 words; cut it to 3"),
    ("min_words", {"words": 3}, ["One two three."], ["One two."], "2 words; say more"),
    ("max_sentences", {"sentences": 1}, ["See Dr. Who at 5.30 p.m. today."], ["Yes. No."], "2 sentences"),
    ("min_sentences", {"sentences": 2}, ["Yes. No."], ["Yes, and no."], "1 sentence"),
    ("no_commas", {}, ["First this. Then that."], ["First this, then that."], "1 comma"),
    ("lowercase", {}, ["hello there."], ["123", "hello There."], '"T"'),
    ("uppercase", {}, ["HELLO THERE."], ["HELLO there."], '"t"'),
    ("bullets", {"at_least": 2}, ["So:\n- one\n* two", "• one\n• two"], ["- one", "-one -two"], "0 bullet points"),
    ("highlights", {"at_least": 1}, ["It is *important*."], ["It is important."], "asterisks"),
    ("title", {}, ["<<Cats>>\nThey purr."], ["<< >> They purr.", "Cats: they purr."], "<<title>>"),
    ("quoted", {}, ['"They purr."'], ['They "purr".'], "begins with 'T'"),
    ("starts_with", {"phrase": "Ahoy!"}, ["ahoy! I am here.", '"Ahoy! Hi."'], ["Hello. Ahoy!"], 'begin with "Ahoy!"'),
    ("ends_with", {"phrase": "Cheers!"}, ["Bye. Cheers!", '"Bye. cheers!"'], ["Cheers! Bye."], 'end with "Cheers!"'),
    ("postscript", {}, ["Yours.\nP.S. Call me.", "p. s. Hi"], ["U.P.S. came.", "Yours."], "P.S."),
    ("must_contain", {"words": ["C++ (14)", "refund"]}, ["Refunds for C++ (14)."], ["C++ and refunds."], '"C++ (14)"'),
    ("must_not_contain", {"words": ["C++", "no"]}, ["I know C."], ["Not now. No.", "I like C++ best."], '"C++"'),
    ("json", {}, ['{"a": 1}', "```json\n[1]\n```"], ["5", '"x"', "{", "[" * 9000, "Here: {}"], "not JSON"),
    ("json", {"keys": ["answer"]}, ['{"answer": 1}'], ["[1]", '{"a": 1}'], 'lacks "answer"'),
    (
        "language",
        {"language": "fr"},
        [FRENCH],
        ["The cat sits on the table and looks out of the window.", "Oui."],
        "4 char",
    ),
]


def norm(checker: str, *, name: str | None = None, weight: float = 1.0, **arguments: object) -> Norm:
    return Norm(name=name or checker, checker=checker, arguments=arguments, weight=weight)


@pytest.mark.parametrize(("checker", "arguments", "held", "broken", "told"), CASES, ids=lambda value: str(value)[:20])
def test_a_checker_tells_replies_that_hold_it_from_those_that_do_not(
    checker: str, arguments: dict[str, object], held: list[str], broken: list[str], told: str
) -> None:
    check = checker_of(norm(checker, **arguments))
    assert [reply for reply in held if check(reply) is not None] == []
    assert [reply for reply in broken if check(reply) is None] == []
    assert told in str(check(broken[-1]))


def test_every_kind_of_norm_has_a_check_and_a_case_here() -> None:
    assert CHECKERS.keys() == CHECKS.keys() == {case[0] for case in CASES}
    assert {kind for pair in CLASHES for kind in pair} <= CHECKERS.keys()


def test_a_language_is_found_the_same_each_time() -> None:
    check = checker_of(norm("language", language="fr", min_chars=5))
    assert len({check("Merci, das ist good, amigo mio.") for _ in range(30)}) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"checker": "rhymes"}, "no checker 'rhymes'; use one of max_words, min_words"),
        ({"checker": "max_words"}, r"words: Field required \(max_words takes words\)"),
        ({"checker": "max_words", "arguments": {"words": 0}}, "words: Input should be greater than or equal to 1"),
        ({"checker": "max_words", "arguments": {"words": "ten"}}, "words: Input should be a valid integer"),
        ({"checker": "max_words", "arguments": {"words": True}}, "words: Input should be a valid integer"),
        ({"checker": "no_commas", "arguments": {"at_most": 1}}, r"at_most: .* \(no_commas takes no arguments\)"),
        ({"checker": "language", "arguments": {"language": "xx"}}, "language: Input should be"),
        ({"checker": "must_contain", "arguments": {"words": []}}, "words: .* at least 1 item"),
        ({"checker": "must_contain", "arguments": {"words": [" "]}}, r"words.0: "),
        ({"checker": "title", "name": "No Spaces"}, "String should match pattern"),
        ({"checker": "title", "weight": 0}, "greater than 0"),
        ({"checker": "title", "weight": float("inf")}, "finite number|less than or equal to 100"),
        ({"checker": "title", "text": "x" * 301}, "at most 300 characters"),
    ],
)
def test_a_bad_norm_is_told_what_is_wrong_and_what_its_checker_takes(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Norm.model_validate({"name": "house"} | fields)


def test_a_norm_without_words_gets_them_from_its_checker_and_survives_storage() -> None:
    given = norm("bullets")
    assert given.text == "A list of at least 2 bullet points."
    assert given.arguments == {"at_least": 2}
    assert norm("language", language="fr").text == "Written in the language 'fr', in at least 40 characters."
    assert Norm.model_validate_json(given.model_dump_json()) == given
    assert Norm(name="x", checker="title", text="File it.").text == "File it."


@pytest.mark.parametrize(
    ("norms", "told"),
    [
        ([norm("lowercase"), norm("uppercase")], "no reply can hold both 'lowercase'"),
        ([norm("json"), norm("title")], "no reply can hold both"),
        ([norm("max_words", words=5), norm("min_words", words=6)], "no reply can hold both"),
        ([norm("title"), norm("quoted", name="title")], "the name 'title' is given 2 times"),
        ([norm("title", name=f"n{n}") for n in range(MAX_NORMS + 1)], "17 norms are over the limit of 16"),
    ],
)
def test_norms_that_can_not_hold_together_are_refused(norms: list[Norm], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        checked(norms)


def test_norms_that_can_hold_together_pass() -> None:
    norms = [norm("max_words", words=5), norm("min_words", words=5), norm("lowercase"), norm("title")]
    assert checked(norms) == tuple(norms)


def test_of_several_scopes_the_most_specific_norm_of_a_name_holds() -> None:
    own, cohort, everybody = (norm("max_words", name="length", words=n) for n in (10, 20, 30))
    other = norm("title")
    assert union([[own], [cohort, other], [everybody]]) == (own, other)
    assert union([[], [cohort]]) == (cohort,)


NORMS = (norm("max_words", words=5, weight=3.0), norm("title"), norm("no_commas"))


def test_adherence_is_the_weighted_share_of_norms_held() -> None:
    assert adherence(NORMS, "Hi", "<<A>> Short.").reward == 1
    assert adherence(NORMS, "Hi", "Short, yes.").reward == pytest.approx(3 / 5)
    assert adherence(NORMS, "Hi", "<<A>> This is, I am sorry, rather long.").reward == pytest.approx(1 / 5)
    assert adherence((), "Hi", "Anything.").reward == 1


def test_the_feedback_says_which_norms_failed_why_and_what_to_do() -> None:
    feedback = adherence(NORMS, "Hi", "Short, yes.").feedback
    assert feedback.splitlines() == [
        "Not held: A title in double angular brackets, such as <<title>>. But it has no title; put one in double angular "
        "brackets above it, such as <<title>>.",
        "Not held: No commas. But it has 1 comma(s); make short sentences instead.",
        "Held: At most 5 words.",
    ]


@pytest.mark.parametrize("reply", ["", "  \n", "is it  RAINING?"])
def test_an_empty_reply_and_an_echo_hold_nothing(reply: str) -> None:
    verdict = adherence(NORMS, "Is it raining?", reply)
    assert verdict.reward == 0
    assert "the reply " in verdict.feedback
    assert all(finding.problem for finding in findings(NORMS, "Is it raining?", reply))
