"""One scope in training: its data, its plan, its KL coefficients, and how far it is.

Everything here depends on the scope alone, never on who else is trained beside it, so training side by side is training one by one.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from service.domain.feedback import BASE
from service.domain.norms import Norm
from service.errors import JobFailed
from service.settings import Settings
from workers.consolidation.anchors import KINDS, Anchor, Anchors, Kind
from workers.consolidation.candidates import Adherence
from workers.consolidation.objective import next_beta, signal_weights
from workers.consolidation.prepare import Prepared
from workers.consolidation.rows import Row
from workers.consolidation.terms import Anchored, Credited, Distilled, Item, Judged, Task

# The student sees the context half of the time and must do without it otherwise (facts of FST: co-adaptation, internalization).
CONTEXT_PROBABILITY = 0.5
# Anchors of each kind in a step. Their KL is noisy at this number, hence the smoothing below.
ANCHORS_PER_STEP = 2
KL_SMOOTHING = 0.6
# Drift on anchors that training never saw is about that on those it did (measured: each of 48 is seen once or twice). The rest of the
# budget is for the bound over anchors; what is still over is scaled down afterwards.
TARGET_SHARE = 0.8
# What KL of a whole budget costs at first, so that beta is larger where the budget is tighter. Adam's first steps go far and the KL term
# takes them back; at more than twice this it took back most of what was learnt too (measured).
BETA_START_NATS = 0.03
WARMUP_STEPS = 4
# Adam's steps are bounded, so a loss this far over the first one means that the numbers have run away.
EXPLODED = 50.0
# A scope that learns no more is left alone: its loss of feedback over so many steps, or an epoch if that is longer, is not lower by this
# share than over as many before them. (A smoothed loss of single steps, each of other examples, ended half of all trainings by chance
# after eleven steps.) What norms teach does not show in that loss.
IDLE_STEPS = 10
IDLE_SHARE = 0.01
# The model's own samples in a step, beside `train_batch` rows of feedback, and what they count beside the mean loss of those.
OWN_PER_STEP = 2
DISTILL_WEIGHT = 0.5
NORMS_WEIGHT = 0.5

Draw = tuple[int, bool]
"""An example, and whether it is seen with its context."""


@dataclass(frozen=True)
class Step:
    """One step, as it is shown."""

    step: int
    loss: float
    kl_nats: dict[Kind, float]
    """Smoothed."""
    beta: dict[Kind, float]


@dataclass
class Progress:
    """How far a scope is: all that a checkpoint keeps beside its weights and their moments."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    beta: dict[Kind, float] = field(default_factory=dict)
    smooth: dict[Kind, float] = field(default_factory=dict)
    feedback_losses: list[float] = field(default_factory=list)
    ended: str = ""
    """Why it ended; empty while it goes on."""


