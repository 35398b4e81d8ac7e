"""Scoring replies over a prefix cache: the sum is exact whatever the cache holds."""

import asyncio
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.feedback import Message
from service.engine import Candidates, Score
from service.errors import ContextLengthExceeded, EngineUnavailable, UpstreamRejected
from service.settings import Settings
from service.vllm import VllmEngine
from tests.fakes import MODEL, FakeVllm
from workers.vllm_plugin.scoring import Seats, score_replies, together, told

BLOCK = 4
TOKENS = st.integers(0, 2)
GARBAGE = 12.5


def logprob(tokens: list[int], at: int) -> float:
    """A token's, by all that comes before it."""
    return -1 - math.sin(hash(tuple(tokens[: at + 1]))) ** 2


def direct_sum(context: list[int], reply: list[int]) -> float:
    tokens = [*context, *reply]
    return math.fsum(logprob(tokens, at) for at in range(len(context), len(tokens)))


class BlockCache:
    """Stands for vLLM's engine: caches whole blocks, and recomputes at least the last state of a prompt."""

    def __init__(self) -> None:
        self.cached: set[tuple[int, ...]] = set()
        self.computed: list[int] = []
        self.at_once = self.most_at_once = 0

    def hit(self, prompt: list[int]) -> int:
        end = 0
        while end + BLOCK < len(prompt) and tuple(prompt[: end + BLOCK]) in self.cached:
            end += BLOCK
        return end

    async def _compute(self, prompt: list[int]) -> int:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        hit = self.hit(prompt)
        await asyncio.sleep(0)
        self.computed.append(len(prompt) - hit)
        self.cached |= {tuple(prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK)}
        self.at_once -= 1
        return hit

    async def fill(self, tokens: list[int]) -> None:
        await self._compute(tokens)

    async def run(self, tokens: list[int]) -> list[float]:
        hit = await self._compute(tokens[:-1])
        return [logprob(tokens, at) for at in range(hit + 1, len(tokens))]


@given(
    context=st.lists(TOKENS, min_size=1, max_size=3 * BLOCK),
    replies=st.lists(st.lists(TOKENS, min_size=1, max_size=3 * BLOCK), min_size=1, max_size=6),
    said=st.lists(TOKENS, max_size=6 * BLOCK),
)
async def test_the_sum_is_exact_whatever_replies_share_and_the_cache_has_seen(context, replies, said):
    engine = BlockCache()
    await engine.fill([*context, *said])
    seats = Seats(runs=2, fills=1)
    for _ in range(2):
        sums = await score_replies(engine, context, replies, seats=seats)
        assert sums == pytest.approx([direct_sum(context, reply) for reply in replies])


async def test_a_context_is_computed_once_and_a_repeated_reply_in_a_few_blocks():
    engine, context, reply = BlockCache(), [0] * 10 * BLOCK, [1, 2] * BLOCK
    for _ in range(2):
        await score_replies(engine, context, [reply, [2, *reply]], seats=Seats(runs=2, fills=1))
    assert sum(n >= 10 * BLOCK for n in engine.computed) == 1
    assert sum(engine.computed) < len(context) + 8 * len(reply)


async def test_no_more_runs_at_once_than_seats_though_many_requests_share_them():
    engine, seats = BlockCache(), Seats(runs=3, fills=1)
    work = [score_replies(engine, [n] * BLOCK, [[1], [2], [3]], seats=seats) for n in range(6)]
    await together(work)
    assert engine.most_at_once <= 4


async def test_an_error_ends_the_other_runs_and_is_raised_as_it_is():
    ended = asyncio.Event()

    class Failing(BlockCache):
        async def run(self, tokens: list[int]) -> list[float]:
            if tokens[-1] == 1:
                raise RuntimeError("the engine is dead")
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return []

    with pytest.raises(RuntimeError, match="engine is dead"):
        await score_replies(Failing(), [0], [[2], [1]], seats=Seats(runs=2, fills=1))
    assert ended.is_set()


