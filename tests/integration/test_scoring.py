"""Scoring inside a real vLLM: exact with any cache, beside chats, under adapters, and refused clearly."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.domain.feedback import Message
from service.engine import MAX_SCORED_REPLIES, Candidates
from service.errors import ContextLengthExceeded, UpstreamRejected
from service.settings import Settings
from service.vllm import VllmEngine
from tests.integration.replica import BASE, KEY, Replica

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

UNKNOWN = "fs-0123456789ab-0001-0123456789ab"
QUESTION = "Name three rivers of Europe."
RIVERS = "The Rhine, the Danube and the Loire are three long rivers of Europe, and ships go up and down all of them. "
LONG = (
    Message(role="system", content="The user wants short replies. " + RIVERS * 18),
    Message(role="user", content=QUESTION),
)
SHORT = (Message(role="user", content=QUESTION),)
REPLIES = ("The Rhine, the Danube and the Loire.", "I cannot say.", RIVERS, RIVERS + "So they say.")


@pytest.fixture
async def engine(vllm_server: Replica) -> AsyncIterator[VllmEngine]:
    url = str(vllm_server.http.base_url)
    engine = VllmEngine(Settings(_env_file=None, vllm_url=url, vllm_api_key=KEY))
    yield engine
    await engine.close()


def salt() -> str:
    return uuid.uuid4().hex


def body(model: str = BASE, messages: tuple[Message, ...] = SHORT, replies: tuple[str, ...] = REPLIES, **item) -> dict:
    """A request's body, for what the client would not send."""
    items = [{"messages": [m.sent() for m in messages], "replies": list(replies), **item}]
    return {"model": model, "cache_salt": salt(), "items": items}


async def sums(engine: VllmEngine, *items: Candidates, model: str = BASE, cache_salt: str = "") -> list[list[float]]:
    scores = await engine.score(items, model=model, cache_salt=cache_salt or salt(), request_id="test")
    return [[score.logprob_sum for score in replies] for replies in scores]


