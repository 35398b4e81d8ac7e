"""`POST /v1/feedback`: record what the user said of an interaction, and learn from it before replying."""

import hashlib
import time
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Header, Request

from service.api.auth import Caller, authenticated, user_of
from service.api.schemas import FeedbackReply, FeedbackRequest, PreferenceBody
from service.domain.fast_weights import apply
from service.domain.feedback import FeedbackEvent, Interaction, Preference, merge_signals
from service.errors import Conflict, InvalidFields, NotFound, StoreUnavailable
from service.serving import Serving
from service.store.users import FeedbackInputs

router = APIRouter()

# Feedback of one user that arrives at once is applied one after the other; each retry means that another one got through.
ATTEMPTS = 32

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=255, description="Makes a retry harmless; the same key with another body is a 409."
    ),
]


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
    for _ in range(ATTEMPTS):
        try:
            reply = await _give(body, serving, tenant=caller.tenant, user=user, idempotency_key=idempotency_key)
        except Conflict as conflict:
            if conflict.code != "log_moved_on":
                raise
            continue
        for signal in body.named_signals():
            serving.metrics.signals.labels(signal).inc()
        serving.metrics.feedback.observe(time.perf_counter() - request.state.started)
        return reply
    raise StoreUnavailable("Too much feedback of this user arrives at once: send it again.")


async def _give(
    body: FeedbackRequest, serving: Serving, *, tenant: str, user: str, idempotency_key: str | None
) -> FeedbackReply:
    """One try: read, apply, append.

    Raises:
        Conflict: `log_moved_on` asks for another try; otherwise the idempotency key was used with another body.
        NotFound: the interaction, or the preferred other one, is not this user's or has expired.
    """
    users, settings = serving.store.users, serving.settings
    fingerprint = hashlib.sha256(
        orjson.dumps(body.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
    ).hexdigest()
    other_id = body.preference.interaction_id if body.preference else None
    inputs = await users.feedback_inputs(
        body.interaction_id, tenant=tenant, user=user, other_id=other_id, idempotency_key=idempotency_key
    )
    if idempotency_key is not None and inputs.receipt is not None:
        return _replayed(inputs.receipt, fingerprint)
    if inputs.interaction is None:
        raise NotFound(
            f"This user has no interaction '{body.interaction_id}': give the completion's id, within "
            f"{settings.interaction_retention_seconds // 86400} days.",
            param="interaction_id",
            code="unknown_interaction",
        )
    interaction, previous = inputs.interaction, inputs.interaction.signals
    signals = merge_signals(previous, _changes(body, interaction, inputs, serving))
    changed = signals != previous
    reply = FeedbackReply(
        interaction_id=interaction.id, context_revision=inputs.fast_weights.revision + changed, changed=changed
    )
    receipt = orjson.dumps({"fingerprint": fingerprint, "reply": reply.model_dump()})
    if not changed:
        if idempotency_key is not None:
            await users.remember(
                tenant=tenant,
                user=user,
                idempotency_key=idempotency_key,
                receipt=receipt,
                seconds=settings.idempotency_seconds,
            )
        return reply
    event = FeedbackEvent(
        revision=reply.context_revision,
        at=time.time(),
        interaction=interaction.model_copy(update={"signals": signals}),
        previous=previous,
    )
    earlier = await users.append(
        event,
        apply(inputs.fast_weights, event),
        idempotency_key=idempotency_key,
        receipt=receipt,
        idempotency_seconds=settings.idempotency_seconds,
    )
    return reply if earlier is None else _replayed(earlier, fingerprint)


def _replayed(receipt: bytes, fingerprint: str) -> FeedbackReply:
    before = orjson.loads(receipt)
    if before["fingerprint"] != fingerprint:
        raise Conflict(
            "This Idempotency-Key was used with another body: use a new key for new feedback.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return FeedbackReply.model_validate(before["reply"])


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
    if other.messages != interaction.messages:
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
    for param, text, limit in (
        ("comment", body.comment, settings.max_comment_chars),
        ("correction", body.correction, settings.max_reply_chars),
        ("preference.text", preferred, settings.max_reply_chars),
    ):
        if text is not None and len(text) > limit:
            raise InvalidFields(f"'{param}' has {len(text)} characters; the limit is {limit}.", param=param)
        if param == "preference.text" and text is not None and not text.strip():
            raise InvalidFields("'preference.text' is blank.", param=param)
