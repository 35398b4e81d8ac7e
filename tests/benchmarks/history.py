"""How long a feedback takes, and the gateway's own part of a chat, for a user with a short and with a long history.

One user lives through the service's own store: chats, feedback, the archive's ticks. At each length of history, all that Redis holds of the
user is dumped, and put back before each round, so that every round at a length does the same work. The lengths take turns.
"""

import gc
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from redis import Redis
from rich.progress import Progress
from rich.table import Table

from service.domain.context import choose
from service.domain.fast_weights import FastWeights
from service.domain.feedback import FeedbackEvent, Signals
from service.domain.fold import apply
from service.embedding import OnnxEmbedder
from service.keys import ensure_keys
from service.settings import Settings
from service.store import open_store
from service.store.keys import UserKeys
from service.tokens import load_tokens
from tests.benchmarks import processes, stored
from tests.benchmarks.load import http_request, load
from tests.benchmarks.material import Caller, headers, numbers, said
from tests.benchmarks.stats import Round, percentile
from tests.benchmarks.vectors import embed
from workers.archive import archive_logs

USER = stored.TEMPLATE_USER
KEYS = UserKeys(tenant=stored.TENANT, user=USER)
HELD = (KEYS.log, KEYS.state, KEYS.snapshot, KEYS.user, KEYS.embeddings(OnnxEmbedder.name))
# Of a round.
FEEDBACKS, CHATS = 24, 12
RECALLING, NOT_RECALLING = "with recall", "without"
# Numbers of a round's interactions, which no history reaches.
FIRST_FRESH = 10**6
# Steps of a life between choices of the context, and between ticks of the archive: each time would take most of the life.
CHOOSE_EVERY, ARCHIVE_EVERY = 8, 500


@dataclass
class Moment:
    """The user after so many feedbacks, and what was measured there."""

    state: FastWeights
    dumps: dict[str, bytes]
    """All that Redis holds of the user, by key."""
    held_bytes: int
    """What that takes of Redis's memory."""
    rounds: list[Round] = field(default_factory=list)
    overhead_ms: dict[str, list[float]] = field(default_factory=lambda: {RECALLING: [], NOT_RECALLING: []})
    """The gateway's own part of a chat, the median of each round; with recall it encodes the prompt."""
    cpu_seconds: float = 0.0
    """The gateway's, of all rounds' feedbacks: what a busy machine changes least."""

    def p50_ms(self) -> float:
        return median(r.ms(0.50) for r in self.rounds)

    def p99_ms(self) -> float:
        """Of all rounds' feedbacks together: one round has too few."""
        return percentile([x for r in self.rounds for x in r.latencies], 0.99) * 1000

    def cpu_ms(self) -> float:
        return self.cpu_seconds / sum(len(r.latencies) for r in self.rounds) * 1000

    def chat_ms(self, kind: str) -> float:
        return median(self.overhead_ms[kind])


