"""What each kind of norm (service/domain/norms.py) asks of a reply: IFEval's check where it has one that is right on short replies.

A check returns None where the norm is held, else what is wrong and how to mend it.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from service.domain.norms import Highlights, Keys, Language, Norm, Nothing, Phrase, Points, Sentences, Terms, Words
from service.verifiers.ifeval import ifeval, language_of, sentences

Check = Callable[[str], str | None]

BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
WORD = re.compile(r"\w+")
TITLE = re.compile(r"<<([^<>\n]+)>>")
POSTSCRIPT = re.compile(r"^[ \t]*P\. ?S\.", re.MULTILINE | re.IGNORECASE)


def checker_of(norm: Norm) -> Check:
    """The check of one norm, with its arguments.

    Raises:
        VerifiersMissing: the extra `verifiers` is not installed.
    """
    return CHECKS[norm.checker](norm.told)


def max_words(told: Words) -> Check:
    few = ifeval("length_constraints:number_words", num_words=told.words + 1, relation="less than")
    return lambda reply: None if few(reply) else f"it has {_words(reply)} words; cut it to {told.words} or fewer"


def min_words(told: Words) -> Check:
    enough = ifeval("length_constraints:number_words", num_words=told.words, relation="at least")
    return lambda reply: None if enough(reply) else f"it has {_words(reply)} words; say more, in {told.words} or more"


def max_sentences(told: Sentences) -> Check:
    def check(reply: str) -> str | None:
        found = len(sentences(reply))
        return (
            None if found <= told.sentences else f"it has {found} sentences; keep the {told.sentences} that matter most"
        )

    return check


def min_sentences(told: Sentences) -> Check:
    def check(reply: str) -> str | None:
        found = len(sentences(reply))
        return None if found >= told.sentences else f"it has {found} sentence(s); write {told.sentences} or more"

    return check


def no_commas(_: Nothing) -> Check:
    free = ifeval("punctuation:no_comma")
    return lambda reply: None if free(reply) else f"it has {reply.count(',')} comma(s); make short sentences instead"


def lowercase(_: Nothing) -> Check:
    """(IFEval's also asks langdetect whether it is English, a guess on a short reply.)"""
    return lambda reply: None if reply.islower() else _cased(reply, str.isupper, "lowercase", "i am fine")


def uppercase(_: Nothing) -> Check:
    return lambda reply: None if reply.isupper() else _cased(reply, str.islower, "capital", "I AM FINE")


def bullets(told: Points) -> Check:
    """(IFEval counts them exactly, which hardly any house asks for.)"""

    def check(reply: str) -> str | None:
        found = len(BULLET.findall(reply))
        if found >= told.at_least:
            return None
        return f'it has {found} bullet points; write {told.at_least} or more, each on its own line after "- "'

    return check


def highlights(told: Highlights) -> Check:
    enough = ifeval("detectable_format:number_highlighted_sections", num_highlights=told.at_least)
    return lambda reply: (
        None if enough(reply) else f"fewer than {told.at_least} parts stand between *asterisks*; mark what matters"
    )


def title(_: Nothing) -> Check:
    """(IFEval's expression takes a tenth of a second over some thousand "<".)"""
    advice = "it has no title; put one in double angular brackets above it, such as <<title>>"
    return lambda reply: None if any(found.strip() for found in TITLE.findall(reply)) else advice


def quoted(_: Nothing) -> Check:
    wrapped = ifeval("startend:quotation")

    def check(reply: str) -> str | None:
        if wrapped(reply):
            return None
        return f'it begins with {reply.strip()[0]!r} and ends with {reply.strip()[-1]!r}; put " before its first word and after its last'

    return check


def starts_with(told: Phrase) -> Check:
    """Whatever the case, and inside quotation marks too."""
    phrase = told.phrase.strip()

    def check(reply: str) -> str | None:
        text = reply.strip().lstrip('"')
        if text.casefold().startswith(phrase.casefold()):
            return None
        return f'it begins with "{text[: len(phrase)]}"; begin with "{phrase}"'

    return check


def ends_with(told: Phrase) -> Check:
    """Whatever the case, and inside quotation marks too."""
    phrase = told.phrase.strip()
    ends = ifeval("startend:end_checker", end_phrase=phrase)
    return lambda reply: (
        None
        if ends(reply)
        else f'it ends with "{reply.strip()[-len(phrase) :]}"; end with "{phrase}", nothing after it'
    )


def postscript(_: Nothing) -> Check:
    """At the beginning of a line. (IFEval takes any "p.s." for one, and half a second over some thousand spaces.)"""
    advice = 'it has no postscript; add a last line that begins with "P.S."'
    return lambda reply: None if POSTSCRIPT.search(reply) else advice


def must_contain(told: Terms) -> Check:
    """Whatever the case, inside other words too: "refund" is in "refunds"."""
    # IFEval takes keywords for regular expressions.
    checks = {word: ifeval("keywords:existence", keywords=[re.escape(word.strip())]) for word in told.words}

    def check(reply: str) -> str | None:
        missing = [word for word, there in checks.items() if not there(reply)]
        return f"it lacks {_listed(missing)}; work it in" if missing else None

    return check


def must_not_contain(told: Terms) -> Check:
    """Whatever the case, as whole words. (IFEval's misses words that end in a sign, such as "C++".)"""
    patterns = {word: re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE) for word in told.words}

    def check(reply: str) -> str | None:
        found = [word for word, pattern in patterns.items() if pattern.search(reply)]
        return f"it says {_listed(found)}; leave that out" if found else None

    return check


