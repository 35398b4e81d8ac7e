"""Whole runs on a tiny random model: what each arm does, that it learns, that a killed run ends as one that was not."""

import dataclasses
import json

import pytest
import torch

from service.errors import Conflict, InvalidRequest, JobFailed
from service.verifiers import Verdict
from tests.fst_tasks import ADVICE, SayTheLetter, find
from workers.fst import folder as folders
from workers.fst import loop as loop_module
from workers.fst.evolution import SCREENED, evolve
from workers.fst.folder import CURVE, GROUND, PLAN, REPLIES, State
from workers.fst.loop import Loop
from workers.fst.plan import checked_plan
from workers.fst.policy import opened
from workers.fst.problems import Problems
from workers.fst.promise import promises
from workers.fst.rollouts import in_process
from workers.fst.run import train

SMALL = {
    "steps": 4,
    "steps_per_cycle": 2,
    "contexts": 2,
    "rollouts": 4,
    "batch_problems": 2,
    "new_tokens": 6,
    "count_cut_off": True,
    "context_tokens": 200,
    "evolution_calls": 12,
    "anchor_problems": 4,
    "train_problems": 16,
    "test_problems": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 1,
}


def plan_of(**changes):
    return checked_plan(**{"tasks": ("say-e",), "arm": "fst", **SMALL, **changes})


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def go(tiny_base, tiny_settings, tmp_path):
    def run(plan, name="run", **options):
        return train(
            plan,
            tmp_path / name,
            **{"base": lambda: tiny_base, "settings": tiny_settings, "find": find, **options},
        )

    return run


def records(folder, kind):
    return [r for r in map(json.loads, (folder / CURVE).read_text().splitlines()) if r["kind"] == kind]


def looped(run, base, settings, policy, problems):
    """A loop that measures nothing."""
    rest = {"settings": settings, "measure": lambda *_: None, "on_step": lambda _: None}
    return Loop(run, policy, in_process(policy), problems, **rest)


def test_reinforcement_learning_raises_the_reward(go, tmp_path):
    go(plan_of(arm="rl", steps=16, steps_per_cycle=8, rollouts=8, batch_problems=4, new_tokens=8, learning_rate=2e-2))
    rewards = [r["test_reward"] for r in records(tmp_path / "run", "cycle")]
    assert rewards[0] < 0.02
    assert rewards[-1] > 0.1


def test_contexts_and_weights_in_turn_raise_the_reward_and_the_verifiers_advice_is_tried(go, tmp_path):
    go(plan_of(steps=16, steps_per_cycle=8, rollouts=8, batch_problems=4, new_tokens=8, learning_rate=2e-2))
    cycles = records(tmp_path / "run", "cycle")
    assert cycles[-1]["test_reward"] > 0.1
    assert cycles[-1]["kl_nats"] > 0.0
    assert sum(c["tried"] for c in cycles) > 4


def test_all_weights_can_be_trained_and_the_base_stays(go, tiny_base, tmp_path):
    ids = torch.arange(20)[None]
    before = tiny_base.model(input_ids=ids).logits.detach()
    go(plan_of(arm="rl", steps=12, steps_per_cycle=6, rollouts=8, batch_problems=4, weights="full", learning_rate=1e-2))
    rewards = [r["test_reward"] for r in records(tmp_path / "run", "cycle")]
    assert rewards[-1] > rewards[0] + 0.05
    assert torch.equal(before, tiny_base.model(input_ids=ids).logits.detach())


def test_what_is_exported_is_within_the_kl_budget(go, tiny_settings, tmp_path):
    result = go(plan_of(arm="rl", steps=8, steps_per_cycle=4, learning_rate=3e-2))
    drift = records(tmp_path / "run", "cycle")[-1]
    assert drift["kl_text_nats"] > tiny_settings.kl_text_budget_nats
    budgeted = result["budgeted"]
    assert 0.0 < budgeted["scale"] < 1.0
    assert budgeted["kl"]["text"]["upper95_nats"] <= tiny_settings.kl_text_budget_nats
    assert budgeted["kl"]["chat"]["upper95_nats"] <= tiny_settings.kl_chat_budget_nats
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_without_contexts_nothing_evolves(go, tmp_path):
    result = go(plan_of(arm="rl"))
    cycles = records(tmp_path / "run", "cycle")
    assert all(c["population"] == [{"guidelines": [], "exemplars": []}] for c in cycles)
    assert all(c["tried"] == c["evolution_samples"] == 0 for c in cycles)
    assert result["samples"] == SMALL["steps"] * SMALL["batch_problems"] * SMALL["rollouts"]


