"""What a candidate says: greedy replies beside the base's, for what no likelihood shows: loops, repetition, replies cut short or run on.

Beside that, reported and not judged: the reverse KL on the adapter's own samples, which is the paper's measure (arXiv 2605.12484); and
where a scope has norms, how well replies hold them, as they are served now and as they would be.

Letters: N reply tokens.
"""

from collections.abc import Iterable, Sequence

import torch

from service.domain.feedback import last_user_text
from service.domain.measures import Generated
from workers.consolidation.anchors import COMPLETION_TOKENS, PASS_TOKENS, Anchor
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.divergence import reverse_kl_of_states
from workers.consolidation.lora import LoraStack
from workers.consolidation.margins import mean, rows_with
from workers.consolidation.rows import Row, batches, pack
from workers.consolidation.sampling import sample

# The newest held-out prompts, and chat anchors from all over the list. Generating takes a pass a token, so there are few of each.
HELDOUT_PROMPTS = 4
ANCHOR_PROMPTS = 6
# Enough to see a style, a loop, and whether a short reply ends.
REPLY_TOKENS = 48
# Of all rows that are generated at once, with padding: their KV cache is 45 kB a token for the default model.
GENERATE_TOKENS = 8192
SEED = 30

# A phrase this long that was there before counts as repetition.
GRAM = 4
# A loop says a phrase of at most so many tokens so often, and goes on for at least so many tokens.
LOOP_PERIOD = 12
LOOP_TIMES = 3
LOOP_TOKENS = 12

Tokens = tuple[int, ...]
Case = tuple[Tokens, int | None]
"""A prompt, and the slot of what replies (None: the base)."""


def generate(
    base: Base,
    judges: LoraStack,
    candidates: Sequence[Candidate],
    anchors: Sequence[Anchor],
    *,
    left_out: Sequence[frozenset[str]],
) -> list[Generated]:
    """For each candidate its replies beside the base's, all scopes side by side.

    Args:
        anchors: chat anchors that judge.
        left_out: for each candidate the context items that it has absorbed.
    """
    general = [anchor.row.prompt for anchor in anchors[:: max(len(anchors) // ANCHOR_PROMPTS, 1)]][:ANCHOR_PROMPTS]
    prompts = [[*(p.alone.prompt for p in c.heldout[-HELDOUT_PROMPTS:]), *general] for c in candidates]
    served = [_served(base, c, gone) for c, gone in zip(candidates, left_out, strict=True)]
    replies = _greedy(
        base,
        judges,
        [
            (prompt, slot)
            for c, own in zip(candidates, prompts, strict=True)
            for prompt in own
            for slot in (None, c.slot)
        ]
        + [case for arms in served for arm in arms for case in arm],
    )
    reverse_kl = reverse_kl_nats(base, judges, general, slots=[c.slot for c in candidates])
    return [
        _report(base, c, own, replies, arms=arms, reverse_kl=kl)
        for c, own, arms, kl in zip(candidates, prompts, served, reverse_kl, strict=True)
    ]


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
    with judges.on([slot for _, slot in cases]):
        sampled = sample(base, [prompt for prompt, _ in cases], max_new_tokens=COMPLETION_TOKENS, seeds=seeds)
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


def _greedy(base: Base, judges: LoraStack, cases: Iterable[Case]) -> dict[Case, Tokens]:
    """The likeliest reply of each case, each generated once."""
    found: dict[Case, Tokens] = {}
    distinct = list(dict.fromkeys(cases))
    for some in ([c for c in distinct if c[1] is None], [c for c in distinct if c[1] is not None]):
        lengths = [len(prompt) + REPLY_TOKENS for prompt, _ in some]
        for batch in batches(some, lengths, max_tokens=GENERATE_TOKENS):
            slots = [slot for i in batch if (slot := some[i][1]) is not None]
            with judges.on(slots or None):
                replies = sample(base, [some[i][0] for i in batch], max_new_tokens=REPLY_TOKENS)
            found.update(zip((some[i] for i in batch), replies, strict=True))
    return found


def _served(base: Base, candidate: Candidate, left_out: frozenset[str]) -> tuple[list[Case], list[Case]]:
    """The newest held-out prompts as they are served now, and as they would be; none where no norms ask for it."""
    if candidate.adherence is None:
        return [], []
    now = rows_with(base, candidate, candidate.context.absorbed if candidate.context else frozenset())
    then = rows_with(base, candidate, left_out)
    return (
        [(row.prompt, candidate.serving) for row in now[-HELDOUT_PROMPTS:]],
        [(row.prompt, candidate.slot) for row in then[-HELDOUT_PROMPTS:]],
    )


def _report(
    base: Base,
    candidate: Candidate,
    prompts: Sequence[Tokens],
    replies: dict[Case, Tokens],
    *,
    arms: tuple[list[Case], list[Case]],
    reverse_kl: float,
) -> Generated:
    end = base.tokenizer.eos_token_id
    of_base = [_said(replies[prompt, None], end) for prompt in prompts]
    of_candidate = [_said(replies[prompt, candidate.slot], end) for prompt in prompts]
    newest = candidate.heldout[-HELDOUT_PROMPTS:]
    wanted = [
        min(len(p.alone.replies[0]), REPLY_TOKENS)
        for p in newest
        if p.example.rejected is not None or p.example.rating > 0
    ]
    before, after = (_adherence(base, candidate, [replies[case] for case in arm]) for arm in arms)
    return Generated(
        prompts=len(prompts),
        base_repetition=mean([repetition(tokens) for tokens in of_base]),
        repetition=mean([repetition(tokens) for tokens in of_candidate]),
        base_loops=mean([float(loops(tokens)) for tokens in of_base]),
        loops=mean([float(loops(tokens)) for tokens in of_candidate]),
        base_tokens=mean([len(tokens) for tokens in of_base]),
        tokens=mean([len(tokens) for tokens in of_candidate]),
        wanted_tokens=mean(wanted) if wanted else None,
        reverse_kl_nats=reverse_kl,
        adherence_before=before,
        adherence=after,
    )


def _said(tokens: Tokens, end: int) -> Tokens:
    """Without the end of turn."""
    return tokens[:-1] if tokens and tokens[-1] == end else tokens


def _adherence(base: Base, candidate: Candidate, replies: Sequence[Tokens]) -> float | None:
    if candidate.adherence is None:
        return None
    texts = [base.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in replies]
    asked = [last_user_text(p.example.messages) for p in candidate.heldout[-HELDOUT_PROMPTS:]]
    return mean([candidate.adherence(prompt, text) for prompt, text in zip(asked, texts, strict=True)])
