"""Consolidations side by side, from scopes' feedback to published adapter versions, as a page of named steps."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from service.domain.feedback import BASE
from service.domain.policy import Limits
from service.errors import JobFailed
from service.settings import Settings
from workers.adapter_store import AdapterRefused, AdapterStore, adapter_store
from workers.consolidation.anchors import load_anchors
from workers.consolidation.artifact import aside
from workers.consolidation.base import Base
from workers.consolidation.checkpoint import Checkpoints
from workers.consolidation.clock import Clock
from workers.consolidation.ends import STOPS, Going
from workers.consolidation.gate import Meter, fit_scales
from workers.consolidation.judgement import Judgement, judge
from workers.consolidation.learner import Step
from workers.consolidation.lora import LoraStack, OtherShape, Shape
from workers.consolidation.published import outcome
from workers.consolidation.task import Material, Task, candidate, material, task
from workers.consolidation.trainer import train
from workers.consolidation.work import Ends, NotNow, OnProgress, Progress, Work

log = logging.getLogger(__name__)


def consolidate(
    works: Sequence[Work],
    *,
    base: Base,
    settings: Settings,
    progress: OnProgress,
    limits: Limits = Limits(),
) -> Ends:
    """Train, measure, judge and publish a candidate of each scope; how each job ended.

    Their checkpoints stay: whoever takes a job over that could not be ended goes on from its own, measures and judges anew, and comes to
    the same version.

    Args:
        limits: what a candidate is promoted by.

    Raises:
        JobFailed: what all of them need can't be had: the anchors, or room on the disk.
    """
    going, clock, store = Going(works, progress), Clock(base.device), adapter_store(settings)
    checkpoints = Checkpoints(store.work, elsewhere=store)
    with clock.stage("data"):
        found = _materials(works, base, settings, going)
    with ExitStack() as folders:
        with clock.stage("anchors"):
            tasks = _tasks(found, base, settings, store, folders, going) if found else []
        with clock.stage("train"):
            trained = _trained(tasks, base, settings, store, checkpoints, going) if tasks else None
        tasks = [task for task in tasks if going.on(task.work.job)]
        if trained is not None and tasks:
            for of, judgement in _judged(tasks, trained, base, settings, store, limits, clock, going):
                _end(of, judgement, base, settings, store, limits, clock, going)
    return going.ends


def _materials(works: Sequence[Work], base: Base, settings: Settings, going: Going) -> list[Material]:
    found = []
    for number, work in enumerate(works):
        going.tell_all(Progress(stage="data", step=number, steps=len(works)))
        if going.on(work.job):
            with going.stopping(work.job):
                found.append(material(work, base=base, settings=settings))
    return found


def _tasks(
    found: Sequence[Material],
    base: Base,
    settings: Settings,
    store: AdapterStore,
    folders: ExitStack,
    going: Going,
) -> list[Task]:
    anchors = load_anchors(
        base,
        cache=settings.data_dir / "anchors",
        limit=settings.anchors,
        more=Path(settings.anchors_file) if settings.anchors_file else None,
        progress=lambda step, steps: going.tell_all(Progress(stage="anchors", step=step, steps=steps)),
    )
    going.tell_all(Progress(stage="anchors", step=1, steps=1))
    still = [of for of in found if going.on(of.work.job)]
    return [
        task(
            of,
            slot=slot,
            folder=folders.enter_context(aside(store, job=of.work.job)),
            anchors=anchors,
            settings=settings,
        )
        for slot, of in enumerate(still)
    ]


def _trained(
    tasks: Sequence[Task],
    base: Base,
    settings: Settings,
    store: AdapterStore,
    checkpoints: Checkpoints,
    going: Going,
) -> LoraStack:
    """The trained adapters. Their stack is out of the base again: what is judged are its exports."""
    with LoraStack.attached(base, Shape.of(settings), slots=len(tasks), seed=settings.train_seed) as stack:
        for of in tasks:
            with going.stopping(of.work.job):
                _start(stack, of, store)
        learners = [of.learner for of in tasks if going.on(of.work.job)]
        train(base, stack, learners, settings=settings, checkpoints=checkpoints, on_step=_telling(going, settings))
    for learner in learners:
        if isinstance(learner.failure, STOPS):
            going.ends[learner.job] = learner.failure
    return stack


def _start(stack: LoraStack, of: Task, store: AdapterStore) -> None:
    """Give a slot the weights that it starts from.

    Raises:
        JobFailed: that version, or another that it will be judged against, is not there or can't be read.
        NotNow: their files can't be had.
    """
    for name in _rivals(of):
        with _reading(name, store) as folder:
            if name == of.learner.start:
                try:
                    stack.load(of.learner.slot, folder)
                except OtherShape as error:
                    # The settings have changed since: it is still judged against that version, and starts from nothing.
                    log.warning("job %s starts anew instead of from %s: %s", of.work.job, name, error)


def _rivals(of: Task) -> set[str]:
    """The versions in use that it will be judged against."""
    return {of.work.parent, of.work.pooled} - {BASE}


@contextmanager
def _reading(version: str, store: AdapterStore) -> Iterator[Path]:
    """Around the reading of a version in use.

    Raises:
        JobFailed: it is not there, or can't be read.
        NotNow: its files can't be had.
    """
    try:
        with store.reading(version) as folder:
            yield folder
    except (OSError, ValueError, KeyError, SafetensorError, AdapterRefused) as error:
        told = f"the version in use, {version}, can't be loaded from {store}: {error}"
        cause = error.__cause__ if isinstance(error, AdapterRefused) else error
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise NotNow(told) from error
        raise JobFailed(f"{told}; if that stays so, roll back") from error


def _telling(going: Going, settings: Settings) -> Callable[[str, Step], None]:
    def told(job: str, step: Step) -> None:
        going.tell(
            job,
            Progress(
                stage="train",
                step=step.step,
                steps=settings.train_steps,
                loss=step.loss,
                kl_text=step.kl_nats["text"],
                kl_chat=step.kl_nats["chat"],
                beta=max(step.beta.values()),
            ),
        )

    return told


def _judged(
    tasks: Sequence[Task],
    trained: LoraStack,
    base: Base,
    settings: Settings,
    store: AdapterStore,
    limits: Limits,
    clock: Clock,
    going: Going,
) -> list[tuple[Task, Judgement]]:
    """What each candidate is worth; its export lies in its folder. One whose rivals can't be read ends here."""
    shapes: dict[str, Shape] = {}
    tasks = _read_rivals(tasks, store, going, lambda name, folder: shapes.update({name: Shape.read(folder)}))
    versions = {name: len(tasks) + n for n, name in enumerate(shapes)}
    shape = Shape.of(settings).with_room_for(shapes.values())
    with LoraStack.attached(base, shape, slots=len(tasks) + len(versions)) as judges:
        tasks = _read_rivals(tasks, store, going, lambda name, folder: judges.load(versions[name], folder))
        if not tasks:
            return []
        candidates = [candidate(of, slot=n, versions=versions, settings=settings) for n, of in enumerate(tasks)]
        anchors = tasks[0].learner.anchors
        meter = Meter(base, trained, judges, anchors, candidates, on_pass=going.counter("measure"))
        with clock.stage("measure"):
            fitted = fit_scales(meter.measure, len(candidates))
        with clock.stage("judge"):
            counted = going.counter("judge")
            judged = judge(base, judges, anchors, candidates, fitted, meter=meter, limits=limits, on_pass=counted)
    return list(zip(tasks, judged, strict=True))


def _read_rivals(
    tasks: Sequence[Task], store: AdapterStore, going: Going, look: Callable[[str, Path], None]
) -> list[Task]:
    """Look at the files of each version that these are judged against; the tasks that go on, for one whose can't be read ends."""
    for name in sorted(set().union(*map(_rivals, tasks))):
        try:
            with _reading(name, store) as folder:
                look(name, folder)
        except (JobFailed, NotNow) as error:
            going.ends |= {of.work.job: error for of in tasks if name in _rivals(of)}
    return [of for of in tasks if going.on(of.work.job)]


def _end(
    of: Task,
    judgement: Judgement,
    base: Base,
    settings: Settings,
    store: AdapterStore,
    limits: Limits,
    clock: Clock,
    going: Going,
) -> None:
    job = of.work.job
    if going.on(job):
        with going.stopping(job):
            going.tell(job, Progress(stage="publish"))
            going.ends[job] = outcome(
                of, judgement, base=base, settings=settings, store=store, limits=limits, clock=clock
            )
