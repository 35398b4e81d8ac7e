"""One turn of an arm: some steps of some users' trainings, with the time, the processor time and the memory that they took."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

# Linux counts a process's peak in KiB.
KIB = 1024


@dataclass(frozen=True)
class Order:
    """What an arm is to do in a turn."""

    users: tuple[int, ...]
    """Numbers; past the distinct ones the first have their turn again, each time in a slot of its own."""
    first: int
    """The first step's number in each user's plan, from 0, so that turns see other rows."""
    steps: int


@dataclass
class Turn:
    """What it took. One by one, times are sums over users."""

    users: int
    steps: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    """Real ones of all rows. A row's prompt counts once for both of its replies, but twice with TRL, which runs it for each; what rows of
    a user begin with in common counts for each of them, though the stack runs it once."""
    setup_seconds: float = 0.0
    """Putting the adapters into the model, before the steps."""
    peak_bytes: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Of each user's feedback at the first step, where the arm has our objective: before any arm has moved a weight."""

    @property
    def adapter_step_seconds(self) -> float:
        """Seconds for one step of one adapter."""
        return self.seconds / (self.users * self.steps)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds


@dataclass(frozen=True)
class Prepared:
    """What an arm did once, before any turn: seconds for one adapter."""

    preparing_seconds: float = 0.0
    """References, and whether contexts help."""
    drawing_seconds: float = 0.0
    """One draw of samples with their teacher's states."""
    draws: bool = False
    """Whether there is a user whose context helps, so that samples are drawn in training."""


class Arm(Protocol):
    """One way to train. It lives in a process of its own."""

    def prepare(self, users: int) -> Prepared:
        """Make the first so many users' trainings ready."""
        ...

    def turn(self, order: Order) -> Turn: ...


class Watch:
    """Adds up what happens inside its `on`, with a device's queue emptied at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    @contextmanager
    def on(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def start(self) -> None:
        self._settle()
        self._began = time.monotonic(), time.process_time()

    def stop(self) -> None:
        self._settle()
        began, cpu_began = self._began
        self.seconds += time.monotonic() - began
        self.cpu_seconds += time.process_time() - cpu_began

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The device's peak since it was forgotten; on the CPU this process's resident memory at its highest since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def chosen(users: Sequence[int], count: int, *, repeat: int) -> tuple[int, ...]:
    """`count` of these users, others in each repeat."""
    return tuple(users[(repeat * count + n) % len(users)] for n in range(min(count, len(users))))
