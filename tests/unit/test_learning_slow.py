"""The learning benchmark's arms that wait for adapters: how these are consolidated, and the figures that are read off the records."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service.settings import Settings
from service.tokens import Tokens
from tests.benchmarks.learning import figures
from tests.benchmarks.learning.__main__ import arguments, chosen_plan, stack_settings
from tests.benchmarks.learning.analysis import Results, adapters
from tests.benchmarks.learning.arms import CHANNELS, SLOW
from tests.benchmarks.learning.consolidations import Consolidations
from tests.benchmarks.learning.folder import open_run
from tests.benchmarks.learning.plan import plan
from tests.benchmarks.learning.records import Records
from tests.benchmarks.learning.report import adapter_table
from tests.benchmarks.learning.session import execute
from tests.benchmarks.learning.users import population
from tests.learning_service import SMALL, FakeService, Interrupted, bench, report_of

EVERY = replace(SMALL, arms=("base", "last-k", "fast", "oracle", *SLOW), users=2, tests=1, shuffled=0)
OWN = ["user:t-00a", "user:t-00b"]


def test_only_arms_with_an_adapter_wait_for_a_consolidation() -> None:
    assert SLOW == ("pooled", "slow", "both", "both-small")
    assert all(bool(channel.stage) == channel.adapter for channel in CHANNELS.values())


async def test_each_stage_is_started_together_measured_and_taken_back_before_the_next(
    tmp_path: Path, tokens: Tokens
) -> None:
    service = FakeService()
    told: list[tuple[str, int]] = []
    run = bench(Records(tmp_path / "r.jsonl"), service, tokens, chosen=EVERY, told=told)
    await run.run()
    assert service.batches == [["global"], OWN, OWN]
    back = [f"{scope} back" for scope in OWN]
    assert service.moves[:6] == ["global", "without", "without", "global back", *OWN]
    assert sorted(service.moves[6:10]) == ["with context"] * 2 + ["without"] * 2
    assert service.moves[10:] == [*back, *OWN, *["with context"] * 2, *back]
    assert sum(steps for _, steps in told) == run.steps


async def test_the_second_consolidation_alone_has_the_smaller_budget(tmp_path: Path, tokens: Tokens) -> None:
    service = FakeService()
    await bench(Records(tmp_path / "r.jsonl"), service, tokens, chosen=EVERY).run()
    budgets = [(version["scope"], version["report"]["kl_chat"]["budget_nats"]) for version in service.versions]
    assert budgets == [("global", 0.1), *((scope, 0.1) for scope in OWN), *((scope, 0.02) for scope in OWN)]
    assert service.budgets == {}


@pytest.mark.parametrize("left", range(1, 24))
async def test_a_consolidation_is_not_done_again_when_a_run_goes_on(tmp_path: Path, tokens: Tokens, left: int) -> None:
    chosen = replace(EVERY, arms=("pooled", "slow", "both-small"), points=(1,))
    whole = FakeService()
    await bench(Records(tmp_path / "whole.jsonl"), whole, tokens, chosen=chosen).run()
    service = FakeService(fails_after=whole.steps - left)
    records = Records(tmp_path / "r.jsonl")
    with pytest.raises((ExceptionGroup, Interrupted)):
        await bench(records, service, tokens, chosen=chosen).run()
    records.close()
    service.mend()
    await bench(Records(tmp_path / "r.jsonl"), service, tokens, chosen=chosen).run()
    assert (service.moves, service.batches, service.budgets) == (whole.moves, whole.batches, {})


async def test_a_rejected_consolidation_is_told_and_counted_and_its_user_served_by_what_is_left(
    tmp_path: Path, tokens: Tokens
) -> None:
    notes: list[str] = []
    records = Records(tmp_path / "r.jsonl")
    run = bench(records, FakeService(refuses=[OWN[1]]), tokens, chosen=EVERY, notes=notes)
    await run.run()
    assert notes == [
        "own: user:t-00b was rejected: user:t-00b gains nothing",
        "own-small: user:t-00b was rejected: user:t-00b gains nothing",
    ]
    results = Results(EVERY, run.people, records)
    assert figures.rejected(results) == {"pooled": 0, "slow": 1, "both": 1, "both-small": 1}
    assert {arm: figures.served_by_base(results, arm) for arm in SLOW} == {
        "pooled": 0.0,
        "slow": 0.5,
        "both": 0.5,
        "both-small": 0.5,
    }
    console = Console(record=True, width=200, file=(tmp_path / "shown").open("w"))
    console.print(adapter_table(results))
    shown = console.export_text()
    assert shown.count("rejected") == 2
    assert shown.count("gains nothing") == 2


async def test_who_waits_is_shown_how_far_the_training_is(tmp_path: Path) -> None:
    service: Any = FakeService()
    service.polls = 2
    told: list[tuple[str, int]] = []
    consolidations = Consolidations(
        service,
        Records(tmp_path / "r.jsonl"),
        small_chat_budget_nats=0.03,
        advance=lambda what, steps: told.append((what, steps)),
        note=str,
        poll_seconds=0.0,
    )
    await consolidations.done("own", OWN)
    assert told == [
        ("own 0/2: train 10/30", 0),
        ("own 0/2: train 20/30", 0),
        ("own: trained", 1),
        ("own: trained", 1),
    ]


async def test_the_line_has_every_figure_of_a_run_with_adapters(tmp_path: Path, tokens: Tokens) -> None:
    service: Any = FakeService()
    # Of somebody else on the same service.
    service.versions.append(
        {"name": "other", "scope": "user:x", "job": "other", "in_use": True, "report": report_of(kl_chat_nats=0.9)}
    )
    run = open_run(tmp_path / "run", EVERY, where="here")
    line = json.loads(await execute(run, EVERY, service, concurrency=3, console=Console(quiet=True)))
    assert line["arms"].keys() == line["context_tokens"].keys() == {"base", "last-k", "fast", "oracle", *SLOW}
    assert all(list(line["arms"][arm]) == ["3"] for arm in SLOW)
    assert (line["adapters"], line["over_budget"], line["kl_chat_max_nats"]) == (5, 0, 0.08)
    assert line["rejected"] == dict.fromkeys(SLOW, 0)
    assert line["kl_ratio_at_matched_satisfaction"] == 0.2
    assert line["promoted"]["own-small"] == {
        "versions": 2,
        "kl_text_nats": 0.01,
        "kl_chat_nats": 0.016,
        "context_tokens_before": 200,
        "context_tokens_after": 50,
    }
    assert "both - fast" in line["differences"]


Scores = Mapping[str, Mapping[int, Sequence[float]]]


def measured(path: Path, scores: Scores, *, tokens: Mapping[str, int] | None = None) -> Results:
    """Results of two users with these shares of four satisfying replies, by arm and point."""
    people = population(2, (1,), seed=0)
    records = Records(path / "r.jsonl")
    chosen = plan("smoke", seed=0, arms=tuple(scores), users=2, points=(0, 5, 10, 20))
    for arm, curve in scores.items():
        for point, shares in curve.items():
            for person, share in zip(people, shares, strict=True):
                for n in range(4):
                    reply = {
                        "id": f"{arm} {point} {person.name} {n}",
                        "prompt_tokens": (tokens or {}).get(arm, 10),
                        "adapter": "base",
                    }
                    satisfied = n < share * 4
                    records.put("reply", arm, person.name, point, f"q{n}", satisfied=satisfied, reply=reply | COST)
    return Results(chosen, people, records)


COST = {"cached_tokens": 0, "seconds": 0.01}
BASE_AND_ORACLE: Scores = {"base": {0: [0.0, 0.0]}, "oracle": {0: [1.0, 0.75]}}
FAST: Scores = {"fast": {0: [0.0, 0.0], 5: [0.5, 0.5], 10: [1.0, 0.5], 20: [1.0, 1.0]}}


@pytest.mark.parametrize(
    ("target", "needed"),
    [(0.0, 0.0), (0.25, 2.5), (0.5, 5.0), (0.6, 7.0), (0.75, 10.0), (1.0, 20.0), (1.01, None)],
)
def test_the_feedback_that_a_curve_needs_lies_on_the_line_between_its_points(
    target: float, needed: float | None
) -> None:
    curve = {0: 0.0, 5: 0.5, 10: 0.75, 20: 1.0}
    assert figures.feedbacks_for(curve, target) == (needed if needed is None else pytest.approx(needed))


def test_a_curve_that_falls_again_has_reached_what_it_has_reached() -> None:
    assert figures.feedbacks_for({0: 0.0, 5: 0.8, 10: 0.2, 20: 0.9}, 0.4) == 2.5


@pytest.mark.parametrize(
    ("slow", "ratio"),
    [([0.5, 0.5], 4.0), ([0.25, 0.25], 8.0), ([1.0, 0.5], 2.0), ([1.0, 1.0], 1.0), ([0.0, 0.0], None)],
)
def test_the_feedback_ratio_is_how_much_sooner_fast_is_where_slow_ends(
    tmp_path: Path, slow: list[float], ratio: float | None
) -> None:
    assert figures.feedback_ratio(measured(tmp_path, FAST | {"slow": {20: slow}})) == ratio


def test_no_feedback_ratio_where_fast_never_gets_there_or_nothing_slow_was_measured(tmp_path: Path) -> None:
    short = {"fast": {0: [0.0, 0.0], 20: [0.5, 0.5]}}
    assert figures.feedback_ratio(measured(tmp_path / "a", short | {"slow": {20: [1.0, 1.0]}})) is None
    assert figures.feedback_ratio(measured(tmp_path / "b", short)) is None


def made_in(results: Results, stage: str, kl: Sequence[float]) -> list[dict[str, Any]]:
    """Versions of a stage, one for each user, as far from the base as is said."""
    found = []
    for person, nats in zip(results.people, kl, strict=False):
        job = f"{stage} {person.name}"
        results.records.put("consolidating", stage, f"user:{person.name}", id=job)
        found.append({"job": job, "report": report_of(kl_chat_nats=nats)})
    return found


@pytest.mark.parametrize(
    ("small", "ratio"),
    [([0.5, 0.75], 0.25), ([1.0, 0.5], 0.25), ([0.5, 0.5], None)],
)
def test_kl_is_compared_where_the_smaller_adapter_satisfies_no_less(
    tmp_path: Path, small: list[float], ratio: float | None
) -> None:
    results = measured(tmp_path, {"slow": {20: [0.5, 0.75]}, "both-small": {20: small}})
    versions = [*made_in(results, "own", [0.06, 0.10]), *made_in(results, "own-small", [0.02])]
    found = figures.kl_ratio(results, versions)
    assert found == (ratio if ratio is None else pytest.approx(ratio))


def test_no_kl_ratio_without_versions_on_both_sides(tmp_path: Path) -> None:
    results = measured(tmp_path, {"slow": {20: [0.5, 0.5]}, "both-small": {20: [1.0, 1.0]}})
    assert figures.kl_ratio(results, made_in(results, "own", [0.06, 0.10])) is None
    assert figures.kl_ratio(results, []) is None


def test_context_tokens_are_compared_without_those_of_the_question(tmp_path: Path) -> None:
    scores = BASE_AND_ORACLE | FAST | {"both": {20: [1.0, 0.5]}}
    results = measured(tmp_path, scores, tokens={"base": 10, "fast": 210, "both": 90})
    assert figures.context_tokens_ratio(results) == pytest.approx(0.4)
    assert figures.differences(results)["both", "fast"].mean == -0.25
    bare = measured(tmp_path / "bare", BASE_AND_ORACLE | FAST)
    assert figures.context_tokens_ratio(bare) is None


def test_the_way_to_the_oracle_is_measured_from_the_base(tmp_path: Path) -> None:
    scores = {"base": {0: [0.25, 0.0]}, "oracle": {0: [1.0, 0.75]}, "slow": {20: [0.25, 0.25]}} | FAST
    found = figures.way_to_oracle(measured(tmp_path, scores))
    assert found == {"slow": pytest.approx(1 / 6), "fast": pytest.approx(7 / 6)}
    assert figures.way_to_oracle(measured(tmp_path / "hopeless", {"base": {0: [1, 1]}, "oracle": {0: [1, 1]}})) == {}


def test_a_rejected_pooled_adapter_leaves_everybody_with_the_base(tmp_path: Path) -> None:
    results = measured(tmp_path, {"pooled": {20: [0.0, 0.0]}, "slow": {20: [0.0, 0.0]}})
    results.records.put("consolidated", "pooled", "global", state="failed", reasons=["no"], report=None)
    results.records.put("consolidated", "own", "user:a", state="promoted", reasons=[], report=report_of())
    assert figures.rejected(results) == {"pooled": 2, "slow": 0}


@pytest.mark.parametrize(
    ("report", "over"),
    [
        (report_of(kl_chat_nats=0.1), 0),
        (report_of(kl_chat_nats=0.101), 1),
        (report_of(worst_nats=1.01), 1),
        (report_of(kl_text_nats=0.021), 1),
        (report_of(kl_chat_nats=0.05, chat_budget_nats=0.03), 1),
    ],
)
def test_a_version_is_over_budget_by_its_bound_or_its_worst_anchor(report: dict[str, Any], over: int) -> None:
    found = adapters([{"report": report}, {"report": report_of()}])
    assert (found["adapters"], found["over_budget"]) == (2, over)


def test_slow_adds_its_arms_and_tells_the_stack_what_they_need() -> None:
    slow = chosen_plan(arguments(["--slow", "--small-chat-budget", "0.05"]))
    assert slow.arms == ("base", "last-k", "fast", "oracle", *SLOW)
    assert slow.small_chat_budget_nats == 0.05
    told = stack_settings(slow)
    assert told.keys() <= Settings.model_fields.keys()
    assert told["user_min_feedbacks"] == 15
    # What is measured is the service as it is, not as end-to-end tests have it.
    assert (told["train_steps"], told["anchors"]) == (30, 48)
    assert stack_settings(chosen_plan(arguments(["--size", "smoke"]))) == {}
