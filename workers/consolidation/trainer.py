"""Trains the adapters of many scopes side by side in one stack: each its own objective, KL coefficients, learning rate and end.

A step takes one step of every scope that is still in training: their rows are packed together by length, whoever's they are, in passes
that fit the memory; what rows of one scope begin with in common, such as its context, is run once. The sum of their losses is
differentiated once; a slot's gradient is of its own scope alone, so it is clipped, checked and applied by itself.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch

from service.errors import JobFailed
from service.settings import Settings
from workers.consolidation.adamw import SlotAdamW, clipped
from workers.consolidation.anchors import KINDS, Kind
from workers.consolidation.base import Base
from workers.consolidation.checkpoint import Checkpoints
from workers.consolidation.learner import ANCHORS_PER_STEP, Learner, Step
from workers.consolidation.lora import LoraStack
from workers.consolidation.objective import hindsight_advantages
from workers.consolidation.own_samples import context_helps, draw
from workers.consolidation.rows import Row, batches, grow, pack_trees
from workers.consolidation.scoring import reply_logprobs, token_logprobs_of
from workers.consolidation.terms import Anchored, Credited, Item, Judged, losses
from workers.consolidation.work import LeaseLost

log = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 1.0
# Tokens with padding whose activations are held for the gradient at once: 1.5 MB each for the default model in float32, so 0.8 GB on a
# CPU; on a GPU a step of a dozen scopes, halved where that does not fit.
CPU_GRADIENT_TOKENS = 512
CUDA_GRADIENT_TOKENS = 16384
# Larger models hold only each layer's input and compute the rest again: 7-8B then fit 80 GB.
CHECKPOINTED_FROM_PARAMETERS = 1_000_000_000
# A killed job goes on from its last checkpoint; samples are drawn anew at the same steps, so that it does exactly what it would have done.
# There is one of the end too, for a job that can't be ended now.
CHECKPOINT_STEPS = 5

OnStep = Callable[[str, Step], None]
Trees = list[list[Item]]
"""A pass: each tree's rows are of one slot and one sequence."""


@dataclass
class _Sums:
    """One scope's sums over the passes of a step."""

    loss: float
    feedback: float
    kl_nats: dict[Kind, float]
    tokens: int
    failure: JobFailed | None = None


def train(
    base: Base,
    stack: LoraStack,
    learners: Sequence[Learner],
    *,
    settings: Settings,
    checkpoints: Checkpoints,
    on_step: OnStep,
) -> None:
    """Train the learners' slots to the end of each. One that fails has its `failure` set, and the others go on."""
    prepare_learners(base, learners)
    optimizer = SlotAdamW(stack.weights_U_N)
    for learner in learners:
        checkpoints.resume(learner, stack, optimizer)
    passes = Passes(base, stack, most_tokens=gradient_tokens(base, settings))
    while active := [learner for learner in learners if learner.going]:
        draw(base, stack, [learner for learner in active if learner.progress.step % CHECKPOINT_STEPS == 0])
        # Around the step alone: transformers gives a model in this mode no cache, so that it would sample by the last token only.
        with activations_checkpointed(base):
            take_step(passes, active, optimizer, on_step)
        for learner in active:
            ended, step = learner.progress.ended, learner.progress.step
            if learner.failure is None and (ended or step % CHECKPOINT_STEPS == 0):
                checkpoints.save(learner, stack, optimizer)


def prepare_learners(base: Base, learners: Sequence[Learner]) -> None:
    """What the base says of every row, once: references, hindsight credit, and whether contexts help."""
    rows = list({row: None for learner in learners for row in learner.rows()})
    references = dict(zip(rows, reply_logprobs(base, rows), strict=True))
    for learner in learners:
        learner.references = {row: references[row] for row in learner.rows()}
        learner.hindsight = _hindsight(base, learner)
        learner.distills = context_helps(base, learner)


def _hindsight(base: Base, learner: Learner) -> dict[Row, Credited]:
    """What comments say of replies' tokens, by the rows that those are trained in."""
    told = [p for p in learner.examples if p.with_comment is not None]
    rows = [row for p in told for row in (p.with_comment, p.alone, p.with_context) if row is not None]
    firsts = list(dict.fromkeys(Row(row.prompt, row.replies[:1]) for row in rows))
    logprobs = dict(zip(firsts, token_logprobs_of(base, firsts), strict=True))

    def of_first(row: Row) -> torch.Tensor:
        return logprobs[Row(row.prompt, row.replies[:1])]

    found = {}
    for prepared in told:
        assert prepared.with_comment is not None
        said_N, plain_N = of_first(prepared.with_comment), of_first(prepared.alone)
        advantages_N = hindsight_advantages(said_N, plain_N, torch.zeros_like(plain_N, dtype=torch.long), 1)
        found[prepared.alone] = Credited(advantages_N, plain_N)
        if prepared.with_context is not None:
            found[prepared.with_context] = Credited(advantages_N, of_first(prepared.with_context))
    return found


