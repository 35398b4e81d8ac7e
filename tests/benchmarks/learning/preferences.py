"""What simulated users may want of a reply: pairs of opposites, each of which a program can write and check.

Both of a pair are wanted by the same number of users and no reply satisfies both, so a policy that does not know the user satisfies at most
half of them. Each can be expressed by a model of 135 million parameters from a few exemplars, and by hardly any reply of the base model.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.benchmarks.learning.ifeval import Check, ifeval

BRIEF_WORDS = 24


@dataclass(frozen=True)
class Draft:
    """A reply before it is put into words: what is said, and how."""

    sentences: tuple[str, ...]
    """The answer, and one more thing to say where there is room for it."""
    topic: str = ""
    opening: str = ""
    closing: str = ""
    bullets: bool = False
    title: bool = False
    quoted: bool = False
    cased: Callable[[str], str] = str

    def text(self) -> str:
        body = "\n".join(f"- {s}" for s in self.sentences) if self.bullets else self.sentences[0]
        between = "\n" if self.bullets else " "
        text = between.join(part for part in (self.opening, body, self.closing) if part)
        if self.title:
            text = f"<<{self.topic}>>\n{text}"
        return self.cased(f'"{text}"' if self.quoted else text)


@dataclass(frozen=True)
class Preference:
    """One thing that a user wants of every reply."""

    name: str
    axis: str
    """What it is about; the other preference of the same axis is its opposite."""
    told: str
    """The whole truth, for the oracle alone."""
    hints: tuple[str, ...]
    """What users say of it: their own words, some vaguer than others, never the checker's."""
    check: Check
    style: Callable[[Draft], Draft]


def starts(phrase: str) -> Check:
    return lambda reply: reply.strip().lstrip('"').lower().startswith(phrase.lower())


def one_line(check: Check) -> Check:
    return lambda reply: len(reply.strip().splitlines()) == 1 and check(reply)


def bulleted(reply: str) -> bool:
    """At least two points. (IFEval counts them exactly, which nobody here asks for.)"""
    return len(re.findall(r"^\s*[-*•]\s+\S", reply, re.MULTILINE)) >= 2


def lowercase(reply: str) -> bool:
    """(IFEval's also asks langdetect whether it is English, a guess on a reply this short.)"""
    return reply.islower()


WORD = re.compile(r"[A-Za-z][A-Za-z'’]*")


def headline(reply: str) -> bool:
    """Every word begins with a capital letter, and not all letters are one."""
    found = WORD.findall(reply)
    return bool(found) and all(word[0].isupper() for word in found) and not reply.isupper()


def big_first_letters(text: str) -> str:
    return WORD.sub(lambda word: word[0][0].upper() + word[0][1:], text)


PREFERENCES: dict[str, Preference] = {
    p.name: p
    for p in (
        Preference(
            "ahoy",
            "opening",
            'Begin every reply with "Ahoy!"',
            (
                "Greet me like a sailor first.",
                "I like to be hailed before anything else.",
                "Say ahoy to me, we are on a ship after all!",
            ),
            starts("Ahoy!"),
            lambda d: replace(d, opening="Ahoy!"),
        ),
        Preference(
            "praise",
            "opening",
            'Begin every reply with "Good question."',
            (
                "Praise what I asked before you explain.",
                "Tell me first that it was a good question, I like that.",
                "A bit of flattery to start with, please.",
            ),
            starts("Good question"),
            lambda d: replace(d, opening="Good question."),
        ),
        Preference(
            "cheers",
            "closing",
            'End every reply with "Cheers!"',
            (
                "Say goodbye as one does with a glass in the hand.",
                "I miss a cheery last word.",
                "Cheers after it would be friendly.",
            ),
            ifeval("startend:end_checker", end_phrase="Cheers!"),
            lambda d: replace(d, closing="Cheers!"),
        ),
        Preference(
            "radio",
            "closing",
            'End every reply with "Over and out."',
            (
                "Sign off as on the radio.",
                "How do I know that you are done? Pilots say so.",
                "Close it the way radio operators do: over and out.",
            ),
            ifeval("startend:end_checker", end_phrase="Over and out."),
            lambda d: replace(d, closing="Over and out."),
        ),
        Preference(
            "lowercase",
            "case",
            "Write everything in lowercase letters.",
            (
                "Please stop using big letters.",
                "Keep your finger off the shift key, I like it quiet.",
                "only small letters for me, as i type",
            ),
            lowercase,
            lambda d: replace(d, cased=str.lower),
        ),
        Preference(
            "headline",
            "case",
            "Begin Every Word With A Capital Letter.",
            (
                "Make it look like a headline.",
                "Each word matters, so each deserves to start big.",
                "I Like It Written Like This",
            ),
            headline,
            lambda d: replace(d, cased=big_first_letters),
        ),
        Preference(
            "brief",
            "layout",
            "Answer in one short sentence.",
            (
                "Too long.",
                "One line will do.",
                "I have no time for all that, keep it tight.",
            ),
            one_line(ifeval("length_constraints:number_words", num_words=BRIEF_WORDS + 1, relation="less than")),
            lambda d: d,
        ),
        Preference(
            "bullets",
            "layout",
            "Answer in bullet points.",
            (
                "Make it a list, I skim.",
                "Break it up with dashes.",
                "I want to see the points below each other, not a block of text.",
            ),
            bulleted,
            lambda d: replace(d, bullets=True),
        ),
        Preference(
            "quoted",
            "frame",
            "Put every reply in double quotation marks.",
            (
                "I cite you in my notes: mark it as something that was said.",
                "Where are the quote marks?",
                "Put those little double strokes around it.",
            ),
            ifeval("startend:quotation"),
            lambda d: replace(d, quoted=True),
        ),
        Preference(
            "title",
            "frame",
            "Begin every reply with a title such as <<topic>>.",
            (
                "I file these: give each one a heading.",
                "Put a headline in << >> above it.",
                "Where is the heading? I need one between the double arrows.",
            ),
            ifeval("detectable_format:title"),
            lambda d: replace(d, title=True),
        ),
    )
}

# Axes whose preferences get into each other's way: a title before the opening, quotation marks around a list.
CLASHES = {frozenset(pair) for pair in (("frame", "opening"), ("frame", "layout"), ("opening", "layout"))}


def opposite(preference: Preference) -> Preference:
    """The other preference of the axis."""
    [other] = [p for p in PREFERENCES.values() if p.axis == preference.axis and p.name != preference.name]
    return other


def compatible(preferences: Sequence[Preference]) -> bool:
    """Whether a reply can satisfy all of them."""
    axes = [p.axis for p in preferences]
    pairs = {frozenset((a, b)) for a in axes for b in axes if a != b}
    return len(set(axes)) == len(axes) and not pairs & CLASHES


def write(preferences: Sequence[Preference], draft: Draft) -> str:
    """The draft in words that satisfy the preferences."""
    for preference in preferences:
        draft = preference.style(draft)
    return draft.text()
