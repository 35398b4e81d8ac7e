"""The stages of one consolidation as it goes through them: how long each took, and a span of each where traces are on."""

import time

from service.store.counts import Amounts
from service.store.jobs import Job, State
from service.tracing import Span, span


class Stages:
    """Of one job in one worker. Jobs side by side are in each stage together, and each counts it as its own."""

    def __init__(self, job: Job) -> None:
        self.seconds: dict[str, float] = {}
        self._record = job
        self._job: Span | None = None
        self._open: Span | None = None
        self._stage = ""
        self._since = 0.0

    def enter(self, stage: str) -> None:
        """The job is in this stage from now on, if it was not already."""
        if stage == self._stage:
            return
        self._leave()
        if self._job is None:
            kind = self._record.scope.partition(":")[0]
            self._job = span("job", fastslow__job=self._record.id, fastslow__scope_kind=kind)
        self._stage, self._since, self._open = stage, time.monotonic(), self._job.part(stage)

    def close(self, state: State) -> None:
        """The job has got as far as it gets in this worker: it has ended so, or is left for the next one."""
        self._leave()
        if self._job is not None:
            self._job.set(fastslow__state=state)
            if state == "failed":
                self._job.fail(state)
            self._job.__exit__(None, None, None)

    def counts(self) -> Amounts:
        """How long each stage took, the one that the job is in until now."""
        self._leave()
        times = {("stages", stage): 1.0 for stage in self.seconds}
        return {("stage_seconds", stage): seconds for stage, seconds in self.seconds.items()} | times

    def _leave(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + time.monotonic() - self._since
        self._stage, self._open = "", None