class Lives:
    """A user's life, kept at several lengths."""

    def __init__(self, gateways: dict[str, processes.Service], redis: Redis, settings: Settings, key: str) -> None:
        self.at: dict[int, Moment] = {}
        self._gateways = gateways
        self._redis = redis
        self._settings = settings
        self._key = key
        self._lines = numbers()
        """No question is asked twice, for its embedding would be remembered."""

    async def live(self, lengths: Sequence[int], progress: Progress) -> None:
        """Give feedback up to the longest history."""
        task = progress.add_task("a user's life", total=max(lengths))
        count = load_tokens(processes.model_folder()).count
        store, state, now = open_store(self._settings), FastWeights(), time.time()
        items: tuple[str, ...] = ()
        for n in range(max(lengths)):
            if n % CHOOSE_EVERY == 0:
                budget = self._settings.context_budget_tokens
                items = choose(state, absorbed=frozenset(), budget_tokens=budget, count=count).items
            served = replace(stored.interaction(n, now, state), items=items)
            await store.users.record(served, retention_seconds=stored.RETENTION_SECONDS)
            given = {"signals": Signals.model_validate(said(n)), "rated_at": n + 1}
            event = FeedbackEvent(revision=n + 1, at=now + n, interaction=replace(served, **given))
            state = apply(state, event)
            await store.users.append(event, state, tenant=stored.TENANT, user=USER, optimize_at=None)
            if n % ARCHIVE_EVERY == 0:
                await archive_logs(store, self._settings, now=time.time())
            if n + 1 in lengths:
                await embed(store, self._settings, tenant=stored.TENANT, user=USER)
                keys = [key for key in HELD if self._redis.exists(key)]
                held = sum(self._redis.memory_usage(key, samples=0) or 0 for key in keys)
                self.at[n + 1] = Moment(state, {key: self._redis.dump(key) or b"" for key in keys}, held)
            progress.advance(task)
        await store.close()

    async def measure(self, *, repeats: int, progress: Progress) -> None:
        task = progress.add_task("measuring by history", total=repeats)
        for repeat in range(-1, repeats):
            # The first is to warm up; no length is always first.
            for length in list(self.at) if repeat % 2 else reversed(self.at):
                moment = self.at[length]
                self._put_back(moment)
                overhead_ms = {kind: self._chats(gateway) for kind, gateway in self._gateways.items()}
                measured, cpu_seconds = await self._feedbacks(length)
                if repeat >= 0:
                    moment.rounds.append(measured)
                    moment.cpu_seconds += cpu_seconds
                    for kind, found in overhead_ms.items():
                        moment.overhead_ms[kind].append(found)
            progress.advance(task, repeat >= 0)

    def _put_back(self, moment: Moment) -> None:
        self._redis.delete(*HELD)
        for key, dump in moment.dumps.items():
            self._redis.restore(key, 0, dump)

    def _chats(self, gateway: processes.Service) -> float:
        """The median overhead of a round's chats, milliseconds."""
        caller = Caller(gateway.port, self._key)
        return median(caller.overhead_ms(USER, f"When does line {next(self._lines)} leave?") for _ in range(CHATS))

    async def _feedbacks(self, length: int) -> tuple[Round, float]:
        """A round's feedbacks, and the gateway's CPU time for them."""
        gateway = self._gateways[RECALLING]
        requests = await self._requests(length)
        # The reply's length but for the digits of the revision.
        reply = {
            "object": "feedback",
            "interaction_id": stored.interaction_id(USER, 0),
            "context_revision": "",
            "changed": True,
        }
        width = len(json.dumps(reply, separators=(",", ":"))) - 2
        widths = range(width + len(str(length + 1)), width + len(str(length + FEEDBACKS)) + 1)
        gc.collect()
        before = gateway.cpu_seconds()
        measured = await load(gateway.port, [iter(requests)], lengths=widths)
        used = gateway.cpu_seconds() - before
        found, _ = Caller(gateway.port, self._key).call("GET", f"/v1/users/{USER}/context", USER)
        if found["revision"] != length + FEEDBACKS or len(measured.latencies) != FEEDBACKS:
            raise RuntimeError(f"{FEEDBACKS} feedbacks after {length} lead to revision {found['revision']}")
        return measured, used

    async def _requests(self, length: int) -> list[bytes]:
        """A round's feedbacks, each on an interaction that is there for it."""
        store, now = open_store(self._settings), time.time()
        requests = []
        for n in range(FIRST_FRESH, FIRST_FRESH + FEEDBACKS):
            fresh = replace(stored.interaction(n, now, self.at[length].state), items=())
            await store.users.record(fresh, retention_seconds=stored.RETENTION_SECONDS)
            body = json.dumps({"interaction_id": fresh.id, **said(n)}).encode()
            requests.append(http_request("POST", "/v1/feedback", headers(self._key, USER), body))
        await store.close()
        return requests

    def table(self) -> Table:
        out = Table(title="By the length of a user's history")
        columns = ("feedbacks before", "items", "p50 ms", "p99 ms", "CPU ms")
        for column in (*columns, "chat with recall", "chat without", "held KiB"):
            out.add_column(column, justify="right")
        for length, moment in self.at.items():
            figures = (moment.p50_ms(), moment.p99_ms(), moment.cpu_ms(), *map(moment.chat_ms, self._gateways))
            shown = [f"{figure:.2f}" for figure in figures]
            out.add_row(f"{length:,}", str(len(moment.state.items)), *shown, f"{moment.held_bytes / 1024:,.0f}")
        return out

    def ratio(self) -> float:
        """The longest history's p50 of feedback to the shortest one's, the median over repeats."""
        short, long = self.at[min(self.at)], self.at[max(self.at)]
        return median(b.ms(0.5) / a.ms(0.5) for a, b in zip(short.rounds, long.rounds, strict=True))

    def chat_ratio(self, kind: str) -> float:
        """The same of the gateway's own part of a chat."""
        short, long = self.at[min(self.at)].overhead_ms[kind], self.at[max(self.at)].overhead_ms[kind]
        return median(b / a for a, b in zip(short, long, strict=True))

    def details(self) -> dict[str, dict[str, float]]:
        """By length of history."""
        return {
            "p50_ms_by_history": {str(n): moment.p50_ms() for n, moment in self.at.items()},
            "p99_ms_by_history": {str(n): moment.p99_ms() for n, moment in self.at.items()},
            "cpu_ms_by_history": {str(n): moment.cpu_ms() for n, moment in self.at.items()},
            "chat_overhead_p50_ms_by_history": {str(n): m.chat_ms(NOT_RECALLING) for n, m in self.at.items()},
            "chat_overhead_with_recall_p50_ms_by_history": {str(n): m.chat_ms(RECALLING) for n, m in self.at.items()},
            "held_kib_by_history": {str(n): m.held_bytes / 1024 for n, m in self.at.items()},
        }


def start(stack: ExitStack, folder: Path, cores: processes.Cores) -> Lives:
    """Valkey, the mock upstream, and gateways over both."""
    folder.mkdir()
    keys = ensure_keys(folder / "keys.json")
    server = stack.enter_context(processes.valkey(folder / "valkey"))
    upstream = stack.enter_context(processes.mock_vllm(folder, cores=cores.others))
    gateways = {
        kind: stack.enter_context(
            processes.gateway(
                folder, cores=cores.service, redis_port=server.port, vllm_port=upstream.port, recall=kind == RECALLING
            )
        )
        for kind in (RECALLING, NOT_RECALLING)
    }
    redis = Redis(port=server.port)
    stack.callback(redis.close)
    settings = Settings(_env_file=None, redis_url=f"redis://127.0.0.1:{server.port}/0", data_dir=folder)
    return Lives(gateways, redis, settings, keys.first("client"))
