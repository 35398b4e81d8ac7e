"""`python -m tests.benchmarks.prefix`: how much of a prompt vLLM finds in its prefix cache after each feedback, by the context's layout.

One user teaches a real gateway over a real vLLM with comments, corrections and ratings. After each feedback some questions are asked
three times: by the service; and with the very same items in two naive layouts, sent as plain messages of users of their own, whose cache
nobody shares: exemplars before guidelines, ordered by likeness to the question or newest first.
"""

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.domain.context import GUIDELINES_HEADING
from service.keys import ensure_keys
from service.settings import Settings
from service.store import open_store
from tests.benchmarks import processes, stored
from tests.benchmarks.material import Caller
from tests.benchmarks.mock_vllm import MODEL
from tests.benchmarks.stats import json_line
from tests.benchmarks.terminal import terminal
from tests.benchmarks.vectors import embed
from tests.e2e.tour import LESSONS

ASKED = (
    "Why is the sky blue?",
    "What is a verb?",
    "How do fish breathe?",
    "What is a bridge for?",
    "Who invented the wheel?",
    "How is glass made?",
    "What does a judge do?",
    "Why do cats purr?",
    "How far away is the sun?",
    "What is a comet?",
    "How do trees drink?",
    "What is the use of money?",
)
CHATS = 4
"""After each feedback, each with another question, as in life; a question comes again after three feedbacks."""
COMMENTS = (
    "One short sentence.",
    "End with Cheers!",
    "Use plain words that a child knows.",
    "Never apologise.",
    "Don't begin with a question.",
    "Give one example from daily life.",
)
# Of the tour's; the figures in docs were measured with these.
TOUR_LESSONS = 16
MORE_LESSONS = {
    "What is snow?": "Snow is frozen water that falls in flakes. Cheers!",
    "What is a fever?": "A fever is heat that helps the body fight illness. Cheers!",
    "How does soap work?": "Soap holds on to fat and to water and carries dirt away. Cheers!",
    "What is a sonata?": "A sonata is a piece of music for one or two players. Cheers!",
    "Why do leaves fall?": "Trees drop their leaves to save water in winter. Cheers!",
    "What is a vote?": "A vote is a choice that counts with all the others. Cheers!",
    "What is rust?": "Rust is iron that has joined with oxygen from damp air. Cheers!",
    "How does a kite fly?": "The wind pushes it up while the string holds it. Cheers!",
    "What is a budget?": "A budget is a plan for the money one has. Cheers!",
    "What is yeast?": "Yeast is a tiny fungus that turns sugar into gas. Cheers!",
    "Why is the sea salty?": "Rivers bring it salt from rocks and only water leaves. Cheers!",
    "What is an echo?": "An echo is sound that comes back from a wall. Cheers!",
    "How do magnets work?": "Tiny currents in them pull the same way. Cheers!",
    "What is a harbour?": "A harbour is water where ships lie safe. Cheers!",
}
OURS, BY_LIKENESS, NEWEST_FIRST = "ours", "by likeness", "newest first"

Messages = list[dict[str, str]]
Turns = list[Messages]


