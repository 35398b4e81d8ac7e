"""`python -m tests.benchmarks.rounds`: consolidation after consolidation of one user on the default model, without the service.

In each round the user corrects replies of the base to new questions. They want two things of every reply: a closing, which stays, and an
opening, of which they want the opposite from the middle on. After each round the version in use is looked at: how far it is from the base,
what it makes of three wishes on questions that nobody spoke of (the old opening, the new one, the closing), and what it says to some
others, alone and with the user's context. All rounds' figures go into a table, a picture and one line of JSON.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console

import workers.consolidation  # noqa: F401  tells OpenMP how to wait, before torch is imported
from service.domain.context import render
from service.domain.feedback import BASE, FeedbackEvent, Message
from service.domain.fold import fold
from service.domain.slow_weights import Scope, TrainReport
from service.errors import FastslowError
from service.settings import Settings
from tests.benchmarks.learning.preferences import PREFERENCES, Draft, Preference, opposite, write
from tests.benchmarks.learning.prompts import Prompt, load
from tests.benchmarks.rounds_report import Looked, draw, line, table, told
from tests.benchmarks.slow.teaching import context_of
from tests.benchmarks.terminal import terminal
from tests.consolidation_data import CORRECTIONS, correction
from workers.consolidation.base import Base, load_base
from workers.consolidation.job import consolidate
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.rows import Row
from workers.consolidation.sampling import sample
from workers.consolidation.scoring import reply_logprobs
from workers.consolidation.work import Outcome, Progress, UserLog, Work

USER = "ann"
OLD, STAYS = PREFERENCES["ahoy"], PREFERENCES["cheers"]
NEW = opposite(OLD)
ROUNDS = 10
FIRST_CORRECTIONS, EACH_CORRECTIONS = 8, 5
JUDGED = 10
"""Test questions that margins are measured on; the others are answered."""
REPLY_TOKENS = 48


@dataclass
class State:
    """What lies between two rounds: the user's log and the version in use."""

    events: list[FeedbackEvent]
    version: str = BASE
    watermark: int = 0
    report: TrainReport | None = None
    """Of the version in use."""

    def log(self) -> UserLog:
        absorbed = frozenset(self.report.absorbed if self.report else ())
        return UserLog.of(self.events, watermark=self.watermark, fast_weights=fold(self.events), absorbed=absorbed)


@dataclass(frozen=True)
class Bench:
    """The model and the questions with the base's greedy replies to them."""

    base: Base
    settings: Settings
    taught: list[Prompt]
    judged: list[Prompt]
    asked: list[Prompt]
    said: dict[str, str]
    """The base's reply to each question that is taught or judged."""

    @classmethod
    def made(cls, settings: Settings, *, corrections: int) -> "Bench":
        base = load_base(settings)
        _, test = load()
        taught = to_teach()
        if corrections > len(taught):
            raise SystemExit(
                f"{corrections} corrections are needed, and there are questions for {len(taught)}: fewer --rounds"
            )
        judged, asked = list(test[:JUDGED]), list(test[JUDGED:])
        questions = [prompt.ask for prompt in (*taught[:corrections], *judged)]
        replies = sample(base, [_alone(base, ask) for ask in questions], max_new_tokens=REPLY_TOKENS)
        said = {ask: _text(base, reply) for ask, reply in zip(questions, replies, strict=True)}
        return cls(base, settings, taught, judged, asked, said)

    def corrected(self, first: int, count: int, wanted: Sequence[Preference]) -> list[FeedbackEvent]:
        """The user's corrections of the base's replies to the next questions."""
        return [
            correction(USER, number + 1, p.ask, _wished(p, wanted), reply=self.said[p.ask])
            for number, p in enumerate(self.taught[first : first + count], start=first)
        ]


def to_teach() -> list[Prompt]:
    """All questions that a user may correct replies to."""
    train, test = load()
    more = [Prompt("", ask, wanted.replace(", indeed", ""), "") for ask, wanted in CORRECTIONS.items()]
    known = {prompt.ask for prompt in (*train, *test)}
    return [*train, *(prompt for prompt in more if prompt.ask not in known)]


def corrections_of(rounds: int) -> int:
    """How many corrections so many rounds take."""
    return FIRST_CORRECTIONS + (rounds - 1) * EACH_CORRECTIONS


def one_round(bench: Bench, state: State, number: int, *, console: Console) -> Outcome:
    """Consolidate what is new; the state goes on to the new version if it is promoted.

    Raises:
        FastslowError: the consolidation failed.
    """
    work = Work(
        tenant="bench",
        scope=Scope(kind="user", name=USER),
        job=f"round-{number}",
        number=number,
        parent=state.version,
        created=float(number),
        users={USER: state.log()},
    )
    with console.status(f"round {number}") as status:

        def show(_: str, progress: Progress) -> None:
            status.update(f"round {number}: {progress.stage} {progress.step or ''}")

        [end] = consolidate([work], base=bench.base, settings=bench.settings, progress=show).values()
    if not isinstance(end, Outcome):
        raise end
    if end.version is not None:
        state.version, state.report = end.version.name, end.report
        state.watermark = len(state.events)
    return end