def test_the_context_arm_leaves_the_weights_alone(go, tmp_path):
    result = go(plan_of(arm="context"))
    cycles = records(tmp_path / "run", "cycle")
    assert [c["kl_nats"] for c in cycles] == [pytest.approx(0.0, abs=1e-6)] * len(cycles)
    assert cycles[-1]["tried"] > 2
    assert {c["weights"] for c in result["two_by_two"]} == {"base"}


def test_what_an_evolution_drew_of_its_members_is_rollouts_of_the_steps_and_paid_for_once(go, tmp_path):
    Counting.asked.clear()
    result = go(plan_of(), find=lambda name: Counting(name, "e"))
    cycles, steps = records(tmp_path / "run", "cycle"), records(tmp_path / "run", "step")
    tests = (len(cycles) + len(result["two_by_two"]) + 1) * SMALL["test_problems"]
    assert len(Counting.asked) == result["samples"] + tests
    # All problems of a cycle are anchors here, and each context of the population has a reply to each of them.
    rollouts = SMALL["steps"] * SMALL["batch_problems"] * SMALL["rollouts"]
    members = [len({json.dumps(member) for member in c["population"]}) for c in cycles[1:]]
    reused = sum(SMALL["anchor_problems"] * of for of in members)
    assert result["samples"] == rollouts + sum(c["evolution_samples"] for c in cycles) - reused
    assert len(steps) == SMALL["steps"]


class SayEven(SayTheLetter):
    """Rewards characters of even code, of which a random model says about a half."""

    def check(self, reply):
        return Verdict(reward=sum(ord(c) % 2 == 0 for c in reply) / max(len(reply), 1), feedback=ADVICE)


def test_from_the_second_cycle_on_what_replies_earned_tells_which_children_promise_most_and_how_members_stand(
    tiny_base, tiny_settings, tmp_path, monkeypatch
):
    asked = []

    def told(model, evidence, parent, children):
        asked.append((evidence, len(children)))
        return promises(model, evidence, parent, children)

    def evolved(*args, **options):
        standings.append(options["standings"])
        return evolve(*args, **options)

    standings = []
    monkeypatch.setattr(loop_module, "promises", told)
    monkeypatch.setattr(loop_module, "evolve", evolved)
    plan = plan_of(tasks=("say-e", "say-o"), steps=6, switch_steps=4)
    problems = Problems(plan, lambda name: SayEven(name, "e"))
    with folders.opened(tmp_path / "run", plan) as run, opened(tiny_base, plan, tiny_settings) as policy:
        loop = looped(run, tiny_base, tiny_settings, policy, problems)
        loop._cycle()
        assert asked == []
        loop._cycle()
        assert asked
        assert all(2 <= children <= SCREENED and evidence.groups for evidence, children in asked)
        asked.clear()
        # Another task: what replies to the old one earned tells nothing of it.
        loop._cycle()
        assert asked == []
    assert [bool(of_cycle) for of_cycle in standings] == [False, True, False]
    # Of the members' replies in the steps those count that were drawn there.
    assert 0 < sum(of.replies for of in standings[1]) < 2 * SMALL["batch_problems"] * SMALL["rollouts"]


class Counting(SayTheLetter):
    """Counts how often it is asked for a reward."""

    asked: list = []

    def check(self, reply):
        self.asked.append(reply)
        return super().check(reply)


def test_distillation_looks_at_no_reward(go, tmp_path):
    Counting.asked.clear()
    result = go(plan_of(arm="distill"), find=lambda name: Counting(name, "e"))
    steps = records(tmp_path / "run", "step")
    assert [s["reward"] for s in steps] == [None] * SMALL["steps"]
    cycles = records(tmp_path / "run", "cycle")
    tests = (len(cycles) + len(result["two_by_two"]) + 1) * SMALL["test_problems"]
    # Evolution and tests ask for rewards; the steps' own replies are never shown to the verifier.
    assert len(Counting.asked) == sum(c["evolution_samples"] for c in cycles) + tests
    assert all(c["context_tokens"] == 0 for c in cycles)