@dataclass
class Feedback:
    """One feedback, and what vLLM then found in its cache, by layout."""

    kind: str
    asked: dict[str, list["Asked"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    prompt_tokens: int
    cached_tokens: int
    seconds: float


def lessons() -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions and what the user says of the replies: corrections, every third with a rating; at first comments in between."""
    comments = iter(COMMENTS)
    for n, (question, wanted) in enumerate((dict(list(LESSONS.items())[:TOUR_LESSONS]) | MORE_LESSONS).items()):
        if n % 3 == 0 and (comment := next(comments, None)):
            yield question, {"comment": comment}
        yield question, {"correction": wanted} | ({"rating": -0.5} if n % 3 == 2 else {})


class Asker:
    """Asks the gateway and keeps what vLLM says of its cache."""

    def __init__(self, caller: Caller, redis_url: str) -> None:
        self._caller = caller
        self._settings = Settings(redis_url=redis_url)

    def chat(self, user: str, messages: Messages, **more: object) -> dict[str, Any]:
        body = {"model": MODEL, "messages": messages, "max_tokens": 1, "temperature": 0, **more}
        reply, headers = self._caller.call("POST", "/v1/chat/completions", user, body)
        if "x-fastslow-degraded" in headers:
            raise RuntimeError(f"degraded: {headers['x-fastslow-degraded']}")
        return reply

    def asked(self, user: str, messages: Messages, **more: object) -> Asked:
        began = time.perf_counter()
        usage = self.chat(user, messages, **more)["usage"]
        seconds = time.perf_counter() - began
        return Asked(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], seconds)

    def teach(self, question: str, said: dict[str, Any]) -> None:
        reply = self.chat("ada", [{"role": "user", "content": question}])
        self._caller.call("POST", "/v1/feedback", "ada", {"interaction_id": reply["id"], **said})
        asyncio.run(self._embed())

    async def _embed(self) -> None:
        store = open_store(self._settings)
        await embed(store, self._settings, tenant=stored.TENANT, user="ada")
        await store.close()

    def ask_all(self, feedback: Feedback, questions: Sequence[str]) -> None:
        """Ask the questions in every layout."""
        for question in questions:
            plain = [{"role": "user", "content": question}]
            rendered = self.chat("ada", plain, personalization={"dry_run": True})["messages"]
            feedback.asked.setdefault(OURS, []).append(self.asked("ada", plain))
            for name, order in NAIVE.items():
                found = self.asked(name, naive(rendered, order), personalization=False)
                feedback.asked.setdefault(name, []).append(found)


def naive(rendered: Messages, order: Callable[[Turns, str], Turns]) -> Messages:
    """The items of a rendered context in another layout: exemplars in this order, then the guidelines newest first, then the question."""
    *context, question = rendered
    system = [m for m in context if m["role"] == "system"]
    turns = [m for m in context if m["role"] != "system"]
    exemplars = [turns[n : n + 2] for n in range(0, len(turns), 2)]
    guidelines = [line for m in system for line in m["content"].split("\n") if line.startswith("- ")]
    told = [{"role": "system", "content": "\n".join([GUIDELINES_HEADING, *reversed(guidelines)])}] if guidelines else []
    return [*(m for turn in order(exemplars, question["content"]) for m in turn), *told, question]


def by_likeness(exemplars: Turns, question: str) -> Turns:
    """Least like the question first, by the words that they share."""
    words = set(question.lower().split())
    return sorted(exemplars, key=lambda turn: len(words & set(turn[0]["content"].lower().split())))


NAIVE: dict[str, Callable[[Turns, str], Turns]] = {
    BY_LIKENESS: by_likeness,
    NEWEST_FIRST: lambda exemplars, _: exemplars[::-1],
}


def share(asked: list[Asked]) -> float:
    """Of the prompts' tokens, those that were served from the cache."""
    return sum(a.cached_tokens for a in asked) / sum(a.prompt_tokens for a in asked)


def shares(feedbacks: list[Feedback], layout: str) -> dict[str, float]:
    """Over all chats; over the first after each feedback, where the layout decides alone; and a chat's time, here of one token."""
    found = [f.asked[layout] for f in feedbacks]
    return {
        "all": share([a for asked in found for a in asked]),
        "first": share([asked[0] for asked in found]),
        "first_p50_ms": median(asked[0].seconds for asked in found) * 1000,
    }


def table(feedbacks: list[Feedback]) -> Table:
    out = Table(
        title="Share of prompt tokens from vLLM's cache: first chat after the feedback / all four", padding=(0, 1)
    )
    for column in ("", "feedback", "prompt tokens", OURS, BY_LIKENESS, NEWEST_FIRST):
        out.add_column(column, justify="right", no_wrap=True)
    for n, feedback in enumerate(feedbacks, 1):
        figures = [f"{share(a[:1]):.2f} / {share(a):.2f}" for a in feedback.asked.values()]
        out.add_row(str(n), feedback.kind, str(feedback.asked[OURS][0].prompt_tokens), *figures)
    return out


@contextmanager
def running(folder: Path) -> Iterator[Asker]:
    """vLLM, Valkey and a gateway, on whichever cores."""
    cores = frozenset(os.sched_getaffinity(0))
    with ExitStack() as stack:
        for name in ("vllm", "gateway"):
            (folder / name).mkdir()
        keys = ensure_keys(folder / "gateway" / "keys.json")
        vllm = stack.enter_context(processes.vllm(folder / "vllm", cores=cores))
        server = stack.enter_context(processes.valkey(folder / "valkey"))
        gateway = stack.enter_context(
            processes.gateway(folder / "gateway", cores=cores, redis_port=server.port, vllm_port=vllm.port)
        )
        caller = Caller(gateway.port, keys.first("client"), timeout_seconds=120)
        yield Asker(caller, f"redis://127.0.0.1:{server.port}/0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--feedbacks", type=int, default=36, help="at most 36")
    options = parser.parse_args()
    console = terminal()
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeRemainingColumn())
    feedbacks: list[Feedback] = []
    questions = itertools.cycle(ASKED)
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastslow-bench-")))
        console.print("starting vLLM: a minute, or some on a busy machine")
        asker = stack.enter_context(running(folder))
        with Progress(*columns, console=console) as progress:
            for question, said in progress.track(list(lessons())[: options.feedbacks], description="teaching, asking"):
                asker.teach(question, said)
                feedbacks.append(Feedback(" and ".join(said)))
                asker.ask_all(feedbacks[-1], [next(questions) for _ in range(CHATS)])
    console.print(table(feedbacks))
    ours, naive_ = shares(feedbacks, OURS), shares(feedbacks, BY_LIKENESS)
    headline = {"cached_share": ours["all"], "cached_share_naive": naive_["all"]}
    details = {
        "feedbacks": len(feedbacks),
        "prompt_tokens_at_end": feedbacks[-1].asked[OURS][0].prompt_tokens,
        **{name.replace(" ", "_"): shares(feedbacks, name) for name in (OURS, BY_LIKENESS, NEWEST_FIRST)},
        "by_feedback": {
            name.replace(" ", "_"): [share(f.asked[name][:1]) for f in feedbacks]
            for name in (OURS, BY_LIKENESS, NEWEST_FIRST)
        },
        "load_average": os.getloadavg()[0],
    }
    print(json_line("prefix", headline, details))


if __name__ == "__main__":
    processes.as_command(main)