def look(bench: Bench, state: State, wanted: Preference) -> Looked:
    """Measure what serves now, which is the base where nothing was promoted yet."""
    base, settings = bench.base, bench.settings
    with LoraStack.attached(base, Shape.of(settings)) as stack:
        if state.version != BASE:
            stack.load(0, settings.adapter_store_dir / state.version)
        old, new, stays = _margins(bench, stack)
        alone = [_alone(base, p.ask) for p in bench.asked]
        shown = [_with_context(bench, state, p.ask) for p in bench.asked]
        with stack.on(0):
            replies = [_text(base, reply) for reply in sample(base, alone + shown, max_new_tokens=REPLY_TOKENS)]
    without, with_it = replies[: len(alone)], replies[len(alone) :]
    return Looked(
        kl_text_nats=state.report.kl_text.mean_nats if state.report else 0.0,
        kl_chat_nats=state.report.kl_chat.mean_nats if state.report else 0.0,
        margin_old=old,
        margin_new=new,
        margin_stays=stays,
        alone_wanted=_share(wanted, without),
        alone_stays=_share(STAYS, without),
        context_wanted=_share(wanted, with_it),
        context_stays=_share(STAYS, with_it),
    )


def _margins(bench: Bench, stack: LoraStack) -> tuple[float, float, float]:
    base = bench.base
    rows = []
    for p in bench.judged:
        texts = [_wished(p, wished) for wished in ((OLD,), (NEW,), (STAYS,))] + [bench.said[p.ask]]
        # The base's own reply is mostly cut off, so its end is not part of it.
        replies = [base.encode_reply(text, ended=n < 3) for n, text in enumerate(texts)]
        rows.append(Row(_alone(base, p.ask), tuple(replies)))
    found = [means.tolist() for means in reply_logprobs(base, rows, stack=stack, slots=[0] * len(rows))]
    old, new, stays = (fmean(means[n] - means[3] for means in found) for n in range(3))
    return old, new, stays


def _wished(prompt: Prompt, wanted: Sequence[Preference]) -> str:
    return write(wanted, Draft((prompt.answer, prompt.more), prompt.topic))


def _alone(base: Base, ask: str) -> tuple[int, ...]:
    return base.encode_chat([Message(role="user", content=ask)])


def _with_context(bench: Bench, state: State, ask: str) -> tuple[int, ...]:
    """The prompt as it would be served."""
    log = state.log()
    context = context_of(
        bench.base, log.fast_weights, budget_tokens=bench.settings.most_context_tokens, absorbed=log.absorbed
    )
    return bench.base.encode_chat(render(context, [Message(role="user", content=ask)]))


def _text(base: Base, reply: Sequence[int]) -> str:
    return base.tokenizer.decode(reply, skip_special_tokens=True)


def _share(wanted: Preference, replies: Sequence[str]) -> float:
    return fmean(float(wanted.check(reply)) for reply in replies)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--change", type=int, default=5, help="the round from which on the other opening is wanted")
    parser.add_argument("--steps", type=int, default=8, help="of each training")
    parser.add_argument(
        "--anchors", type=int, default=24, help="of each kind, half of the default: a round takes some minutes"
    )
    parser.add_argument("--model", default="", help="folder or hub id; default: the default model")
    parser.add_argument(
        "--folder", type=Path, default=Path("data/bench-rounds"), help="of adapters, anchors and the picture"
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    console = terminal()
    changes = {"model": options.model} if options.model else {"model": Settings().model_path}
    settings = Settings(
        _env_file=None,
        data_dir=options.folder,
        # Each run's versions are its own: names are never written twice.
        adapter_store=str(options.folder / f"adapters-{time.time():.0f}"),
        anchors=options.anchors,
        train_steps=options.steps,
        user_min_feedbacks=FIRST_CORRECTIONS,
        **changes,
    )
    began = time.monotonic()
    try:
        bench = Bench.made(settings, corrections=corrections_of(options.rounds))
        state, looked, ends = State([]), [], []
        for number in range(1, options.rounds + 1):
            wanted = OLD if number < options.change else NEW
            count = EACH_CORRECTIONS if state.events else FIRST_CORRECTIONS
            state.events += bench.corrected(len(state.events), count, (wanted, STAYS))
            ends.append(one_round(bench, state, number, console=console))
            looked.append(look(bench, state, wanted))
            console.print(told(number, looked[-1], ends[-1]), highlight=False)
    except FastslowError as failed:
        console.print(failed.message, highlight=False)
        return 1
    console.print(table(looked, ends))
    budgets = {"text": settings.kl_text_budget_nats, "chat": settings.kl_chat_budget_nats}
    draw(looked, change=options.change, budgets=budgets, path=options.folder / "rounds.png")
    console.print(f"picture: {options.folder / 'rounds.png'}", highlight=False)
    seconds = time.monotonic() - began
    print(line(looked, ends, change=options.change, device=bench.base.device.type, seconds=seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