def test_distillation_brings_the_model_nearer_to_the_base_with_the_context(tiny_base, tiny_settings, tmp_path):
    plan = plan_of(arm="distill", steps=12, learning_rate=1e-2, rollouts=8)
    with folders.opened(tmp_path / "d", plan) as run, opened(tiny_base, plan, tiny_settings) as policy:
        loop = looped(run, tiny_base, tiny_settings, policy, Problems(plan, find))
        teacher = loop.state.population[0].model_copy(update={"guidelines": (ADVICE,) * 3})
        steps = []
        for step in range(plan.steps):
            loop._move(population=(teacher,))
            steps.append(loop._step(step).kl_nats)
    assert steps[-1] < 0.7 * steps[0]


@pytest.mark.parametrize(
    ("arm", "dies"), [("fst", "after a measurement"), ("fst", "in a step"), ("distill", "in a step")]
)
def test_a_killed_run_ends_as_one_that_was_not(go, tmp_path, arm, dies):
    plan = plan_of(arm=arm, steps=4, evolution_calls=6)
    whole = go(plan, "whole")

    def on_point(state, record):
        if dies == "after a measurement" and state.step == 4:
            raise Killed

    def on_step(step):
        if dies == "in a step" and step == 3:
            raise Killed

    with pytest.raises(Killed):
        go(plan, "killed", on_point=on_point, on_step=on_step)
    killed = go(plan, "killed")
    for result in (whole, killed):
        del result["seconds"]
    assert killed == whole
    for file in (CURVE, REPLIES):
        assert (tmp_path / "killed" / file).read_text() == (tmp_path / "whole" / file).read_text()


def test_a_run_in_slices_of_a_cycle_ends_as_a_whole_one(tiny_base, tiny_settings, tmp_path):
    plan = plan_of()
    states = []
    for name, cycles in (("whole", plan.cycles), ("sliced", 1)):
        done = False
        while not done:
            with folders.opened(tmp_path / name, plan) as run, opened(tiny_base, plan, tiny_settings) as policy:
                loop = looped(run, tiny_base, tiny_settings, policy, Problems(plan, find))
                until = loop.state.step + cycles * plan.steps_per_cycle
                done = loop.go(enough=lambda loop=loop, until=until: loop.state.step >= until)
                states.append((name, loop.state.step, loop.state.samples, loop.state.population))
    assert [step for name, step, *_ in states if name == "sliced"] == [2, 4]
    assert states[0][1:] == states[-1][1:]
    assert (tmp_path / "sliced" / CURVE).read_text() == (tmp_path / "whole" / CURVE).read_text()


@pytest.fixture
def die(tmp_path):
    """One more worker is at the run of a plan and never comes to an end of its attempt; what it does before."""
    left = []

    def at(plan, do=lambda run: None):
        with folders.opened(tmp_path / "run", plan) as run:
            left.append(run.attempt(most=4))
            left[-1].__enter__()
            do(run)

    return at


def test_a_run_that_kills_its_workers_is_given_up_and_may_be_sent_again(go, die):
    plan = plan_of(arm="rl")
    for _ in range(4):
        die(plan)
    with pytest.raises(JobFailed, match="given up after 4 workers died"):
        go(plan, most_attempts=4)
    assert go(plan, most_attempts=4)["steps"] == plan.steps


def test_workers_that_got_on_before_they_died_or_ended_by_themselves_are_not_counted(go, die):
    plan = plan_of(arm="rl")
    for _ in range(6):
        assert go(plan, limit_seconds=0.0, most_attempts=4) is None
    for number in range(6):
        die(plan, lambda run, number=number: run.save(State(), {}) if number == 2 else None)
    with pytest.raises(JobFailed, match="given up after 4 workers died"):
        go(plan, most_attempts=4)


def test_a_run_that_is_out_of_time_says_so_and_goes_on_later(go):
    plan = plan_of(arm="rl")
    assert go(plan, limit_seconds=0.0) is None
    assert go(plan)["steps"] == plan.steps


def test_a_finished_run_is_not_done_again(go, tiny_settings, tmp_path):
    plan = plan_of(arm="rl")
    first = go(plan)

    def no_base():
        raise AssertionError("there is nothing to do")

    again = train(plan, tmp_path / "run", base=no_base, settings=tiny_settings, find=find)
    assert again == json.loads(json.dumps(first))


