"""What a consolidation takes: seconds a stage, and the memory's peak."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workers.consolidation.work import Stage


class Clock:
    """Runs from its making. The memory's peak is of the device's on CUDA, else of this process so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.monotonic()
        self.stages: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.stages[name] = round(time.monotonic() - started, 3)

    @property
    def total(self) -> float:
        return round(time.monotonic() - self._started, 3)

    @property
    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        # Linux counts in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
