"""What a candidate says: greedy replies beside the base's, for what no likelihood shows: loops, repetition, replies cut short or run on.

Where a scope has norms, how well replies hold them, and of a user's scope, how near they are in style to what the user wanted, as they are
served now and as they would be. Beside that, reported and not judged: the reverse KL on the adapter's own samples, which is the paper's
measure (arXiv 2605.12484).

Letters: N reply tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.domain.bootstrap import paired
from service.domain.measures import Difference, Generated
from workers.consolidation.anchors import COMPLETION_TOKENS, PASS_TOKENS, Anchor
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.divergence import reverse_kl_of_states
from workers.consolidation.lora import LoraStack
from workers.consolidation.margins import mean, rows_with
from workers.consolidation.prepare import Prepared
from workers.consolidation.rows import Row, batches, pack
from workers.consolidation.sampling import GumbelNoise, sample
from workers.consolidation.speaker import REPLY_TOKENS, Case, Speaker, Tokens

# The newest held-out prompts, and chat anchors from all over the list. Generating takes a pass a token, so there are few of each.
HELDOUT_PROMPTS = 6
ANCHOR_PROMPTS = 6
SEED = 30

# A phrase this long that was there before counts as repetition.
GRAM = 4
# A loop says a phrase of at most so many tokens so often, and goes on for at least so many tokens.
LOOP_PERIOD = 12
LOOP_TIMES = 3
LOOP_TOKENS = 12


@dataclass(frozen=True)
class Replies:
    """What is said of one candidate."""

    base: list[Tokens]
    """By the base to the newest held-out prompts, then to general ones, without a context."""
    candidate: list[Tokens]
    now: list[Tokens]
    """To the newest held-out prompts as they are served now; none where neither norms nor a user's style judge them."""
    then: list[Tokens]
    """As they would be served."""
    reverse_kl_nats: float


