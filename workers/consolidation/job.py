"""One consolidation, from a scope's feedback to a published adapter version, as a page of named steps."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from service.domain.feedback import BASE
from service.domain.policy import decide
from service.domain.slow_weights import AdapterVersion, Reject, TrainReport, version_name
from service.errors import JobFailed
from service.settings import Settings
from workers.consolidation.adapters import Adapters
from workers.consolidation.anchors import load_anchors
from workers.consolidation.artifact import aside, publish
from workers.consolidation.base import Base
from workers.consolidation.dataset import Dataset, build
from workers.consolidation.gate import (
    CURRENT,
    Measured,
    Meter,
    context_tokens,
    find_absorbed,
    fit_scale,
    measure_margins,
)
from workers.consolidation.prepare import TRAIN_CONTEXT_TOKENS, Prepared, prepare
from workers.consolidation.trainer import Step, Trained, train
from workers.consolidation.work import OnProgress, Outcome, Progress, Stage, Work


def consolidate(work: Work, *, base: Base, settings: Settings, progress: OnProgress) -> Outcome:
    """Train, measure, judge and publish one scope's candidate.

    Raises:
        JobFailed: too little data, a loss that is not finite, a full disk; nothing was published.
    """
    clock = _Clock(base.device)
    progress(Progress(stage="data"))
    dataset = build(work, min_examples=settings.min_feedbacks, max_train=settings.train_steps * settings.train_batch)
    with clock.stage("data"):
        training = _prepared(base, work, dataset, settings, heldout=False)
        heldout = _prepared(base, work, dataset, settings, heldout=True)
    with clock.stage("anchors"):
        anchors = load_anchors(
            base, cache=settings.data_dir / "anchors", limit=settings.anchors, progress=_counter("anchors", progress)
        )
    store = settings.adapter_store_dir
    with aside(store, job=work.job) as folder, Adapters.attached(base, settings) as adapters:
        current = _load_current(adapters, work, store)
        with clock.stage("train"):
            trained = train(
                base, adapters, training, anchors, settings=settings, on_step=_shown(progress, settings.train_steps)
            )
        with clock.stage("measure"):
            meter = Meter(base, adapters, anchors, folder=folder, settings=settings)
            chosen = _fitted(meter, progress)
        with clock.stage("judge"):
            progress(Progress(stage="judge"))
            margins = measure_margins(base, adapters, heldout, has_current=current is not None)
            absorbed = _absorbed(base, adapters, work, heldout, settings, progress)
        before, after = _context_tokens(base, work, current, absorbed, settings)
        report = TrainReport(
            train_examples=len(training),
            heldout_examples=len(heldout),
            steps=len(trained.losses),
            first_loss=trained.losses[0],
            last_loss=trained.losses[-1],
            scale=chosen.scale,
            kl_text=chosen.kl["text"],
            kl_chat=chosen.kl["chat"],
            margins=margins,
            absorbed=absorbed,
            context_tokens_before=before,
            context_tokens_after=after,
            seconds=clock.total,
            stage_seconds=clock.stages,
            peak_memory_bytes=clock.peak_memory_bytes,
            device=base.device.type,
        )
        decision = decide(report)
        if isinstance(decision, Reject):
            return Outcome(decision=decision, report=report)
        progress(Progress(stage="publish"))
        version = _version(work, base, settings, chosen, report, trained)
        publish(folder, version, store=store)
        return Outcome(decision=decision, report=report, version=version)


def _prepared(base: Base, work: Work, dataset: Dataset, settings: Settings, *, heldout: bool) -> list[Prepared]:
    """One side in tokens.

    Raises:
        JobFailed: nothing of it can be encoded.
    """
    budget = settings.context_budget_tokens
    prepared = prepare(
        base,
        dataset.heldout if heldout else dataset.train,
        {user: log.fast_weights for user, log in work.users.items()},
        budget_tokens=budget if heldout else min(budget, TRAIN_CONTEXT_TOKENS),
        dropped=dataset.dropped,
    )
    if not prepared:
        raise JobFailed(f"too little data: none of it can be encoded ({dict(dataset.dropped)})")
    return prepared


def _load_current(adapters: Adapters, work: Work, store: Path) -> AdapterVersion | None:
    """Load the version in use, to be judged against and to start from; None for the base.

    Raises:
        JobFailed: its files are not in the store, or can't be read.
    """
    if work.parent == BASE:
        return None
    folder = store / work.parent
    try:
        version = AdapterVersion.model_validate_json((folder / "provenance.json").read_bytes())
        adapters.load(folder, CURRENT)
        adapters.start_from(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise JobFailed(
            f"the version in use, {work.parent}, can't be loaded from {store}: {error}; roll back first"
        ) from error
    return version


def _fitted(meter: Meter, progress: OnProgress) -> Measured:
    """The export at the scale that fits the budgets, in the meter's folder and loaded as the candidate.

    Raises:
        JobFailed: the same scale gave other bytes the second time.
    """
    measured: list[Measured] = []

    def measure(scale: float) -> Measured:
        progress(Progress(stage="measure", step=len(measured) + 1))
        measured.append(meter.measure(scale))
        return measured[-1]

    chosen = fit_scale(measure)
    if measured[-1] is not chosen and meter.export(chosen.scale) != chosen.sha256:
        raise JobFailed(f"exporting at scale {chosen.scale:.4f} again gave other weights; the disk may be failing")
    return chosen


def _absorbed(
    base: Base, adapters: Adapters, work: Work, heldout: list[Prepared], settings: Settings, progress: OnProgress
) -> tuple[str, ...]:
    """Context items that the candidate makes unnecessary: asked of a user's own scope only, where there is one context."""
    log = work.users.get(work.scope.name) if work.scope.kind == "user" else None
    if log is None:
        return ()
    return find_absorbed(
        base,
        adapters,
        heldout,
        log.fast_weights,
        budget_tokens=settings.context_budget_tokens,
        on_pass=lambda number: progress(Progress(stage="judge", step=number)),
    )


