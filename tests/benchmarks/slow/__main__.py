"""`python -m tests.benchmarks.slow`: what slow weights add, without the service: users teach, are consolidated side by side, and ask.

Users, moods, questions and verdicts are those of the learning benchmark. Here the worker itself replies, and contexts are the fold of
the feedback: no optimizer searches among them. So it needs no vLLM, runs on a GPU too, and says what consolidation does alone. Adapters
are trained, scaled, judged and promoted by the very code of the service; whatever is promoted serves.

    base     no context, no adapter             slow     the adapter alone
    fast     the context                        both     the adapter, with the context that it has not absorbed
    oracle   the true preferences, told by the client
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import workers.consolidation  # noqa: F401  tells OpenMP how to wait, before torch is imported
from service.domain.feedback import FeedbackEvent
from service.domain.fold import fold
from service.domain.policy import Limits
from service.domain.slow_weights import Reject, Scope
from service.errors import FastslowError
from service.settings import Settings
from tests.benchmarks.learning.prompts import load
from tests.benchmarks.learning.users import population
from tests.benchmarks.slow.answers import ARMS, Answers, answered
from tests.benchmarks.slow.teaching import TENANT, Pupil, taught
from tests.benchmarks.stats import json_line
from tests.benchmarks.terminal import terminal
from workers.consolidation.base import Base, load_base
from workers.consolidation.job import consolidate
from workers.consolidation.work import Outcome, UserLog, Work
from workers.consolidation.work import Progress as Stage

PREFERENCES = (1, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=12, help="in pairs of opposites")
    parser.add_argument("--feedbacks", default="20,60", help="of each user; a consolidation after each of these")
    parser.add_argument("--tests", type=int, default=10, help="questions that each arm answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anchors", type=int, default=48, help="of each kind")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="", help="folder or hub id; default: the default model")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds the model and the anchors' cache")
    parser.add_argument(
        "--folder", type=Path, default=Path("data/bench-slow"), help="of feedback, which is given once, and replies"
    )
    return parser.parse_args()


def teach(base: Base, settings: Settings, options: argparse.Namespace, most: int, console: Console) -> list[Pupil]:
    """The users with their feedback: of an earlier run in this folder, else given now."""
    train, _ = load()
    people = population(options.users, PREFERENCES, seed=options.seed)
    file = options.folder / f"feedback-{options.users}-{most}-{options.seed}.json"
    if not file.exists():
        columns = (TextColumn("teaching"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as told:
            bar = told.add_task("", total=most * len(people))
            pupils = taught(
                base,
                people,
                train,
                feedbacks=most,
                budget_tokens=settings.most_context_tokens,
                seed=options.seed,
                on_feedback=lambda given: told.update(bar, completed=given),
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        events = {pupil.person.name: [event.model_dump() for event in pupil.events] for pupil in pupils}
        file.write_text(json.dumps(events))
    given = json.loads(file.read_text())
    found = []
    for person in people:
        events = [FeedbackEvent.model_validate(event) for event in given[person.name]]
        found.append(Pupil(person, iter(()), events, fold(events)))
    return found


def up_to(pupils: Sequence[Pupil], feedbacks: int) -> list[Pupil]:
    """The same users when they had given so many."""
    return [Pupil(p.person, p.asks, p.events[:feedbacks], fold(p.events[:feedbacks])) for p in pupils]


def consolidated(
    base: Base,
    settings: Settings,
    pupils: Sequence[Pupil],
    number: int,
    console: Console,
    *,
    limits: Limits = Limits(),
) -> list[Outcome | None]:
    """How each user's consolidation ended; None where it failed, which is told.

    Args:
        number: of the versions.
        limits: what a candidate is promoted by.
    """
    works = [
        Work(
            tenant=TENANT,
            scope=Scope(kind="user", name=pupil.person.name),
            job=f"{pupil.person.name}-{number}",
            number=number,
            created=float(number),
            users={pupil.person.name: UserLog.of(pupil.events, watermark=0, fast_weights=pupil.state)},
        )
        for pupil in pupils
    ]
    with console.status("consolidating") as status:

        def show(_: str, progress: Stage) -> None:
            status.update(f"consolidating: {progress.stage} {progress.step or ''}")

        ends = consolidate(works, base=base, settings=settings, progress=show, limits=limits)
    found: list[Outcome | None] = []
    for work in works:
        end = ends[work.job]
        if not isinstance(end, Outcome):
            console.print(f"{work.job} failed: {end}", highlight=False, markup=False)
            found.append(None)
            continue
        if isinstance(end.decision, Reject):
            console.print(f"{work.job}: {'; '.join(end.decision.reasons)}", highlight=False, markup=False)
        found.append(end)
    return found


def summary(answers: dict[str, list[Answers]], ends: Sequence[Outcome | None]) -> dict[str, Any]:
    """One point's figures."""
    reports = [end.report for end in ends if end is not None]
    promoted = [end.report for end in ends if end is not None and end.version is not None]
    return {
        **{arm: fmean(one.satisfied for one in answers[arm]) for arm in ARMS},
        "promoted": len(promoted),
        "over_budget": sum(not (r.kl_text.within and r.kl_chat.within) for r in promoted),
        "steps": fmean(r.steps for r in reports) if reports else None,
        "scale": fmean(r.scale for r in promoted) if promoted else None,
        "kl_text_nats": fmean(r.kl_text.mean_nats for r in promoted) if promoted else None,
        "kl_chat_nats": fmean(r.kl_chat.mean_nats for r in promoted) if promoted else None,
        "prompt_tokens_fast": fmean(one.prompt_tokens for one in answers["fast"]),
        "prompt_tokens_both": fmean(one.prompt_tokens for one in answers["both"]),
    }


