"""The bodies of the calls about a user's context: what is shown, edited and told of its history."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.api.schemas import Id
from service.domain.cold_start import offered
from service.domain.fast_weights import FastWeights
from service.domain.history import Change
from service.domain.items import CREDIT_DIGITS, Guideline, Origin, Prior

MAX_EDITS = 32


class EditBody(BaseModel):
    """One change by hand."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["add", "change", "pin", "unpin", "remove"]
    id: Id | None = None
    """The item's, for all but `add`."""
    text: str | None = None
    """A guideline's, to add it or to change it."""
    prompt: str | None = None
    """A new exemplar's."""
    reply: str | None = None
    """A new exemplar's, or an exemplar's new one."""


class EditsRequest(BaseModel):
    """`PATCH /v1/users/{user}/context`: all of the edits are made, in their order, or none."""

    model_config = ConfigDict(extra="forbid")

    edits: Annotated[list[EditBody], Field(min_length=1, max_length=MAX_EDITS)]
    if_revision: Annotated[int, Field(ge=0)] | None = None
    """Refuse them (409) unless the context is still at this revision."""


class ItemView(BaseModel):
    """One context item as people see it."""

    id: str
    kind: Literal["guideline", "exemplar"]
    text: str | None = None
    prompt: str | None = None
    reply: str | None = None
    rejected: str | None = None
    helpful: float
    """Praise of the replies that it was in the context of, its share of each, fading with each further feedback."""
    harmful: float
    support: int
    """How many interactions' standing feedback says so."""
    sources: list[str]
    """The oldest and the newest of them."""
    origin: Origin
    pinned: bool
    in_context: bool
    """Whether it is rendered now, under the token budget and the adapter in use."""
    absorbed: bool
    """Whether the adapter version in use makes it unnecessary."""


class MemberView(BaseModel):
    """One context of a user's population."""

    id: str
    items: list[str]
    score: float
    """Median gain in margin over no context on the user's feedback, nats per token."""
    helpful: float
    harmful: float
    """Praise and blame of the replies that it served, fading like an item's."""


class PopulationView(BaseModel):
    """The contexts that chats draw from, best first; none until the optimizer has run."""

    basis: int
    """The revision that it was computed from."""
    adapter: str
    """The version in use, under which it was scored."""
    members: list[MemberView]


class ContextReply(BaseModel):
    """`GET /v1/users/{user}/context`, and what an edit answers."""

    object: Literal["context"] = "context"
    user: str
    revision: int
    adapter: str
    tokens: int
    budget_tokens: int
    items: list[ItemView]
    population: PopulationView
    optimizing: bool
    """Whether an optimization of the contexts is planned or runs."""


def item_views(
    state: FastWeights, *, chosen: frozenset[str], absorbed: frozenset[str], priors: Iterable[Prior] = ()
) -> list[ItemView]:
    """All items of a user and what the user has from others (`origin` is `cohort`), guidelines first, by age."""
    views = []
    items = (*state.guidelines.values(), *offered(state, priors), *state.exemplars.values())
    for item in sorted(items, key=lambda i: (i.id[0] != "g", i.born)):
        credit = state.credit(item.id)
        views.append(
            ItemView(
                kind="guideline" if isinstance(item, Guideline) else "exemplar",
                helpful=round(credit.helpful, CREDIT_DIGITS),
                harmful=round(credit.harmful, CREDIT_DIGITS),
                in_context=item.id in chosen,
                absorbed=item.id in absorbed,
                **item.model_dump(exclude={"sources", "since"}),
                sources=list(item.sources),
            )
        )
    return views


def population_view(state: FastWeights, *, adapter: str) -> PopulationView:
    """A user's population under the adapter in use, with its members' credit."""
    population, members = state.population_under(adapter), []
    for member in population.members:
        credit = state.credit(member.id)
        helpful, harmful = round(credit.helpful, CREDIT_DIGITS), round(credit.harmful, CREDIT_DIGITS)
        items = list(dict.fromkeys(map(state.resolve, member.items)))
        members.append(MemberView(id=member.id, items=items, score=member.score, helpful=helpful, harmful=harmful))
    return PopulationView(basis=population.basis, adapter=adapter, members=members)


class HistoryReply(BaseModel):
    """`GET /v1/users/{user}/context/history`."""

    object: Literal["list"] = "list"
    data: list[Change]
    """The oldest first."""
    has_more: bool
    next_after: int | None
    """What to give as `after` for the next page; null on the last one."""
    archived: int
    """Revisions up to this one are in the archive and not shown."""
