"""`POST /v1/chat/completions`: OpenAI's request and reply, personalized."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from service.api.admission import Admission
from service.api.auth import Caller, authenticated, user_of
from service.api.schemas import PASSED_ON, ChatRequest, DryRunReply
from service.domain.context import TOKENS_AROUND_MESSAGE
from service.domain.feedback import BASE
from service.engine import DONE
from service.errors import EngineUnavailable, FastslowError, InvalidRequest, ModelNotFound, UpstreamRejected
from service.serving import Plan, Serving, rendered
from service.tracing import span

router = APIRouter()
T = TypeVar("T")


class ClientGone(FastslowError):
    """The client hung up before its reply was ready."""

    status = 499
    code = "client_closed_request"


class Clock:
    """The gateway's own time in one chat: all of it less what was spent waiting for vLLM."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.upstream = 0.0

    def own_seconds(self) -> float:
        return time.perf_counter() - self.started - self.upstream


@router.post("/v1/chat/completions", summary="Chat, personalized for the user")
async def chat(request: Request, body: ChatRequest, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    serving: Serving = request.app.state.serving
    if body.model != serving.settings.model_name:
        raise ModelNotFound(
            f"The model '{body.model[:100]}' does not exist: this service serves '{serving.settings.model_name}'.",
            param="model",
        )
    if len(body.messages) > serving.settings.max_messages:
        raise InvalidRequest(
            f"{len(body.messages)} messages are over the limit of {serving.settings.max_messages}.", param="messages"
        )
    clock = Clock(request.state.started)
    user = user_of(request, caller, body.named_user())
    admission: Admission = request.app.state.admission
    with span("admit"):
        await admission.chat(request, tenant=caller.tenant, user=user, tokens=lambda: _most_tokens(body, serving))
    serve = _serve_stream if body.stream else _serve_whole
    rejected: tuple[str, UpstreamRejected] | None = None
    while True:
        plan = await serving.plan(
            body.conversation(),
            interaction_id=f"chatcmpl-{request.state.request_id}",
            tenant=caller.tenant,
            user=user,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            seed=body.seed,
            wish=body.wish(),
            without_adapter=rejected is not None,
        )
        if body.wish().dry_run:
            return _dry_run(plan, body, clock, serving)
        try:
            response = await serve(request, body, serving, plan, clock)
        except UpstreamRejected as error:
            if plan.version.adapter == BASE:
                raise
            rejected = (plan.version.adapter, error)
            continue
        # The adapter is to blame only now that the base took the same request.
        if rejected is not None:
            serving.adapter_failed(*rejected)
        return response


def _most_tokens(body: ChatRequest, serving: Serving) -> int:
    """Tokens of the messages, and of the longest reply to them."""
    count = serving.tokens.count
    prompt = sum(count(message.text() or "") + TOKENS_AROUND_MESSAGE for message in body.messages)
    return prompt + (body.max_completion_tokens or body.max_tokens or serving.settings.default_max_tokens)


def _sampling(body: ChatRequest) -> dict[str, Any]:
    return body.model_dump(include=PASSED_ON, exclude_none=True)


def _headers(plan: Plan, clock: Clock, serving: Serving) -> dict[str, str]:
    own_seconds = clock.own_seconds()
    serving.metrics.overhead.observe(own_seconds)
    serving.metrics.context_tokens.observe(plan.context.tokens)
    serving.metrics.served.labels(plan.channel).inc()
    headers = {
        "x-fastslow-adapter": plan.version.adapter,
        "x-fastslow-context-revision": str(plan.version.context_revision),
        "x-fastslow-context-member": plan.version.member,
        "x-fastslow-context-tokens": str(plan.context.tokens),
        "x-fastslow-overhead-ms": f"{own_seconds * 1000:.2f}",
    }
    return headers | ({"x-fastslow-degraded": ",".join(plan.degraded)} if plan.degraded else {})


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
    content = orjson.dumps(reply.model_dump())
    return Response(content, media_type="application/json", headers=_headers(plan, clock, serving))


async def _serve_whole(request: Request, body: ChatRequest, serving: Serving, plan: Plan, clock: Clock) -> Response:
    upstream = serving.upstream_body(plan, _sampling(body))
    sent = time.perf_counter()
    reply = await _unless_gone(
        request, serving.engine.complete(upstream, request_id=_upstream_id(plan), affinity=plan.affinity)
    )
    clock.upstream += time.perf_counter() - sent
    choice = reply["choices"][0]
    text = choice["message"].get("content") or ""
    await serving.record(plan, text, choice.get("finish_reason"))
    serving.metrics.count_usage(reply.get("usage"))
    reply = _tidy(reply) | {"id": plan.id, "model": body.model}
    headers = _headers(plan, clock, serving)
    serving.metrics.chat.labels("no").observe(time.perf_counter() - clock.started)
    afterwards = BackgroundTask(serving.sent, plan, text)
    return Response(orjson.dumps(reply), media_type="application/json", headers=headers, background=afterwards)


async def _serve_stream(request: Request, body: ChatRequest, serving: Serving, plan: Plan, clock: Clock) -> Response:
    upstream = serving.upstream_body(plan, _sampling(body)) | {"stream": True}
    if body.stream_options is not None:
        upstream["stream_options"] = body.stream_options.model_dump()
    sent = time.perf_counter()
    stack = AsyncExitStack()
    # Entered here, so that a refusal becomes an error reply and not a broken stream.
    events = await _unless_gone(
        request,
        stack.enter_async_context(
            serving.engine.stream(upstream, request_id=_upstream_id(plan), affinity=plan.affinity)
        ),
    )
    clock.upstream += time.perf_counter() - sent
    relayed = _relay(events, stack, body, serving, plan, clock.started)
    return EventStream(relayed, stack, _headers(plan, clock, serving))


class EventStream(StreamingResponse):
    """Server-sent events that end at once when the client goes away, which aborts the generation.

    Args:
        upstream: holds vLLM's reply. Closed even where the client left before the first event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], upstream: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events = events
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._upstream.aclose()


async def _relay(
    events: AsyncIterator[bytes], stack: AsyncExitStack, body: ChatRequest, serving: Serving, plan: Plan, started: float
) -> AsyncGenerator[bytes, None]:
    """vLLM's events as the client's, each as it comes; the interaction is stored before the last."""
    pieces: list[str] = []
    finish_reason: str | None = None
    async with stack:
        try:
            async for event in events:
                if event == DONE:
                    told = len(plan.degraded)
                    await serving.record(plan, "".join(pieces), finish_reason)
                    for reason in plan.degraded[told:]:
                        # The headers have left; a comment is what server-sent events have for this.
                        yield f": x-fastslow-degraded: {reason}\n\n".encode()
                    await serving.sent(plan, "".join(pieces))
                    yield b"data: [DONE]\n\n"
                    serving.metrics.chat.labels("yes").observe(time.perf_counter() - started)
                    return
                chunk = orjson.loads(event.removeprefix(b"data: "))
                serving.metrics.count_usage(chunk.get("usage"))
                for choice in chunk.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    if piece and not any(pieces):
                        serving.metrics.first_token.observe(time.perf_counter() - started)
                    pieces.append(piece)
                    finish_reason = choice.get("finish_reason") or finish_reason
                chunk = _tidy(chunk) | {"id": plan.id, "model": body.model}
                yield b"data: " + orjson.dumps(chunk) + b"\n\n"
            broken = EngineUnavailable("The inference server ended the stream early: send the request again.")
        except EngineUnavailable as error:
            broken = error
        # The status has left already; an error event is what OpenAI's clients raise from.
        yield b"data: " + orjson.dumps(broken.body()) + b"\n\n"


def _tidy(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply or a chunk without the fields of vLLM's own, which it sends as null; OpenAI's nulls stay."""
    kept = {k: v for k, v in reply.items() if v is not None}
    for choice in kept.get("choices", ()):
        for part in ("message", "delta"):
            if part in choice:
                choice[part] = {k: v for k, v in choice[part].items() if v is not None or k in ("content", "refusal")}
        for own in ("token_ids", "routed_experts", "stop_reason"):
            choice.pop(own, None)
    return kept


def _upstream_id(plan: Plan) -> str:
    """vLLM makes the completion's id of this by putting `chatcmpl-` before it."""
    return plan.id.removeprefix("chatcmpl-")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (and the generation aborted with it) when the client hangs up first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client closed the request.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
