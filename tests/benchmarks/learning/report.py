"""What a run shows: two tables, the replies to read, and the last line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tests.benchmarks.learning import figures
from tests.benchmarks.learning.analysis import Interval, Results, adapters, diagonal_gain
from tests.benchmarks.learning.prompts import Prompt
from tests.benchmarks.stats import json_line

NONE = Interval(0.0, 0.0, 0.0)


def scores(results: Results) -> Table:
    """A row an arm: the share of replies that satisfy at each point, with its interval."""
    out = Table(title="Replies that satisfy, after so many feedbacks per user (95 % over users)")
    out.add_column("arm")
    for point in results.plan.points:
        out.add_column(str(point), justify="right")
    for arm in results.arms:
        curve = results.curve(arm)
        out.add_row(arm, *(shown(curve[point]) if point in curve else "" for point in results.plan.points))
    return out


def shown(interval: Interval) -> str:
    return f"{interval.mean:.2f}\n{interval.low:.2f}-{interval.high:.2f}"


def costs(results: Results) -> Table:
    """A row an arm: what its replies took at the last point."""
    out = Table(title="Per reply, at the last point")
    for column in ("arm", "prompt tokens", "of them cached", "p50 ms", "p95 ms"):
        out.add_column(column, justify="right" if out.columns else "left")
    for arm in results.arms:
        cost = results.cost(arm)
        share, p50, p95 = (cost[name] for name in ("cached_share", "p50_ms", "p95_ms"))
        out.add_row(arm, f"{cost['prompt_tokens']:.0f}", f"{share:.0%}", f"{p50:.0f}", f"{p95:.0f}")
    return out


def adapter_table(results: Results) -> Table:
    """A row a consolidation: how it ended, what its candidate is like, and why it is not served."""
    out = Table(
        title="Consolidations (KL on chat and text anchors in nats per token; held-out margins without context)"
    )
    for column in ("stage", "scope", "ended", "KL chat", "KL text", "margin, base", "candidate", "context", "reasons"):
        out.add_column(column, justify="right" if column[0] in "KmcC" else "left")
    for record in results.records.under("consolidated"):
        _, stage, scope = record["key"]
        # What a reason quotes is not to be read as markup.
        reasons = Text("\n".join(record["reasons"]))
        out.add_row(stage, scope, record["state"], *_measured(record["report"]), reasons)
    return out


def _measured(report: Mapping[str, Any] | None) -> list[str]:
    """A report's cells; empty where it never came to one."""
    if report is None:
        return [""] * 5
    nats = [report["kl_chat"]["mean_nats"], report["kl_text"]["mean_nats"]]
    nats += [report["margins"]["base"], report["margins"]["candidate"]]
    return [f"{value:.3f}" for value in nats] + [
        f"{report['context_tokens_before']} > {report['context_tokens_after']}"
    ]


def result(results: Results, versions: figures.Versions, swap: Interval | None, details: Mapping[str, object]) -> str:
    """The last line. Details beyond the headline: paired differences, costs, who was not settled, what the run adds."""
    curves = {arm: results.curve(arm) for arm in results.arms}
    taken = {arm: results.cost(arm) for arm in results.arms}
    last = results.plan.points[-1]
    headline = {
        "size": results.plan.size,
        "users": len(results.people),
        "arms": {arm: {str(n): i.mean for n, i in curve.items()} for arm, curve in curves.items()},
        "ci": {arm: {str(n): [i.low, i.high] for n, i in curve.items()} for arm, curve in curves.items()},
        "oracle": curves["oracle"][last].mean if "oracle" in curves else 0.0,
        "swap": (swap or NONE).fields(),
        "shuffled": (results.shuffled() or NONE).fields(),
        "context_tokens": {arm: results.context_tokens(arm) for arm in taken},
        **adapters(figures.made(results, versions)),
        **figures.headline(results, versions),
    }
    unsettled = {str(r["key"][1]): len(r["unsettled"]) for r in results.records.under("settled") if r["unsettled"]}
    told = {
        "seed": results.plan.seed,
        "fractions": {arm: {str(n): i.mean for n, i in results.curve(arm, of="fraction").items()} for arm in curves},
        "recovered": recovered(results),
        "over_last_k": {str(n): results.difference("fast", "last-k", n).fields() for n in results.plan.points if n > 0}
        if {"fast", "last-k"} <= curves.keys()
        else {},
        **{figure: {a: c[figure] for a, c in taken.items()} for figure in ("p50_ms", "p95_ms", "cached_share")},
        "unsettled": unsettled,
        **figures.details(results, versions),
    }
    return json_line("learning", headline, {**told, **details})


def recovered(results: Results) -> dict[str, float]:
    """How much of the way from the base to the oracle the fast channel has gone, at each point."""
    curves = {arm: results.curve(arm) for arm in ("base", "fast", "oracle") if arm in results.arms}
    if len(curves) < 3:
        return {}
    way = {n: curves["oracle"][n].mean - curves["base"][n].mean for n in results.plan.points}
    return {str(n): (curves["fast"][n].mean - curves["base"][n].mean) / d for n, d in way.items() if d > 0}


def readable(results: Results, folder: Path) -> Path:
    """Every measured reply, one a line, for people to read."""
    path = folder / "replies.jsonl"
    with path.open("w") as out:
        for record in results.records.under("reply"):
            _, arm, user, point, ask = record["key"]
            line = {
                "arm": arm,
                "user": user,
                "wants": record["wants"],
                "feedbacks": point,
                "ask": ask,
                "reply": record["reply"]["text"],
                "satisfied": record["satisfied"],
                "unmet": record["unmet"],
                "answers": record["answers"],
            }
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def controls(
    results: Results, tests: Sequence[Prompt], taught: Sequence[Prompt]
) -> tuple[list[list[float]], Interval | None]:
    """The user-swap matrix, if the service learnt anything, and what its diagonal gains."""
    if "fast" not in results.arms:
        return [], None
    matrix = results.swap(tests, taught)
    return matrix, diagonal_gain(matrix)


def labels(results: Results) -> list[str]:
    return [f"{p.name} {'+'.join(w.name for w in p.preferences)}" for p in results.people]
