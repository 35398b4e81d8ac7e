"""What one event changed in a user's fast weights, and why: the log as people read it."""

from collections.abc import Mapping, Sequence

from service.domain.events import EditEvent, Event, OptimizeReport, PopulationEvent
from service.domain.fast_weights import FastWeights
from service.domain.feedback import FeedbackEvent, Frozen, Signals
from service.domain.fold import apply
from service.domain.items import CREDIT_DIGITS, Credit, Guideline, Item

SHOWN_CHARS = 300
"""Of each text; the log keeps all."""


class FeedbackCause(Frozen):
    """Feedback, by the interaction that it is about."""

    interaction_id: str
    signals: dict[str, float | str | None]
    """The signals that changed and what they say now: a preference as `this` or `other`, null where it was retracted."""


class EditOp(Frozen):
    """One edit; what it wrote is among the items."""

    op: str
    id: str | None = None


class EditCause(Frozen):
    """Edits by hand."""

    by: str
    edits: tuple[EditOp, ...]


class PopulationCause(Frozen):
    """An optimization."""

    basis: int
    """The revision that it was computed from."""
    adapter: str
    report: OptimizeReport


class ItemChange(Frozen):
    """An item that came, went, or is no longer the same."""

    id: str
    text: str
    """A guideline's text, an exemplar's reply."""
    became: str | None = None
    """Of one that went: the item that stands for it now, where it was changed or merged."""
    changed: dict[str, tuple[str | int | bool, str | int | bool]] = {}
    """Of one that stayed: before and after."""


class CreditMove(Frozen):
    """What was added to the praise and the blame of an item or a member (less what was taken back), fading left aside."""

    helpful: float
    harmful: float


class Change(Frozen):
    """One event of the log."""

    revision: int
    at: float
    """Seconds since the epoch."""
    kind: str
    cause: FeedbackCause | EditCause | PopulationCause
    added: tuple[ItemChange, ...] = ()
    removed: tuple[ItemChange, ...] = ()
    changed: tuple[ItemChange, ...] = ()
    credit: dict[str, CreditMove] = {}
    """By the id of the item or of the population's member."""
    members_before: tuple[str, ...] = ()
    members_after: tuple[str, ...] = ()


def changes(before: FastWeights, after: FastWeights, event: Event) -> Change:
    """What `event` did: `after` is `before` with it folded in."""
    old, new = before.items, after.items
    return Change(
        revision=event.revision,
        at=event.at,
        kind=event.kind,
        cause=_cause(event),
        added=tuple(_line(item) for name, item in new.items() if name not in old),
        removed=tuple(_gone(item, after) for name, item in old.items() if name not in new),
        changed=_changed(old, new),
        credit=_moved(before, after),
        members_before=tuple(member.id for member in before.population.members),
        members_after=tuple(member.id for member in after.population.members),
    )


def page(start: FastWeights, events: Sequence[Event], *, after: int, limit: int) -> list[Change]:
    """What the events past revision `after` changed, the oldest first.

    Args:
        start: the fold of all that came before `events`.
    """
    found: list[Change] = []
    state = start
    for event in events:
        if len(found) == limit:
            break
        before, state = state, apply(state, event)
        if event.revision > after:
            found.append(changes(before, state, event))
    return found


def _cause(event: Event) -> FeedbackCause | EditCause | PopulationCause:
    if isinstance(event, FeedbackEvent):
        signals = _new_signals(event.previous, event.interaction.signals)
        return FeedbackCause(interaction_id=event.interaction.id, signals=signals)
    if isinstance(event, EditEvent):
        return EditCause(by=event.by, edits=tuple(EditOp(op=edit.op, id=edit.id) for edit in event.edits))
    assert isinstance(event, PopulationEvent)
    return PopulationCause(basis=event.basis, adapter=event.adapter, report=event.report)


def _new_signals(before: Signals, after: Signals) -> dict[str, float | str | None]:
    names = [name for name in Signals.model_fields if getattr(before, name) != getattr(after, name)]
    return {name: _shown(getattr(after, name)) for name in names}


def _shown(signal: object) -> float | str | None:
    if isinstance(signal, str):
        return signal[:SHOWN_CHARS]
    if signal is None or isinstance(signal, float):
        return signal
    better: str = getattr(signal, "better", "")
    return better


def _text(item: Item) -> str:
    text: str = item.text if isinstance(item, Guideline) else getattr(item, "reply", "")
    return text[:SHOWN_CHARS]


def _line(item: Item) -> ItemChange:
    return ItemChange(id=item.id, text=_text(item))


def _gone(item: Item, after: FastWeights) -> ItemChange:
    stands = after.resolve(item.id)
    return ItemChange(id=item.id, text=_text(item), became=stands if stands in after.items else None)


def _changed(old: Mapping[str, Item], new: Mapping[str, Item]) -> tuple[ItemChange, ...]:
    found = []
    for name in old.keys() & new.keys():
        before, after = old[name], new[name]
        pairs: dict[str, tuple[str | int | bool, str | int | bool]] = {
            "text": (_text(before), _text(after)),
            "support": (before.support, after.support),
            "origin": (before.origin, after.origin),
            "pinned": (before.pinned, after.pinned),
        }
        moved = {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
        if moved:
            found.append(ItemChange(id=name, text=_text(after), changed=moved))
    return tuple(sorted(found, key=lambda change: change.id))


def _moved(before: FastWeights, after: FastWeights) -> dict[str, CreditMove]:
    moves = {}
    for name in sorted(before.credits.keys() | after.credits.keys()):
        old = before.credits.get(name, Credit(clock=after.clock)).at(after.clock)
        new = after.credit(name)
        move = CreditMove(
            helpful=round(new.helpful - old.helpful, CREDIT_DIGITS),
            harmful=round(new.harmful - old.harmful, CREDIT_DIGITS),
        )
        if move.helpful or move.harmful:
            moves[name] = move
    return moves