def say(
    speaker: Speaker,
    candidates: Sequence[Candidate],
    anchors: Sequence[Anchor],
    *,
    scales: Sequence[float],
    left_out: Sequence[frozenset[str]],
) -> list[Replies]:
    """For each candidate greedy replies beside the base's, all scopes side by side.

    Args:
        anchors: chat anchors that judge.
        scales: of what the candidates' slots hold.
        left_out: for each candidate the context items that it has absorbed.
    """
    general = [anchor.row.prompt for anchor in anchors[:: max(len(anchors) // ANCHOR_PROMPTS, 1)]][:ANCHOR_PROMPTS]
    arms: list[list[Case]] = []
    for c, scale, gone in zip(candidates, scales, left_out, strict=True):
        prompts = [*(p.alone.prompt for p in _newest(c)), *general]
        arms += [[Case(prompt) for prompt in prompts], [Case(prompt, c.slot, scale) for prompt in prompts]]
        judged = c.adherence is not None or c.style is not None
        arms += [served_now(speaker.base, c), served_then(speaker.base, c, scale, gone)] if judged else [[], []]
    said = iter(speaker.replies(arms))
    reverse_kl = reverse_kl_nats(speaker.base, speaker.judges, general, slots=[c.slot for c in candidates])
    return [
        Replies(base=next(said), candidate=next(said), now=next(said), then=next(said), reverse_kl_nats=nats)
        for nats in reverse_kl
    ]


def served_now(base: Base, candidate: Candidate) -> list[Case]:
    """The newest held-out prompts as they are served now."""
    absorbed = candidate.context.absorbed if candidate.context else frozenset()
    return _served(base, candidate, absorbed, candidate.serving, 1.0)


def served_then(base: Base, candidate: Candidate, scale: float, left_out: frozenset[str]) -> list[Case]:
    """The same prompts by the candidate at a scale, with the context without these items."""
    return _served(base, candidate, left_out, candidate.slot, scale)


def _served(base: Base, candidate: Candidate, gone: frozenset[str], slot: int | None, scale: float) -> list[Case]:
    return [Case(row.prompt, slot, scale) for row in rows_with(base, candidate, gone)[-HELDOUT_PROMPTS:]]


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that were there before in the same reply; 0 where it is too short to have two."""
    grams = list(zip(*(tokens[i:] for i in range(GRAM)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether a reply ends by saying the same over and over."""
    for period in range(1, LOOP_PERIOD + 1):
        length = max(LOOP_TIMES * period, LOOP_TOKENS)
        end = tokens[-length:]
        if len(end) == length and end[period:] == end[:-period]:
            return True
    return False


def reverse_kl_nats(base: Base, judges: LoraStack, prompts: Sequence[Tokens], *, slots: Sequence[int]) -> list[float]:
    """For each slot's adapter KL(adapter || base) in nats per token on its own replies, sampled at temperature 1; the mean over replies."""
    cases = [(prompt, slot) for slot in slots for prompt in prompts]
    seeds = [SEED + n for _ in slots for n in range(len(prompts))]
    sampled = sample(
        base,
        [prompt for prompt, _ in cases],
        max_new_tokens=COMPLETION_TOKENS,
        noise=GumbelNoise(seeds, device=base.device),
        stack=judges,
        slots=[slot for _, slot in cases],
    )
    rows = [Row(prompt, (reply,)) for (prompt, _), reply in zip(cases, sampled, strict=True)]
    kl = [0.0] * len(rows)
    for batch in batches(rows, [len(row) for row in rows], max_tokens=PASS_TOKENS):
        packed = pack([rows[i] for i in batch], device=base.device)
        with torch.no_grad():
            base_states_N_D = base.states(packed)
            with judges.on([cases[i][1] for i in batch]):
                states_N_D = base.states(packed)
            means = packed.mean_by_reply(reverse_kl_of_states(base_states_N_D, states_N_D, base.head)).tolist()
        for i, nats in zip(batch, means, strict=True):
            kl[i] = nats
    return [mean(kl[n * len(prompts) : (n + 1) * len(prompts)]) for n in range(len(slots))]


def _newest(candidate: Candidate) -> list[Prepared]:
    return candidate.heldout[-HELDOUT_PROMPTS:]


def report(base: Base, candidate: Candidate, said: Replies) -> Generated:
    """What the replies show."""
    wanted = [min(len(p.alone.replies[0]), REPLY_TOKENS) for p in _newest(candidate) if _is_wanted(p)]
    return Generated(
        prompts=len(said.base),
        base_repetition=mean([repetition(tokens) for tokens in said.base]),
        repetition=mean([repetition(tokens) for tokens in said.candidate]),
        base_loops=mean([float(loops(tokens)) for tokens in said.base]),
        loops=mean([float(loops(tokens)) for tokens in said.candidate]),
        base_tokens=mean([len(tokens) for tokens in said.base]),
        tokens=mean([len(tokens) for tokens in said.candidate]),
        wanted_tokens=mean(wanted) if wanted else None,
        reverse_kl_nats=said.reverse_kl_nats,
        adherence_before=_adherence(base, candidate, said.now),
        adherence=_adherence(base, candidate, said.then),
        style_before=style(base, candidate, said.now),
        style=style(base, candidate, said.then),
        style_change=_style_change(base, candidate, said),
    )


def style(base: Base, candidate: Candidate, replies: Sequence[Tokens]) -> float | None:
    """How near replies to the newest held-out prompts are to what the user wants, the mean; None where nothing tells."""
    return mean(_styles(base, candidate, replies)) if candidate.style else None


def _style_change(base: Base, candidate: Candidate, said: Replies) -> Difference | None:
    if candidate.style is None:
        return None
    return paired(_styles(base, candidate, said.then), _styles(base, candidate, said.now), seed=SEED)


def _styles(base: Base, candidate: Candidate, replies: Sequence[Tokens]) -> list[float]:
    assert candidate.style is not None
    asked = [p.example.asked for p in _newest(candidate)]
    return [candidate.style(prompt, text) for prompt, text in zip(asked, _texts(base, replies), strict=True)]


def _is_wanted(prepared: Prepared) -> bool:
    return prepared.example.rejected is not None or prepared.example.rating > 0


def _adherence(base: Base, candidate: Candidate, replies: Sequence[Tokens]) -> float | None:
    if candidate.adherence is None:
        return None
    asked = [p.example.asked for p in _newest(candidate)]
    return mean([candidate.adherence(prompt, text) for prompt, text in zip(asked, _texts(base, replies), strict=True)])


def _texts(base: Base, replies: Sequence[Tokens]) -> list[str]:
    return [base.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in replies]
