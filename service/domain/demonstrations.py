"""Demonstrations: what the user corrected otherwise, or only rated or commented on, put into the form that they want now.

Small models follow what they are shown far better than what they are told. So where the user's wishes are known (from guidelines, or from
what their corrections have in common) but few corrections show them, others are rewritten to those wishes by rules: corrections made in
haste or before the user changed their mind, then replies that nobody corrected. They stand in for the exemplars that are missing, compete
like any item, and leave as real exemplars come in.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from service.domain.comments import stances
from service.domain.feedback import Frozen, Interaction
from service.domain.inference import TELLING, Candidate, Pair, follows, infer, without
from service.domain.items import Exemplar, Guideline, exemplar_id

# So many exemplars are enough to show a style; real ones count first.
ENOUGH = 6
# Replies that are kept to be rewritten, the newest.
MAX_DRAFTS = 8
MAX_DRAFT_CHARS = 600
# Corrections that are compared, the newest.
COMPARED = 8
# In a row and of one mind, so many say that the user has changed theirs; one or two may have been made in haste.
LATEST = 3
# Longest demonstration where no correction says how long a reply should be.
DEFAULT_WORDS = 40
# A reply that says less than this has nothing to show but its form.
MIN_WORDS = 4

_SENTENCE = re.compile(r"[^.!?]+[.!?]+(?=\s|$)")
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+", re.MULTILINE)
_PHRASE = re.compile(r'"([^"]{1,80})"|“([^”]{1,80})”')


class Draft(Frozen):
    """A reply that was spoken of and not corrected."""

    prompt: str
    reply: str
    revision: int
    praised: bool = False


def draft_of(interaction: Interaction, *, revision: int) -> Draft | None:
    """What an interaction's feedback leaves to rewrite: nothing where it says what was wanted, or nothing at all."""
    prompt, reply = interaction.last_user_text().strip(), interaction.reply.strip()
    if interaction.signals.is_empty() or interaction.pair() is not None or not prompt or not reply:
        return None
    if len(prompt) > MAX_DRAFT_CHARS:
        return None
    praised = (interaction.signals.stated_rating() or 0.0) > 0 and interaction.finish_reason != "length"
    return Draft(prompt=prompt, reply=reply[:MAX_DRAFT_CHARS], revision=revision, praised=praised)


def in_common(exemplars: Sequence[Exemplar], *, before: Mapping[str, str] = {}) -> dict[str, str]:
    """What a user's last corrections have in common, by axis of style; of `opening` and `closing` the phrase as it is written.

    Nothing of one alone, which does not tell what of it is the style. Where they are divided, what they had in common stands until none of
    the last three has it; then it is what these have in its place, if all of them do.

    Args:
        exemplars: oldest first.
        before: what they had in common before the last of them.
    """
    compared = [Pair(x.prompt, x.reply, x.rejected) for x in exemplars if x.rejected][-COMPARED:]
    latest = compared[-LATEST:]
    common = {c.axis: _value(c) for c in infer(compared)}
    divided = {axis: value for axis, value in before.items() if axis in TELLING and axis not in common}
    kept = {axis: v for axis, v in divided.items() if any(follows(pair.wanted, axis, v) for pair in latest)}
    if kept != divided and len(latest) == LATEST:
        common |= {c.axis: _value(c) for c in infer(latest) if c.axis in divided and c.support == LATEST}
    return common | kept


def _value(candidate: Candidate) -> str:
    phrase = _phrase(candidate.text)
    return candidate.value if phrase is None else phrase


def is_odd(exemplar: Exemplar, in_common: Mapping[str, str]) -> bool:
    """Whether a correction lacks what the others have in common: made in haste, or before the user changed their mind."""
    return not exemplar.pinned and _strays(exemplar.reply, in_common)


def _strays(reply: str, in_common: Mapping[str, str]) -> bool:
    return any(follows(reply, axis, value) is False for axis, value in in_common.items() if axis in TELLING)