def table(points: dict[int, dict[str, Any]]) -> Table:
    found = Table(title="Satisfied, the mean over users")
    for name in ("feedbacks", *ARMS, "promoted", "KL chat", "prompt tokens fast / both"):
        found.add_column(name, justify="right")
    for feedbacks, of in points.items():
        kl = "" if of["kl_chat_nats"] is None else f"{of['kl_chat_nats']:.4f}"
        tokens = f"{of['prompt_tokens_fast']:.0f} / {of['prompt_tokens_both']:.0f}"
        found.add_row(str(feedbacks), *(f"{of[arm]:.2f}" for arm in ARMS), str(of["promoted"]), kl, tokens)
    return found


def record(
    folder: Path, feedbacks: int, pupils: Sequence[Pupil], answers: dict[str, list[Answers]], ends: Sequence[Any]
) -> None:
    """Everything that was said and measured, to read."""
    with (folder / f"after-{feedbacks}.jsonl").open("w") as file:
        for n, (pupil, end) in enumerate(zip(pupils, ends, strict=True)):
            line = {
                "user": pupil.person.name,
                "wants": [p.name for p in pupil.person.preferences],
                "satisfied": {arm: answers[arm][n].satisfied for arm in ARMS},
                "replies": {arm: answers[arm][n].replies for arm in ARMS},
                "decision": end.decision.model_dump() if end else None,
                "report": end.report.model_dump() if end else None,
            }
            file.write(json.dumps(line) + "\n")


def main() -> int:
    options = arguments()
    console = terminal()
    points = [int(n) for n in options.feedbacks.split(",")]
    changes = {"model": options.model, "model_name": Path(options.model).name} if options.model else {}
    settings = Settings(
        _env_file=None,
        data_dir=options.data_dir,
        # Each run's versions are its own: names are never written twice.
        adapter_store=str(options.folder / f"adapters-{time.time():.0f}"),
        anchors=options.anchors,
        worker_device=options.device,
        user_min_feedbacks=2,
        **changes,
    )
    train, tests = load()
    found: dict[int, dict[str, Any]] = {}
    try:
        base = load_base(settings)
        pupils = teach(base, settings, options, max(points), console)
        for number, feedbacks in enumerate(points, start=1):
            some = up_to(pupils, feedbacks)
            ends = consolidated(base, settings, some, number, console)
            answers = answered(base, settings, some, ends, train=train, tests=tests[: options.tests], seed=options.seed)
            record(options.folder, feedbacks, some, answers, ends)
            found[feedbacks] = summary(answers, ends)
    except FastslowError as failed:
        console.print(failed.message, highlight=False)
        return 1
    console.print(table(found))
    device = torch.cuda.get_device_name() if base.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    headline: dict[str, Any] = {"device": device, "users": options.users, "tests": options.tests}
    print(json_line("slow", headline, {"feedbacks": {str(n): of for n, of in found.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
