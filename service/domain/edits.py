"""Edits by hand: they outrank what feedback and the optimizer say, and what was removed stays out until the user says it anew."""

from collections.abc import Callable
from typing import TypeVar

from service.domain.comments import guideline_text
from service.domain.events import Edit, EditEvent
from service.domain.fast_weights import (
    MAX_EXEMPLARS,
    MAX_GUIDELINES,
    MAX_ONE_ITEM_CHARS,
    FastWeights,
    bounded,
    remembered,
)
from service.domain.items import Exemplar, Guideline, exemplar_id, guideline_id
from service.errors import InvalidFields, NotFound

ItemKind = TypeVar("ItemKind", Guideline, Exemplar)


def edited(state: FastWeights, event: EditEvent) -> FastWeights:
    """The fast weights after the edits, in their order. What can't be done any more (an item that has gone meanwhile) is left out."""
    state = _adopting(state, event)
    for edit in event.edits:
        state = _EDITS[edit.op](state, edit, event.revision)
    return state


def check(state: FastWeights, event: EditEvent) -> None:
    """Whether the edits can be made to these fast weights, each to what the earlier ones left; those that pass do as they say.

    Raises:
        InvalidFields: one has the wrong fields; says which.
        NotFound: there is no such item.
    """
    state = _adopting(state, event)
    for n, edit in enumerate(event.edits):
        _check(state, edit, param=f"edits.{n}")
        state = _EDITS[edit.op](state, edit, event.revision)


def _check(state: FastWeights, edit: Edit, *, param: str) -> None:
    """Whether one edit can be made.

    Raises:
        InvalidFields: it has the wrong fields; says which.
        NotFound: there is no such item.
    """
    named, said = edit.id is not None, (edit.text, edit.prompt, edit.reply)
    if edit.op == "add":
        if named or (edit.text is None) == (edit.prompt is None or edit.reply is None):
            raise InvalidFields(
                "'add' takes 'text' for a guideline, or 'prompt' and 'reply' for an exemplar.", param=param
            )
    elif not named:
        raise InvalidFields(f"'{edit.op}' needs the item's 'id'.", param=f"{param}.id")
    elif state.resolve(edit.id or "") not in state.items:
        raise NotFound(f"This user's context has no item '{edit.id}'.", param=f"{param}.id", code="unknown_item")
    elif edit.op == "change":
        guideline = state.resolve(edit.id or "") in state.guidelines
        if (edit.text is None) == guideline or (edit.reply is None) != guideline or edit.prompt is not None:
            raise InvalidFields("'change' takes 'text' for a guideline and 'reply' for an exemplar.", param=param)
    elif any(value is not None for value in said):
        raise InvalidFields(f"'{edit.op}' takes nothing but an 'id'.", param=param)
    for name, value in zip(("text", "prompt", "reply"), said, strict=True):
        if value is not None and not value.strip():
            raise InvalidFields(f"'{name}' is blank.", param=f"{param}.{name}")
    if len(edit.prompt or "") + len(edit.reply or "") > MAX_ONE_ITEM_CHARS:
        raise InvalidFields(
            f"An exemplar of over {MAX_ONE_ITEM_CHARS} characters would not fit into any context.", param=param
        )


def guideline_wording(text: str) -> str:
    """What was written by hand as the one line of a guideline; unlike a comment it is kept even where it says nothing specific."""
    return guideline_text(text) or " ".join(text.split()[:30])[:300]


def _adopting(state: FastWeights, event: EditEvent) -> FastWeights:
    new = {
        g.id: g.model_copy(update={"origin": "edit", "since": event.revision})
        for g in event.adopted
        if g.id not in state.guidelines
    }
    return state.model_copy(update={"guidelines": bounded({**state.guidelines, **new}, MAX_GUIDELINES)})


def _add(state: FastWeights, edit: Edit, revision: int) -> FastWeights:
    if edit.text is not None:
        text = guideline_wording(edit.text)
        new = Guideline(id=guideline_id(text), text=text, origin="edit", since=revision)
        return _put(state, new, old=state.guidelines.get(state.resolve(new.id)))
    prompt, reply = edit.prompt or "", edit.reply or ""
    exemplar = Exemplar(id=exemplar_id(prompt, reply), prompt=prompt, reply=reply, origin="edit", since=revision)
    return _put(state, exemplar, old=state.exemplars.get(exemplar.id))


def _change(state: FastWeights, edit: Edit, revision: int) -> FastWeights:
    name = state.resolve(edit.id or "")
    if (guideline := state.guidelines.get(name)) and edit.text is not None:
        text = guideline_wording(edit.text)
        update = {"id": guideline_id(text), "text": text, "origin": "edit", "since": revision}
        return _put(state, guideline.model_copy(update=update), old=guideline)
    if (exemplar := state.exemplars.get(name)) and edit.reply is not None:
        named = exemplar_id(exemplar.prompt, edit.reply, exemplar.rejected)
        update = {"id": named, "reply": edit.reply, "origin": "edit", "since": revision}
        return _put(state, exemplar.model_copy(update=update), old=exemplar)
    return state


def _put(state: FastWeights, new: ItemKind, *, old: ItemKind | None) -> FastWeights:
    """`new` in place of `old`: feedback that supports the old one supports it from now on, and its credit goes with it."""
    aliases, credits = state.aliases, state.credits
    if old is not None:
        new = new.model_copy(update={"sources": old.sources, "support": old.support, "pinned": old.pinned})
        if old.id != new.id:
            aliases = {name: new.id if target == old.id else target for name, target in aliases.items()}
            aliases = remembered({**aliases, old.id: new.id})
            if old.id in credits:
                credits = {**credits, new.id: credits[old.id]}
    aliases = {name: target for name, target in aliases.items() if name != new.id}
    gone = old.id if old else None
    changes = {
        "aliases": aliases,
        "credits": credits,
        "removed": {name: at for name, at in state.removed.items() if name != new.id},
    }
    if isinstance(new, Guideline):
        kept = {name: item for name, item in state.guidelines.items() if name != gone}
        changes["guidelines"] = bounded({**kept, new.id: new}, MAX_GUIDELINES)
    else:
        others = {name: item for name, item in state.exemplars.items() if name != gone}
        changes["exemplars"] = bounded({**others, new.id: new}, MAX_EXEMPLARS)
    return state.model_copy(update=changes)


def _pinned(pinned: bool) -> Callable[[FastWeights, Edit, int], FastWeights]:
    def pin(state: FastWeights, edit: Edit, revision: int) -> FastWeights:
        name = state.resolve(edit.id or "")
        if guideline := state.guidelines.get(name):
            changed = {**state.guidelines, name: guideline.model_copy(update={"pinned": pinned})}
            return state.model_copy(update={"guidelines": changed})
        if exemplar := state.exemplars.get(name):
            kept = {**state.exemplars, name: exemplar.model_copy(update={"pinned": pinned})}
            return state.model_copy(update={"exemplars": kept})
        return state

    return pin


def _remove(state: FastWeights, edit: Edit, revision: int) -> FastWeights:
    name = state.resolve(edit.id or "")
    return state.model_copy(
        update={
            "guidelines": {key: item for key, item in state.guidelines.items() if key != name},
            "exemplars": {key: item for key, item in state.exemplars.items() if key != name},
            "removed": remembered({**state.removed, name: revision}),
        }
    )


_EDITS = {"add": _add, "change": _change, "pin": _pinned(True), "unpin": _pinned(False), "remove": _remove}
