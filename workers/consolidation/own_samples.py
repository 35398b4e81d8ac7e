"""What distillation works on: samples of the model without its context, and the frozen base with the context as their teacher.

Only where the context measurably helps: a small base may follow its context so little that its word is worth less than the feedback
(arXiv 2605.12484 finds distillation alone stalling).
"""

import math
from collections.abc import Sequence

import torch

from workers.consolidation.base import Base
from workers.consolidation.divergence import t95
from workers.consolidation.learner import Learner
from workers.consolidation.lora import LoraStack
from workers.consolidation.prepare import Prepared
from workers.consolidation.rows import Row, pack
from workers.consolidation.sampling import sample
from workers.consolidation.scoring import reply_logprobs

# As long as the anchors' completions: the style shows in what a reply opens with, and in that it ends.
SAMPLE_TOKENS = 32
SAMPLES = 4
# The newest pairs with a context; each is scored twice, once with a context of full length.
ASKED = 8
MIN_ASKED = 3


def helps(base: Base, learner: Learner) -> bool:
    """Whether the context raises the base's margins on pairs that are not in it: the one-sided 95 % bound of the mean is over zero."""
    asked = [p for p in learner.examples if p.full_context is not None and p.example.rejected is not None][-ASKED:]
    if len(asked) < MIN_ASKED:
        return False
    rows = [row for p in asked for row in (p.alone, p.full_context) if row is not None]
    margins = [float(means[0] - means[1]) for means in reply_logprobs(base, rows)]
    gains = torch.tensor([shown - alone for alone, shown in zip(margins[::2], margins[1::2], strict=True)])
    bound = gains.mean() - t95(len(gains) - 1) * gains.std() / math.sqrt(len(gains))
    return bool(bound > 0)


def draw_samples(base: Base, stack: LoraStack, learners: Sequence[Learner]) -> None:
    """Give each learner new samples of its model, with the teacher's states on them."""
    drawn: list[tuple[Learner, Prepared]] = []
    seeds: list[int] = []
    for learner in learners:
        step, seed = learner.progress.step, learner.settings.train_seed
        asked = [p for p in learner.examples if p.full_context is not None]
        for n in range(SAMPLES):
            drawn.append((learner, asked[(step * SAMPLES + n) % len(asked)]))
            seeds.append(seed * 1_000_003 + step * SAMPLES + n)
        learner.samples = []
    with stack.on([learner.slot for learner, _ in drawn]):
        replies = sample(base, [p.alone.prompt for _, p in drawn], max_new_tokens=SAMPLE_TOKENS, seeds=seeds)
    for (learner, prepared), reply in zip(drawn, replies, strict=True):
        assert prepared.full_context is not None
        packed = pack([Row(prepared.full_context.prompt, (reply,))], device=base.device)
        with torch.no_grad():
            learner.samples.append((Row(prepared.alone.prompt, (reply,)), base.states(packed)))