def json_only(told: Keys) -> Check:
    """An object or a list, between ``` or not; with keys: an object that has them. (To IFEval a number or a quoted word is JSON too.)"""
    valid = ifeval("detectable_format:json_format")

    def check(reply: str) -> str | None:
        example = "{" + ", ".join(f'"{key}": ...' for key in told.keys or ("answer",)) + "}"
        text = re.sub(r"^```(?:json)?|```$", "", reply.strip(), flags=re.IGNORECASE).strip()
        try:
            parsed = json.loads(text) if valid(reply) else None
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict | list):
            return f"it is not JSON and nothing else; reply with {example} alone"
        missing = [key for key in told.keys if not isinstance(parsed, dict) or key not in parsed]
        return f"its JSON lacks {_listed(missing)}; reply with {example}" if missing else None

    return check


def language(told: Language) -> Check:
    def check(reply: str) -> str | None:
        text = reply.strip()
        if len(text) < told.min_chars:
            return f"it has {len(text)} characters; a language shows from {told.min_chars} on: say more"
        found = language_of(text)
        return (
            None
            if found == told.language
            else f"it reads as '{found or 'no language'}'; write all of it in '{told.language}'"
        )

    return check


def _words(reply: str) -> int:
    """As IFEval counts them."""
    return len(WORD.findall(reply))


def _listed(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _cased(reply: str, wrong: Callable[[str], bool], letters: str, example: str) -> str:
    found = "".join(character for character in reply if wrong(character))
    if not found:
        return f'it has no letters; answer in {letters} letters, as in "{example}"'
    return f'it has {len(found)} other letters, the first "{found[0]}"; write {letters} letters only, as in "{example}"'


CHECKS: dict[str, Callable[[Any], Check]] = {
    "max_words": max_words,
    "min_words": min_words,
    "max_sentences": max_sentences,
    "min_sentences": min_sentences,
    "no_commas": no_commas,
    "lowercase": lowercase,
    "uppercase": uppercase,
    "bullets": bullets,
    "highlights": highlights,
    "title": title,
    "quoted": quoted,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "postscript": postscript,
    "must_contain": must_contain,
    "must_not_contain": must_not_contain,
    "json": json_only,
    "language": language,
}
