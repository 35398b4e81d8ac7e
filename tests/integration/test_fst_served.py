"""Rollouts by a real vLLM: by the very weights in training, with the log-probabilities that training sees, and nothing left behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.errors import EngineUnavailable, JobFailed
from service.settings import Settings
from service.verifiers import task
from tests.integration.replica import BASE, KEY, Replica
from workers.consolidation.base import Base, load_base
from workers.consolidation.rows import pack, token_logprobs
from workers.fst.contexts import EMPTY, TaskContext
from workers.fst.plan import checked_plan
from workers.fst.policy import Policy, opened
from workers.fst.rollouts import Asked, Rollout, Sampling, rows_of
from workers.fst.run import train
from workers.fst.served import served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TASK = "star-graph-2x2"
PLAN = checked_plan(tasks=(TASK,), arm="fst", rollouts_by="vllm")
SAMPLING = Sampling(new_tokens=12, count_cut_off=True)


@pytest.fixture(scope="module")
def settings(vllm_server: Replica, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        _env_file=None,
        data_dir=tmp_path_factory.mktemp("data"),
        model=str(vllm_server.model_path),
        model_name=BASE,
        adapter_store=str(vllm_server.store),
        vllm_url=str(vllm_server.http.base_url).rstrip("/"),
        vllm_api_key=KEY,
        worker_device="cpu",
        anchors=8,
    )


@pytest.fixture(scope="module")
def base(settings: Settings) -> Base:
    return load_base(settings)


@pytest.fixture
def policy(base: Base, settings: Settings) -> Iterator[Policy]:
    with opened(base, PLAN, settings) as policy:
        yield policy


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    contexts = (EMPTY, TaskContext(guidelines=("Answer with nodes alone.",)))
    problems = task(TASK).problems("train", count=3, seed=0)
    return [Asked(problem, context, place) for problem in problems for place, context in enumerate(contexts)]


def moved(policy: Policy, *, seed: int) -> None:
    """Other weights, as after a step."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))


def off(policy: Policy, rollouts: list[Rollout], *, trained: bool) -> float:
    """Furthest that a recorded log-probability is from the one that training would see."""
    with policy.trained() if trained else policy.frozen() as model, torch.no_grad():
        packed = pack(rows_of(rollouts), device=model.device)
        now_N = token_logprobs(model.states(packed), model.head, packed.target_N)
    return (now_N - torch.tensor([value for r in rollouts for value in r.logprobs])).abs().max().item()


def adapters(vllm_server: Replica, known: set[str]) -> tuple[set[str], set[str]]:
    """Those in the store and those in vLLM, but for other tests'."""
    loaded = vllm_server.http.get("/fastslow/adapters").json()["adapters"]
    return {path.name for path in vllm_server.store.glob("fs-*")} - known, set(loaded) - known


def test_replies_are_drawn_by_the_weights_as_they_are_and_no_adapter_stays(
    policy: Policy, asked: list[Asked], settings: Settings, vllm_server: Replica, tmp_path: Path
) -> None:
    known = adapters(vllm_server, set())[0]
    with served(policy, out=tmp_path / "run", settings=settings) as rollers:
        moved(policy, seed=1)
        first = rollers.trained.roll(asked, SAMPLING, samples=2, seed="s")
        assert [r.asked for r in first] == [one for one in asked for _ in range(2)]
        assert off(policy, first, trained=True) < 1e-2 < off(policy, first, trained=False)
        assert len({r.reply for r in first}) > 6
        again = rollers.trained.roll(asked, SAMPLING, samples=2, seed="s")
        assert [r.reply for r in again] == [r.reply for r in first]
        [one], [loaded] = adapters(vllm_server, known)
        assert one == loaded

        moved(policy, seed=2)
        second = rollers.trained.roll(asked[:2], SAMPLING, samples=2, seed="s")
        assert off(policy, second, trained=True) < 1e-2
        [other], [loaded] = adapters(vllm_server, known)
        assert other == loaded != one

        plain = rollers.frozen.roll(asked[:2], SAMPLING, samples=2, seed="s")
        assert off(policy, plain, trained=False) < 1e-2
    assert adapters(vllm_server, known) == (set(), set())


def test_what_a_killed_process_left_goes_when_the_run_goes_on(
    policy: Policy, asked: list[Asked], settings: Settings, vllm_server: Replica, tmp_path: Path
) -> None:
    known = adapters(vllm_server, set())[0]
    killed = served(policy, out=tmp_path / "run", settings=settings)
    killed.__enter__().trained.roll(asked[:1], SAMPLING, samples=1, seed="s")
    assert len(adapters(vllm_server, known)[0]) == 1
    with served(policy, out=tmp_path / "run", settings=settings) as rollers:
        assert adapters(vllm_server, known) == (set(), set())
        rollers.trained.roll(asked[:1], SAMPLING, samples=1, seed="s")
        with served(policy, out=tmp_path / "another", settings=settings):
            assert len(adapters(vllm_server, known)[0]) == 1


def test_a_whole_run_learns_from_them(base: Base, settings: Settings, tmp_path: Path) -> None:
    few = {"steps": 1, "contexts": 2, "rollouts": 4, "batch_problems": 1, "new_tokens": 12}
    few |= {"evolution_calls": 1, "anchor_problems": 1, "train_problems": 4, "test_problems": 1}
    plan = checked_plan(tasks=(TASK,), arm="fst", rollouts_by="vllm", learning_rate=1e-3, **few)
    result = train(plan, tmp_path / "run", base=lambda: base, settings=settings)
    assert result is not None
    assert result["samples"] >= 4
    assert {cell["weights"] for cell in result["two_by_two"]} == {"base", "slow"}


def test_a_vllm_that_is_not_there_or_has_another_store_is_told_of(
    policy: Policy, asked: list[Asked], settings: Settings, tmp_path: Path
) -> None:
    away = settings.model_copy(update={"vllm_url": "http://127.0.0.1:9"})
    with pytest.raises(EngineUnavailable, match="can't be reached"), served(policy, out=tmp_path, settings=away):
        pass
    elsewhere = settings.model_copy(update={"adapter_store": str(tmp_path / "adapters")})
    with (
        served(policy, out=tmp_path / "run", settings=elsewhere) as rollers,
        pytest.raises(JobFailed, match=r"does not exist.*over the adapter store of these settings"),
    ):
        rollers.trained.roll(asked[:2], SAMPLING, samples=1, seed="s")
