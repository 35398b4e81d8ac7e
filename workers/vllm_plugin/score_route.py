"""`POST /fastslow/score` inside vLLM: log-probabilities of replies, many to a context."""

from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.inputs import TextPrompt
from vllm.platforms import current_platform
from vllm.renderers import TokenizeParams
from vllm.utils import random_uuid

from service.engine import BACKGROUND_PRIORITY, MAX_SCORED_REPLIES
from workers.vllm_plugin.engine_runs import EngineRuns
from workers.vllm_plugin.scoring import Seats, score_replies, together


class Item(BaseModel):
    """A conversation, its context rendered into it, with replies to it."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, Any]] = Field(min_length=1)
    replies: list[str] = Field(min_length=1)
    ended: bool = True
    """Whether the replies' end is scored too: they were not cut off."""


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    """The base model's served name, or an adapter version."""
    cache_salt: Annotated[str, Field(pattern=r"^[^@/\\\x00]{1,128}$")]
    """The user's, as in their chats: those have cached the context already."""
    items: list[Item] = Field(min_length=1)
    priority: int = Field(BACKGROUND_PRIORITY, ge=1)
    """Later than what has a smaller one; chats have 0."""

    @model_validator(mode="after")
    def _bounded(self) -> "ScoreRequest":
        if (replies := sum(len(item.replies) for item in self.items)) > MAX_SCORED_REPLIES:
            raise ValueError(f"the items have {replies} replies, and a request may have {MAX_SCORED_REPLIES}")
        return self


@with_cancellation
async def score(body: ScoreRequest, raw_request: Request) -> JSONResponse:
    """200 `{"scores": [[{"logprob_sum", "tokens"}, ...], ...]}` (nats), a list per item. A client that hangs up ends the work."""
    request_id = raw_request.headers.get("X-Request-Id") or random_uuid()
    scores = await raw_request.app.state.fastslow_scorer.score(body, request_id=f"score-{request_id}")
    if isinstance(scores, ErrorResponse):
        return JSONResponse(scores.model_dump(), status_code=scores.error.code)
    return JSONResponse({"scores": scores})


class Scorer:
    """Scores by the engine of this replica.

    Args:
        engine: vLLM's `EngineClient`.
        chat: vLLM's `OpenAIServingChat`; what it renders is what chats are served with.
        models: vLLM's `OpenAIServingModels`.
    """

    def __init__(self, *, engine: Any, chat: Any, models: Any) -> None:
        self._engine = engine
        self._chat = chat
        self._models = models
        runs = max(1, engine.vllm_config.scheduler_config.max_num_seqs // 2)
        # A context of 500 tokens keeps a CPU busy for a second. Two at once are no faster, and streams would wait for both.
        self._seats = Seats(runs=runs, fills=1 if current_platform.is_cpu() else runs)

    async def warm_up(self) -> None:
        """Make vLLM compile its ranking of log-probabilities now: it takes a CPU 15 seconds once, in which no chat goes on."""
        await EngineRuns(self._engine, adapter=None, cache_salt="warm-up", priority=0, request_id="warm-up").run([0, 0])

    async def score(self, body: ScoreRequest, *, request_id: str) -> list[list[dict[str, float]]] | ErrorResponse:
        """The scores by item and reply, or vLLM's refusal of the model.

        Raises:
            VLLMValidationError: an item is no conversation, or too long.
            VLLMNotFoundError: the adapter was evicted meanwhile.
        """
        encoded: list[tuple[list[int], list[list[int]]]] = []
        for number in range(len(body.items)):
            item = await self._encode(body, number)
            if isinstance(item, ErrorResponse):
                return item
            encoded.append(item)
        runs = EngineRuns(
            self._engine,
            adapter=self._adapter(body.model),
            cache_salt=body.cache_salt,
            priority=body.priority,
            request_id=request_id,
        )
        logprobs = await together(
            score_replies(runs, context, replies, seats=self._seats) for context, replies in encoded
        )
        return [
            [{"logprob_sum": value, "tokens": len(reply)} for value, reply in zip(values, replies, strict=True)]
            for values, (_, replies) in zip(logprobs, encoded, strict=True)
        ]

    def _adapter(self, model: str) -> Any:
        """vLLM's `LoRARequest`, None for the base model."""
        adapter = self._models.lora_requests.get(model)
        if adapter is None and not self._models.is_base_model(model):
            raise VLLMNotFoundError(f"The model `{model}` does not exist.")
        return adapter

    async def _encode(self, body: ScoreRequest, number: int) -> tuple[list[int], list[list[int]]] | ErrorResponse:
        """Token ids of an item's conversation up to where the reply begins, and of each reply."""
        item, longest = body.items[number], self._engine.model_config.max_model_len
        try:
            request = ChatCompletionRequest(model=body.model, messages=item.messages, cache_salt=body.cache_salt)
            # This also loads the adapter.
            rendered = await self._chat.render_chat_request(request)
            if isinstance(rendered, ErrorResponse):
                return rendered
            context = rendered[1][0]["prompt_token_ids"]
            replies = [await self._encode_reply(text, ended=item.ended, longest=longest) for text in item.replies]
        except ValidationError as error:
            first = error.errors()[0]
            raise _refused(number, f"{first['msg']}, in {'.'.join(map(str, first['loc'][:2]))}.", "messages") from None
        except VLLMValidationError as error:
            raise _refused(number, str(error.args[0]), error.parameter) from None
        if not all(replies):
            raise _refused(number, "An empty reply has no tokens to score, unless it has ended.", "replies")
        if len(context) + (most := max(map(len, replies))) > longest:
            message = f"The conversation of {len(context)} tokens and a reply of {most} do not fit into {longest}."
            raise _refused(number, message, "input_tokens")
        return context, replies

    async def _encode_reply(self, text: str, *, ended: bool, longest: int) -> list[int]:
        renderer = self._engine.renderer
        params = TokenizeParams(max_total_tokens=longest, add_special_tokens=False)
        tokens = (await renderer.tokenize_prompt_async(TextPrompt(prompt=text), params))["prompt_token_ids"]
        return [*tokens, renderer.get_eos_token_id()] if ended else [*tokens]


def _refused(number: int, message: str, parameter: str | None) -> VLLMValidationError:
    return VLLMValidationError(f"Item {number}: {message}", parameter=parameter)
