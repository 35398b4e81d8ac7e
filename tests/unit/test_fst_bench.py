"""The benchmark's figures by hand: curves made up so that the ratios are known."""

import json

import pytest

from tests.benchmarks.fst.analysis import Finished, Results
from tests.benchmarks.fst.plan import runs, second_task
from tests.benchmarks.fst.report import line

TWO_BY_TWO = [
    {"weights": "base", "context": False, "reward": 0.1, "kl_nats": 0.0},
    {"weights": "base", "context": True, "reward": 0.3, "kl_nats": 0.0},
    {"weights": "slow", "context": False, "reward": 0.4, "kl_nats": 0.2},
    {"weights": "slow", "context": True, "reward": 0.6, "kl_nats": 0.2},
]


def finished(named, points):
    """A run with points (samples, reward, KL), one a step."""
    curve = [
        {"step": n, "samples": c, "test_reward": r, "kl_nats": kl, "task": named.plan.tasks[0], "kind": "cycle"}
        for n, (c, r, kl) in enumerate(points)
    ]
    return Finished(named, curve, {"two_by_two": TWO_BY_TWO, "seconds": 1.0})


RL = [(0, 0.1, 0.0), (100, 0.1, 0.1), (200, 0.2, 0.2), (300, 0.4, 0.4), (400, 0.5, 0.8)]
FST = [(0, 0.1, 0.0), (100, 0.3, 0.1), (200, 0.5, 0.2), (300, 0.6, 0.3), (400, 0.6, 0.3)]
FLAT = [(0, 0.1, 0.0), (100, 0.1, 0.01), (200, 0.105, 0.02)]


def results(tmp_path, *, rl=RL, fst=FST, seeds=(0,)):
    named = runs("smoke", tmp_path, seeds=seeds, followed=2)
    curves = {"rl": rl, "fst": fst}
    return Results([finished(one, curves.get(one.arm, FLAT)) for one in named])


def test_twice_as_fast_is_a_ratio_of_two(tmp_path):
    assert results(tmp_path).samples_ratio("gym-easy:chain_sum") == pytest.approx(2.0)


def test_kl_is_compared_where_both_have_the_same_reward(tmp_path):
    # Both reach 0.46, nine tenths of the way to rl's peak: rl between samples 300 and 400, fst between 100 and 200.
    assert results(tmp_path).kl_ratio("gym-easy:chain_sum") == pytest.approx(0.18 / 0.64)


def test_where_rl_never_left_its_start_there_is_no_ratio(tmp_path):
    flat = results(tmp_path, rl=FLAT)
    assert flat.samples_ratio("gym-easy:chain_sum") is None
    assert flat.kl_ratio("gym-easy:chain_sum") is None
    assert flat.fit("gym-easy:chain_sum", "rl") is None


def test_where_fst_never_reaches_rl_there_is_no_ratio(tmp_path):
    assert results(tmp_path, rl=FST, fst=RL).samples_ratio("gym-easy:chain_sum") is None


def test_a_run_on_the_second_task_starts_from_the_weights_of_the_first(tmp_path):
    named = {(one.role, one.task, one.arm): one for one in runs("smoke", tmp_path)}
    second = named["second", "gym-easy:chain_sum", "fst"]
    assert second.plan.start == str(named["curve", "gym-easy:chain_sum", "fst"].folder)
    assert second.plan.tasks == ("gym-easy:spell_backward",)
    assert second.plan.arm == "rl"
    assert second_task(("a", "b", "c"), "c") == "a"


def test_what_follows_a_task_is_compared_on_the_task_that_follows(tmp_path):
    after = results(tmp_path).after("gym-easy:chain_sum")
    assert list(after) == ["base", "rl", "fst"]
    assert {point.task for curve in after.values() for point in curve} == {"gym-easy:spell_backward"}
    assert [[point.reward for point in after[start]] for start in ("base", "rl")] == [[r for _, r, _ in RL]] * 2


def test_every_run_comes_after_the_one_it_starts_from(tmp_path):
    done = set()
    for one in runs("full", tmp_path):
        assert not one.plan.start or one.plan.start in done
        done.add(str(one.folder))


def test_the_last_line_has_the_promised_keys(tmp_path):
    said = json.loads(line(results(tmp_path, seeds=(0, 1)), size="smoke"))
    assert list(said) == ["bench", "size", "tasks"]
    assert said["bench"] == "fst"
    task = said["tasks"]["gym-easy:chain_sum"]
    assert list(task) == [
        "samples_ratio",
        "asymptote_fst",
        "asymptote_rl",
        "kl_ratio_at_matched_reward",
        "second_task",
        "two_by_two",
    ]
    assert task["second_task"] == {"base": 0.5, "rl": 0.5, "fst": 0.6}
    assert [cell["reward"] for cell in task["two_by_two"]] == [0.1, 0.3, 0.4, 0.6]
    assert task["asymptote_fst"] == pytest.approx(0.62, abs=0.05)
