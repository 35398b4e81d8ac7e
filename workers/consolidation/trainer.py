"""Trains the adapter: AdamW on the objective, under two adaptive KL coefficients, a fixed number of steps, seeded."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.errors import JobFailed
from service.settings import Settings
from workers.consolidation.adapters import Adapters
from workers.consolidation.anchors import KINDS, PASS_TOKENS, Anchor, Anchors, Kind
from workers.consolidation.base import Base
from workers.consolidation.divergence import kl_of_states
from workers.consolidation.objective import next_beta, pair_loss, rate_loss
from workers.consolidation.prepare import Prepared
from workers.consolidation.rows import Row, batches, pack, token_logprobs

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
MAX_GRADIENT_NORM = 1.0
# Adam's steps are bounded, so a loss this far over the first one means that the numbers have run away.
EXPLODED = 50.0
# Tokens with padding whose activations are held for the gradient at once: 1.5 MB each for the default model in float32.
GRADIENT_TOKENS = 512


@dataclass(frozen=True)
class Step:
    """One step, as it is shown."""

    step: int
    loss: float
    kl_nats: dict[Kind, float]
    """Smoothed."""
    beta: dict[Kind, float]


@dataclass
class Trained:
    """What the run was like."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    last: Step | None = None


def train(
    base: Base,
    adapters: Adapters,
    examples: Sequence[Prepared],
    anchors: Anchors,
    *,
    settings: Settings,
    on_step: Callable[[Step], None],
) -> Trained:
    """Train the adapter that is attached.

    Raises:
        JobFailed: the loss is not finite or has exploded; the step is named.
    """
    plan = schedule(len(examples), steps=settings.train_steps, batch=settings.train_batch, seed=settings.train_seed)
    reference = _references(base, adapters, examples, plan)
    budgets: dict[Kind, float] = {"text": settings.kl_text_budget_nats, "chat": settings.kl_chat_budget_nats}
    steering = {kind: _cycle(anchors.of(kind, "steer"), settings.train_seed) for kind in KINDS}
    parameters = adapters.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    beta: dict[Kind, float] = {kind: BETA_START_NATS / budgets[kind] for kind in KINDS}
    smooth: dict[Kind, float] = {}
    run = Trained()
    for number, draws in enumerate(plan, start=1):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * _shape(number, settings.train_steps)
        optimizer.zero_grad(set_to_none=True)
        loss = _examples_backward(base, [(examples[i], seen) for i, seen in draws], reference, run)
        for kind in KINDS:
            kl = _anchors_backward(base, [next(steering[kind]) for _ in range(ANCHORS_PER_STEP)], beta[kind], run)
            loss += beta[kind] * kl
            smooth[kind] = KL_SMOOTHING * smooth.get(kind, kl) + (1 - KL_SMOOTHING) * kl
        _check(loss, run.losses, number, settings.train_steps)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM, error_if_nonfinite=False)
        optimizer.step()
        run.losses.append(loss)
        run.last = Step(step=number, loss=loss, kl_nats=dict(smooth), beta=dict(beta))
        on_step(run.last)
        # A fresh adapter has no KL yet; answering that by a lower beta made it overshoot.
        for kind in KINDS if number > WARMUP_STEPS else ():
            beta[kind] = next_beta(beta[kind], kl_nats=smooth[kind], target_nats=TARGET_SHARE * budgets[kind])
    return run


def schedule(count: int, *, steps: int, batch: int, seed: int) -> list[list[tuple[int, bool]]]:
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


def reply_logprobs(base: Base, rows: Sequence[Row], *, max_tokens: int = PASS_TOKENS) -> list[Tensor]:
    """Mean log-probability of each row's replies, nats per token, without gradient: one tensor a row."""
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in batches(rows, [len(row) for row in rows], max_tokens=max_tokens):
            packed = pack([rows[i] for i in batch], device=base.device)
            means_R = packed.mean_by_reply(token_logprobs(base.states(packed), base.head, packed.target_N))
            found.update(zip(batch, means_R.split([len(rows[i].replies) for i in batch]), strict=True))
    return [found[i] for i in range(len(rows))]


