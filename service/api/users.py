"""What the service has learnt of a user: shown, edited by hand, and how it came about."""

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from service.api.auth import Caller, authenticated, path_user
from service.api.context_schemas import ContextReply, EditBody, EditsRequest, HistoryReply, item_views, population_view
from service.api.log_writes import IdempotencyKey, LogWrite, check_length
from service.contexts import Wanted
from service.domain.cold_start import offered
from service.domain.edits import check
from service.domain.events import Edit, EditEvent
from service.domain.feedback import BASE
from service.domain.fold import apply
from service.domain.history import page
from service.domain.items import Guideline, Prior
from service.errors import Conflict
from service.serving import Serving
from service.store.users import ChatState

router = APIRouter(prefix="/v1/users")
Anyone = Annotated[Caller, Depends(authenticated)]


@router.get("/{user:path}/context", summary="A user's fast weights")
async def context(request: Request, user: str, caller: Anyone) -> ContextReply:
    """All items with their counts, and which of them the next chat renders. A user without feedback has none of their own."""
    serving: Serving = request.app.state.serving
    user = path_user(request, caller, user)
    state = await serving.store.users.chat_state(tenant=caller.tenant, user=user)
    return await _context_reply(serving, state, tenant=caller.tenant, user=user)


@router.patch("/{user:path}/context", summary="Edit a user's fast weights by hand")
async def edit(
    request: Request, user: str, body: EditsRequest, caller: Anyone, idempotency_key: IdempotencyKey = None
) -> ContextReply:
    """Add, change, pin, unpin or remove items: all of the edits or none. They outrank what is inferred, and what was removed stays out
    until the user says it anew. Answers with the context as it is then.
    """
    serving: Serving = request.app.state.serving
    user = path_user(request, caller, user)
    edits = tuple(_edit(one, serving, param=f"edits.{n}") for n, one in enumerate(body.edits))
    write = LogWrite(serving, body, tenant=caller.tenant, user=user, idempotency_key=idempotency_key)

    async def attempt() -> ChatState:
        state = await serving.store.users.chat_state(tenant=caller.tenant, user=user)
        # Looked at after the state: where that has these edits already, their receipt is there too.
        receipt = await serving.store.users.receipt(tenant=caller.tenant, user=user, idempotency_key=idempotency_key)
        if write.answered(receipt) is not None:
            return state
        _expect_revision(body, state)
        priors = await serving.priors.of(tenant=caller.tenant, cohort=state.cohort)
        before = state.fast_weights
        event = EditEvent(
            revision=before.revision + 1,
            at=time.time(),
            by="admin" if caller.role == "admin" else "user",
            edits=edits,
            adopted=_adopted(edits, offered(before, priors)),
        )
        check(before, event)
        after = apply(before, event)
        optimize_at = serving.optimize_at(after, now=event.at, edited=True)
        made = {"revision": event.revision}
        answer = await write.append(event, after=after, answer=made, optimize_at=optimize_at)
        if answer != made:
            return await serving.store.users.chat_state(tenant=caller.tenant, user=user)
        return replace(state, fast_weights=after)

    return await _context_reply(serving, await write.through(attempt), tenant=caller.tenant, user=user)


@router.get("/{user:path}/context/history", summary="What changed a user's fast weights, and why")
async def history(
    request: Request,
    user: str,
    caller: Anyone,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> HistoryReply:
    """The events past revision `after`, the oldest first: feedback, edits, optimizations, each with what it added, removed and credited."""
    serving: Serving = request.app.state.serving
    log = await serving.store.users.log(tenant=caller.tenant, user=path_user(request, caller, user))
    # Some tenths of a second for thousands of events: other users' chats go on meanwhile.
    found = await asyncio.to_thread(page, log.start, log.events, after=after, limit=limit)
    has_more = bool(found) and found[-1].revision < log.events[-1].revision
    return HistoryReply(
        data=found,
        has_more=has_more,
        next_after=found[-1].revision if has_more else None,
        archived=log.start.revision,
    )


async def _context_reply(serving: Serving, state: ChatState, *, tenant: str, user: str) -> ContextReply:
    adapter, absorbed = await serving.adapter_in_use(state, tenant=tenant, user=user) or (BASE, frozenset[str]())
    priors = await serving.priors.of(tenant=tenant, cohort=state.cohort)
    own = state.fast_weights
    chosen = serving.contexts.standing(Wanted(tenant, user, own, adapter, absorbed, priors))
    return ContextReply(
        user=user,
        revision=own.revision,
        adapter=adapter,
        tokens=chosen.tokens,
        budget_tokens=serving.settings.most_context_tokens,
        items=item_views(own, chosen=frozenset(chosen.items), absorbed=absorbed, priors=priors),
        population=population_view(own, adapter=adapter),
        optimizing=await serving.store.optimizations.pending(tenant=tenant, user=user),
    )


def _edit(given: EditBody, serving: Serving, *, param: str) -> Edit:
    """The edit as the log keeps it: texts within the limits, and neutralized.

    Raises:
        InvalidFields: a text is too long.
    """
    settings = serving.settings
    limits = {"text": settings.max_comment_chars, "prompt": settings.max_reply_chars, "reply": settings.max_reply_chars}
    texts: dict[str, Any] = {}
    for name, limit in limits.items():
        text: str | None = getattr(given, name)
        check_length(text, limit, param=f"{param}.{name}")
        texts[name] = None if text is None else serving.tokens.neutralize(text)
    return Edit(op=given.op, id=given.id, **texts)


def _adopted(edits: tuple[Edit, ...], priors: list[Prior]) -> tuple[Guideline, ...]:
    """The guidelines from others that the edits name."""
    named = {edit.id for edit in edits}
    return tuple(Guideline(id=prior.id, text=prior.text) for prior in priors if prior.id in named)


def _expect_revision(body: EditsRequest, state: ChatState) -> None:
    revision = state.fast_weights.revision
    if body.if_revision not in (None, revision):
        raise Conflict(
            f"The context is at revision {revision}, not {body.if_revision}: look at it again.",
            param="if_revision",
            code="revision_moved_on",
        )
