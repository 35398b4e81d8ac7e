"""The judging of candidates that fit their budgets, many scopes side by side: what each is worth, at which scale, beside what serves now.

    rivals      held-out margins of the base, the version in use, the pooled one, and what serves now
    frontier    margins and KL at quarters of the scale that fits, with the whole context
    scale       of those at which replies keep the user's style, the one that is worth most is the candidate's
    hand-off    which context items the candidate makes unnecessary at that scale
    the chosen  general ability, generated replies, the price

Nothing here decides; `service.domain.policy.decide` does, by the report that these figures go into.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from service.domain.bootstrap import paired
from service.domain.measures import FEW_EXAMPLES, Ability, FrontierPoint, Generated, Handed, Price
from service.domain.policy import Limits
from service.domain.price import price, value_nats
from service.domain.slow_weights import Divergence, Margins
from workers.consolidation.ability import measure_ability
from workers.consolidation.anchors import Anchors
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.gate import Measured, Meter
from workers.consolidation.generated import Replies, report, say, served_now, served_then, style
from workers.consolidation.handoff import LOST_STYLE, Answer, HandOff, Passes, context_tokens, hand_off
from workers.consolidation.lora import LoraStack
from workers.consolidation.margins import (
    SEED,
    Arm,
    Rivals,
    compare,
    mean,
    measure,
    measure_rivals,
    rows_alone,
    rows_with,
)
from workers.consolidation.rounds import in_rounds
from workers.consolidation.speaker import Speaker

# Of the largest scale that fits the budgets; each costs a pass over anchors and held-out examples.
SMALLER = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Judgement:
    """One candidate's part of the report, under the report's own names. Its folder holds the export that was judged."""

    scale: float
    kl_text: Divergence
    kl_chat: Divergence
    margins: Margins
    frontier: tuple[FrontierPoint, ...]
    absorbed: tuple[str, ...]
    handed: tuple[Handed, ...]
    context_tokens_before: int
    context_tokens_after: int
    price: Price
    ability: Ability
    generated: Generated
    notes: tuple[str, ...]
    sha256: str
    """Of the weights file in the candidate's folder."""

    def report(self) -> dict[str, Any]:
        """The fields of a `TrainReport` that are known here."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sha256"}


@dataclass(frozen=True)
class Point:
    """A candidate at one scale: margins example by example without a context and with the whole one, and what that is worth."""

    measured: Measured
    alone: list[float]
    whole: list[float]
    value_nats: float


def judge(
    base: Base,
    judges: LoraStack,
    anchors: Anchors,
    candidates: Sequence[Candidate],
    fitted: Sequence[Measured],
    *,
    meter: Meter,
    limits: Limits,
    on_pass: Callable[[], None],
) -> list[Judgement]:
    """Judge candidates at the scales that `fit_scales` found by this meter.

    Afterwards each candidate's folder and slot hold the export of the scale that its judgement names.

    Args:
        limits: what the gate will ask, so that nothing is handed off for which it would refuse all.
        on_pass: called before each of the passes that take seconds.

    Raises:
        JobFailed: an export gave other bytes than when it was measured.
    """
    on_pass()
    rivals = measure_rivals(base, judges, candidates)
    points = _frontiers(base, judges, candidates, fitted, rivals, meter=meter, on_pass=on_pass)
    speaker = Speaker(base, judges)
    now = speaker.replies([served_now(base, c) if c.style else [] for c in candidates])
    serving = [Answer(r.serving, style(base, c, said)) for r, c, said in zip(rivals, candidates, now, strict=True)]
    chosen = _in_style(speaker, candidates, points, serving, meter=meter, on_pass=on_pass)
    scales = [point.measured.scale for point in chosen]
    meter.measure(dict(enumerate(scales)))
    passes = [_passing(base, *of, limits) for of in zip(candidates, rivals, chosen, strict=True)]
    # Where a style is known, these have been said.
    then = speaker.replies(
        [served_then(base, c, s, frozenset()) if c.style else [] for c, s in zip(candidates, scales, strict=True)]
    )
    whole = [Answer(p.whole, style(base, c, said)) for p, c, said in zip(chosen, candidates, then, strict=True)]
    handed = hand_off(speaker, candidates, serving, whole, scales=scales, passes=passes, on_pass=on_pass)
    on_pass()
    abilities = measure_ability(base, judges, [c.slot for c in candidates])
    on_pass()
    gone = [of.absorbed for of in handed]
    said = say(speaker, candidates, anchors.of("chat", "judge"), scales=scales, left_out=gone)
    return [
        _judgement(
            base,
            candidates[n],
            rivals[n],
            points[n],
            chosen[n],
            handed[n],
            fitted[n],
            ability=abilities[n],
            said=said[n],
        )
        for n in range(len(candidates))
    ]


def _judgement(
    base: Base,
    c: Candidate,
    rivals: Rivals,
    points: Sequence[Point],
    chosen: Point,
    handed: HandOff,
    fitted: Measured,
    *,
    ability: Ability,
    said: Replies,
) -> Judgement:
    kl = chosen.measured.kl
    before, after = _tokens(base, c, handed.absorbed)
    gain = mean(handed.left.margins) - mean(rivals.serving)
    return Judgement(
        scale=chosen.measured.scale,
        kl_text=kl["text"],
        kl_chat=kl["chat"],
        margins=compare(rivals, alone=chosen.alone, with_context=handed.whole.margins, would_serve=handed.left.margins),
        frontier=tuple(_frontier_point(point) for point in reversed(points)),
        absorbed=tuple(item.item for item in handed.items if item.absorbed),
        handed=handed.items,
        context_tokens_before=before,
        context_tokens_after=after,
        price=price(
            kl_text_nats=kl["text"].mean_nats,
            kl_chat_nats=kl["chat"].mean_nats,
            tokens_saved=before - after,
            margin_gain_nats=gain,
            value_nats=_value_nats(chosen.measured, gain_nats=gain, tokens_saved=before - after),
        ),
        ability=ability,
        generated=report(base, c, said),
        notes=_notes(chosen, points, fitted),
        sha256=chosen.measured.sha256,
    )


def _tokens(base: Base, c: Candidate, left_out: frozenset[str]) -> tuple[int, int]:
    """Of the context as it is rendered now, and without these items."""
    now = c.context.absorbed if c.context else frozenset()
    return (
        context_tokens(c.context, left_out=now, count=base.tokens.count),
        context_tokens(c.context, left_out=left_out, count=base.tokens.count),
    )


def _passing(base: Base, c: Candidate, rivals: Rivals, chosen: Point, limits: Limits) -> Passes:
    """What the gate asks of a candidate as it would be served (`policy._worse_as_served`)."""

    def passes(left_out: frozenset[str], margins: list[float]) -> bool:
        against = paired(margins, rivals.serving, seed=SEED)
        before, after = _tokens(base, c, left_out)
        worth = _value_nats(chosen.measured, gain_nats=against.mean, tokens_saved=before - after)
        return not limits.loses(against) and not limits.is_worthless(worth)

    return passes


def _value_nats(measured: Measured, *, gain_nats: float, tokens_saved: int) -> float:
    return value_nats(
        margin_gain_nats=gain_nats,
        tokens_saved=tokens_saved,
        text_share=measured.share("text"),
        chat_share=measured.share("chat"),
    )


def _frontiers(
    base: Base,
    judges: LoraStack,
    candidates: Sequence[Candidate],
    fitted: Sequence[Measured],
    rivals: Sequence[Rivals],
    *,
    meter: Meter,
    on_pass: Callable[[], None],
) -> list[list[Point]]:
    """Each candidate at its scales, the largest first; one at scale 0, which has no smaller one, at that alone."""
    points: list[list[Point]] = [[] for _ in candidates]
    for fraction in (1.0, *SMALLER):
        some = [n for n, largest in enumerate(fitted) if fraction == 1.0 or largest.scale > 0.0]
        measured = meter.measure({n: fraction * fitted[n].scale for n in some})
        on_pass()
        arms = [
            Arm(candidates[n].heldout, rows, candidates[n].slot)
            for n in some
            for rows in (rows_alone(candidates[n]), rows_with(base, candidates[n]))
        ]
        found = iter(measure(base, judges, arms))
        for n in some:
            alone, whole = next(found), next(found)
            gain = mean(whole) - mean(rivals[n].serving)
            worth = _value_nats(measured[n], gain_nats=gain, tokens_saved=0)
            points[n].append(Point(measured[n], alone, whole, worth))
    return points


def _in_style(
    speaker: Speaker,
    candidates: Sequence[Candidate],
    points: Sequence[Sequence[Point]],
    serving: Sequence[Answer],
    *,
    meter: Meter,
    on_pass: Callable[[], None],
) -> list[Point]:
    """Each candidate's point of the highest value among those whose replies keep the user's style, with the whole context."""
    base = speaker.base

    def answered(questions: dict[int, Point]) -> dict[int, float | None]:
        on_pass()
        scales = {n: point.measured.scale for n, point in questions.items()}
        meter.measure(scales)
        said = speaker.replies([served_then(base, candidates[n], scales[n], frozenset()) for n in questions])
        return {n: style(base, candidates[n], replies) for n, replies in zip(questions, said, strict=True)}

    searches = [_search(own, now.style) for own, now in zip(points, serving, strict=True)]
    return in_rounds(searches, answered)


def _search(points: Sequence[Point], now: float | None) -> Generator[Point, float | None, Point]:
    """One candidate's: asks how its replies would be in style, where `now` they are."""
    ranked = sorted(points, key=lambda point: -point.value_nats)
    if now is None:
        return ranked[0]
    near: list[float] = []
    for point in ranked:
        found = yield point
        if found is None or found >= now - LOST_STYLE:
            return point
        near.append(found)
    # None does: the gate judges the one that comes nearest.
    return ranked[near.index(max(near))]


def _frontier_point(point: Point) -> FrontierPoint:
    return FrontierPoint(
        scale=point.measured.scale,
        kl_text_nats=point.measured.kl["text"].mean_nats,
        kl_chat_nats=point.measured.kl["chat"].mean_nats,
        margin_alone=mean(point.alone),
        margin_with_context=mean(point.whole),
        value_nats=point.value_nats,
    )


def _notes(chosen: Point, points: Sequence[Point], fitted: Measured) -> tuple[str, ...]:
    notes = []
    if any(other.value_nats > chosen.value_nats for other in points):
        notes.append("by likelihood another scale is worth more, but replies would be less as the user wants")
    scale, examples = chosen.measured.scale, len(chosen.alone)
    if examples < FEW_EXAMPLES:
        notes.append(
            f"{examples} held-out example{'s' if examples > 1 else ''}: the bounds say little, so every one of them must be better"
        )
    if scale < fitted.scale:
        notes.append(
            f"the largest scale within the budgets is {fitted.scale:.3g}; {scale:.3g} is worth more for the drift that it costs"
        )
    if fitted.scale == 0.0:
        notes.append("no scale above 0 fits the budgets")
    return tuple(notes)
