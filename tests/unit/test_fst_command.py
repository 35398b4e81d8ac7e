"""`fastslow fst`: what it says when it can't run, and a run from the command line and from the queue on a tiny model."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.jobs import CONSOLIDATE_QUEUE, FAST_SLOW, celery_app
from service.settings import Settings
from workers.fst import folder as folders
from workers.fst.folder import ATTEMPTS
from workers.fst.plan import checked_plan
from workers.runner import MOST_ATTEMPTS

FEW = {
    "steps": 2,
    "steps_per_cycle": 1,
    "contexts": 2,
    "rollouts": 2,
    "batch_problems": 1,
    "new_tokens": 4,
    "evolution_calls": 2,
    "anchor_problems": 2,
    "train_problems": 4,
    "test_problems": 2,
}
OPTIONS = [text for name, value in FEW.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def fastslow(tiny_model_path, tmp_path):
    """The command, on the tiny model."""
    env = {
        "FASTSLOW_MODEL": str(tiny_model_path),
        "FASTSLOW_DATA_DIR": str(tmp_path / "data"),
        "FASTSLOW_WORKER_DEVICE": "cpu",
        "FASTSLOW_ANCHORS": "8",
        "FASTSLOW_LORA_RANK": "4",
    }

    def run(*arguments, **changes):
        return CliRunner().invoke(app, ["fst", *map(str, arguments)], env={**env, **changes})

    run.env = env
    return run


def test_tasks_are_listed_with_what_they_are_about(fastslow):
    said = fastslow("tasks")
    assert said.exit_code == 0
    assert "star-graph-2x2" in said.stdout
    assert "Find the way" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--task", "nope"), "There is no task 'nope'. Known tasks: star-graph-2x2"),
        (("--task", "star-graph-2x2", "--arm", "magic"), "no arm 'magic': choose one of fst, rl, context, distill"),
        (("--task", "star-graph-2x2", "--rollouts", "9"), "9 rollouts can't be shared out among 4 contexts"),
        (("--task", "star-graph-2x2", "--steps", "0"), "--steps: Input should be greater than or equal to 1"),
        (
            ("--task", "star-graph-2x2", "--rollouts-by", "vllm", "--weights", "full"),
            "vLLM is given adapters, not all weights",
        ),
        (("--task", "star-graph-2x2", "--rollouts-by", "magic"), "--rollouts-by: Input should be 'worker' or 'vllm'"),
        (("--task", "star-graph-2x2", "--switch-steps", "7"), "must be a multiple of steps-per-cycle"),
    ],
)
def test_what_can_t_be_run_is_said_in_one_line(fastslow, tmp_path, arguments, named):
    said = fastslow("run", *arguments, "--out", tmp_path / "out")
    assert said.exit_code == 1
    assert named in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_named(fastslow, tmp_path):
    said = fastslow("run", "--task", "star-graph-2x2", "--out", tmp_path / "out", FASTSLOW_MODEL="/no/such")
    assert said.exit_code == 1
    assert "there is no base model at /no/such" in said.stderr


def test_a_run_ends_with_its_two_by_two_and_goes_on_after_its_time_was_up(fastslow, tmp_path):
    out = tmp_path / "out"
    begun = fastslow("run", "--task", "star-graph-2x2", "--out", out, *OPTIONS, "--limit-seconds", "0")
    assert begun.exit_code == 75, begun.stderr
    assert "goes on in" in begun.stdout
    ended = fastslow("run", "--task", "star-graph-2x2", "--out", out, *OPTIONS)
    assert ended.exit_code == 0, ended.stderr
    assert "slow weights without contexts" in ended.stdout
    assert json.loads((out / "result.json").read_text())["steps"] == FEW["steps"]
    other = fastslow("run", "--task", "star-graph-2x2", "--out", out, *OPTIONS, "--seed", "1")
    assert other.exit_code == 1
    assert "seed 0 (not 1)" in other.stderr


def test_the_queue_of_gpu_nodes_takes_runs():
    routes = celery_app(Settings(_env_file=None)).conf.task_routes
    assert routes[FAST_SLOW] == {"queue": CONSOLIDATE_QUEUE}


# A process of its own imports everything anew: on a busy machine that alone takes a minute.
@pytest.mark.timeout(300)
def test_a_worker_does_a_run_and_gives_up_one_that_killed_too_many_before(fastslow, tmp_path):
    plan = {"tasks": ["star-graph-2x2"], "arm": "rl", **FEW}
    with folders.opened(tmp_path / "out", checked_plan(**plan)):
        (tmp_path / "out" / ATTEMPTS).write_text(str(MOST_ATTEMPTS))
    code = f"""
from service.errors import JobFailed
from workers.tasks import fast_slow
try:
    fast_slow({plan!r}, {str(tmp_path / "out")!r})
except JobFailed as error:
    print(error)
fast_slow({plan!r}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **fastslow.env}, check=True, capture_output=True, text=True
    )
    assert "is given up after 4 workers died" in done.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["samples"] == FEW["steps"] * FEW["batch_problems"] * FEW["rollouts"]
