"""Norms of a scope: what every reply to its users should be like, each of which a program can check.

A norm names a checker with typed arguments; what the checkers do is in service/verifiers/checkers.py, under the same names.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from service.domain.feedback import Frozen

# Of one scope. A reply that has to hold more is hardly written by anybody.
MAX_NORMS = 16

Positive = Annotated[int, Field(strict=True, ge=1, le=5000)]
Written = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]


class Arguments(BaseModel):
    """What a checker is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Nothing(Arguments):
    pass


class Words(Arguments):
    words: Positive


class Sentences(Arguments):
    sentences: Positive


class Points(Arguments):
    at_least: Positive = 2


class Highlights(Arguments):
    at_least: Positive = 1


class Phrase(Arguments):
    phrase: Written


class Terms(Arguments):
    words: Annotated[tuple[Written, ...], Field(min_length=1, max_length=20)]


class Keys(Arguments):
    keys: Annotated[tuple[Written, ...], Field(max_length=20)] = ()


class Language(Arguments):
    # fmt: off
    language: Literal[
        "af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu", "he", "hi", "hr", "hu",
        "id", "it", "ja", "kn", "ko", "lt", "lv", "mk", "ml", "mr", "ne", "nl", "no", "pa", "pl", "pt", "ro", "ru", "sk", "sl", "so",
        "sq", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "zh-cn", "zh-tw",
    ]
    # fmt: on
    min_chars: Positive = 40
    """A shorter reply is not told from others of its alphabet, so it does not hold the norm."""


@dataclass(frozen=True)
class Checker:
    """One kind of norm."""

    arguments: type[Arguments]
    text: Callable[[Any], str]
    """The norm in words, where the admin gives none."""


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


CHECKERS: dict[str, Checker] = {
    "max_words": Checker(Words, lambda a: f"At most {a.words} words."),
    "min_words": Checker(Words, lambda a: f"At least {a.words} words."),
    "max_sentences": Checker(Sentences, lambda a: f"At most {a.sentences} sentence{'s' * (a.sentences > 1)}."),
    "min_sentences": Checker(Sentences, lambda a: f"At least {a.sentences} sentence{'s' * (a.sentences > 1)}."),
    "no_commas": Checker(Nothing, lambda _: "No commas."),
    "lowercase": Checker(Nothing, lambda _: "Lowercase letters only."),
    "uppercase": Checker(Nothing, lambda _: "Capital letters only."),
    "bullets": Checker(Points, lambda a: f"A list of at least {a.at_least} bullet points."),
    "highlights": Checker(Highlights, lambda a: f"At least {a.at_least} part{'s' * (a.at_least > 1)} *in asterisks*."),
    "title": Checker(Nothing, lambda _: "A title in double angular brackets, such as <<title>>."),
    "quoted": Checker(Nothing, lambda _: "All of the reply in double quotation marks."),
    "starts_with": Checker(Phrase, lambda a: f'Begins with "{a.phrase}".'),
    "ends_with": Checker(Phrase, lambda a: f'Ends with "{a.phrase}".'),
    "postscript": Checker(Nothing, lambda _: 'A postscript that begins with "P.S."'),
    "must_contain": Checker(Terms, lambda a: f"Contains {_listed(a.words)}."),
    "must_not_contain": Checker(Terms, lambda a: f"Does not contain {_listed(a.words)}."),
    "json": Checker(Keys, lambda a: "JSON and nothing else" + (f", with {_listed(a.keys)}." if a.keys else ".")),
    "language": Checker(
        Language, lambda a: f"Written in the language '{a.language}', in at least {a.min_chars} characters."
    ),
}

# A list of JSON alone, or of one case alone, has no room for the other.
_SHAPES = ("bullets", "title", "quoted", "starts_with", "ends_with", "postscript")
CLASHES = {frozenset(("lowercase", "uppercase")), *(frozenset(("json", shape)) for shape in _SHAPES)}


class Norm(Frozen):
    """One norm."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    checker: str
    arguments: Annotated[dict[str, Any], Field(validate_default=True)] = {}
    """The checker's, complete with its defaults."""
    text: Annotated[str, Field(max_length=300, validate_default=True)] = ""
    """For people."""
    weight: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """What it counts for among the scope's norms."""

    @field_validator("checker")
    @classmethod
    def _known(cls, checker: str) -> str:
        if checker not in CHECKERS:
            raise ValueError(f"there is no checker '{checker[:40]}'; use one of {', '.join(CHECKERS)}")
        return checker

    @field_validator("arguments", mode="after")
    @classmethod
    def _typed(cls, arguments: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "checker" not in info.data:
            return arguments
        kind = CHECKERS[info.data["checker"]].arguments
        try:
            return kind.model_validate(arguments).model_dump(mode="json")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            takes = ", ".join(kind.model_fields) or "no arguments"
            raise ValueError(f"{where}: {first['msg']} ({info.data['checker']} takes {takes})") from None

    @field_validator("text", mode="after")
    @classmethod
    def _said(cls, text: str, info: ValidationInfo) -> str:
        if text.strip() or "arguments" not in info.data or "checker" not in info.data:
            return text
        checker = CHECKERS[info.data["checker"]]
        return checker.text(checker.arguments.model_validate(info.data["arguments"]))

    @property
    def told(self) -> Arguments:
        """The arguments by their types."""
        return CHECKERS[self.checker].arguments.model_validate(self.arguments)


def checked(norms: Sequence[Norm]) -> tuple[Norm, ...]:
    """The norms, if a scope may have them together.

    Raises:
        ValueError: too many, a name twice, or two that no reply can hold at once.
    """
    if len(norms) > MAX_NORMS:
        raise ValueError(f"{len(norms)} norms are over the limit of {MAX_NORMS} for one scope")
    for name, times in Counter(norm.name for norm in norms).items():
        if times > 1:
            raise ValueError(f"the name '{name}' is given {times} times; each norm needs its own")
    for n, norm in enumerate(norms):
        for other in norms[n + 1 :]:
            if _clash(norm, other):
                raise ValueError(
                    f"no reply can hold both '{norm.name}' ({norm.text}) and '{other.name}' ({other.text})"
                )
    return tuple(norms)


def _clash(one: Norm, other: Norm) -> bool:
    if frozenset((one.checker, other.checker)) in CLASHES:
        return True
    most = {n.checker: n.arguments for n in (one, other)}
    for unit in ("words", "sentences"):
        if {f"min_{unit}", f"max_{unit}"} == most.keys():
            return bool(most[f"min_{unit}"][unit] > most[f"max_{unit}"][unit])
    return False


def union(lists: Iterable[Iterable[Norm]]) -> tuple[Norm, ...]:
    """The norms of several scopes, most specific first: of a name that is there twice, the first."""
    found: dict[str, Norm] = {}
    for norms in lists:
        for norm in norms:
            found.setdefault(norm.name, norm)
    return tuple(found.values())
