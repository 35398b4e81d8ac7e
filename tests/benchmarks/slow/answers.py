"""Each arm's greedy replies after a consolidation, given in this process, and how many of them satisfy their users."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from service.domain.context import render
from service.domain.feedback import Message
from service.settings import Settings
from tests.benchmarks.learning.arms import oracle
from tests.benchmarks.learning.prompts import Prompt
from tests.benchmarks.learning.users import judge
from tests.benchmarks.slow.teaching import REPLY_TOKENS, Pupil, context_of
from workers.adapter_store import adapter_store
from workers.consolidation.base import Base
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.rows import batches
from workers.consolidation.sampling import sample
from workers.consolidation.work import Outcome

ARMS = ("base", "fast", "slow", "both", "oracle")
PASS_TOKENS = {"cpu": 8_192, "cuda": 65_536}

Prompted = tuple[tuple[int, ...], int | None]
"""A prompt's tokens, and the slot that answers it (None: the base)."""


@dataclass(frozen=True)
class Answers:
    """One arm's, for one user."""

    replies: list[str]
    satisfied: float
    """Share of the replies."""
    prompt_tokens: float
    """The mean."""


def answered(
    base: Base,
    settings: Settings,
    pupils: Sequence[Pupil],
    ends: Sequence[Outcome | None],
    *,
    train: Sequence[Prompt],
    tests: Sequence[Prompt],
    seed: int,
) -> dict[str, list[Answers]]:
    """Each arm's answers, user by user: slow and both by what was promoted, else by what serves without it.

    Args:
        ends: each user's consolidation; None where it failed.
    """
    versions = [end.version if end else None for end in ends]
    store = adapter_store(settings)
    with LoraStack.attached(base, Shape.of(settings), slots=len(pupils)) as stack:
        for slot, version in enumerate(versions):
            if version is not None:
                with store.reading(version.name) as folder:
                    stack.load(slot, folder)
        cases: list[Prompted] = []
        for slot, (pupil, version) in enumerate(zip(pupils, versions, strict=True)):
            adapter = None if version is None else slot
            gone = frozenset(version.report.absorbed) if version else frozenset()
            for arm in ARMS:
                uses = adapter if arm in ("slow", "both") else None
                cases += [(_prompt(base, settings, pupil, arm, gone, prompt, train, seed), uses) for prompt in tests]
        texts = _said(base, stack, cases)
    found: dict[str, list[Answers]] = {arm: [] for arm in ARMS}
    several = len(tests)
    for n, (pupil, arm) in enumerate((pupil, arm) for pupil in pupils for arm in ARMS):
        own = slice(n * several, (n + 1) * several)
        verdicts = [judge(pupil.person, text, prompt, train) for text, prompt in zip(texts[own], tests, strict=True)]
        found[arm].append(
            Answers(
                texts[own],
                satisfied=fmean(float(verdict.satisfied) for verdict in verdicts),
                prompt_tokens=fmean(len(prompt) for prompt, _ in cases[own]),
            )
        )
    return found


def _prompt(
    base: Base,
    settings: Settings,
    pupil: Pupil,
    arm: str,
    gone: frozenset[str],
    prompt: Prompt,
    train: Sequence[Prompt],
    seed: int,
) -> tuple[int, ...]:
    question = Message(role="user", content=prompt.ask)
    if arm in ("base", "slow"):
        return base.encode_chat([question])
    if arm == "oracle":
        told = oracle(pupil.person, train, base.tokens.count, seed=seed)
        return base.encode_chat([*(Message(**turn) for turn in told), question])
    absorbed = gone if arm == "both" else frozenset()
    context = context_of(base, pupil.state, budget_tokens=settings.most_context_tokens, absorbed=absorbed)
    return base.encode_chat(render(context, [question]))


def _said(base: Base, stack: LoraStack, cases: Sequence[Prompted]) -> list[str]:
    """The reply to each case; the same case is answered once."""
    said: dict[Prompted, str] = {}
    new = list(dict.fromkeys(cases))
    for some in ([case for case in new if case[1] is None], [case for case in new if case[1] is not None]):
        lengths = [len(prompt) + REPLY_TOKENS for prompt, _ in some]
        for batch in batches(some, lengths, max_tokens=PASS_TOKENS[base.device.type]):
            slots = [slot for slot in (some[i][1] for i in batch) if slot is not None]
            prompts = [some[i][0] for i in batch]
            replies = sample(base, prompts, max_new_tokens=REPLY_TOKENS, stack=stack, slots=slots or None)
            for i, reply in zip(batch, replies, strict=True):
                said[some[i]] = base.tokenizer.decode(reply, skip_special_tokens=True)
    return [said[case] for case in cases]
