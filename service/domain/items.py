"""What a context is made of: guidelines and exemplars, and the credit that they have earned."""

import hashlib
from typing import Literal, TypeVar

from service.domain.comments import canonical
from service.domain.feedback import Frozen

Origin = Literal["feedback", "edit", "inferred", "cohort"]
"""Who says so: the user's comments and corrections, an edit by hand, the optimizer, or other users of the cohort."""

# Enough to tell where an item comes from; an item that is said a thousand times must not grow with it.
MAX_SOURCES = 16
# Credit fades by this factor with each further feedback: what helped last year says little of today.
DECAY = 0.98
# Beyond these a decayed count is the rounding error of a rating that was taken back.
CREDIT_DIGITS = 6


class Item(Frozen):
    """A thing that a context may hold, kept while some standing feedback supports it, or an edit or the optimizer put it there."""

    id: str
    sources: dict[str, int] = {}
    """Supporting interaction -> the revision at which it began to: the oldest and the newest, at most `MAX_SOURCES`."""
    support: int = 0
    """How many interactions support it now."""
    origin: Origin = "feedback"
    pinned: bool = False
    """Set by hand: rendered first, whatever the ratings say."""
    since: int = 0
    """The revision that put it here, where no interaction did."""

    @property
    def born(self) -> int:
        """The revision of the oldest support: items are rendered in this order."""
        return min((*self.sources.values(), *((self.since,) if self.since else ())), default=0)

    @property
    def renewed(self) -> int:
        """The revision of the newest support."""
        return max(self.since, *self.sources.values(), 0)

    @property
    def chars(self) -> int:
        """Length of its texts."""
        return 0

    @property
    def by_hand(self) -> bool:
        return self.pinned or self.origin == "edit"

    @property
    def stated(self) -> bool:
        """Whether the user (or an admin) said it, rather than that it was inferred."""
        return self.support > 0 or self.by_hand or self.origin == "feedback"


ItemT = TypeVar("ItemT", bound=Item)


class Guideline(Item):
    """One short instruction."""

    text: str

    @property
    def chars(self) -> int:
        return len(self.text)


class Prior(Guideline):
    """A guideline that other users of the cohort or the tenant have found helpful, or that an admin wrote for them."""

    origin: Origin = "cohort"
    mean: float = 0.5
    """Their posterior mean of its being helpful."""
    users: int = 0
    """For how many of them the optimizer kept it."""
    written: bool = False
    """Whether an admin wrote it."""


class Exemplar(Item):
    """One prompt with the reply that the user wanted and, where known, the one they did not."""

    prompt: str
    reply: str
    rejected: str = ""

    @property
    def chars(self) -> int:
        return len(self.prompt) + len(self.reply) + len(self.rejected)


class Credit(Frozen):
    """Decayed sums of praise and of blame, as they stood at `clock` feedbacks: a Beta posterior's counts."""

    helpful: float = 0.0
    harmful: float = 0.0
    clock: int = 0

    def at(self, clock: int) -> "Credit":
        """These counts `clock` feedbacks into the log."""
        fade = DECAY ** (clock - self.clock)
        return Credit(helpful=self.helpful * fade, harmful=self.harmful * fade, clock=clock)

    def plus(self, rating: float, *, weight: float) -> "Credit":
        """With a rating added at this credit's clock (a negative weight takes one back)."""
        helpful = round(self.helpful + max(rating, 0.0) * weight, CREDIT_DIGITS)
        harmful = round(self.harmful + max(-rating, 0.0) * weight, CREDIT_DIGITS)
        return Credit(helpful=max(helpful, 0.0), harmful=max(harmful, 0.0), clock=self.clock)

    @property
    def is_empty(self) -> bool:
        return self.helpful == self.harmful == 0.0

    def mean(self, *, helpful: float = 1.0, harmful: float = 1.0) -> float:
        """Posterior mean of being helpful under a Beta prior (uniform if not given)."""
        return (self.helpful + helpful) / (self.helpful + self.harmful + helpful + harmful)


def item_id(kind: str, *parts: str) -> str:
    """An item is named by its content, so that a version's absorbed items can be told from later ones."""
    return f"{kind}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def guideline_id(text: str) -> str:
    """Guidelines that say the same in almost the same words are one."""
    return item_id("g", canonical(text))


def exemplar_id(prompt: str, reply: str, rejected: str = "") -> str:
    return item_id("x", prompt, reply, rejected)


def supported(item: ItemT, source: str, revision: int) -> ItemT:
    """The item with one more interaction that supports it."""
    sources = bounded_sources({**item.sources, source: revision})
    return item.model_copy(update={"sources": sources, "support": item.support + 1})


def unsupported(item: ItemT, source: str) -> ItemT | None:
    """The item without an interaction that supported it; None if nothing holds it any more."""
    support = max(item.support - 1, 0)
    if support == 0 and item.origin == "feedback" and not item.pinned:
        return None
    sources = {name: revision for name, revision in item.sources.items() if name != source}
    return item.model_copy(update={"sources": sources, "support": support})


def bounded_sources(sources: dict[str, int]) -> dict[str, int]:
    """The oldest source, which tells the item's age, and the newest."""
    if len(sources) <= MAX_SOURCES:
        return sources
    oldest, *others = sorted(sources, key=lambda name: (sources[name], name))
    return {name: sources[name] for name in (oldest, *others[-(MAX_SOURCES - 1) :])}
