"""What the model says by itself while it is trained, and what is learnt from that: from its context, and from its scope's norms.

Distillation: the frozen base with the context is the teacher of the model without it. Only where the context measurably helps: a small
base may follow its context so little that its word is worth less than the feedback (arXiv 2605.12484 finds distillation alone stalling).

Norms: several replies to a prompt, each rewarded by the share of the norms that it holds; those above their group's mean are
reinforced (`policy_gradient`).
"""

import math
from collections.abc import Sequence

import torch

from workers.consolidation.base import Base
from workers.consolidation.divergence import t95
from workers.consolidation.learner import Learner
from workers.consolidation.lora import LoraStack
from workers.consolidation.policy_gradient import group_advantages
from workers.consolidation.prepare import Prepared
from workers.consolidation.rows import Row
from workers.consolidation.sampling import GumbelNoise, sample
from workers.consolidation.scoring import reply_logprobs, reply_states, token_logprobs_of
from workers.consolidation.terms import Credited

# As long as the anchors' completions, or a little more: the style shows in what a reply opens with, and in that it ends.
SAMPLE_TOKENS = 32
DISTILLED = 4
REWARDED_PROMPTS = 2
REWARDED_GROUP = 4
# The newest pairs with a context; each is scored twice, once with a context of full length.
ASKED = 8
MIN_ASKED = 3

Drawn = tuple[Learner, Prepared]


def context_helps(base: Base, learner: Learner) -> bool:
    """Whether the context raises the base's margins on pairs that are not in it: the one-sided 95 % bound of the mean is over zero."""
    asked = [p for p in learner.examples if p.full_context is not None and p.example.rejected is not None][-ASKED:]
    if len(asked) < MIN_ASKED:
        return False
    rows = [row for p in asked for row in (p.alone, p.full_context) if row is not None]
    margins = [float(means[0] - means[1]) for means in reply_logprobs(base, rows)]
    gains = torch.tensor([shown - alone for alone, shown in zip(margins[::2], margins[1::2], strict=True)])
    bound = gains.mean() - t95(len(gains) - 1) * gains.std() / math.sqrt(len(gains))
    return bool(bound > 0)


def draw(base: Base, stack: LoraStack, learners: Sequence[Learner]) -> None:
    """Give learners that learn from their own samples new ones. A learner's depend on its step and seed, not on the others."""
    taught: list[Drawn] = []
    judged: list[Drawn] = []
    for learner in learners:
        step = learner.progress.step
        learner.distilled, learner.rewarded = [], []
        if learner.distills:
            shown = [p for p in learner.examples if p.full_context is not None]
            taught += [(learner, shown[(step * DISTILLED + n) % len(shown)]) for n in range(DISTILLED)]
        if learner.adherence is not None:
            asked = [learner.examples[(step + n) % len(learner.examples)] for n in range(REWARDED_PROMPTS)]
            judged += [(learner, p) for p in asked for _ in range(REWARDED_GROUP)]
    replies = _replies(base, stack, taught + judged)
    _teach(base, list(zip(taught, replies, strict=False)))
    for start in range(0, len(judged), REWARDED_PROMPTS * REWARDED_GROUP):
        end = start + REWARDED_PROMPTS * REWARDED_GROUP
        _reward(base, stack, judged[start:end], replies[len(taught) + start : len(taught) + end])


def _replies(base: Base, stack: LoraStack, drawn: Sequence[Drawn]) -> list[tuple[int, ...]]:
    seeds: list[int] = []
    counts: dict[str, int] = {}
    for learner, _ in drawn:
        number = counts[learner.job] = counts.get(learner.job, 0) + 1
        seeds.append(learner.settings.train_seed * 1_000_003 + learner.progress.step * 101 + number)
    return sample(
        base,
        [p.alone.prompt for _, p in drawn],
        max_new_tokens=SAMPLE_TOKENS,
        noise=GumbelNoise(seeds, device=base.device),
        stack=stack,
        slots=[learner.slot for learner, _ in drawn],
    )


def _teach(base: Base, samples: Sequence[tuple[Drawn, tuple[int, ...]]]) -> None:
    shown = [Row(p.full_context.prompt, (reply,)) for (_, p), reply in samples if p.full_context is not None]
    for ((learner, prepared), reply), states_N_D in zip(samples, reply_states(base, shown), strict=True):
        learner.distilled.append((Row(prepared.alone.prompt, (reply,)), states_N_D))


def _reward(base: Base, stack: LoraStack, drawn: Sequence[Drawn], replies: Sequence[tuple[int, ...]]) -> None:
    """One learner's samples, group by group, with the credit of each; groups that are all alike teach nothing."""
    [learner] = {learner.job: learner for learner, _ in drawn}.values()
    assert learner.adherence is not None
    texts = [base.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
    rewards = [learner.adherence(p.example.asked, text) for (_, p), text in zip(drawn, texts, strict=True)]
    advantages_P_G = group_advantages(torch.tensor(rewards).view(REWARDED_PROMPTS, REWARDED_GROUP))
    credited = [
        (Row(prepared.alone.prompt, (reply,)), advantage)
        for (_, prepared), reply, advantage in zip(drawn, replies, advantages_P_G.flatten().tolist(), strict=True)
        if advantage != 0.0
    ]
    rows = [row for row, _ in credited]
    olds = token_logprobs_of(base, rows, stack=stack, slots=[learner.slot] * len(rows))
    for (row, advantage), old_N in zip(credited, olds, strict=True):
        learner.rewarded.append((row, Credited(torch.full_like(old_N, advantage), old_N)))
