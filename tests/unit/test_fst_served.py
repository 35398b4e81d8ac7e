"""Rollouts by vLLM, where it is busy, away or refuses; tests/integration has them by a real one."""

import asyncio

import pytest

from service.engine import Sampled
from service.errors import EngineUnavailable, JobFailed, UpstreamRejected
from tests.fst_tasks import find
from workers.fst import served
from workers.fst.contexts import EMPTY
from workers.fst.plan import checked_plan
from workers.fst.policy import opened
from workers.fst.rollouts import Asked, Sampling
from workers.fst.served import OnVllm


class Engine:
    """Answers after these failures; knows how many requests it had at once."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.asked = []
        self.most = self.now = 0

    async def sample(self, prompt, *, samples, max_tokens, seed, **rest):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        if self.failures:
            raise self.failures.pop()
        self.asked.append((prompt, seed))
        return [Sampled((5, 6, 7), (-1.0, -2.0, -3.0))] * samples


@pytest.fixture
def roll(tiny_base, tiny_settings):
    """Rolls two samples to each of eight problems over an engine."""
    problems = find("say-e").problems("train", count=8, seed=0)
    asked = [Asked(problem, EMPTY) for problem in problems]

    def run(engine, *, sequences=6):
        settings = tiny_settings.model_copy(update={"vllm_max_sequences": sequences})
        with opened(tiny_base, checked_plan(tasks=("say-e",)), settings) as policy, asyncio.Runner() as runner:
            roller = OnVllm(policy, engine, runner, settings, model=lambda: "fs-1")
            return roller.roll(asked, Sampling(6, count_cut_off=True), samples=2, seed="s")

    return run


def test_no_more_is_asked_at_once_than_vllm_has_in_a_batch(roll):
    engine = Engine()
    rollouts = roll(engine)
    assert len(rollouts) == 16
    assert rollouts[0].logprobs == (-1.0, -2.0, -3.0)
    assert engine.most == 3
    assert len({seed for _, seed in engine.asked}) == 8
    few = Engine()
    roll(few, sequences=1)
    assert few.most == 1


def test_a_vllm_that_is_away_for_a_moment_is_asked_again(roll):
    engine = Engine(*[EngineUnavailable("busy", retry_after_seconds=0.01)] * 5)
    assert len(roll(engine)) == 16
    assert not engine.failures


def test_one_that_stays_away_or_refuses_ends_the_run_with_what_to_do(roll, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(JobFailed, match=r"no rollouts for 0.1 s: gone"):
        roll(Engine(*[EngineUnavailable("gone", retry_after_seconds=0.05)] * 99))
    with pytest.raises(JobFailed, match=r"does not exist\. It must run with our plugin"):
        roll(Engine(UpstreamRejected("The model `fs-1` does not exist.", status=404)))