def _references(
    base: Base, adapters: Adapters, examples: Sequence[Prepared], plan: list[list[tuple[int, bool]]]
) -> dict[Row, Tensor]:
    """The base's mean log-probabilities of every row that the plan comes to, computed once."""
    rows = list({examples[i].row(context=seen): None for draws in plan for i, seen in draws})
    with adapters.on(None):
        return dict(zip(rows, reply_logprobs(base, rows), strict=True))


def _examples_backward(
    base: Base, draws: Sequence[tuple[Prepared, bool]], reference: dict[Row, Tensor], run: Trained
) -> float:
    """Adds the gradient of the mean loss of the examples; the loss. In passes of similar length that fit the memory."""
    rows = [prepared.row(context=seen) for prepared, seen in draws]
    total = 0.0
    for batch in batches(rows, [len(row) for row in rows], max_tokens=GRADIENT_TOKENS):
        packed = pack([rows[i] for i in batch], device=base.device)
        means_E_2 = packed.mean_by_reply(token_logprobs(base.states(packed), base.head, packed.target_N)).view(-1, 2)
        reference_E_2 = torch.stack([reference[rows[i]] for i in batch])
        loss = _loss(means_E_2, reference_E_2, [draws[i][0] for i in batch]).sum() / len(rows)
        loss.backward()
        total += loss.item()
        run.tokens += sum(len(rows[i]) for i in batch)
    return total


def _loss(means_E_2: Tensor, reference_E_2: Tensor, examples: Sequence[Prepared]) -> Tensor:
    """Each example's loss by its kind, shape (E,)."""
    h_E_2 = means_E_2 - reference_E_2
    kinds = [prepared.example.kind for prepared in examples]
    rated = torch.tensor([kind == "rating" for kind in kinds], device=h_E_2.device)
    correction_E = torch.tensor([float(kind == "correction") for kind in kinds], device=h_E_2.device)
    rating_E = torch.tensor([prepared.example.rating for prepared in examples], device=h_E_2.device)
    losses_E = torch.zeros_like(h_E_2[:, 0])
    if not rated.all():
        pairs = h_E_2[~rated]
        losses_E[~rated] = pair_loss(pairs[:, 0], pairs[:, 1], -means_E_2[~rated, 0], correction_E[~rated])
    if rated.any():
        losses_E[rated] = rate_loss(h_E_2[rated, 0], rating_E[rated], h_E_2[rated, 1])
    return losses_E


def _anchors_backward(base: Base, drawn: Sequence[Anchor], beta: float, run: Trained) -> float:
    """Adds the gradient of beta times the anchors' mean KL; the KL."""
    packed = pack([anchor.row for anchor in drawn], device=base.device)
    base_states_N_D = torch.cat([anchor.base_states_N_D for anchor in drawn])
    kl = packed.mean_by_reply(kl_of_states(base_states_N_D, base.states(packed), base.head)).mean()
    (beta * kl).backward()
    run.tokens += sum(len(anchor.row) for anchor in drawn)
    return kl.item()


def _cycle(anchors: Sequence[Anchor], seed: int) -> Iterator[Anchor]:
    """The anchors over and over, in another order each time."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(anchors, len(anchors))


def _shape(step: int, steps: int) -> float:
    """The learning rate's course: up over the first steps, then down in a straight line to a tenth."""
    warm = min(step / WARMUP_STEPS, 1.0)
    return warm * (1.0 - 0.9 * (step - 1) / max(steps - 1, 1))


def _check(loss: float, losses: Sequence[float], step: int, steps: int) -> None:
    if not math.isfinite(loss):
        raise JobFailed(f"the loss is {loss} at step {step} of {steps}: try a lower FASTSLOW_LEARNING_RATE")
    if losses and loss > EXPLODED * max(abs(losses[0]), 1.0):
        raise JobFailed(
            f"the loss exploded from {losses[0]:.3g} to {loss:.3g} at step {step} of {steps}: try a lower FASTSLOW_LEARNING_RATE"
        )
