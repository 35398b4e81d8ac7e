"""One fault from begin to end: load, break, mend, load again, and then what was acknowledged is looked for."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.faults.checks import Person, doubled, gaps, losses
from tests.faults.load import Load
from tests.faults.members import Layout
from tests.faults.people import people, stored
from tests.faults.registry import Fault
from tests.faults.stack import KEY_OF, Stack


@dataclass(frozen=True)
class Pace:
    """How much load, and for how long."""

    users: int = 8
    pause_seconds: float = 0.5
    """Of a user, between chats."""
    fault_seconds: float = 20.0
    """How long something stays broken."""
    after_seconds: float = 3.0
    """How long the load goes on when all is well again."""
    recover_seconds: float = 120.0
    """Longest wait for a clean second, and for a tick of the scheduler."""
    clean_seconds: float = 1.0
    """Of the clean second, which is longer where replies take longer."""
    reply_seconds: float = 10.0
    """A client's patience."""

    def on(self, layout: Layout) -> "Pace":
        """What a layout bears: a real vLLM on few cores takes seconds for a reply."""
        if not layout.real_vllm:
            return self
        return replace(self, users=2, pause_seconds=2.0, recover_seconds=600.0, clean_seconds=30.0, reply_seconds=300.0)


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    name: str
    acknowledged: int
    lost: int
    """Acknowledged feedback that is not stored exactly once, and logs that are not whole."""
    crossed: int
    """Replies that had something of another user's."""
    behind: int
    """Replies that lacked acknowledged feedback and did not say so."""
    recover_s: float | None
    """From the fault's end, or a kill, to the begin of the first clean second; None where none came."""
    work_s: float | None
    """To the first tick of the scheduler that the worker has done."""
    answered: int
    errors: Counter[str]
    """Requests that failed for good."""
    attempts: Counter[str]
    """Failed attempts, most of which were made again."""
    degraded: Counter[str]
    personal: int
    """Replies whose context had the user's own secret."""
    problems: tuple[str, ...]
    """What else must not be, in words."""

    @property
    def client_errors(self) -> int:
        return self.errors.total()

    @property
    def held(self) -> bool:
        """Whether nothing was lost, nobody got what is another's, and all was well in the end."""
        return not (self.lost or self.crossed or self.behind or self.problems or self.recover_s is None)


async def run(fault: Fault, stack: Stack, pace: Pace, say: Callable[[str], None]) -> Outcome:
    """Break one thing of a whole stack.

    Raises:
        AssertionError: the load did not come into its stride before anything was broken.
    """
    pace = pace.on(stack.layout)
    persons = await people(stack, trial=fault.name, count=pace.users)
    load = Load(
        persons,
        url=stack.url,
        keys=KEY_OF,
        model=stack.settings.model_name,
        pause_seconds=pace.pause_seconds,
        reply_seconds=pace.reply_seconds,
        echoes=not stack.layout.real_vllm,
    )

    async def clean(since: float) -> float | None:
        return await load.clean(since=since, within=pace.recover_seconds, seconds=pace.clean_seconds)

    async with load.running(drain_seconds=pace.recover_seconds):
        say("load")
        assert await clean(time.monotonic()), "no steady load"
        say("broken")
        stack.problems.clear()
        began = time.monotonic()
        async with fault.break_it(stack, pace.fault_seconds):
            ended, clock = time.monotonic(), time.time()
            if not fault.instant:
                await asyncio.sleep(max(0.0, began + max(pace.fault_seconds, fault.least_seconds) - ended))
        if not fault.instant:
            ended, clock = time.monotonic(), time.time()
        say("mended")
        recovered, tick = await asyncio.gather(clean(ended), stack.worked(since=clock, within=pace.recover_seconds))
        # What was started again takes its part of the load before it is over.
        await stack.whole()
        await asyncio.sleep(pace.after_seconds)
    say("looking")
    return await _outcome(
        fault, stack, load, persons, recover=recovered and recovered - ended, work=tick and tick - clock
    )


async def _outcome(
    fault: Fault, stack: Stack, load: Load, persons: list[Person], *, recover: float | None, work: float | None
) -> Outcome:
    events, records = await stored(stack, persons), load.records
    missing = losses(load.acknowledged, events)
    problems = [*stack.problems, *records.crossed[:3], *records.behind[:3]]
    problems += [f"{loss.acknowledged} is there {loss.times} times" for loss in missing[:3]]
    errors = records.errors()
    if fault.seamless and errors:
        problems.append(f"{errors.total()} requests failed, and none may")
    if recover is None:
        problems.append("no clean second came")
    if work is None:
        problems.append("no tick of the scheduler was worked off")
    return Outcome(
        name=fault.name,
        acknowledged=len(load.acknowledged),
        lost=len(missing) + doubled(events) + gaps(events),
        crossed=len(records.crossed),
        behind=len(records.behind),
        recover_s=recover,
        work_s=work,
        answered=records.answered(),
        errors=errors,
        attempts=Counter(how for _, how in records.attempts),
        degraded=records.degraded,
        personal=records.personal,
        problems=tuple(problems),
    )
