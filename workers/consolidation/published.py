"""The record of a candidate: its report, its version, and its files in the store."""

import logging
from itertools import count

from service.domain.policy import Limits, decide
from service.domain.slow_weights import AdapterVersion, Reject, TrainReport, version_name
from service.settings import Settings
from workers.adapter_store import AdapterStore
from workers.consolidation.artifact import NameTaken, publish
from workers.consolidation.base import Base
from workers.consolidation.clock import Clock
from workers.consolidation.judgement import Judgement
from workers.consolidation.task import Task
from workers.consolidation.work import NotNow, Outcome

log = logging.getLogger(__name__)


def outcome(
    task: Task,
    judgement: Judgement,
    *,
    base: Base,
    settings: Settings,
    store: AdapterStore,
    limits: Limits,
    clock: Clock,
) -> Outcome:
    """Decide on a judged candidate, and publish it if it is promoted.

    Raises:
        JobFailed: the files can't be written or read back.
        NotNow: the disk is full, or the store is away.
    """
    report = _report(task, judgement, base, clock)
    decision = decide(report, limits)
    if isinstance(decision, Reject):
        return Outcome(decision=decision, report=report)
    # A job that was not promoted has left its version until it is retired; the same weights again have the same name.
    for number in count(task.work.number):
        version = _version(task, judgement, report, base, settings, number=number)
        try:
            publish(task.folder, version, store=store)
            break
        except NameTaken as taken:
            log.info("job %s takes the next number: %s", task.work.job, taken)
        except OSError as error:
            raise NotNow(f"{version.name} can't be published: {error}") from error
    return Outcome(decision=decision, report=report, version=version)


def _report(task: Task, judgement: Judgement, base: Base, clock: Clock) -> TrainReport:
    progress = task.learner.progress
    return TrainReport(
        train_examples=len(task.learner.examples),
        heldout_examples=len(task.heldout),
        steps=progress.step,
        first_loss=progress.losses[0],
        last_loss=progress.losses[-1],
        seconds=clock.total,
        stage_seconds=clock.stages,
        peak_memory_bytes=clock.peak_memory_bytes,
        device=base.device.type,
        **judgement.report(),
    )


def _version(
    task: Task, judgement: Judgement, report: TrainReport, base: Base, settings: Settings, *, number: int
) -> AdapterVersion:
    work, learner = task.work, task.learner
    return AdapterVersion(
        name=version_name(work.scope, tenant=work.tenant, number=number, content_sha256=judgement.sha256),
        tenant=work.tenant,
        scope=str(work.scope),
        number=number,
        parent=work.parent,
        base_model=base.name,
        base_sha256=base.sha256,
        content_sha256=judgement.sha256,
        created=work.created,
        job=work.job,
        watermark={user: log.head for user, log in work.users.items()},
        report=report,
        hyperparameters={
            "lora_rank": settings.lora_rank,
            "lora_alpha": settings.lora_alpha,
            "learning_rate": settings.learning_rate,
            "batch": settings.train_batch,
            "seed": settings.train_seed,
            "steps": learner.progress.step,
            "ended": learner.progress.ended,
            "started_from": learner.start,
            "distilled": int(learner.distills),
            "tokens": learner.progress.tokens,
            "beta_text": learner.progress.beta["text"],
            "beta_chat": learner.progress.beta["chat"],
        },
    )
