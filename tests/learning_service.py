"""A small fake of the service for tests of the learning benchmark, and the parts that a run of it is made of."""

from collections.abc import Sequence
from typing import Any

from service.domain.feedback import BASE
from service.tokens import Tokens
from tests.benchmarks.learning.client import Messages, Reply
from tests.benchmarks.learning.peers import Peer
from tests.benchmarks.learning.plan import Plan, plan
from tests.benchmarks.learning.prompts import load
from tests.benchmarks.learning.records import Records
from tests.benchmarks.learning.run import Bench

TRAIN, TEST = load()
BY_ASK = {prompt.ask: prompt for prompt in (*TRAIN, *TEST)}
SMALL = plan(
    "smoke", seed=0, users=4, tests=3, points=(0, 1, 3), shuffled=2, settle_seconds=0.0, settle_adapters_seconds=0.0
)
CHAT_BUDGET_NATS = 0.1


class Interrupted(Exception):
    """The machine went away."""


class FakeService:
    """Remembers each user's last correction, and replies in its style: all that these tests need of learning.

    An adapter is as far from the base as its budget allows, and says nothing of its own.
    """

    def __init__(self, *, fails_after: int | None = None, refuses: Sequence[str] = ()) -> None:
        self.asked: list[tuple[str | None, str, int]] = []
        self.told: dict[str, dict[str, Any]] = {}
        self.repeats = 0
        self.steps = 0
        self.styles: dict[str, str] = {}
        self.moves: list[str] = []
        """Consolidations and rollbacks, and who was asked of between them."""
        self.batches: list[list[str]] = []
        self.budgets: dict[str, float] = {}
        self.versions: list[dict[str, Any]] = []
        self.unsettled = False
        self.polls = 0
        """How often a job that was asked for was still running."""
        self._left = fails_after
        self._refuses = refuses
        self._jobs: dict[str, dict[str, Any]] = {}

    def mend(self) -> None:
        """Nothing is interrupted any more."""
        self._left = None

    async def chat(
        self, messages: Messages, *, user: str | None = None, personalization: dict[str, bool] | None = None, **_: Any
    ) -> Reply:
        self._step()
        adapter = BASE
        if personalization is not None and personalization["adapter"]:
            self.moves.append("with context" if personalization["context"] else "without")
            adapter = self._serving(f"user:{user}") or self._serving("global") or BASE
        ask = messages[-1]["content"]
        self.asked.append((user, ask, len(messages)))
        ending = self.styles.get(user or "", "")
        plain = BY_ASK[ask].plain if ask in BY_ASK else ""
        number = len(self.asked)
        return Reply(f"id-{number}", f"{plain}{ending}", 30 + 10 * len(messages), 20, 0, 0.01, adapter, "auto")

    async def feedback(self, user: str, body: dict[str, Any], *, key: str) -> None:
        self.repeats += key in self.told
        self.told[key] = body
        self._step()
        if "correction" in body:
            self.styles[user] = " Cheers!" if body["correction"].endswith("Cheers!") else ""

    async def optimizing(self, _: str) -> bool:
        return self.unsettled

    async def consolidate(self, scopes: Sequence[str]) -> dict[str, str]:
        self._step()
        self.moves += scopes
        self.batches.append(list(scopes))
        found = {}
        for scope in scopes:
            found[scope] = f"job {len(self._jobs)}"
            self._jobs[found[scope]] = {
                "scope": scope,
                "polls": self.polls,
                "state": "running",
                "stage": "train",
                "step": 0,
                "steps": 30,
                "reasons": [],
                "report": None,
            }
        return found

    async def job(self, job_id: str) -> dict[str, Any]:
        self._step()
        job = self._jobs[job_id]
        if job["state"] == "running" and job["polls"]:
            job["polls"] -= 1
            job["step"] += 10
        elif job["state"] == "running":
            self._end(job_id, job)
        return job

    def _end(self, job_id: str, job: dict[str, Any]) -> None:
        scope = job["scope"]
        budget = self.budgets.get(scope, CHAT_BUDGET_NATS)
        job["report"] = report_of(kl_chat_nats=0.8 * budget, chat_budget_nats=budget)
        if scope in self._refuses:
            job |= {"state": "rejected", "reasons": [f"{scope} gains nothing"]}
            return
        job["state"] = "promoted"
        name = f"version {len(self.versions)}"
        self.versions.append({"name": name, "scope": scope, "job": job_id, "in_use": True, "report": job["report"]})

    async def chat_budget(self, scope: str, nats: float | None) -> None:
        self._step()
        if nats is None:
            del self.budgets[scope]
        else:
            self.budgets[scope] = nats

    async def roll_back(self, scope: str) -> None:
        self._step()
        serving = [version for version in self.versions if version["in_use"] and version["scope"] == scope]
        assert serving, f"there is nothing to roll back in {scope}"
        serving[0]["in_use"] = False
        self.moves.append(f"{scope} back")

    async def adapters(self) -> list[dict[str, Any]]:
        return self.versions

    def _serving(self, scope: str) -> str:
        return next((v["name"] for v in self.versions if v["in_use"] and v["scope"] == scope), "")

    def _step(self) -> None:
        self.steps += 1
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Interrupted


def report_of(
    *, kl_chat_nats: float = 0.05, chat_budget_nats: float = 0.1, worst_nats: float = 0.1, kl_text_nats: float = 0.01
) -> dict[str, Any]:
    """The parts of a version's report that the benchmark reads."""
    anchors = {"anchors": 48, "tokens": 1000}
    chat = {"mean_nats": kl_chat_nats, "upper95_nats": kl_chat_nats, "worst_nats": worst_nats} | anchors
    text = {"mean_nats": kl_text_nats, "upper95_nats": kl_text_nats, "worst_nats": kl_text_nats} | anchors
    return {
        "kl_chat": chat | {"budget_nats": chat_budget_nats},
        "kl_text": text | {"budget_nats": 0.02},
        "margins": {"base": 0.1, "candidate": 0.5},
        "context_tokens_before": 200,
        "context_tokens_after": 50,
    }


def bench(
    records: Records,
    service: Any,
    tokens: Tokens,
    *,
    chosen: Plan = SMALL,
    peers: Sequence[Peer] = (),
    told: list[tuple[str, int]] | None = None,
    notes: list[str] | None = None,
) -> Bench:
    """A run; what it tells of its progress and what it notes go to the lists."""

    def advance(what: str, steps: int) -> None:
        if told is not None:
            told.append((what, steps))

    return Bench(
        chosen,
        service=service,
        records=records,
        count=tokens.count,
        prefix="t",
        peers=peers,
        concurrency=3,
        advance=advance,
        note=(notes if notes is not None else []).append,
    )