def output(tokens: list[int], *, cached: int, prompt: list[float], last: float = -1.0) -> SimpleNamespace:
    """vLLM's output of a run over `tokens`, of which `prompt` has the log-probabilities that it lists."""
    *head, sampled = tokens
    return SimpleNamespace(
        num_cached_tokens=cached,
        prompt_logprobs=SimpleNamespace(token_ids=head[len(head) - len(prompt) :], logprobs=prompt),
        outputs=[SimpleNamespace(logprobs=SimpleNamespace(token_ids=[sampled], logprobs=[last]))],
    )


@pytest.mark.parametrize("garbage", [0, 2], ids=["left out", "garbage"])
def test_what_was_cached_is_not_told_of(garbage):
    listed = [GARBAGE] * garbage + [-0.3, -0.4]
    assert told([5, 6, 7, 8, 9, 4], output([5, 6, 7, 8, 9, 4], cached=2, prompt=listed)) == [-0.3, -0.4, -1.0]


def test_a_prompt_cached_but_for_its_last_token_tells_of_the_sampled_one():
    assert told([5, 6, 7], output([5, 6, 7], cached=1, prompt=[GARBAGE], last=-0.5)) == [-0.5]


def test_the_log_probabilities_of_other_tokens_are_refused():
    whole = output([5, 6, 7, 8], cached=0, prompt=[-0.1, -0.2])
    assert told([5, 6, 7, 8], whole) == [-0.1, -0.2, -1.0]
    whole.prompt_logprobs.token_ids = [0, 7]
    assert told([5, 6, 7, 8], whole) is None


def test_fewer_log_probabilities_than_were_computed_are_refused():
    assert told([5, 6, 7, 8], output([5, 6, 7, 8], cached=0, prompt=[-0.2])) is None


@pytest.fixture
async def engine(vllm: FakeVllm):
    engine = VllmEngine(Settings(_env_file=None, vllm_url=vllm.url, vllm_api_key="vllm-key"))
    yield engine
    await engine.close()


def candidates(*replies: str, **options) -> Candidates:
    messages = (Message(role="system", content="Speak of rivers."), Message(role="user", content="What is blue?"))
    return Candidates(messages=messages, replies=replies, **options)


async def test_the_client_sends_conversations_and_returns_a_score_per_reply(engine, vllm):
    items = [candidates("Blue rivers.", "A red car."), candidates("Blue", ended=False)]
    scores = await engine.score(items, model=MODEL, cache_salt="s", request_id="one")
    assert [[score.tokens for score in replies] for replies in scores] == [[3, 4], [1]]
    assert scores[0][0].mean > scores[0][1].mean
    assert vllm.scored[-1]["cache_salt"] == "s"
    assert vllm.scored[-1]["items"][0]["messages"][0] == {"role": "system", "content": "Speak of rivers."}
    assert [item["ended"] for item in vllm.scored[-1]["items"]] == [True, False]


async def test_a_score_has_its_mean_in_nats_per_token():
    assert Score(logprob_sum=-6.0, tokens=4).mean == -1.5


async def test_an_unknown_adapter_is_the_engines_404(engine):
    with pytest.raises(UpstreamRejected) as refused:
        await engine.score([candidates("x")], model="fs-unknown", cache_salt="s", request_id="one")
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        ((400, {"message": "Item 0: too long", "param": "input_tokens"}), ContextLengthExceeded),
        ((400, {"message": "2 validation errors", "param": "body.items.0.replies"}), UpstreamRejected),
        ((503, {"message": "busy"}), EngineUnavailable),
    ],
)
async def test_the_engines_refusals_become_the_services_errors(engine, vllm, refusal, error):
    vllm.refuse = refusal
    with pytest.raises(error):
        await engine.score([candidates("x")], model=MODEL, cache_salt="s", request_id="one")
