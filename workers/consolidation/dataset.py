"""From logs to examples: what is usable, what trains, what is held out to judge.

The split is by time and by prompt: the newest feedback judges, because it is what the user wants now; feedback on one prompt, be it of
many interactions, is on one side. Only what is past the watermark judges, so no version is judged by what its parent was trained on.
In a scope of several users the newest is what is newest of each.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from service.domain.comments import guideline_text
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Frozen, Interaction, Message, last_user_text
from service.errors import JobFailed
from workers.consolidation.work import UserLog, Work

# Of the new feedback.
HELDOUT_SHARE = 0.25
# Fewer say nothing; two are still weak, and the report gives the count.
MIN_HELDOUT = 2
# More sharpen the margin little and cost a pass each for base, parent and candidate.
MAX_HELDOUT = 32
# One third of the mix is older feedback, so that a round does not undo the last.
REPLAY_PER_NEW = 0.5
# In a cohort or the whole tenant nobody has more than twice an equal share, so that one user can't steer the adapter.
SHARE_OF_EQUAL = 2.0

Kind = Literal["correction", "preference", "rating", "comment"]


class Example(Frozen):
    """One interaction's feedback as something to learn.

    A correction or preference has a `rejected` reply; a rating or a comment has only the reply that it is of.
    """

    id: str
    """The interaction's."""
    user: str
    kind: Kind
    messages: tuple[Message, ...]
    reply: str
    rejected: str | None = None
    rating: float = 1.0
    """In [-1, 1]; 0 only of a comment alone."""
    comment: str | None = None
    """What was said of the reply, where that says what to do and there is no pair that shows it."""
    reply_ended: bool = True
    """Whether the reply ended by itself, so that its end is part of what is learnt."""
    rejected_ended: bool = True
    new: bool = True
    """Past the watermark; the others are replay."""

    @property
    def judges(self) -> bool:
        """Whether a margin can be measured on it: a comment alone says nothing of how likely its reply should be."""
        return self.kind != "comment"

    @property
    def asked(self) -> str:
        """The last user message."""
        return last_user_text(self.messages)

    @property
    def prompt(self) -> str:
        """The last user message, as the split knows it: case and spacing don't make another prompt."""
        return " ".join(self.asked.casefold().split())


@dataclass(frozen=True)
class Dataset:
    """The two sides, and what was left out and why."""

    train: list[Example]
    heldout: list[Example]
    dropped: Counter[str] = field(default_factory=Counter)


def build(work: Work, *, min_examples: int, max_train: int) -> Dataset:
    """The examples of a work's logs.

    Args:
        min_examples: fewest usable feedbacks.
        max_train: most examples to train on, which a run has steps for; the newest are kept.

    Raises:
        JobFailed: too little to train on or to judge by; the counts are in the message.
    """
    dropped: Counter[str] = Counter()
    by_user = {user: usable(user, log, dropped) for user, log in work.users.items()}
    cap = most_of_one([len(own) for own in by_user.values() if own])
    if over := sum(max(0, len(own) - cap) for own in by_user.values()):
        dropped["over one user's share"] = over
    examples = _interleaved({user: own[-cap:] for user, own in by_user.items()}, salt=work.number)
    new = sum(example.new for example in examples)
    found = f"{len(examples)} usable feedbacks, {new} of them new{_reasons(dropped)}"
    if len(examples) < min_examples or new == 0:
        raise JobFailed(f"too little data: {found}; at least {min_examples} are needed, and one new")
    train, heldout = split(examples)
    if not heldout:
        raise JobFailed(
            f"too little data: {found}, and nothing of it can be held out to judge by: that takes ratings, corrections or "
            "preferences on two new prompts"
        )
    return Dataset(train=mix(train, max_train, salt=work.number), heldout=heldout[-MAX_HELDOUT:], dropped=dropped)


def usable(user: str, log: UserLog, dropped: Counter[str]) -> list[Example]:
    """A user's feedback as examples, oldest first, repeated ones once; `dropped` counts the rest by reason."""
    examples: dict[tuple[object, ...], Example] = {}
    for interaction in log.interactions:
        new = log.revisions.get(interaction.id, log.head) > log.watermark
        example = example_of(interaction, user=user, new=new)
        if isinstance(example, str):
            dropped[example] += 1
            continue
        key = (example.messages, example.reply, example.rejected, example.rating, example.comment)
        if examples.pop(key, None):
            dropped["said twice"] += 1
        examples[key] = example
    return list(examples.values())


def example_of(interaction: Interaction, *, user: str, new: bool) -> Example | str:
    """The example that an interaction's standing signals make, or why they make none. A pair goes before a rating."""
    pair = interaction.pair()
    replies = (interaction.reply,) if pair is None else pair
    if not interaction.last_user_text().strip():
        return "no user message"
    if pair is None and not interaction.signals.stated_rating() and _telling_comment(interaction) is None:
        return "no signal to learn from"
    if not all(reply.strip() for reply in replies):
        return "an empty reply"
    if pair is not None and pair[0].strip() == pair[1].strip():
        return "both replies the same"
    return _example(interaction, pair, user=user, new=new)


