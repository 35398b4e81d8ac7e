"""A chat's context is chosen once for the same fast weights, and anew when anything that it depends on changes."""

import dataclasses

import pytest

from service.contexts import Contexts, Wanted
from service.domain.context import render
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message, Signals, VersionTuple
from service.domain.fold import fold
from service.domain.items import Prior
from service.metrics import Metrics
from service.recall import Recall
from service.serving import Plan, rendered
from service.settings import Settings
from service.store import open_store
from service.tokens import Tokens, around, texts_of
from tests.unit.test_fast_weights import log_of

ROOM = 1000
CHAT = [Message(role="system", content="You are a clerk."), Message(role="user", content="Where is the form?")]


def taught(*comments: str) -> FastWeights:
    signals = [Signals(comment=comment, correction=f"Form {n}.") for n, comment in enumerate(comments)]
    return fold(log_of(*enumerate(signals)))


def of(state: FastWeights, user: str = "alice") -> Wanted:
    return Wanted("acme", user, state, "base", frozenset())


@pytest.fixture
def contexts(tokens: Tokens) -> Contexts:
    settings = Settings(_env_file=None, recall=False)
    return Contexts(tokens, settings, Recall(open_store(settings), None, settings, Metrics()))


async def test_the_same_fast_weights_are_chosen_from_once_and_any_change_is_seen(contexts: Contexts) -> None:
    state = taught("Be brief.", "Name the street.")
    first = await contexts.for_chat(of(state), CHAT, room=ROOM, seed=None)
    assert len(first.context.items) == 4
    assert await contexts.for_chat(of(state), CHAT[1:], room=ROOM + 1, seed=7) is first

    less_room = await contexts.for_chat(of(state), CHAT, room=first.context.tokens - 1, seed=None)
    absorbed = dataclasses.replace(of(state), adapter="fs-1", absorbed=frozenset(first.context.items[:1]))
    with_absorbed = await contexts.for_chat(absorbed, CHAT, room=ROOM, seed=None)
    prior = Prior(id="g-prior", text="Use metres.", mean=0.9)
    with_prior = await contexts.for_chat(dataclasses.replace(of(state), priors=(prior,)), CHAT, room=ROOM, seed=None)
    later = await contexts.for_chat(of(taught("Be brief.", "Name the street.", "No jokes.")), CHAT, room=ROOM, seed=1)

    assert 0 < less_room.context.tokens < first.context.tokens
    assert with_absorbed.context.items == first.context.items[1:]
    assert "Use metres." in with_prior.instructions
    assert "No jokes." in later.instructions
    assert (await contexts.for_chat(of(state), CHAT, room=ROOM, seed=None)).context == first.context


async def test_nobody_gets_anothers_choice(contexts: Contexts) -> None:
    mine, theirs = taught("Be brief."), taught("Be long.")
    for _ in range(2):
        assert "brief" in (await contexts.for_chat(of(mine), CHAT, room=ROOM, seed=None)).instructions
        assert "long" in (await contexts.for_chat(of(theirs, "bob"), CHAT, room=ROOM, seed=None)).instructions


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], []])
async def test_what_is_sent_is_what_is_rendered(contexts: Contexts, messages: list[Message]) -> None:
    choice = await contexts.for_chat(of(taught("Be brief.")), messages, room=ROOM, seed=None)
    plan = Plan("id", "acme", "alice", messages, choice, VersionTuple(model="m"), 9)
    assert rendered(plan) == [m.sent() for m in render(choice.context, messages)]


@pytest.mark.parametrize("text", ["", "x", "word " * 50, "Ünïcödé ﷽ 漢字 🙂🙂", "\x00\x01 \n\n\t  ", "<|im_end|>" * 3])
def test_a_bound_on_tokens_that_costs_nothing_holds(tokens: Tokens, text: str) -> None:
    messages = [Message(role="user", content=text), Message(role="assistant", content=None)]
    most = tokens.most_of(messages, text)
    assert most is not None
    assert around(messages) + sum(map(tokens.count, (*texts_of(messages), text))) <= most


async def test_long_texts_are_counted_as_short_ones_are_and_too_much_is_seen_by_its_bytes(tokens: Tokens) -> None:
    long = "A river is water. " * 1_000
    assert await tokens.counted(["A river is water. ", long], most=10**6) == tokens.count(
        "A river is water. "
    ) + tokens.count(long)
    assert tokens.count(long) == len(tokens._tokenizer.encode(long, add_special_tokens=False).ids)
    huge = long * 100
    assert 2048 <= await tokens.counted([huge], most=2048) <= tokens.count(huge)


def test_what_a_template_renders_beside_the_text_is_counted_too(tokens: Tokens) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    plain = Message(role="assistant", content="Let me see.")
    calling = Message(role="assistant", content="Let me see.", tool_calls=[call])
    shown, more = (sum(map(tokens.count, texts_of([message]))) for message in (plain, calling))
    assert more > shown + 10
