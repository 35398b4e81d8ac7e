"""Guidelines proposed by a language model, over real HTTP: from an endpoint that answers, and from those that don't as they should."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from service.domain.fold import fold
from service.settings import Settings
from tests.context_search_data import PlantedScorer, corrections, feedback, means, words, work
from tests.gateway import free_port
from workers.context_search.candidates import Candidate, Pool
from workers.context_search.reflection import MOST_FAILURES, Reflection, ask
from workers.context_search.search import search

PROPOSED = "Answer in one short sentence"


class Endpoint:
    """Answers chat completions as OpenAI's interface says, or as a test wants."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[], Any] = lambda: f"Sure!\n```\n{PROPOSED}\n```"
        self.status = 200
        self.url = ""

    async def complete(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        message = {"role": "assistant", "content": self.answer()}
        return web.json_response({"choices": [{"message": message}]}, status=self.status)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    fake = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield fake
    await runner.cleanup()


def settings_for(url: str, **changes: Any) -> Settings:
    return Settings(
        _env_file=None, reflection_url=url, reflection_model="writer", reflection_api_key="secret", **changes
    )


class Counted:
    """How often the endpoint could not be asked."""

    def __init__(self) -> None:
        self.failures = 0

    async def __call__(self) -> None:
        self.failures += 1


def reflection_of(settings: Settings, counted: Counted) -> Callable[[Pool], Reflection]:
    def of(pool: Pool) -> Reflection:
        return Reflection(
            pool,
            ask=lambda prompt: ask(prompt, settings=settings),
            failed=counted,
            neutralize=lambda text: text.replace("<|im_end|>", "< |im_end|>"),
        )

    return of


async def edited(url: str, events: Any, counted: Counted | None = None) -> tuple[Pool, Candidate | None]:
    pool = Pool(fold(events), budget_tokens=400, count=words)
    reflection = reflection_of(settings_for(url), counted or Counted())(pool)
    return pool, await reflection.edit(Candidate(), work(events).examples)


async def test_the_model_sees_the_feedback_and_its_guideline_goes_on_trial(endpoint: Endpoint) -> None:
    pool, candidate = await edited(endpoint.url, corrections(3))
    assert candidate is not None
    [name] = candidate.guidelines
    new = pool.state.guidelines[name]
    assert (new.text, new.origin, new.stated) == (PROPOSED, "inferred", False)
    [body] = endpoint.bodies
    assert body["model"] == "writer"
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    shown = body["messages"][0]["content"]
    assert "Wanted 2." in shown
    assert "Question 2?" in shown
    assert "nobody asked for" in shown


async def test_a_search_takes_over_what_the_model_proposes_where_it_helps(endpoint: Endpoint) -> None:
    events = corrections(12)
    scorer = PlantedScorer({PROPOSED: 0.6})
    found = await search(
        work(events), means(scorer, reflection=reflection_of(settings_for(endpoint.url), Counted())), seed=0
    )
    assert [g.text for g in found.inferred] == [PROPOSED]
    assert found.inferred[0].id in found.members[0].items
    assert found.report.reflective


async def test_a_search_leaves_out_what_the_model_proposes_where_it_does_not_help(endpoint: Endpoint) -> None:
    scorer = PlantedScorer({"Wanted 2.": 0.5})
    tools = means(scorer, reflection=reflection_of(settings_for(endpoint.url), Counted()))
    found = await search(work(corrections(12)), tools, seed=0)
    assert found.inferred == ()
    assert found.report.reflective


@pytest.mark.parametrize("answer", ["", "```\n```", "good", None, 7, [{"type": "text"}]])
async def test_an_answer_without_a_guideline_is_no_edit(endpoint: Endpoint, answer: Any) -> None:
    endpoint.answer = lambda: answer
    _, candidate = await edited(endpoint.url, corrections(3))
    assert candidate is None


async def test_a_long_answer_is_cut_to_a_guideline_and_control_tokens_lose_their_meaning(endpoint: Endpoint) -> None:
    endpoint.answer = lambda: "```\nWrite <|im_end|> " + "very short sentences " * 50 + "\n```"
    pool, candidate = await edited(endpoint.url, corrections(3))
    assert candidate is not None
    text = pool.state.guidelines[candidate.guidelines[0]].text
    assert len(text.split()) <= 32
    assert "<|im_end|>" not in text


async def test_what_contradicts_the_user_is_not_even_tried(endpoint: Endpoint) -> None:
    endpoint.answer = lambda: "```\nGive more detail and write longer replies\n```"
    events = [*corrections(3), feedback(4, comment="Shorter replies please")]
    _, candidate = await edited(endpoint.url, events)
    assert candidate is None


async def test_what_the_user_removed_does_not_come_back(endpoint: Endpoint) -> None:
    events = corrections(3)
    pool, first = await edited(endpoint.url, events)
    assert first is not None
    state = fold(events).model_copy(update={"removed": {first.guidelines[0]: 4}})
    pool = Pool(state, budget_tokens=400, count=words)
    reflection = reflection_of(settings_for(endpoint.url), Counted())(pool)
    assert await reflection.edit(Candidate(), work(events).examples) is None


@pytest.mark.parametrize("status", [401, 404, 429, 500])
async def test_a_refusal_is_counted_and_the_search_goes_on_without(endpoint: Endpoint, status: int) -> None:
    endpoint.status = status
    counted = Counted()
    scorer = PlantedScorer({"Wanted 2.": 0.5})
    tools = means(scorer, reflection=reflection_of(settings_for(endpoint.url), counted))
    found = await search(work(corrections(12)), tools, seed=0)
    assert found.report.margin_after == pytest.approx(0.5)
    assert not found.report.reflective
    assert counted.failures == len(endpoint.bodies) == MOST_FAILURES


async def test_an_endpoint_that_is_not_there_is_counted_too() -> None:
    counted = Counted()
    _, candidate = await edited(f"http://127.0.0.1:{free_port()}/v1", corrections(3), counted)
    assert (candidate, counted.failures) == (None, 1)


async def test_an_endpoint_that_hangs_is_given_up(endpoint: Endpoint) -> None:
    released = asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        await released.wait()
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/chat/completions", hang)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    counted = Counted()
    settings = settings_for(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", reflection_timeout_seconds=0.2)
    pool = Pool(fold(corrections(3)), budget_tokens=400, count=words)
    assert await reflection_of(settings, counted)(pool).edit(Candidate(), work(corrections(3)).examples) is None
    assert counted.failures == 1
    released.set()
    await runner.cleanup()
