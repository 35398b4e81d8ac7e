"""A run: users teach until a point, every arm answers the test questions, on to the next point; then the arms that wait for adapters."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tests.benchmarks.learning.arms import CHANNELS, FIXED, PLAIN, POOLED, STAGES, Count, last_k, oracle, stage_of
from tests.benchmarks.learning.client import Messages, Reply, Service
from tests.benchmarks.learning.consolidations import Advance, Consolidations, Note
from tests.benchmarks.learning.lessons import Pupil, School
from tests.benchmarks.learning.peers import Peer
from tests.benchmarks.learning.plan import Plan
from tests.benchmarks.learning.prompts import Prompt, load
from tests.benchmarks.learning.records import Records
from tests.benchmarks.learning.users import Person, judge, population

SHUFFLED = "shuffled"
SHUFFLED_FEEDBACKS = 10
"""Most feedbacks that a user of the control is given."""
SETTLE_POLL_SECONDS = 1.0


class Bench:
    """One run of a plan against a service, and what it needs to go on after an interruption."""

    def __init__(
        self,
        plan: Plan,
        *,
        service: Service,
        records: Records,
        count: Count,
        prefix: str,
        peers: Sequence[Peer] = (),
        concurrency: int,
        advance: Advance,
        note: Note,
    ) -> None:
        train, test = load()
        self.plan = plan
        self.service = service
        self.records = records
        self.peers = {peer.name: peer for peer in peers}
        self.people = population(plan.users, plan.preferences, seed=plan.seed)
        self.train, self.tests = train, test[: plan.tests]
        self._count = count
        self._prefix = prefix
        self._consolidations = Consolidations(
            service, records, small_chat_budget_nats=plan.small_chat_budget_nats, advance=advance, note=note
        )
        self._school = School(service, records, train, seed=plan.seed)
        self._gate = asyncio.Semaphore(concurrency)
        self._advance = advance
        self._plain: dict[str, asyncio.Task[Reply]] = {}
        self._taught: dict[str, int] = {}

    @property
    def steps(self) -> int:
        """How many steps `advance` is going to be told of: feedbacks, replies and consolidations."""
        measured = sum(1 if arm in FIXED else len(self.plan.points) for arm in self._repeated)
        arms = measured + sum(1 for arm in self.plan.arms if stage_of(arm))
        replies = arms * len(self.people) * len(self.tests)
        control = self.plan.shuffled * (self._control_point + len(self.tests))
        consolidations = sum(len(self._scopes(stage)) for stage in self._stages)
        return replies + len(self.people) * self.plan.points[-1] + control + consolidations

    async def run(self) -> None:
        for point in self.plan.points:
            await self._together(self._teach, [(self.pupil(person), point) for person in self.people])
            await self._settle(self._accounts, point)
            for peer in self.peers.values():
                await self._together(self._tell_peer, [(peer, person, point) for person in self.people])
            arms = [arm for arm in self._repeated if point == 0 or arm not in FIXED]
            await self._measure(arms, self.people, point)
        await self._control()
        for stage in self._stages:
            await self._slow(stage)

    def account(self, person: Person, kind: str = "") -> str:
        """The user that the service knows a person as."""
        return "-".join(filter(None, (self._prefix, person.name, kind)))

    def pupil(self, person: Person) -> Pupil:
        return Pupil(self.account(person), (person,))

    def shuffled(self, person: Person) -> Pupil:
        """A user whose every feedback is somebody's who wants none of what this person wants."""
        others = tuple(other for other in self.people if person.at_odds(other))
        return Pupil(self.account(person, SHUFFLED), others)

    @property
    def _repeated(self) -> list[str]:
        return [arm for arm in self.plan.arms if not stage_of(arm)] + list(self.peers)

    @property
    def _stages(self) -> list[str]:
        wanted = {stage_of(arm) for arm in self.plan.arms}
        return [stage for stage in STAGES if stage in wanted]

    @property
    def _accounts(self) -> list[str]:
        return [self.account(person) for person in self.people]

    def _scopes(self, stage: str) -> list[str]:
        """What the stage consolidates."""
        return ["global"] if stage == POOLED else [f"user:{account}" for account in self._accounts]

    @property
    def _control_point(self) -> int:
        return min(SHUFFLED_FEEDBACKS, self.plan.points[-1])

    async def _teach(self, pupil: Pupil, until: int) -> None:
        await self._school.teach(pupil, until=until)
        for _ in range(self._taught.get(pupil.account, 0), until):
            self._advance(f"{until} feedbacks", 1)
        self._taught[pupil.account] = until

    async def _tell_peer(self, peer: Peer, person: Person, point: int) -> None:
        account = self.account(person)
        await peer.tell(account, self._school.given(account, until=point), self.records)

    async def _settle(self, accounts: Sequence[str], point: int | str) -> None:
        """Wait until nothing is being optimized any more; who is not done in time is put on record."""
        most = self.plan.settle_adapters_seconds if point in STAGES else self.plan.settle_seconds
        if self.records.get("settled", point) is not None:
            return
        began = time.monotonic()
        left = list(accounts)
        while left and time.monotonic() - began < most:
            left = [account for account in left if await self.service.optimizing(account)]
            if left:
                await asyncio.sleep(SETTLE_POLL_SECONDS)
        self.records.put("settled", point, seconds=time.monotonic() - began, unsettled=left)

    async def _measure(self, arms: Sequence[str], people: Sequence[Person], point: int) -> None:
        # Question by question, so that the second finds what the first left in vLLM's prefix cache.
        cases = [(arm, person, point, prompt) for prompt in self.tests for person in people for arm in arms]
        await self._together(self._measured, cases)

    async def _measured(self, arm: str, person: Person, point: int, prompt: Prompt) -> None:
        key = ("reply", arm, person.name, point, prompt.ask)
        if self.records.get(*key) is None:
            reply = await self._answer(arm, person, point, prompt)
            verdict = judge(person, reply.text, prompt, self.train)
            self.records.put(
                *key,
                wants=[p.name for p in person.preferences],
                unmet=[p.name for p in verdict.unmet],
                answers=verdict.answers,
                satisfied=verdict.satisfied,
                fraction=verdict.fraction,
                reply=reply.fields(),
            )
        self._advance(f"{arm} after {point}", 1)

    async def _answer(self, arm: str, person: Person, point: int, prompt: Prompt) -> Reply:
        question = [{"role": "user", "content": prompt.ask}]
        if arm in PLAIN:
            return await self._plain_chat([*self._context(arm, person, point), *question])
        if arm in self.peers:
            return await self.peers[arm].endpoint.chat(question, user=self.account(person))
        kind = SHUFFLED if arm == SHUFFLED else ""
        channel = CHANNELS["fast" if arm == SHUFFLED else arm]
        account = self.account(person, kind)
        return await self.service.chat(question, user=account, personalization=channel.personalization)

    def _context(self, arm: str, person: Person, point: int) -> Messages:
        """What the client itself puts before the question."""
        if arm == "oracle":
            return oracle(person, self.train, self._count, seed=self.plan.seed)
        if arm == "last-k":
            return last_k(self._school.given(self.account(person), until=point), self._count)
        return []

    async def _plain_chat(self, messages: Messages) -> Reply:
        """Asked in nobody's name, which nothing is learnt from; the same request is made once."""
        key = json.dumps(messages)
        if key not in self._plain:
            self._plain[key] = asyncio.ensure_future(self.service.chat(messages))
        return await self._plain[key]

    async def _control(self) -> None:
        people = self.people[: self.plan.shuffled]
        pupils = [self.shuffled(person) for person in people]
        await self._together(self._teach, [(pupil, self._control_point) for pupil in pupils])
        await self._settle([pupil.account for pupil in pupils], SHUFFLED)
        await self._measure([SHUFFLED], people, self._control_point)

    async def _slow(self, stage: str) -> None:
        """Have the stage's adapters trained, and measure the arms that they serve; who has none in the end has what serves them then."""
        await self._consolidations.done(stage, self._scopes(stage))
        await self._settle(self._accounts, stage)
        arms = [arm for arm in self.plan.arms if stage_of(arm) == stage]
        await self._measure(arms, self.people, self.plan.points[-1])
        await self._consolidations.take_back(stage)

    async def _together(self, work: Callable[..., Coroutine[Any, Any, None]], cases: Sequence[tuple[Any, ...]]) -> None:
        """All cases at once, but no more than so many at a time; the first error ends the run."""

        async def one(case: tuple[Any, ...]) -> None:
            async with self._gate:
                await work(*case)

        async with asyncio.TaskGroup() as group:
            for case in cases:
                group.create_task(one(case))