def take_step(passes: "Passes", active: Sequence[Learner], optimizer: SlotAdamW, on_step: OnStep) -> None:
    """One step of each of these learners, their rows packed together. One that fails has its `failure` set, and its weights stay."""
    sums = passes.run([item for number, learner in enumerate(active) for item in learner.items(number)], len(active))
    slots = [learner.slot for learner in active]
    gradient_S_N = passes.stack.weights_U_N.grad[slots]
    finite_S = gradient_S_N.isfinite().all(dim=1).tolist()
    going = []
    for number, (learner, of) in enumerate(zip(active, sums, strict=True)):
        rate, loss = learner.rate, of.loss if finite_S[number] else math.nan
        try:
            if of.failure is not None:
                raise of.failure
            step = learner.took(loss=loss, feedback_loss=of.feedback, kl_nats=of.kl_nats, tokens=of.tokens)
            on_step(learner.job, step)
        except (JobFailed, LeaseLost) as error:
            learner.failure = error
            continue
        going.append((number, rate))
    if going:
        numbers = [number for number, _ in going]
        optimizer.step(
            clipped(gradient_S_N[numbers], most=MAX_GRADIENT_NORM),
            [slots[number] for number in numbers],
            rates=[rate for _, rate in going],
            steps=[active[number].progress.step for number in numbers],
        )


class Passes:
    """Forward and backward of a step's rows, in passes of similar length that fit the memory."""

    def __init__(self, base: Base, stack: LoraStack, *, most_tokens: int) -> None:
        self.base = base
        self.stack = stack
        self.most_tokens = most_tokens

    def run(self, items: Sequence[Item], learners: int) -> list[_Sums]:
        """Sets the gradient of all items' weighted losses; the sums by learner, a failure where a row alone does not fit the memory."""
        self.stack.weights_U_N.grad = torch.zeros_like(self.stack.weights_U_N)
        sums = [_Sums(0.0, 0.0, dict.fromkeys(KINDS, 0.0), 0) for _ in range(learners)]
        waiting = list(self._batches(items))
        while waiting:
            trees = waiting.pop()
            try:
                found = self._backward(trees)
            except torch.OutOfMemoryError:
                # The gradient is the last thing that a pass adds to, so nothing of it was added.
                waiting += self._smaller(trees, sums)
                continue
            for item, loss in zip(chain(*trees), found, strict=True):
                _book(sums[item.learner], item, loss)
        return sums

    def _smaller(self, trees: Trees, sums: Sequence[_Sums]) -> list[Trees]:
        """A pass that did not fit the memory as two, from now on so; of one row alone, its scope fails."""
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        [first, *others] = trees
        if len(first) == 1 and not others:
            tokens = len(first[0].row)
            sums[first[0].learner].failure = JobFailed(f"a row of {tokens} tokens does not fit the device's memory")
            return []
        self.most_tokens = max(self.most_tokens // 2, 1)
        log.warning("out of memory: passes of at most %d tokens from now on", self.most_tokens)
        if others:
            return [trees[: len(trees) // 2], trees[len(trees) // 2 :]]
        return [[first[: len(first) // 2]], [first[len(first) // 2 :]]]

    def _batches(self, items: Sequence[Item]) -> Iterator[Trees]:
        """All items, those of a slot that begin alike as trees."""
        trees = list(grow([item.row for item in items], [item.slot for item in items], max_tokens=self.most_tokens))
        for batch in batches(trees, [tree.tokens for tree in trees], max_tokens=self.most_tokens):
            yield [[items[i] for i in trees[n].rows] for n in batch]

    def _backward(self, trees: Trees) -> list[float]:
        """Adds a pass to the gradient; the losses of its items, in the order of the trees."""
        items = [item for tree in trees for item in tree]
        packed = pack_trees([[item.row for item in tree] for tree in trees], device=self.base.device)
        slots = [tree[0].slot for tree in trees]
        with self.stack.on(slots[0] if len(set(slots)) == 1 else slots):
            loss_I = losses(self.base, packed, self.base.states(packed), items)
            weight_I = torch.tensor([item.weight for item in items], device=loss_I.device)
            (loss_I * weight_I).sum().backward()
        return loss_I.tolist()


def _book(sums: _Sums, item: Item, loss: float) -> None:
    sums.loss += item.weight * loss
    sums.tokens += len(item.row)
    if isinstance(item.task, Judged):
        sums.feedback += item.weight * loss
    elif isinstance(item.task, Anchored):
        sums.kl_nats[item.task.kind] += loss / ANCHORS_PER_STEP


def gradient_tokens(base: Base, settings: Settings) -> int:
    """Most tokens of a pass with gradient."""
    return settings.train_pass_tokens or (CUDA_GRADIENT_TOKENS if base.device.type == "cuda" else CPU_GRADIENT_TOKENS)


@contextmanager
def activations_checkpointed(base: Base) -> Iterator[None]:
    """While inside, a large model computes its layers' activations again for the gradient instead of keeping them."""
    if sum(p.numel() for p in base.model.parameters()) < CHECKPOINTED_FROM_PARAMETERS:
        yield
        return
    # transformers looks at the training mode; of a frozen base only dropout depends on it too, and the families served have none.
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.model.train()
    try:
        yield
    finally:
        base.model.eval()
        base.model.gradient_checkpointing_disable()