class Reference:
    """The same model by a plain forward pass."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def tokens(self, messages: tuple[Message, ...], reply: str, *, ended: bool) -> tuple[list[int], list[int]]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id] if ended else []
        return self.tokenizer(text, add_special_tokens=False)["input_ids"], [*ids, *end]

    @torch.inference_mode()
    def logprob(self, messages: tuple[Message, ...], reply: str, *, ended: bool = True) -> float:
        context, ids = self.tokens(messages, reply, ended=ended)
        logits = self.model(torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()


@pytest.fixture(scope="module")
def reference(vllm_server: Replica) -> Reference:
    return Reference(vllm_server.model_path)


async def test_scores_are_those_of_a_plain_forward_pass(engine, reference):
    items = [Candidates(LONG, REPLIES), Candidates(SHORT, REPLIES, ended=False)]
    for item, measured in zip(items, await sums(engine, *items), strict=True):
        expected = [reference.logprob(item.messages, reply, ended=item.ended) for reply in REPLIES]
        assert measured == pytest.approx(expected, rel=1e-3)


async def test_the_end_of_turn_counts_as_a_token(engine):
    items = [Candidates(messages=SHORT, replies=["Yes."], ended=ended) for ended in (True, False)]
    whole, cut = await engine.score(items, model=BASE, cache_salt=salt(), request_id="test")
    assert whole[0].tokens == cut[0].tokens + 1
    assert whole[0].logprob_sum < cut[0].logprob_sum


async def test_scores_are_the_same_whatever_the_cache_holds(vllm_server, engine):
    alone = [(await sums(engine, Candidates(messages=LONG, replies=[reply])))[0][0] for reply in REPLIES]
    users = salt()
    messages = [m.sent() for m in LONG]
    said = await asyncio.to_thread(
        vllm_server.chat, BASE, max_tokens=40, messages=messages, cache_salt=users, ignore_eos=True
    )
    replies = (*REPLIES, said.json()["choices"][0]["message"]["content"])
    first, again = [(await sums(engine, Candidates(LONG, replies), cache_salt=users))[0] for _ in range(2)]
    assert first == pytest.approx(again, rel=1e-4)
    assert first[:-1] == pytest.approx(alone, rel=1e-4)


async def test_eight_replies_to_one_context_compute_it_once(vllm_server, engine, reference):
    replies = [f"{number} rivers." for number in ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")]
    context, reply = map(len, reference.tokens(LONG, replies[0], ended=True))
    before = vllm_server.metric("prefix_cache_hits_total"), vllm_server.metric("prefix_cache_queries_total")
    await sums(engine, Candidates(LONG, replies))
    hits = vllm_server.metric("prefix_cache_hits_total") - before[0]
    computed = vllm_server.metric("prefix_cache_queries_total") - before[1] - hits
    assert context > 400
    assert hits >= 8 * (context - 32)
    assert computed < context + 8 * (32 + reply)


async def test_an_adapter_scores_as_it_serves(vllm_server, engine, publish, reference):
    name = publish()
    measured = (await sums(engine, Candidates(SHORT, REPLIES), model=name))[0]
    assert measured != pytest.approx((await sums(engine, Candidates(SHORT, REPLIES)))[0], rel=1e-2)
    for reply, value in zip(REPLIES, measured, strict=True):
        context, ids = reference.tokens(SHORT, reply, ended=True)
        plain = {"model": name, "prompt": [*context, *ids], "max_tokens": 1, "prompt_logprobs": 0}
        listed = vllm_server.http.post("/v1/completions", json=plain).json()["choices"][0]["prompt_logprobs"]
        expected = sum(next(iter(token.values()))["logprob"] for token in listed[len(context) :])
        assert value == pytest.approx(expected, rel=1e-3)


def test_the_replica_lives_through_scoring_beside_chats_under_many_adapters(vllm_server, publish):
    """The second of the known killers: concurrent log-probabilities of prompts under adapters."""
    models = [BASE, publish(), publish(), publish()]

    def score(model: str) -> int:
        return vllm_server.http.post("/fastslow/score", json=body(model)).status_code

    def chat(model: str) -> int:
        return vllm_server.chat(model, max_tokens=16).status_code

    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(call, model) for model in models * 2 for call in (score, chat)]
        assert [call.result() for call in calls] == [200] * 16
    assert vllm_server.healthy()


async def test_an_unknown_adapter_is_404(vllm_server, engine):
    with pytest.raises(UpstreamRejected) as refused:
        await sums(engine, Candidates(SHORT, REPLIES), model=UNKNOWN)
    assert (refused.value.status, refused.value.param) == (404, "model")
    assert vllm_server.healthy()


@pytest.mark.parametrize(
    "item",
    [Candidates(SHORT, [RIVERS * 200]), Candidates((Message(role="user", content=RIVERS * 200),), ["Yes."])],
    ids=["the reply", "the conversation"],
)
async def test_what_does_not_fit_the_window_is_refused_by_the_items_number(engine, item):
    with pytest.raises(ContextLengthExceeded, match="Item 1"):
        await sums(engine, Candidates(SHORT, REPLIES), item)


async def test_a_conversation_and_a_reply_that_fit_only_alone_are_refused(engine):
    half = RIVERS * 45
    with pytest.raises(ContextLengthExceeded, match=r"Item 0: .* do not fit into 2048"):
        await sums(engine, Candidates((Message(role="user", content=half),), [half]))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"items": []}, "items"),
        ({"model": ""}, "model"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"cache_salt": None}, "cache_salt"),
        ({"priority": 0}, "priority"),
        ({"temperature": 1}, "temperature"),
        (body(replies=()), "items.0.replies"),
        (body(replies=("",), ended=False), "replies"),
        (body(replies=("Yes.",) * (MAX_SCORED_REPLIES + 1)), "body"),
        (body(messages=()), "items.0.messages"),
        ({"items": [{"messages": [{"content": "x"}], "replies": ["Yes."]}]}, "messages"),
    ],
)
def test_a_malformed_request_is_400_and_names_the_field(vllm_server, change, param):
    response = vllm_server.http.post("/fastslow/score", json=body() | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].removeprefix("body.") == param


def test_a_body_that_is_no_json_is_400(vllm_server):
    headers = {"Content-Type": "application/json"}
    assert vllm_server.http.post("/fastslow/score", content=b"{", headers=headers).status_code == 400


def test_a_client_that_hangs_up_ends_the_scoring(vllm_server):
    contexts = [(Message(role="user", content=f"{n}. {RIVERS * 18}"),) for n in range(40)]
    request = body() | {"items": [body(messages=messages)["items"][0] for messages in contexts]}
    before = vllm_server.metric("prompt_tokens_total")
    with pytest.raises(httpx.ReadTimeout):
        vllm_server.http.post("/fastslow/score", json=request, timeout=2)
    deadline, computed = time.monotonic() + 30, math.nan
    while computed != (computed := vllm_server.metric("prompt_tokens_total") - before):
        assert time.monotonic() < deadline
        time.sleep(3)
    # All of it would be 40 contexts of more than 400 tokens, and four replies to each.
    assert computed < 40 * 400 / 2
