"""The outcomes for people, and as the last line of a run."""

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from tests.benchmarks.stats import json_line
from tests.faults.trial import Outcome, Pace


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each fault; `less` are chats that said that they were served with less than was due."""
    out = Table(padding=(0, 0), title="Seconds until all was well again, and what clients saw")
    out.add_column("fault", no_wrap=True)
    for column in ("clients s", "workers s", "acked", "lost", "crossed", "failed", "retried", "less"):
        out.add_column(column, justify="right", no_wrap=True)
    for one in outcomes:
        out.add_row(
            one.name,
            _seconds(one.recover_s),
            _seconds(one.work_s),
            *map(str, (one.acknowledged, one.lost, one.crossed, one.client_errors)),
            *(str(counts.total()) for counts in (one.attempts, one.degraded)),
        )
    return out


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The same for docs/faults.md."""
    lines = ["| fault | clients | workers | acknowledged | lost | crossed | failed | tried again | served with less |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for one in outcomes:
        cells = [one.name, _seconds(one.recover_s), _seconds(one.work_s), one.acknowledged, one.lost, one.crossed]
        failed = f"{one.client_errors} ({_told(one.errors)})" if one.errors else "0"
        cells += [failed, _told(one.attempts) or "-", _told(one.degraded) or "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def result(outcomes: Sequence[Outcome], pace: Pace) -> str:
    """The last line."""
    headline = {
        "acknowledged": sum(one.acknowledged for one in outcomes),
        "lost": sum(one.lost for one in outcomes),
        "crossed": sum(one.crossed for one in outcomes),
    }
    faults = {
        one.name: {
            "recover_s": one.recover_s,
            "client_errors": one.client_errors,
            "work_s": one.work_s,
            "answered": one.answered,
            "behind": one.behind,
            "errors": one.errors,
            "attempts": one.attempts,
            "degraded": one.degraded,
            "personal": one.personal,
        }
        for one in outcomes
    }
    return json_line("faults", headline, {"faults": faults, "fault_seconds": pace.fault_seconds, "users": pace.users})


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())
