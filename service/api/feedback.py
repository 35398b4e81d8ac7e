"""`POST /v1/feedback`: record what the user said of an interaction, and learn from it before replying."""

import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from service.api.admission import Admission
from service.api.auth import Caller, authenticated, user_of
from service.api.log_writes import IdempotencyKey, LogWrite, check_length
from service.api.schemas import FeedbackReply, FeedbackRequest, PreferenceBody
from service.domain.feedback import FeedbackEvent, Interaction, Preference, merge_signals
from service.domain.fold import apply
from service.errors import InvalidFields, NotFound
from service.serving import Serving
from service.store.users import FeedbackInputs

router = APIRouter()


@router.post("/v1/feedback", summary="Feedback about an interaction")
async def feedback(
    request: Request,
    body: FeedbackRequest,
    caller: Annotated[Caller, Depends(authenticated)],
    idempotency_key: IdempotencyKey = None,
) -> FeedbackReply:
    serving: Serving = request.app.state.serving
    user = user_of(request, caller, body.user)
    if user is None:
        raise InvalidFields("Name the user: send the header X-User-ID, or the field 'user'.", param="user")
    check_lengths(body, serving)
    admission: Admission = request.app.state.admission
    await admission.feedback(request, tenant=caller.tenant, user=user)
    write = LogWrite(serving, body, tenant=caller.tenant, user=user, idempotency_key=idempotency_key)
    reply = await write.through(lambda: _give(body, write))
    for signal in body.named_signals():
        serving.metrics.signals.labels(signal).inc()
    serving.metrics.feedback.observe(time.perf_counter() - request.state.started)
    return reply


async def _give(body: FeedbackRequest, write: LogWrite) -> FeedbackReply:
    """One try: read, apply, append.

    Raises:
        Conflict: `log_moved_on` asks for another try; otherwise the idempotency key was used with another body.
        NotFound: the interaction, or the preferred other one, is not this user's or has expired.
    """
    serving = write.serving
    inputs = await serving.store.users.feedback_inputs(
        body.interaction_id,
        tenant=write.tenant,
        user=write.user,
        other_id=body.preference.interaction_id if body.preference else None,
        idempotency_key=write.key,
    )
    if (answer := write.answered(inputs.receipt)) is not None:
        return FeedbackReply.model_validate(answer)
    if inputs.interaction is None:
        raise NotFound(
            f"This user has no interaction '{body.interaction_id}': give the completion's id, within "
            f"{serving.settings.interaction_retention_seconds // 86400} days.",
            param="interaction_id",
            code="unknown_interaction",
        )
    before, interaction, previous = inputs.fast_weights, inputs.interaction, inputs.interaction.signals
    signals = merge_signals(previous, _changes(body, interaction, inputs, serving))
    changed = signals != previous
    reply = FeedbackReply(interaction_id=interaction.id, context_revision=before.revision + changed, changed=changed)
    if not changed:
        await write.remember(reply.model_dump())
        return reply
    rated_anew = signals.stated_rating() != previous.stated_rating()
    event = FeedbackEvent(
        revision=reply.context_revision,
        at=time.time(),
        interaction=replace(
            interaction, signals=signals, rated_at=before.clock + 1 if rated_anew else interaction.rated_at
        ),
        previous=previous,
        previous_rated_at=interaction.rated_at,
    )
    started = time.perf_counter()
    after = apply(before, event)
    serving.metrics.folds.labels("apply").observe(time.perf_counter() - started)
    optimize_at = serving.optimize_at(after, now=event.at)
    answer = await write.append(event, after=after, answer=reply.model_dump(), optimize_at=optimize_at)
    return FeedbackReply.model_validate(answer)


def _changes(
    body: FeedbackRequest, interaction: Interaction, inputs: FeedbackInputs, serving: Serving
) -> dict[str, Any]:
    """The named signals as the log keeps them: text neutralized, the preferred other reply written out."""
    changes: dict[str, Any] = {}
    for signal in body.named_signals():
        value = getattr(body, signal)
        if isinstance(value, str):
            value = serving.tokens.neutralize(value)
        elif isinstance(value, PreferenceBody):
            value = _preference(value, interaction, inputs.other, serving)
        changes[signal] = value
    return changes


def _preference(
    given: PreferenceBody, interaction: Interaction, other: Interaction | None, serving: Serving
) -> Preference:
    if given.interaction_id is None:
        return Preference(other=serving.tokens.neutralize(given.text or ""), better=given.better)
    if other is None:
        raise NotFound(
            f"This user has no interaction '{given.interaction_id}'.",
            param="preference.interaction_id",
            code="unknown_interaction",
        )
    if other.id == interaction.id:
        raise InvalidFields("An interaction can't be preferred to itself.", param="preference.interaction_id")
    # Of one of them a part may be all that was kept.
    same = (interaction.messages, interaction.in_brief().messages)
    if other.messages not in same and interaction.messages != other.in_brief().messages:
        raise InvalidFields(
            "The two interactions answer different conversations, so neither reply is the better one.",
            param="preference.interaction_id",
        )
    return Preference(other=other.reply, other_id=other.id, better=given.better)


def check_lengths(body: FeedbackRequest, serving: Serving) -> None:
    """Refuse texts over the settings' limits.

    Raises:
        InvalidFields: names the field and the limit.
    """
    settings = serving.settings
    preferred = body.preference.text if body.preference else None
    check_length(body.comment, settings.max_comment_chars, param="comment")
    check_length(body.correction, settings.max_reply_chars, param="correction")
    check_length(preferred, settings.max_reply_chars, param="preference.text")
    if preferred is not None and not preferred.strip():
        raise InvalidFields("'preference.text' is blank.", param="preference.text")
