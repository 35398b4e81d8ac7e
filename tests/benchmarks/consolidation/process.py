"""Each arm in a process of its own, so that its memory is its own; they take turns, and only one of them ever works."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from service.errors import FastslowError
from service.settings import Settings
from tests.benchmarks.consolidation.turns import Arm, Order, Prepared, Turn

STOP_SECONDS = 10.0
# Nothing is reported to anybody, nothing fetched. TRL tells its authors of each trainer that is made, but not in CI.
QUIET = {
    "CI": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


class ArmFailed(Exception):
    """An arm's process ended or raised; the message is its traceback or what was wrong."""


@dataclass(frozen=True)
class Remote:
    """An arm in its process."""

    name: str
    process: BaseProcess
    wire: Connection

    def prepare(self, users: int) -> Prepared:
        return self._asked(users)  # type: ignore[return-value]

    def turn(self, order: Order) -> Turn:
        return self._asked(order)  # type: ignore[return-value]

    def _asked(self, question: object) -> object:
        """Its answer.

        Raises:
            ArmFailed: it has none.
        """
        try:
            self.wire.send(question)
            answer = self.wire.recv()
        except (EOFError, OSError) as error:
            self.process.join(STOP_SECONDS)
            code = self.process.exitcode
            raise ArmFailed(f"the arm {self.name} ended with exit code {code} (-9: out of memory?)") from error
        if isinstance(answer, str):
            raise ArmFailed(f"the arm {self.name} failed: {answer}")
        return answer


@contextmanager
def arms(names: Sequence[str], settings: Settings, *, distinct: int) -> Iterator[dict[str, Remote]]:
    """The arms by name, each over a base model of its own; all gone afterwards."""
    os.environ.update(QUIET)
    context = multiprocessing.get_context("spawn")
    started: dict[str, Remote] = {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(name, settings, distinct, theirs), daemon=True)
            process.start()
            theirs.close()
            started[name] = Remote(name, process, ours)
        yield started
    finally:
        for remote in started.values():
            remote.wire.close()
        for remote in started.values():
            remote.process.join(STOP_SECONDS)
            remote.process.kill()


def serve(name: str, settings: Settings, distinct: int, wire: Connection) -> None:
    """Answer until nobody asks any more."""
    arm: Arm | None = None
    # Whoever asked may be gone, whatever was said before.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            question = wire.recv()
            try:
                arm = arm or _made(name, settings, distinct)
                answer: object = arm.turn(question) if isinstance(question, Order) else arm.prepare(question)
            except FastslowError as error:
                answer = error.message
            except Exception:
                answer = traceback.format_exc()
            wire.send(answer)


def _made(name: str, settings: Settings, distinct: int) -> Arm:
    from tests.benchmarks.consolidation import ours, trl_arm
    from workers.consolidation.base import load_base

    kinds: dict[str, Callable[..., Arm]] = {"sequential": ours.OneByOne, "stacked": ours.Stacked, "trl": trl_arm.Trl}
    return kinds[name](load_base(settings), settings, users=distinct)