def test_a_folder_of_another_run_is_refused_and_the_difference_named(go):
    go(plan_of(arm="rl"))
    with pytest.raises(Conflict, match=r"seed 0 \(not 1\)"):
        go(plan_of(arm="rl", seed=1))


@pytest.mark.parametrize("change", ["lora_alpha", "base_sha256"])
def test_a_run_goes_on_only_with_the_model_and_the_adapters_that_it_began_with(
    go, tiny_base, tiny_settings, tmp_path, change
):
    plan = plan_of(arm="rl")
    assert go(plan, limit_seconds=0.0) is None
    other = {
        "lora_alpha": {"settings": tiny_settings.model_copy(update={"lora_alpha": 16})},
        "base_sha256": {"base": lambda: dataclasses.replace(tiny_base, sha256="1" * 64)},
    }[change]
    with pytest.raises(InvalidRequest, match=rf"holds a run with {change} \w+ \(not \w+\): set"):
        go(plan, **other)
    with pytest.raises(InvalidRequest, match=rf"of another model, rank or kind: {change}"):
        go(plan_of(arm="rl", start=str(tmp_path / "run")), "next", **other)
    assert go(plan)["steps"] == plan.steps


def test_a_folder_that_does_not_tell_its_ground_is_gone_on_with_and_tells_it_then(go, tmp_path):
    plan = plan_of(arm="rl")
    assert go(plan, limit_seconds=0.0) is None
    ground = (tmp_path / "run" / GROUND).read_text()
    (tmp_path / "run" / GROUND).unlink()
    assert go(plan)["steps"] == plan.steps
    assert (tmp_path / "run" / GROUND).read_text() == ground


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(go, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(Conflict, match=r"thesis\.txt"):
        go(plan_of(), "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_processes_don_t_work_in_one_folder(go, tmp_path):
    plan = plan_of()
    with folders.opened(tmp_path / "run", plan), pytest.raises(Conflict, match="Another process"):
        go(plan)


def test_an_unknown_task_is_refused_before_a_folder_is_made(go, tmp_path):
    with pytest.raises(InvalidRequest, match="no task 'nope'"):
        go(plan_of(tasks=("nope",)))
    assert not (tmp_path / "run" / PLAN).exists()


def test_a_run_starts_from_the_weights_of_another(go, tmp_path):
    go(plan_of(arm="rl", learning_rate=1e-2), "first")
    last = records(tmp_path / "first", "cycle")[-1]
    go(plan_of(arm="rl", start=str(tmp_path / "first")), "second")
    assert records(tmp_path / "second", "cycle")[0]["kl_nats"] == pytest.approx(last["kl_nats"], rel=1e-4)
    with pytest.raises(InvalidRequest, match="no run with a checkpoint"):
        go(plan_of(arm="rl", start=str(tmp_path / "nowhere")), "third")
    with pytest.raises(InvalidRequest, match="of another model"):
        go(plan_of(arm="rl", weights="full", start=str(tmp_path / "first")), "fourth")


def test_tasks_switch_on_the_fly_and_the_population_goes_along(go, tmp_path):
    plan = plan_of(tasks=("say-e", "say-o"), switch_steps=2)
    go(plan)
    cycles = records(tmp_path / "run", "cycle")
    assert [c["task"] for c in cycles] == ["say-e", "say-e", "say-o"]
    problems = Problems(plan, find)
    assert {p.id.split("/")[0] for step in (2, 3) for p in problems.minibatch(step)} == {"say-o"}


def test_an_epoch_gives_every_problem_once_and_all_arms_the_same(tmp_path):
    plan = plan_of(batch_problems=4)
    problems = Problems(plan, find)
    epoch = [p.id for step in range(4) for p in problems.minibatch(step)]
    assert len(set(epoch)) == plan.train_problems
    assert [p.id for p in Problems(plan_of(batch_problems=4, arm="rl"), find).minibatch(2)] == epoch[8:12]
    assert not set(epoch) & {p.id for p in problems.test("say-e")}


def test_a_loss_that_is_not_finite_names_the_step(go):
    with pytest.raises(JobFailed, match=r"at step [23]: try a lower --learning-rate"):
        go(plan_of(arm="rl", learning_rate=1e30, warmup_steps=0))
