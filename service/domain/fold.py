"""The fold of a user's log into fast weights.

The fast weights are `fold(log)`: a pure function of the user's events, so whatever is cached of it can be lost. A *guideline* comes from a
comment, an *exemplar* from a correction or a preference; an item is there as long as some interaction's standing feedback supports it.
Ratings credit the items that were in the context of the reply, and the population's member that it was. Support and credit are sums kept
beside the items, so a retracted or replaced signal leaves the state that would be there without it.

Edits by hand (`edits.py`) and the optimizer's results (`population.py`) are events like any other.
"""

from collections.abc import Iterable
from dataclasses import replace

from service.domain.comments import guideline_text
from service.domain.demonstrations import ENOUGH, MAX_DRAFTS, demonstrations, draft_of, in_common, is_odd
from service.domain.edits import edited
from service.domain.events import EditEvent, Event
from service.domain.fast_weights import (
    MAX_EXEMPLARS,
    MAX_GUIDELINES,
    FastWeights,
    bounded,
    bounded_credits,
    remembered,
)
from service.domain.feedback import AUTO, FeedbackEvent, Interaction, Signals
from service.domain.items import (
    DECAY,
    Credit,
    Exemplar,
    Guideline,
    ItemT,
    exemplar_id,
    guideline_id,
    supported,
    unsupported,
)
from service.domain.population import repopulated
from service.domain.ranking import without_contradicted


def guideline_of(signals: Signals) -> Guideline | None:
    """The guideline that a comment amounts to, if it says anything specific."""
    text = guideline_text(signals.comment) if signals.comment else None
    return Guideline(id=guideline_id(text), text=text) if text else None


def exemplar_of(interaction: Interaction, signals: Signals) -> Exemplar | None:
    """The exemplar that a correction or a preference amounts to."""
    spoken_of = replace(interaction, signals=signals)
    pair, prompt = spoken_of.pair(), interaction.last_user_text()
    if pair is None or not prompt.strip() or not pair[0].strip():
        return None
    wanted, unwanted = pair
    return Exemplar(id=exemplar_id(prompt, wanted, unwanted), prompt=prompt, reply=wanted, rejected=unwanted)


def apply(state: FastWeights, event: Event) -> FastWeights:
    """The fast weights after one more event. An event that is already folded in changes nothing.

    Raises:
        ValueError: the event does not follow the state; a part of the log is missing.
    """
    if event.revision <= state.revision:
        return state
    if event.revision != state.revision + 1:
        raise ValueError(f"event {event.revision} does not follow revision {state.revision}: the log has a gap")
    state = state.model_copy(update={"revision": event.revision, "updated": event.at})
    if isinstance(event, FeedbackEvent):
        return demonstrated(_said(state, event), before=state)
    if isinstance(event, EditEvent):
        return demonstrated(edited(state, event), before=state)
    return repopulated(state, event)


def fold(events: Iterable[Event], state: FastWeights | None = None) -> FastWeights:
    """The fast weights after `events`, in the order of the log, from `state` (empty if None)."""
    state = state or FastWeights()
    for event in events:
        state = apply(state, event)
    return state


def demonstrated(state: FastWeights, *, before: FastWeights) -> FastWeights:
    """The fast weights with demonstrations in the places of missing exemplars, and odd ones known, as what was said now stands."""
    said = {name: x for name, x in state.exemplars.items() if x.stated}
    # Comparing replies takes longer than all the rest of a feedback, so only what is new is compared.
    compared = said.keys() == {name for name, x in before.exemplars.items() if x.stated}
    if compared and len(said) == len(state.exemplars) >= ENOUGH:
        return state
    exemplars = sorted(said.values(), key=lambda x: (x.born, x.id))
    common = before.in_common if compared else in_common(exemplars, before=before.in_common)
    odd = before.odd if compared else tuple(x.id for x in exemplars if is_odd(x, common))
    made = demonstrations(
        state.drafts.values(),
        exemplars=[x for x in exemplars if x.id not in odd],
        # The last one is shown as it was said.
        odd=[x for x in exemplars if x.id in odd and x.renewed < state.revision],
        in_common=common,
        guidelines=without_contradicted(g for g in state.guidelines.values() if g.stated),
    )
    shown = {x.id: state.exemplars.get(x.id, x) for x in made if x.id not in state.removed and x.id not in said}
    return state.model_copy(
        update={"exemplars": said | shown, "in_common": common, "odd": odd, "aliases": _renamed(state, shown)}
    )