def demonstrations(
    drafts: Iterable[Draft],
    *,
    exemplars: Sequence[Exemplar],
    odd: Sequence[Exemplar] = (),
    in_common: Mapping[str, str],
    guidelines: Iterable[Guideline],
) -> list[Exemplar]:
    """The missing exemplars, from the newest of the odd ones, then from the newest drafts.

    Args:
        exemplars: what the user corrected or preferred, oldest first.
        odd: likewise, but in another style.
        in_common: what the others have in common.
        guidelines: what the user said that stands.
    """
    missing = ENOUGH - len(exemplars)
    # After one correction, a demonstration that lacks its style would speak against it.
    if missing <= 0 or len(exemplars) == 1:
        return []
    wishes = dict(in_common)
    for guideline in sorted(guidelines, key=lambda g: g.renewed):
        for axis, value in stances(guideline.text).items():
            wishes[axis] = value if axis not in ("opening", "closing") else _phrase(guideline.text) or ""
    if not any(axis in wishes for axis in REWRITTEN):
        return []
    most_words = max((len(x.reply.split()) for x in exemplars), default=DEFAULT_WORDS)
    known = {x.prompt.casefold() for x in exemplars}
    made: list[Exemplar] = []
    newest = sorted(drafts, key=lambda d: -d.revision)
    for draft in [*sorted(_outdated(odd), key=lambda d: -d.revision), *newest]:
        as_wished = draft.praised and bool(in_common) and not _strays(draft.reply, in_common)
        reply = draft.reply if as_wished else rewritten(draft.reply, wishes, most_words=most_words)
        if reply is None or draft.prompt.casefold() in known or len(made) == missing:
            continue
        known.add(draft.prompt.casefold())
        name = exemplar_id(draft.prompt, reply)
        made.append(Exemplar(id=name, prompt=draft.prompt, reply=reply, origin="inferred", since=draft.revision))
    return made


def _outdated(odd: Sequence[Exemplar]) -> list[Draft]:
    """The odd ones without the phrases that they open and close with."""
    phrases = {axis: phrase for axis, phrase in in_common(odd).items() if axis in ("opening", "closing")}
    drafts = []
    for exemplar in odd:
        plain = exemplar.reply
        for axis, phrase in phrases.items():
            plain = without(plain, phrase, at_end=axis == "closing")
        drafts.append(Draft(prompt=exemplar.prompt, reply=plain, revision=exemplar.renewed))
    return drafts


REWRITTEN = ("opening", "closing", "case", "bullets", "quotes", "length", "sentences", "words", "commas")
"""Axes that `rewritten` acts on."""


def rewritten(reply: str, wishes: Mapping[str, str], *, most_words: int) -> str | None:
    """A reply in the form that is wished for, as far as rules can bring it there; None where they can't.

    Args:
        wishes: by the axes of `service.domain.comments.stances`; of `opening` and `closing` the phrase as it is written.
    """
    plain = _LIST_MARK.sub("", reply.strip().strip('"'))
    for axis in ("opening", "closing"):
        # One that has the phrase already must not get it twice.
        if phrase := wishes.get(axis):
            plain = without(plain, phrase, at_end=axis == "closing")
    sentences = _sentences(plain, most_words)
    if wishes.get("length") == "shorter" or wishes.get("sentences") in ("1", "<=1"):
        sentences = sentences[:1]
    if not sentences or wishes.get("title") == "yes" or wishes.get("code") == "yes":
        return None
    if sum(len(sentence.split()) for sentence in sentences) < MIN_WORDS:
        return None
    if wishes.get("commas") == "no":
        sentences = [sentence.replace(",", "") for sentence in sentences]
    parts = [part for part in (wishes.get("opening"), _body(sentences, wishes), wishes.get("closing")) if part]
    text = ("\n" if wishes.get("bullets") in ("yes", "numbered") else " ").join(parts)
    if wishes.get("case") in ("lower", "upper"):
        text = text.lower() if wishes["case"] == "lower" else text.upper()
    return f'"{text}"' if wishes.get("quotes") == "yes" and not text.startswith('"') else text


def _sentences(text: str, most_words: int) -> list[str]:
    """The first whole sentences within so many words; the first alone may take twice as many, or few replies could be shown at all."""
    kept: list[str] = []
    words = 0
    for match in _SENTENCE.finditer(text):
        words += len(match[0].split())
        if words > (most_words if kept else 2 * most_words):
            break
        kept.append(match[0].strip())
    return kept


def _body(sentences: Sequence[str], wishes: Mapping[str, str]) -> str:
    if wishes.get("bullets") == "yes":
        return "\n".join(f"- {sentence}" for sentence in sentences)
    if wishes.get("bullets") == "numbered":
        return "\n".join(f"{n}. {sentence}" for n, sentence in enumerate(sentences, start=1))
    return " ".join(sentences)


def _phrase(text: str) -> str | None:
    match = _PHRASE.search(text)
    return (match[1] or match[2]) if match else None
