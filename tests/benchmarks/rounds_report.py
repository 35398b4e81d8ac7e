"""What ten rounds look like: a line each while they run, a table, a picture, and the benchmark's last line."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from service.domain.slow_weights import Reject
from tests.benchmarks.stats import json_line
from workers.consolidation.work import Outcome

COLOURS = {"text": "#0072B2", "chat": "#D55E00", "old": "#D55E00", "new": "#0072B2", "stays": "#009E73"}


@dataclass(frozen=True)
class Looked:
    """What serves after a round."""

    kl_text_nats: float
    kl_chat_nats: float
    """Mean over judge anchors of the version in use; 0 without one."""
    margin_old: float
    margin_new: float
    margin_stays: float
    """Mean log p(reply as wished) - mean log p(the base's own reply), nats per token, without a context."""
    alone_wanted: float
    alone_stays: float
    context_wanted: float
    context_stays: float
    """Shares of greedy replies with the opening that is wanted now and with the closing, without the user's context and with it."""


def told(number: int, at: Looked, end: Outcome) -> str:
    """One round in a line or two, with every reason if the candidate was rejected."""
    reasons = end.decision.reasons if isinstance(end.decision, Reject) else ()
    return "\n".join(
        (
            f"round {number}: {end.decision.decision}; KL {at.kl_text_nats:.4f} text, {at.kl_chat_nats:.4f} chat; margins "
            f"{at.margin_old:+.2f} old, {at.margin_new:+.2f} new, {at.margin_stays:+.2f} closing; said alone {at.alone_wanted:.1f} "
            f"and {at.alone_stays:.1f}, with the context {at.context_wanted:.1f} and {at.context_stays:.1f}",
            *(f"  {reason}" for reason in reasons),
        )
    )


def table(looked: Sequence[Looked], ends: Sequence[Outcome]) -> Table:
    found = Table(title="What serves after each round (margins in nats per token; shares alone / with the context)")
    for name in (
        "round",
        "KL text",
        "KL chat",
        "old",
        "new",
        "closing",
        "opening said",
        "closing said",
        "scale",
        "ended",
    ):
        found.add_column(name, justify="right" if name != "ended" else "left")
    for number, (at, end) in enumerate(zip(looked, ends, strict=True), start=1):
        found.add_row(
            str(number),
            f"{at.kl_text_nats:.4f}",
            f"{at.kl_chat_nats:.4f}",
            f"{at.margin_old:+.2f}",
            f"{at.margin_new:+.2f}",
            f"{at.margin_stays:+.2f}",
            f"{at.alone_wanted:.1f} / {at.context_wanted:.1f}",
            f"{at.alone_stays:.1f} / {at.context_stays:.1f}",
            f"{end.report.scale:.2f}",
            "promoted" if end.version else "rejected",
        )
    return found


def draw(looked: Sequence[Looked], *, change: int, budgets: dict[str, float], path: Path) -> None:
    """Three panels over rounds: drift in shares of its budget, margins, what is said."""
    x = range(1, len(looked) + 1)
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    drift, margins, said = figure.subplots(1, 3)
    for kind, mark in (("text", "o"), ("chat", "s")):
        shares = [getattr(at, f"kl_{kind}_nats") / budgets[kind] for at in looked]
        drift.plot(x, shares, marker=mark, color=COLOURS[kind], label=f"{kind} (budget {budgets[kind]:g} nats)")
    drift.axhline(1.0, color="#777777", linestyle=":")
    for wish, mark, name in (("old", "s", "old opening"), ("new", "o", "new opening"), ("stays", "^", "closing")):
        values = [getattr(at, f"margin_{wish}") for at in looked]
        margins.plot(x, values, marker=mark, color=COLOURS[wish], label=name)
    for arm, style in (("alone", "-"), ("context", "--")):
        for wish, name, colour in (("wanted", "opening", COLOURS["new"]), ("stays", "closing", COLOURS["stays"])):
            values = [getattr(at, f"{arm}_{wish}") for at in looked]
            said.plot(x, values, style, color=colour, label=f"{name}, {'alone' if arm == 'alone' else 'with context'}")
    labels = (
        "mean KL from the base / budget",
        "margin on the base's reply, nats per token",
        "share of replies that have it",
    )
    for axes, label in zip((drift, margins, said), labels, strict=True):
        axes.axvline(change - 0.5, color="#777777", linewidth=1)
        axes.set(xlabel="round (line: another opening is wanted)", ylabel=label)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def line(looked: Sequence[Looked], ends: Sequence[Outcome], *, change: int, device: str, seconds: float) -> str:
    curves = {name: [getattr(at, name) for at in looked] for name in asdict(looked[0])}
    over = sum(not (end.report.kl_text.within and end.report.kl_chat.within) for end in ends if end.version)
    details = {"change_at": change, "device": device, "seconds": seconds, "load_average": os.getloadavg()[0]}
    return json_line(
        "rounds",
        {"rounds": len(ends), "promoted": sum(end.version is not None for end in ends), "over_budget": over},
        curves | {"scale": [end.report.scale for end in ends]} | details,
    )
