"""How each of several jobs in one process ends: what stops one scope becomes its end, and those beside it go on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from service.errors import FastslowError
from workers.consolidation.work import Ends, LeaseLost, OnProgress, Progress, Stage, Work

STOPS = (FastslowError, LeaseLost)


class Going:
    """Which jobs have ended and how, and the telling of progress, which may end one too."""

    def __init__(self, works: Sequence[Work], progress: OnProgress) -> None:
        self.ends: Ends = {}
        self.tell = progress
        """The caller's own: raises what stops a job."""
        self._works = works

    def on(self, job: str) -> bool:
        return job not in self.ends

    @contextmanager
    def stopping(self, job: str) -> Iterator[None]:
        """What stops the body is this job's end."""
        try:
            yield
        except STOPS as error:
            self.ends[job] = error

    def tell_all(self, progress: Progress) -> None:
        for work in self._works:
            if self.on(work.job):
                with self.stopping(work.job):
                    self.tell(work.job, progress)

    def counter(self, stage: Stage) -> Callable[[], None]:
        """A callback that counts a stage's passes."""
        passes = 0

        def passed() -> None:
            nonlocal passes
            passes += 1
            self.tell_all(Progress(stage=stage, step=passes))

        return passed
