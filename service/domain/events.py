"""The three kinds of event in a user's log: what the user said, what was edited by hand, what the optimizer found.

All are applied by the same fold, in the order of their revisions, so none can overwrite what came before it unseen.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from service.domain.feedback import BASE, FeedbackEvent, Frozen
from service.domain.items import Guideline


class Edit(Frozen):
    """One change by hand. `add` takes a text, or a prompt and a reply; `change` an id and the new text or reply; the others an id."""

    op: Literal["add", "change", "pin", "unpin", "remove"]
    id: str | None = None
    text: str | None = None
    prompt: str | None = None
    reply: str | None = None


class EditEvent(Frozen):
    """Edits that were made together, by the user or an admin. They outrank what is inferred."""

    kind: Literal["edit"] = "edit"
    revision: int = Field(ge=1)
    at: float
    by: Literal["user", "admin"]
    edits: tuple[Edit, ...]
    adopted: tuple[Guideline, ...] = ()
    """Guidelines that the user had from others and that the edits name: they become the user's own first."""


class Member(Frozen):
    """One context of a user's population: the optimizer's ordered choice of items."""

    id: str
    """`m-` and a digest of the items, so that its credit stays with it from one population to the next."""
    items: tuple[str, ...]
    win: float = 0.5
    """Share of the user's feedback on which it does at least as well as the others, in (0, 1): the prior of its Beta posterior."""
    score: float = 0.0
    """Median gain in margin over no context, nats per token."""
    basis: int = 0
    """The revision that it was computed from (the fold sets it from its event)."""


class OptimizeReport(Frozen):
    """What one optimization did and measured. Margins are medians over feedback, in nats per token over no context."""

    instances: int = 0
    heldout: int = 0
    candidates: int = 0
    metric_calls: int = 0
    margin_before: float | None = None
    margin_after: float | None = None
    heldout_before: float | None = None
    """Of the best member before, on feedback that the search did not see."""
    heldout_after: float | None = None
    generated: dict[str, float] = {}
    """Scores of the generated replies by who made them, where two members were compared so."""
    reflective: bool = False
    seconds: float = 0.0


class PopulationEvent(Frozen):
    """The optimizer's result."""

    kind: Literal["population"] = "population"
    revision: int = Field(ge=1)
    at: float
    basis: int
    """The revision that it was computed from. Items that were born later join every member by themselves."""
    basis_clock: int
    """The number of feedbacks in the log up to `basis`."""
    adapter: str = BASE
    """The version in use when the members were scored."""
    members: tuple[Member, ...]
    """Best first, at most `MAX_MEMBERS`."""
    inferred: tuple[Guideline, ...] = ()
    """Candidate guidelines that earned their place."""
    merged: dict[str, str] = {}
    """Guideline that says the same as an older one -> that one."""
    report: OptimizeReport = OptimizeReport()


Event = Annotated[FeedbackEvent | EditEvent | PopulationEvent, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(data: bytes) -> Event:
    """An event as it lies in the log.

    Raises:
        ValidationError: it is none.
    """
    return _ADAPTER.validate_json(data)
