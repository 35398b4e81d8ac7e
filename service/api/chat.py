"""`POST /v1/chat/completions`: OpenAI's request and reply, personalized."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from service.api.admission import Admission
from service.api.auth import Caller, authenticated, user_of
from service.api.presence import Presence
from service.api.responses import EventStream, RawHeaders, WholeReply
from service.api.schemas import PASSED_ON, ChatRequest, DryRunReply
from service.domain.context import TOKENS_AROUND_MESSAGE
from service.domain.feedback import BASE
from service.engine import DONE
from service.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    UpstreamRejected,
)
from service.metrics import Metrics
from service.serving import Plan, Serving, rendered
from service.tokens import as_json, texts_of
from service.tracing import span

router = APIRouter()

# Of a choice.
VLLMS_OWN = ("token_ids", "routed_experts", "stop_reason")


class Clock:
    """The gateway's own time in one chat: all of it less what was spent waiting for vLLM."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.upstream = 0.0

    def own_seconds(self) -> float:
        return time.perf_counter() - self.started - self.upstream


@router.post("/v1/chat/completions", summary="Chat, personalized for the user")
async def chat(request: Request, body: ChatRequest, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    # Items of the states: as attributes they take three times as long.
    state, services = request.state, request.app.state
    serving: Serving = services["serving"]
    if body.model != serving.settings.model_name:
        raise ModelNotFound(
            f"The model '{body.model[:100]}' does not exist: this service serves '{serving.settings.model_name}'.",
            param="model",
        )
    if len(body.messages) > serving.settings.max_messages:
        raise InvalidRequest(
            f"{len(body.messages)} messages are over the limit of {serving.settings.max_messages}.", param="messages"
        )
    clock = Clock(state["started"])
    user = user_of(request, caller, body.named_user())
    tools = as_json(body.tools) if body.tools else ""
    admission: Admission = services["admission"]
    with span("admit"):
        await admission.chat(
            request, tenant=caller.tenant, user=user, tokens=lambda: _most_tokens(body, tools, serving)
        )
    serve = _serve_stream if body.stream else _serve_whole
    wish = body.wish()
    rejected: tuple[str, UpstreamRejected] | None = None
    too_long = False
    while True:
        plan = await serving.plan(
            body.conversation(),
            interaction_id=f"chatcmpl-{state['request_id']}",
            tenant=caller.tenant,
            user=user,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            seed=body.seed,
            tools=tools,
            wish=wish,
            without_adapter=rejected is not None,
            without_context=too_long,
        )
        if wish.dry_run:
            return _dry_run(plan, body, clock, serving)
        try:
            response = await serve(request, body, serving, plan, clock)
        except ContextLengthExceeded:
            # The chat template may take more than was reckoned with. A conversation that fits by itself is answered.
            if plan.context.tokens == 0:
                raise
            too_long = True
            continue
        except UpstreamRejected as error:
            if plan.version.adapter == BASE:
                raise
            rejected = (plan.version.adapter, error)
            continue
        # The adapter is to blame only now that the base took the same request.
        if rejected is not None:
            serving.adapter_failed(*rejected)
        return response


async def _most_tokens(body: ChatRequest, tools: str, serving: Serving) -> int:
    """Tokens of the messages, and of the longest reply to them."""
    texts = [*texts_of(body.conversation()), tools]
    prompt = await serving.tokens.counted(texts, most=serving.settings.max_model_len)
    reply = body.max_completion_tokens or body.max_tokens or serving.settings.default_max_tokens
    return prompt + TOKENS_AROUND_MESSAGE * len(body.messages) + reply


def _sampling(body: ChatRequest) -> dict[str, Any]:
    told = vars(body)
    return {name: told[name] for name in body.model_fields_set & PASSED_ON if told[name] is not None}


def _headers(plan: Plan, clock: Clock, serving: Serving) -> RawHeaders:
    own_seconds = clock.own_seconds()
    serving.metrics.overhead.observe(own_seconds)
    serving.metrics.context_tokens.observe(plan.context.tokens)
    serving.metrics.served_by[plan.channel].inc()
    headers = [
        (b"x-fastslow-adapter", plan.version.adapter.encode()),
        (b"x-fastslow-context-revision", b"%d" % plan.version.context_revision),
        (b"x-fastslow-context-member", plan.version.member.encode()),
        (b"x-fastslow-context-tokens", b"%d" % plan.context.tokens),
        (b"x-fastslow-overhead-ms", b"%.2f" % (own_seconds * 1000)),
    ]
    if plan.degraded:
        headers.append((b"x-fastslow-degraded", ",".join(plan.degraded).encode()))
    return headers


def _dry_run(plan: Plan, body: ChatRequest, clock: Clock, serving: Serving) -> Response:
    """What would be sent to vLLM, and nothing is; no interaction is stored."""
    reply = DryRunReply(
        model=body.model,
        adapter=plan.version.adapter,
        context_revision=plan.version.context_revision,
        member=plan.version.member,
        context_tokens=plan.context.tokens,
        items=list(plan.context.items),
        messages=rendered(plan),
        degraded=plan.degraded,
    )
    return WholeReply(reply.model_dump(), _headers(plan, clock, serving))


async def _serve_whole(request: Request, body: ChatRequest, serving: Serving, plan: Plan, clock: Clock) -> Response:
    upstream = serving.upstream_body(plan, _sampling(body))
    sent = time.perf_counter()
    with Presence(request.receive, request.state["attention"]):
        reply = await serving.engine.complete(upstream, request_id=_upstream_id(plan), affinity=plan.affinity)
    clock.upstream += time.perf_counter() - sent
    choice = reply["choices"][0]
    text = choice["message"].get("content") or ""
    await serving.record(plan, text, choice.get("finish_reason"))
    serving.metrics.count_usage(reply.get("usage"))
    reply = _tidy(reply) | {"id": plan.id, "model": body.model}
    headers = _headers(plan, clock, serving)
    serving.metrics.whole_chat.observe(time.perf_counter() - clock.started)
    return WholeReply(reply, headers, then=lambda: serving.sent(plan, text))


async def _serve_stream(request: Request, body: ChatRequest, serving: Serving, plan: Plan, clock: Clock) -> Response:
    upstream = serving.upstream_body(plan, _sampling(body)) | {"stream": True}
    if body.stream_options is not None:
        upstream["stream_options"] = body.stream_options.model_dump()
    sent = time.perf_counter()
    stack = AsyncExitStack()
    # Entered here, so that a refusal becomes an error reply and not a broken stream.
    with Presence(request.receive, request.state["attention"]):
        events = await stack.enter_async_context(
            serving.engine.stream(upstream, request_id=_upstream_id(plan), affinity=plan.affinity)
        )
    clock.upstream += time.perf_counter() - sent
    relayed = _relay(events, body, serving, plan, clock.started)
    return EventStream(relayed, stack, _headers(plan, clock, serving))


async def _relay(
    pieces: AsyncIterator[list[bytes]], body: ChatRequest, serving: Serving, plan: Plan, started: float
) -> AsyncGenerator[bytes, None]:
    """vLLM's events as the client's, as many at a time as have come; the interaction is stored before the last.

    What was told of it is stored too where the client has had enough: whoever stops a bad reply may say so.
    """
    told = _Told(plan.id, body.model, started, serving.metrics)
    stored = False
    try:
        async for events in pieces:
            done = events[-1] == DONE
            if relayed := b"".join([told.event(event) for event in (events[:-1] if done else events)]):
                yield relayed
            if done:
                before = len(plan.degraded)
                stored = True
                await serving.record(plan, told.text, told.finish_reason)
                for reason in plan.degraded[before:]:
                    # The headers have left; a comment is what server-sent events have for this.
                    yield f": x-fastslow-degraded: {reason}\n\n".encode()
                serving.sent(plan, told.text)
                yield b"data: [DONE]\n\n"
                serving.metrics.streamed_chat.observe(time.perf_counter() - started)
                return
        broken = EngineUnavailable("The inference server ended the stream early: send the request again.")
    except EngineUnavailable as error:
        broken = error
    except (GeneratorExit, asyncio.CancelledError):
        if told.text and not stored:
            await serving.record(plan, told.text, told.finish_reason)
        raise
    # The status has left already; an error event is what OpenAI's clients raise from.
    yield b"data: " + orjson.dumps(broken.body()) + b"\n\n"


class _Told:
    """What a stream has told so far."""

    def __init__(self, reply_id: str, model: str, started: float, metrics: Metrics) -> None:
        self._named = {"id": reply_id, "model": model}
        self._started = started
        self._metrics = metrics
        self._pieces: list[str] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def event(self, event: bytes) -> bytes:
        """One of vLLM's events as the client's."""
        chunk = orjson.loads(event.removeprefix(b"data: "))
        self._metrics.count_usage(chunk.get("usage"))
        for choice in chunk.get("choices", ()):
            if piece := choice["delta"].get("content"):
                if not self._pieces:
                    self._metrics.first_token.observe(time.perf_counter() - self._started)
                self._pieces.append(piece)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return b"data: " + orjson.dumps(_tidy(chunk) | self._named) + b"\n\n"


def _tidy(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply or a chunk without the fields of vLLM's own, which it sends as null; OpenAI's nulls stay."""
    if None in reply.values():
        reply = {k: v for k, v in reply.items() if v is not None}
    for choice in reply.get("choices", ()):
        for own in VLLMS_OWN:
            choice.pop(own, None)
        name = "delta" if "delta" in choice else "message"
        if None in choice[name].values():
            choice[name] = {k: v for k, v in choice[name].items() if v is not None or k in ("content", "refusal")}
    return reply


def _upstream_id(plan: Plan) -> str:
    """vLLM makes the completion's id of this by putting `chatcmpl-` before it."""
    return plan.id.removeprefix("chatcmpl-")
