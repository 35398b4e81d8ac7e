"""The judging of candidates that fit their budgets, many scopes side by side: what each is worth, at which scale, beside what serves now.

    rivals      held-out margins of the base, the version in use, the pooled one, and what serves now
    hand-off    which context items the candidate makes unnecessary
    frontier    margins and KL at quarters of the scale that fits; the scale of the highest value is the candidate's
    style       whether replies keep the user's style; if not, at another scale, or with the whole context
    the chosen  general ability, generated replies, the price

Nothing here decides; `service.domain.policy.decide` does, by the report that these figures go into.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from service.domain.measures import FEW_EXAMPLES, Ability, FrontierPoint, Generated, Handed, Price
from service.domain.price import price, value_nats
from service.domain.slow_weights import Divergence, Margins
from workers.consolidation.ability import measure_ability
from workers.consolidation.anchors import Anchors
from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.gate import Measured, Meter
from workers.consolidation.generated import report, say, served_now, served_then, style
from workers.consolidation.handoff import COSTS_NOTHING_NATS, HandOff, context_tokens, hand_off
from workers.consolidation.lora import LoraStack
from workers.consolidation.margins import Arm, Rivals, compare, mean, measure, measure_rivals, rows_alone, rows_with
from workers.consolidation.rounds import in_rounds
from workers.consolidation.speaker import Speaker

# Of the largest scale that fits the budgets; each costs a pass over anchors and held-out examples.
SMALLER = (0.75, 0.5, 0.25)
# Of [0, 1]: what replies may lose in style, against what serves now.
LOST_STYLE = 0.05


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
    """A candidate at one scale: margins example by example without a context, with the whole one, and with what absorption leaves."""

    measured: Measured
    alone: list[float]
    whole: list[float]
    left: list[float]


@dataclass(frozen=True)
class Choice:
    """A scale, with the hand-off or without it, and what that is worth."""

    point: Point
    hands_off: bool
    tokens_now: int
    """Of the context that is rendered now."""
    tokens: int
    """Of the one that would be."""
    gain_nats: float
    value_nats: float

    @property
    def would_serve(self) -> list[float]:
        return self.point.left if self.hands_off else self.point.whole

    @property
    def price(self) -> Price:
        kl = self.point.measured.kl
        return price(
            kl_text_nats=kl["text"].mean_nats,
            kl_chat_nats=kl["chat"].mean_nats,
            tokens_saved=self.tokens_now - self.tokens,
            margin_gain_nats=self.gain_nats,
            value_nats=self.value_nats,
        )


def judge(
    base: Base,
    judges: LoraStack,
    anchors: Anchors,
    candidates: Sequence[Candidate],
    fitted: Sequence[Measured],
    *,
    meter: Meter,
    on_pass: Callable[[], None],
) -> list[Judgement]:
    """Judge candidates at the scales that `fit_scales` found by this meter.

    Afterwards each candidate's folder and slot hold the export of the scale that its judgement names.

    Args:
        on_pass: called before each of the passes that take seconds.

    Raises:
        JobFailed: an export gave other bytes than when it was measured.
    """
    on_pass()
    rivals = measure_rivals(base, judges, candidates)
    meter.measure({n: measured.scale for n, measured in enumerate(fitted)})
    handed = hand_off(base, judges, candidates, on_pass=on_pass)
    points = _frontiers(base, judges, candidates, fitted, handed, meter=meter, on_pass=on_pass)
    options = [
        [_choices(base, c, r, h, point) for point in scales]
        for c, r, h, scales in zip(candidates, rivals, handed, points, strict=True)
    ]
    speaker = Speaker(base, judges)
    chosen = _in_style(speaker, candidates, options, handed, meter=meter, on_pass=on_pass)
    meter.measure({n: choice.point.measured.scale for n, choice in enumerate(chosen)})
    gone = [h.absorbed if choice.hands_off else frozenset() for h, choice in zip(handed, chosen, strict=True)]
    on_pass()
    abilities = measure_ability(base, judges, [c.slot for c in candidates])
    on_pass()
    scales = [choice.point.measured.scale for choice in chosen]
    said = say(speaker, candidates, anchors.of("chat", "judge"), scales=scales, left_out=gone)
    return [
        Judgement(
            scale=choice.point.measured.scale,
            kl_text=choice.point.measured.kl["text"],
            kl_chat=choice.point.measured.kl["chat"],
            margins=compare(
                rivals[n], alone=choice.point.alone, with_context=choice.point.whole, would_serve=choice.would_serve
            ),
            frontier=tuple(_frontier_point(of_scale) for of_scale in reversed(options[n])),
            absorbed=tuple(item.item for item in handed[n].items if item.item in gone[n]),
            handed=tuple(h.model_copy(update={"absorbed": h.item in gone[n]}) for h in handed[n].items),
            context_tokens_before=choice.tokens_now,
            context_tokens_after=choice.tokens,
            price=choice.price,
            ability=abilities[n],
            generated=report(base, candidates[n], said[n]),
            notes=_notes(choice, options[n], fitted[n]),
            sha256=choice.point.measured.sha256,
        )
        for n, choice in enumerate(chosen)
    ]


def _frontiers(
    base: Base,
    judges: LoraStack,
    candidates: Sequence[Candidate],
    fitted: Sequence[Measured],
    handed: Sequence[HandOff],
    *,
    meter: Meter,
    on_pass: Callable[[], None],
) -> list[list[Point]]:
    """Each candidate at its scales, the largest first; one at scale 0, which has no smaller one, at that alone."""
    on_pass()
    alone = measure(base, judges, [Arm(c.heldout, rows_alone(c), c.slot) for c in candidates])
    points = [[Point(m, a, h.whole, h.left)] for m, a, h in zip(fitted, alone, handed, strict=True)]
    some = [n for n, largest in enumerate(fitted) if largest.scale > 0.0]
    for fraction in SMALLER if some else ():
        measured = meter.measure({n: fraction * fitted[n].scale for n in some})
        on_pass()
        arms = [
            Arm(candidates[n].heldout, rows, candidates[n].slot)
            for n in some
            for rows in (
                rows_alone(candidates[n]),
                rows_with(base, candidates[n]),
                rows_with(base, candidates[n], handed[n].absorbed),
            )
        ]
        found = iter(measure(base, judges, arms))
        for n in some:
            points[n].append(Point(measured[n], next(found), next(found), next(found)))
    return points


def _choices(base: Base, c: Candidate, rivals: Rivals, handed: HandOff, point: Point) -> list[Choice]:
    """At one scale, the one that keeps the whole context, and the one that hands off, where that costs nothing at this scale either."""

    def tokens(left_out: frozenset[str]) -> int:
        return context_tokens(c.context, left_out=left_out, count=base.tokens.count)

    now = tokens(c.context.absorbed if c.context else frozenset())

    def choice(margins: list[float], left_out: frozenset[str], *, hands_off: bool) -> Choice:
        then = tokens(left_out)
        gain = mean(margins) - mean(rivals.serving)
        worth = value_nats(
            margin_gain_nats=gain,
            tokens_saved=now - then,
            text_share=point.measured.share("text"),
            chat_share=point.measured.share("chat"),
        )
        return Choice(point, hands_off=hands_off, tokens_now=now, tokens=then, gain_nats=gain, value_nats=worth)

    keeps = choice(point.whole, frozenset(), hands_off=False)
    gone = handed.absorbed
    if not gone or mean(point.left) < mean(point.whole) - COSTS_NOTHING_NATS:
        return [keeps]
    return [keeps, choice(point.left, gone, hands_off=True)]


def _in_style(
    speaker: Speaker,
    candidates: Sequence[Candidate],
    options: Sequence[Sequence[Sequence[Choice]]],
    handed: Sequence[HandOff],
    *,
    meter: Meter,
    on_pass: Callable[[], None],
) -> list[Choice]:
    """Each candidate's choice of the highest value among those whose replies keep the user's style.

    Likelihood sees a style only roughly: left to it, items would leave the context at scales at which nobody could tell that the adapter
    has learnt what they say.
    """
    base = speaker.base
    now = speaker.replies([served_now(base, c) if c.style else [] for c in candidates])
    least = [style(base, c, said) if c.style else None for c, said in zip(candidates, now, strict=True)]

    def answered(questions: dict[int, Choice]) -> dict[int, float | None]:
        on_pass()
        scales = {n: choice.point.measured.scale for n, choice in questions.items()}
        meter.measure(scales)
        gone = {n: handed[n].absorbed if choice.hands_off else frozenset() for n, choice in questions.items()}
        said = speaker.replies([served_then(base, candidates[n], scales[n], gone[n]) for n in questions])
        return {n: style(base, candidates[n], replies) for n, replies in zip(questions, said, strict=True)}

    return in_rounds([_search(own, enough) for own, enough in zip(options, least, strict=True)], answered)


def _search(options: Sequence[Sequence[Choice]], now: float | None) -> Generator[Choice, float | None, Choice]:
    """One candidate's: asks how its replies would be in style, where `now` they are."""
    ranked = sorted((choice for of_scale in options for choice in of_scale), key=lambda choice: -choice.value_nats)
    if now is None:
        return ranked[0]
    keeping: list[tuple[float, Choice]] = []
    for choice in ranked:
        found = yield choice
        if found is None or found >= now - LOST_STYLE:
            return choice
        if not choice.hands_off:
            keeping.append((found, choice))
    # None does: the gate judges the one with the whole context that comes nearest.
    return max(keeping, key=lambda of: of[0])[1]


def _frontier_point(of_scale: Sequence[Choice]) -> FrontierPoint:
    best = max(of_scale, key=lambda c: c.value_nats)
    measured = best.point.measured
    return FrontierPoint(
        scale=measured.scale,
        kl_text_nats=measured.kl["text"].mean_nats,
        kl_chat_nats=measured.kl["chat"].mean_nats,
        margin_alone=mean(best.point.alone),
        margin_with_context=mean(best.point.whole),
        value_nats=best.value_nats,
    )


def _notes(choice: Choice, options: Sequence[Sequence[Choice]], fitted: Measured) -> tuple[str, ...]:
    notes = []
    if any(other.value_nats > choice.value_nats for of_scale in options for other in of_scale):
        notes.append(
            "by likelihood more could leave the context, or another scale is worth more, but replies would be less as the user wants"
        )
    scale, examples = choice.point.measured.scale, len(choice.point.alone)
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