@dataclass
class Learner:
    """A scope's training.

    `references` and `hindsight` are the base's word, by row. `distilled` and `rewarded` are what its model said by itself, drawn anew
    every few steps: with the base's states on them under the context, and with the credit that the scope's norms give.
    """

    job: str
    slot: int
    examples: Sequence[Prepared]
    budgets: dict[Kind, float]
    """Nats per token."""
    anchors: Anchors
    settings: Settings
    start: str = BASE
    """The version whose weights it starts from, or `base`."""
    references: dict[Row, Tensor] = field(default_factory=dict)
    hindsight: dict[Row, Credited] = field(default_factory=dict)
    distills: bool = False
    """Whether its context measurably helps, so that the model may learn from it."""
    norms: Sequence[Norm] = ()
    """Those attached to the scope."""
    adherence: Adherence | None = None
    """To these norms."""
    distilled: list[tuple[Row, Tensor]] = field(default_factory=list)
    rewarded: list[tuple[Row, Credited]] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.plan = schedule(
            len(self.examples), steps=settings.train_steps, batch=settings.train_batch, seed=settings.train_seed
        )
        self._epoch_steps = math.ceil(len(self.examples) / settings.train_batch)
        self._steering = {
            kind: cycled(
                self.anchors.of(kind, "steer"), settings.train_steps * ANCHORS_PER_STEP, seed=settings.train_seed
            )
            for kind in KINDS
        }
        self._signals = signal_weights(Counter(prepared.example.kind for prepared in self.examples))
        self.progress.beta = {kind: BETA_START_NATS / self.budgets[kind] for kind in KINDS}

    @property
    def going(self) -> bool:
        return self.failure is None and not self.progress.ended

    @property
    def rate(self) -> float:
        """The next step's learning rate: up over the first steps, then down in a straight line to a tenth."""
        step, steps = self.progress.step + 1, self.settings.train_steps
        warm = min(step / WARMUP_STEPS, 1.0)
        return self.settings.learning_rate * warm * (1.0 - 0.9 * (step - 1) / max(steps - 1, 1))

    def rows(self) -> list[Row]:
        """Every row of feedback that the plan comes to, once."""
        return list({self.examples[i].row(context=seen): None for draws in self.plan for i, seen in draws})

    def items(self, number: int) -> list[Item]:
        """The rows of the next step; `number` is this learner's among those of the run."""
        step = self.progress.step
        draws = self.plan[step]
        items = [self._judged(number, self.examples[i], seen, len(draws)) for i, seen in draws]
        for kind in KINDS:
            at = step * ANCHORS_PER_STEP
            for anchor in self._steering[kind][at : at + ANCHORS_PER_STEP]:
                task = Anchored(anchor.base_states_N_D, kind)
                items.append(Item(number, self.slot, anchor.row, task, self.progress.beta[kind] / ANCHORS_PER_STEP))
        taught: list[tuple[Row, Task]] = [(row, Distilled(teacher)) for row, teacher in self.distilled]
        for own, weight in ((taught, DISTILL_WEIGHT), (self.rewarded, NORMS_WEIGHT)):
            some = [own[(step * OWN_PER_STEP + n) % len(own)] for n in range(min(OWN_PER_STEP, len(own)))]
            items += [Item(number, self.slot, row, task, weight / len(some)) for row, task in some]
        return items

    def _judged(self, number: int, prepared: Prepared, seen: bool, of: int) -> Item:
        row, example = prepared.row(context=seen), prepared.example
        task = Judged(example, self.references[row], self.hindsight.get(row))
        return Item(number, self.slot, row, task, self._signals[example.kind] / of)

    def took(self, *, loss: float, feedback_loss: float, kl_nats: dict[Kind, float], tokens: int) -> Step:
        """Book a step.

        Raises:
            JobFailed: the loss is not finite or has exploded; the step is named.
        """
        progress, steps = self.progress, self.settings.train_steps
        progress.step += 1
        _check(loss, progress.losses, progress.step, steps)
        for kind, kl in kl_nats.items():
            progress.smooth[kind] = KL_SMOOTHING * progress.smooth.get(kind, kl) + (1 - KL_SMOOTHING) * kl
        progress.losses.append(loss)
        progress.tokens += tokens
        shown = Step(progress.step, loss, dict(progress.smooth), dict(progress.beta))
        # A fresh adapter has no KL yet; answering that by a lower beta made it overshoot.
        for kind in KINDS if progress.step > WARMUP_STEPS else ():
            progress.beta[kind] = next_beta(
                progress.beta[kind], kl_nats=progress.smooth[kind], target_nats=TARGET_SHARE * self.budgets[kind]
            )
        progress.feedback_losses.append(feedback_loss)
        self._end_if_done()
        return shown

    def _end_if_done(self) -> None:
        progress, settings = self.progress, self.settings
        if progress.step >= settings.train_steps:
            progress.ended = "all steps taken"
        elif self.adherence is None and self._is_idle():
            progress.ended = "no better for an epoch"
        elif progress.tokens >= settings.train_token_limit:
            progress.ended = "the limit of tokens is reached"

    def _is_idle(self) -> bool:
        losses, window = self.progress.feedback_losses, max(IDLE_STEPS, self._epoch_steps)
        if len(losses) < 2 * window:
            return False
        before, now = fmean(losses[-2 * window : -window]), fmean(losses[-window:])
        return now > before - IDLE_SHARE * abs(before)


def schedule(count: int, *, steps: int, batch: int, seed: int) -> list[list[Draw]]:
    """Per step, which examples, and whether each is seen with its context. Epochs are shuffled; every example comes equally often."""
    chance = random.Random(seed)
    waiting: list[int] = []
    plan = []
    for _ in range(steps):
        draws = []
        for _ in range(min(batch, count)):
            if not waiting:
                waiting = list(range(count))
                chance.shuffle(waiting)
            draws.append((waiting.pop(), chance.random() < CONTEXT_PROBABILITY))
        plan.append(draws)
    return plan


def cycled(anchors: Sequence[Anchor], count: int, *, seed: int) -> list[Anchor]:
    """The anchors over and over, in another order each time, `count` in all."""
    chance = random.Random(seed)
    drawn: list[Anchor] = []
    while len(drawn) < count:
        drawn += chance.sample(anchors, len(anchors))
    return drawn[:count]


def _check(loss: float, losses: Sequence[float], step: int, steps: int) -> None:
    if not math.isfinite(loss):
        raise JobFailed(f"the loss is {loss} at step {step} of {steps}: try a lower FASTSLOW_LEARNING_RATE")
    if losses and loss > EXPLODED * max(abs(losses[0]), 1.0):
        raise JobFailed(
            f"the loss exploded from {losses[0]:.3g} to {loss:.3g} at step {step} of {steps}: try a lower FASTSLOW_LEARNING_RATE"
        )
