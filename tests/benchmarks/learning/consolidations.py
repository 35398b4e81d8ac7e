"""The consolidations of a run: a stage's are started together, watched to their ends, and taken back when they have been measured.

Each is recorded when it is started and when it has ended, so that a run which is taken up again does none twice.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.benchmarks.learning.arms import OWN_SMALL
from tests.benchmarks.learning.client import Service
from tests.benchmarks.learning.records import Records

POLL_SECONDS = 2.0
PROMOTED = "promoted"
ENDED = (PROMOTED, "rejected", "failed")

Advance = Callable[[str, int], None]
"""Told what is being done, and how many steps of the run that has completed."""
Note = Callable[[str], None]
"""Told what whoever runs this should know."""


class Consolidations:
    """Has the service train adapters, through its admin calls."""

    def __init__(
        self,
        service: Service,
        records: Records,
        *,
        small_chat_budget_nats: float,
        advance: Advance,
        note: Note,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.service = service
        self.records = records
        self._small = small_chat_budget_nats
        self._advance = advance
        self._note = note
        self._poll_seconds = poll_seconds

    async def done(self, stage: str, scopes: Sequence[str]) -> None:
        """Consolidate the scopes, unless that is on record; what was rejected or failed is told with its reasons."""
        if self.records.get("trained", stage) is None:
            await self._budgets(stage, scopes, self._small)
            await self._start(stage, scopes)
            await self._watch(stage, scopes)
            await self._budgets(stage, scopes, None)
            self.records.put("trained", stage)
        for _ in scopes:
            self._advance(f"{stage}: trained", 1)

    async def take_back(self, stage: str) -> None:
        """Put what the stage has promoted out of use, so that its feedback counts as new and the next stage starts from the base too."""
        if self.records.get("taken back", stage) is None:
            ours = {r["key"][2] for r in self.records.under("consolidated", stage) if r["state"] == PROMOTED}
            serving = {version["scope"] for version in await self.service.adapters() if version["in_use"]}
            for scope in sorted(ours & serving):
                await self.service.roll_back(scope)
            self.records.put("taken back", stage)

    async def _budgets(self, stage: str, scopes: Sequence[str], nats: float | None) -> None:
        # The run's users are nobody else's, so there is no budget of theirs to restore.
        if stage == OWN_SMALL:
            for scope in scopes:
                await self.service.chat_budget(scope, nats)

    async def _start(self, stage: str, scopes: Sequence[str]) -> None:
        new = [scope for scope in scopes if self.records.get("consolidating", stage, scope) is None]
        if new:
            for scope, job in (await self.service.consolidate(new)).items():
                self.records.put("consolidating", stage, scope, id=job)

    async def _watch(self, stage: str, scopes: Sequence[str]) -> None:
        left = [scope for scope in scopes if self.records.get("consolidated", stage, scope) is None]
        while left:
            going = {}
            for scope in left:
                started = self.records.get("consolidating", stage, scope)
                assert started is not None, f"{scope} was never started"
                job = await self.service.job(started["id"])
                if job["state"] in ENDED:
                    self._ended(stage, scope, job)
                else:
                    going[scope] = job
            left = list(going)
            if left:
                self._advance(standing(stage, list(going.values()), of=len(scopes)), 0)
                await asyncio.sleep(self._poll_seconds)

    def _ended(self, stage: str, scope: str, job: Mapping[str, Any]) -> None:
        state, reasons = job["state"], job["reasons"]
        self.records.put("consolidated", stage, scope, state=state, reasons=reasons, report=job["report"])
        if state != PROMOTED:
            self._note(f"{stage}: {scope} was {state}: {'; '.join(reasons)}")


def standing(stage: str, going: Sequence[Mapping[str, Any]], *, of: int) -> str:
    """How far the jobs are that have not ended, by the last of each stage: `own 4/12: train 12/30, queued`."""
    at: dict[str, tuple[int, int]] = {}
    for job in going:
        step = (job["step"], job["steps"])
        at[job["stage"]] = min(step, at.get(job["stage"], step))
    shown = (f"{name} {step}/{steps}" if steps else name for name, (step, steps) in at.items())
    return f"{stage} {of - len(going)}/{of}: {', '.join(shown)}"