def _context_tokens(
    base: Base, work: Work, current: AdapterVersion | None, absorbed: tuple[str, ...], settings: Settings
) -> tuple[int, int]:
    """Tokens of the user's context under the version in use and under the candidate; 0 for scopes of many users."""
    log = work.users.get(work.scope.name) if work.scope.kind == "user" else None
    if log is None:
        return 0, 0
    budget = settings.context_budget_tokens
    before = current.report.absorbed if current else ()
    return (
        context_tokens(base, log.fast_weights, absorbed=before, budget_tokens=budget),
        context_tokens(base, log.fast_weights, absorbed=absorbed, budget_tokens=budget),
    )


def _version(
    work: Work, base: Base, settings: Settings, chosen: Measured, report: TrainReport, trained: Trained
) -> AdapterVersion:
    return AdapterVersion(
        name=version_name(work.scope, tenant=work.tenant, number=work.number, content_sha256=chosen.sha256),
        tenant=work.tenant,
        scope=str(work.scope),
        number=work.number,
        parent=work.parent,
        base_model=base.name,
        base_sha256=base.sha256,
        content_sha256=chosen.sha256,
        created=work.created,
        job=work.job,
        watermark={user: log.head for user, log in work.users.items()},
        report=report,
        hyperparameters={
            "lora_rank": settings.lora_rank,
            "lora_alpha": settings.lora_alpha,
            "learning_rate": settings.learning_rate,
            "steps": settings.train_steps,
            "batch": settings.train_batch,
            "seed": settings.train_seed,
            "tokens": trained.tokens,
            "beta_text": trained.last.beta["text"] if trained.last else 0.0,
            "beta_chat": trained.last.beta["chat"] if trained.last else 0.0,
        },
    )


def _counter(stage: Stage, progress: OnProgress) -> Callable[[int, int], None]:
    return lambda step, steps: progress(Progress(stage=stage, step=step, steps=steps))


def _shown(progress: OnProgress, steps: int) -> Callable[[Step], None]:
    def show(step: Step) -> None:
        progress(
            Progress(
                stage="train",
                step=step.step,
                steps=steps,
                loss=step.loss,
                kl_text=step.kl_nats["text"],
                kl_chat=step.kl_nats["chat"],
                beta=max(step.beta.values()),
            )
        )

    return show


class _Clock:
    """Seconds a stage, and the memory's peak: of the device's on CUDA, else of this process so far."""

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
