"""The two arms with our objective: all users side by side in our stack, and one by one with peft.

Both take the same rows of the same plans, packed by length, score them by the same code and clip alike. What differs is who computes the
adapters (peft's layers or the stack's), who moves them (torch's AdamW or the stack's), that one packs the rows of one user alone, each
a sequence, and the other everybody's, and what rows of one user begin with in common once.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model

from service.settings import Settings
from tests.benchmarks.consolidation.material import afresh, learners
from tests.benchmarks.consolidation.turns import Order, Prepared, Turn, Watch, forget_peak, peak_bytes
from workers.consolidation.adamw import BETAS, EPSILON, SlotAdamW
from workers.consolidation.anchors import KINDS
from workers.consolidation.base import Base
from workers.consolidation.learner import ANCHORS_PER_STEP, Learner
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.own_samples import draw
from workers.consolidation.rows import batches, pack
from workers.consolidation.terms import Anchored, Item, Judged, losses
from workers.consolidation.trainer import (
    MAX_GRADIENT_NORM,
    Passes,
    activations_checkpointed,
    gradient_tokens,
    prepare_learners,
    take_step,
)


class Stacked:
    """Our own training, as `trainer.train` does it."""

    def __init__(self, base: Base, settings: Settings, *, users: int) -> None:
        self._base, self._settings = base, settings
        self._learners = learners(base, settings, users=users)

    def prepare(self, users: int) -> Prepared:
        return prepare(self._base, self._settings, self._learners[:users], together=users)

    def turn(self, order: Order) -> Turn:
        base, settings = self._base, self._settings
        active = afresh(self._learners, order.users, step=order.first)
        turn, setup, watch = Turn(len(active), order.steps), Watch(base.device), Watch(base.device)
        forget_peak(base.device)

        setup.start()
        with LoraStack.attached(base, Shape.of(settings), slots=len(active), seed=settings.train_seed) as stack:
            optimizer = SlotAdamW(stack.weights_U_N)
            passes = Passes(base, stack, most_tokens=gradient_tokens(base, settings))
            setup.stop()
            with activations_checkpointed(base), watch.on():
                for _ in range(order.steps):
                    take_step(passes, active, optimizer, lambda *_: None)
                    # Those who have their turn again, in a slot of their own, begin at the same loss.
                    for learner in active:
                        turn.losses.setdefault(learner.job, learner.progress.feedback_losses[0])
        for learner in active:
            if learner.failure is not None:
                raise learner.failure
        turn.tokens = sum(learner.progress.tokens for learner in active)
        return finished(turn, watch, setup, base)


class OneByOne:
    """Each user by themselves: peft's adapter, torch's AdamW."""

    def __init__(self, base: Base, settings: Settings, *, users: int) -> None:
        self._base, self._settings = base, settings
        self._learners = learners(base, settings, users=users)

    def prepare(self, users: int) -> Prepared:
        return prepare(self._base, self._settings, self._learners[:users], together=1)

    def turn(self, order: Order) -> Turn:
        base, device = self._base, self._base.device
        turn, setup, watch = Turn(len(order.users), order.steps), Watch(device), Watch(device)
        forget_peak(device)
        for user in order.users:
            [learner] = afresh(self._learners, [user], step=order.first)
            setup.start()
            adapted = get_peft_model(base.model, lora_config(self._settings))
            weights = [p for p in adapted.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(weights, betas=BETAS, eps=EPSILON, weight_decay=0.0)
            setup.stop()
            with activations_checkpointed(base), watch.on():
                for _ in range(order.steps):
                    self._step(learner, weights, optimizer)
                    turn.losses.setdefault(learner.job, learner.progress.feedback_losses[0])
            adapted.unload()
            turn.tokens += learner.progress.tokens
        return finished(turn, watch, setup, base)

    def _step(self, learner: Learner, weights: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        base, items = self._base, learner.items(0)
        most = gradient_tokens(base, self._settings)
        found: dict[int, float] = {}
        for batch in batches(items, [len(item.row) for item in items], max_tokens=most):
            some = [items[i] for i in batch]
            packed = pack([item.row for item in some], device=base.device)
            loss_I = losses(base, packed, base.states(packed), some)
            (loss_I * torch.tensor([item.weight for item in some], device=base.device)).sum().backward()
            found.update(zip(batch, loss_I.tolist(), strict=True))
        optimizer.param_groups[0]["lr"] = learner.rate
        book(learner, items, [found[i] for i in range(len(items))])
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()


def lora_config(settings: Settings) -> LoraConfig:
    """An adapter as the stack's are."""
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_target_modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def prepare(base: Base, settings: Settings, prepared: Sequence[Learner], *, together: int) -> Prepared:
    """What the base says of all rows, and a first draw of samples where contexts help; `together` at a time."""
    asking, drawing = Watch(base.device), Watch(base.device)
    drawn = 0
    for first in range(0, len(prepared), together):
        some = list(prepared[first : first + together])
        with asking.on():
            prepare_learners(base, some)
        helped = [learner for learner in some if learner.distills]
        drawn += len(helped)
        if helped:
            with LoraStack.attached(base, Shape.of(settings), slots=len(prepared)) as stack, drawing.on():
                draw(base, stack, helped)
    return Prepared(asking.seconds / len(prepared), drawing.seconds / max(drawn, 1), drawn > 0)


def book(learner: Learner, items: Sequence[Item], losses_I: Sequence[float]) -> None:
    """Tell a learner of its step, as the trainer does."""
    kl_nats = dict.fromkeys(KINDS, 0.0)
    for item, loss in zip(items, losses_I, strict=True):
        if isinstance(item.task, Anchored):
            kl_nats[item.task.kind] += loss / ANCHORS_PER_STEP
    weighted = [item.weight * loss for item, loss in zip(items, losses_I, strict=True)]
    feedback = [w for item, w in zip(items, weighted, strict=True) if isinstance(item.task, Judged)]
    tokens = sum(len(item.row) for item in items)
    learner.took(loss=sum(weighted), feedback_loss=sum(feedback), kl_nats=kl_nats, tokens=tokens)


def finished(turn: Turn, watch: Watch, setup: Watch, base: Base) -> Turn:
    turn.seconds, turn.cpu_seconds, turn.setup_seconds = watch.seconds, watch.cpu_seconds, setup.seconds
    turn.peak_bytes = peak_bytes(base.device)
    return turn
