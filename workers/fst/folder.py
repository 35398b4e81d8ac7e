"""The folder of a run: its plan and the ground that it stands on, its curves as JSON lines, a checkpoint after every cycle, its result.

A killed run goes on from its last checkpoint: what it had written beyond that is cut off, so it ends as one that was never killed.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError

from service.domain.feedback import Frozen
from service.errors import Conflict, InvalidRequest, JobFailed, NotFound
from service.settings import Settings
from workers.fst.contexts import EMPTY, TaskContext
from workers.fst.material import Material
from workers.fst.plan import Plan
from workers.fst.promise import Evidence
from workers.fst.standing import Standing

PLAN, GROUND, CURVE, REPLIES, CHECKPOINT, RESULT, ATTEMPTS, LOCK = (
    "plan.json",
    "ground.json",
    "curve.jsonl",
    "replies.jsonl",
    "checkpoint.pt",
    "result.json",
    "attempts",
    ".lock",
)


class Ground(Frozen):
    """What a run's weights belong to: the base model, and of the settings the shape of the adapters."""

    base_sha256: str
    lora_rank: int | None = None
    """None here and below where all weights are trained."""
    lora_alpha: int | None = None
    lora_target_modules: tuple[str, ...] | None = None

    @classmethod
    def of(cls, plan: Plan, settings: Settings, *, base_sha256: str) -> Self:
        if plan.weights == "full":
            return cls(base_sha256=base_sha256)
        return cls(
            base_sha256=base_sha256,
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_target_modules=tuple(sorted(settings.lora_target_modules)),
        )

    def differences(self, now: Self) -> list[str]:
        """What is another one now, in words."""
        return _differences(self.model_dump(), now.model_dump())


class State(Frozen):
    """Where a run is, between cycles."""

    step: int = 0
    samples: int = 0
    """Replies that a verifier has scored for learning, of steps and evolutions together; tests don't count."""
    population: tuple[TaskContext, ...] = (EMPTY,)
    material: Material = Material()
    evidence: Evidence = Evidence()
    """Replies of late, by which it is judged what contexts promise."""
    standings: tuple[Standing, ...] = ()
    """What the members earned in the steps of the last cycle."""
    seconds: float = 0.0
    """Spent so far, over all sessions of the run."""
    lines: dict[str, int] = {}
    """File -> its bytes at the checkpoint."""


class Run:
    """An opened run."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan

    @property
    def result(self) -> dict[str, Any] | None:
        """Of a finished run."""
        try:
            return json.loads((self.folder / RESULT).read_text())
        except FileNotFoundError:
            return None

    def stand_on(self, ground: Ground) -> None:
        """Go on only on the ground that the run began on.

        Raises:
            InvalidRequest: it is another; what differs.
        """
        there = read_ground(self.folder)
        if there is None:
            _write(self.folder / GROUND, ground.model_dump_json(indent=1))
        elif differ := there.differences(ground):
            raise InvalidRequest(
                f"{self.folder} holds a run with {', '.join(differ)}: set FASTSLOW_MODEL and FASTSLOW_LORA_* as they were, "
                "or choose another --out.",
                param="out",
            )

    @contextmanager
    def attempt(self, *, most: int) -> Iterator[None]:
        """Around a worker's time with the run. A worker that dies in it is counted, until the next checkpoint or any other end.

        Raises:
            JobFailed: so many have died; whoever begins again after that has as many attempts anew.
        """
        path = self.folder / ATTEMPTS
        died = int(path.read_text()) if path.exists() else 0
        try:
            if died >= most:
                raise JobFailed(
                    f"the run in {self.folder} is given up after {died} workers died or were killed at it without a checkpoint: "
                    "if their memory was full, send one of fewer rollouts, batch problems or tokens"
                )
            _write(path, str(died + 1))
            yield
        finally:
            path.unlink(missing_ok=True)

    def curve(self) -> list[dict[str, Any]]:
        """The records so far."""
        path = self.folder / CURVE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write(self, file: str, record: Mapping[str, Any]) -> None:
        """Add a line to one of the run's files."""
        with (self.folder / file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def save(self, state: State, tensors: Mapping[str, Any]) -> None:
        """Checkpoint, whole or not at all."""
        lines = {name: path.stat().st_size for name in (CURVE, REPLIES) if (path := self.folder / name).exists()}
        state = state.model_copy(update={"lines": lines})
        aside = self.folder / f"{CHECKPOINT}.new"
        torch.save({"state": state.model_dump_json(), **tensors}, aside)
        os.replace(aside, self.folder / CHECKPOINT)
        if (attempts := self.folder / ATTEMPTS).exists():
            _write(attempts, "1")

    def resume(self) -> tuple[State, Mapping[str, Any]] | None:
        """The last checkpoint, the files cut back to it; None (and empty files) where there is none."""
        path = self.folder / CHECKPOINT
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        state = State.model_validate_json(saved["state"]) if saved else State()
        for name in (CURVE, REPLIES):
            if (file := self.folder / name).exists():
                os.truncate(file, state.lines.get(name, 0))
        return (state, saved) if saved else None

    def finish(self, result: Mapping[str, Any]) -> None:
        _write(self.folder / RESULT, json.dumps(result, indent=1, allow_nan=False))


@contextmanager
def opened(folder: Path, plan: Plan) -> Iterator[Run]:
    """The run of a plan in its folder, which nobody else may work in meanwhile.

    Raises:
        Conflict: the folder holds another run, or another process is at work in it.
    """
    if folder.is_dir() and not (folder / PLAN).exists() and (strangers := _names(folder)):
        raise Conflict(f"{folder} is not empty ({strangers[0]}) and holds no run: choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Conflict(f"--out {folder} can't be made: {error.strerror}.") from error
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another process is at work in {folder}: wait for it, or choose another --out.") from None
        _claim(folder, plan)
        yield Run(folder, plan)


def read_plan(folder: Path) -> Plan:
    """The plan of the run in a folder.

    Raises:
        NotFound: there is none.
    """
    try:
        return Plan.model_validate_json((folder / PLAN).read_bytes())
    except (OSError, ValidationError) as error:
        raise NotFound(f"{folder} holds no run of Fast-Slow Training that could be read.") from error


def read_ground(folder: Path) -> Ground | None:
    """The ground of the run in a folder; None where it has none that is told."""
    path = folder / GROUND
    return Ground.model_validate_json(path.read_bytes()) if path.exists() else None


def _claim(folder: Path, plan: Plan) -> None:
    if (folder / PLAN).exists():
        there = read_plan(folder)
        if there == plan:
            return
        differ = _differences(there.model_dump(), plan.model_dump())
        raise Conflict(f"{folder} holds another run, with {', '.join(differ)}: choose another --out, or remove it.")
    _write(folder / PLAN, plan.model_dump_json(indent=1))


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name} {was[name]} (not {now[name]})" for name in was if was[name] != now[name]]


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text)
    os.replace(aside, path)


def _names(folder: Path) -> list[str]:
    """What lies in a folder, but for what a run that was killed at once has left."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{PLAN}.new"))