def _example(interaction: Interaction, pair: tuple[str, str] | None, *, user: str, new: bool) -> Example:
    signals = interaction.signals
    # Only what was served can have been cut off; what a user wrote ends where it ends.
    served_ended = interaction.finish_reason != "length"
    common = {"id": interaction.id, "user": user, "messages": interaction.messages, "new": new}
    if pair is None:
        rating = signals.stated_rating() or 0.0
        return Example(
            **common,
            kind="rating" if rating else "comment",
            reply=interaction.reply,
            rating=rating,
            comment=_telling_comment(interaction),
            reply_ended=served_ended,
        )
    served_is_wanted = signals.correction is None and pair[0] == interaction.reply
    return Example(
        **common,
        kind="preference" if signals.correction is None else "correction",
        reply=pair[0],
        rejected=pair[1],
        reply_ended=served_ended or not served_is_wanted,
        rejected_ended=served_ended or served_is_wanted,
    )


def _telling_comment(interaction: Interaction) -> str | None:
    """What the comment asks for; None where it is praise or blame alone, which counts as a rating."""
    comment = interaction.signals.comment
    return guideline_text(comment) if comment else None


def split(examples: Sequence[Example], *, share: float = HELDOUT_SHARE) -> tuple[list[Example], list[Example]]:
    """(training, held-out), each in the order given, oldest first; no prompt is on both sides.

    The newest prompts are held out, so many that they have about `share` of the new examples, and at least `MIN_HELDOUT` where that leaves
    as many to train on. What was spoken of before the watermark, or can't judge, is never held out.
    """
    new = [example for example in examples if example.new]
    most = len(new) // 2
    wanted = min(max(round(share * len(new)), MIN_HELDOUT), most)
    old_prompts = {example.prompt for example in examples if not example.new}
    by_prompt: dict[str, list[Example]] = {}
    for example in reversed(new):
        by_prompt.setdefault(example.prompt, []).append(example)
    heldout: set[str] = set()
    count = 0
    for prompt, group in by_prompt.items():
        if count >= wanted:
            break
        can_judge = prompt not in old_prompts and all(example.judges for example in group)
        if can_judge and count + len(group) <= most:
            heldout.add(prompt)
            count += len(group)
    return [e for e in examples if e.prompt not in heldout], [e for e in examples if e.prompt in heldout]


def mix(train: Sequence[Example], most: int, *, salt: int) -> list[Example]:
    """The newest new examples, with up to half as many of replay, which differ from one version to the next.

    Args:
        most: most examples in all.
        salt: the version's number.
    """
    new = [example for example in train if example.new]
    old = [example for example in train if not example.new]
    replay = min(len(old), math.ceil(len(new) * REPLAY_PER_NEW), most // 3)
    drawn = sorted(old, key=lambda example: _place(f"{salt}\0{example.id}"))[:replay]
    return drawn + new[-(most - replay) :]


def without_own(state: FastWeights, example: Example) -> FastWeights:
    """The fast weights as if this example's interaction had never been spoken of, so that its answer is not in its own context.

    An exemplar for the same prompt goes too, whoever supports it.
    """
    guidelines = {
        name: item
        for name, item in state.guidelines.items()
        if item.support != 1 or example.id not in item.sources or item.by_hand
    }
    exemplars = {
        name: item
        for name, item in state.exemplars.items()
        if example.id not in item.sources and " ".join(item.prompt.casefold().split()) != example.prompt
    }
    return state.model_copy(update={"guidelines": guidelines, "exemplars": exemplars})


def most_of_one(counts: Sequence[int]) -> int:
    """The most examples that a user may have, so that nobody has more than `SHARE_OF_EQUAL` times an equal share of what is kept."""
    cap = max(counts, default=1)
    # What is cut off one makes the equal share smaller.
    while counts and (share := int(SHARE_OF_EQUAL * sum(min(count, cap) for count in counts) / len(counts))) < cap:
        cap = share
    return cap


def _interleaved(by_user: dict[str, list[Example]], *, salt: int) -> list[Example]:
    """All users' examples, replay first, each user's in their order and evenly over the whole, so that its end holds the newest of each.

    Wherever it is cut, each user has about the same share on both sides as in the whole. Where a user's begin differs from one version to
    the next, so that it is not always the same ones of those who have said little who are left out.

    Args:
        by_user: oldest first.
        salt: the version's number.
    """
    placed: list[tuple[bool, float, Example]] = []
    for user, own in by_user.items():
        start = _place(f"{salt}\0{user}")
        for new in (False, True):
            group = [example for example in own if example.new is new]
            placed += [(new, (n + start) / len(group), example) for n, example in enumerate(group)]
    return [example for _, _, example in sorted(placed, key=lambda entry: entry[:2])]


def _place(text: str) -> float:
    """Where a text falls in [0, 1), the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _reasons(dropped: Iterable[str]) -> str:
    counts = ", ".join(f"{count} with {reason}" for reason, count in sorted(Counter(dropped).items()))
    return f" (left out: {counts})" if counts else ""