def _renamed(state: FastWeights, shown: dict[str, Exemplar]) -> dict[str, str]:
    """The aliases with what was shown for the same prompts until now: a context that lists the old demonstration has the new one."""
    gone = {x.prompt: x.id for x in state.exemplars.values() if not x.stated and x.id not in shown}
    renamed = {gone[x.prompt]: x.id for x in shown.values() if x.prompt in gone}
    if not renamed:
        return state.aliases
    kept = {name: renamed.get(target, target) for name, target in state.aliases.items() if name not in shown}
    return remembered({**kept, **renamed})


def _said(state: FastWeights, event: FeedbackEvent) -> FastWeights:
    interaction, clock = event.interaction, state.clock + 1
    before, after = event.previous, interaction.signals
    guidelines = _support(state.guidelines, state, event, before=guideline_of(before), after=guideline_of(after))
    exemplars = _support(
        state.exemplars,
        state,
        event,
        before=exemplar_of(interaction, before),
        after=exemplar_of(interaction, after),
    )
    drafts = {name: draft for name, draft in state.drafts.items() if name != interaction.id}
    if draft := draft_of(interaction, revision=event.revision):
        drafts[interaction.id] = draft
    said_again = [name for name in state.removed if name in guidelines or name in exemplars]
    return state.model_copy(
        update={
            "clock": clock,
            "guidelines": bounded(guidelines, MAX_GUIDELINES),
            "exemplars": bounded(exemplars, MAX_EXEMPLARS),
            "credits": _credit(state, event, clock=clock),
            "drafts": dict(list(drafts.items())[-MAX_DRAFTS:]),
            "removed": {name: at for name, at in state.removed.items() if name not in said_again},
            "aliases": {
                name: stands
                for name, stands in state.aliases.items()
                if name not in guidelines and name not in exemplars
            },
        }
    )


def _support(
    items: dict[str, ItemT], state: FastWeights, event: FeedbackEvent, *, before: ItemT | None, after: ItemT | None
) -> dict[str, ItemT]:
    """`items` with the event's interaction supporting `after` and no longer `before`; what stays the same keeps its age."""

    def standing(item: ItemT) -> str:
        # What it was changed into may have been removed since; said anew it is itself again.
        return stands if (stands := state.resolve(item.id)) in items else item.id

    left, joined = (standing(item) if item else None for item in (before, after))
    if left == joined:
        return items
    items = dict(items)
    source = event.interaction.id
    if left is not None and (old := items.pop(left, None)) and (kept := unsupported(old, source)):
        items[left] = kept
    if joined is not None and after is not None:
        items[joined] = supported(items.get(joined, after), source, event.revision)
    return items


def _credit(state: FastWeights, event: FeedbackEvent, *, clock: int) -> dict[str, Credit]:
    """Credits after the event: a rating is spread over the items of the reply's context, and goes whole to its member."""
    interaction = event.interaction
    before, after = event.previous.stated_rating() or 0.0, interaction.signals.stated_rating() or 0.0
    if (before, event.previous_rated_at) == (after, interaction.rated_at) or not (before or after):
        return state.credits
    shares = {state.resolve(name): 1 / len(interaction.items) for name in interaction.items}
    if interaction.version.member != AUTO:
        shares[interaction.version.member] = 1.0
    credits = dict(state.credits)
    for name, share in shares.items():
        credit = credits.pop(name, Credit(clock=clock)).at(clock)
        credit = credit.plus(before, weight=-share * DECAY ** (clock - event.previous_rated_at))
        credit = credit.plus(after, weight=share * DECAY ** (clock - interaction.rated_at))
        if not credit.is_empty:
            credits[name] = credit
    members = (member.id for population in state.populations for member in population.members)
    return bounded_credits(credits, (*state.items, *members))
