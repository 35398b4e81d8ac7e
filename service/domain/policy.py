"""When contexts are optimized, when a scope is consolidated, and whether the candidate is served."""

from collections.abc import Iterator

from service.domain.fast_weights import FastWeights
from service.domain.feedback import Frozen
from service.domain.measures import Difference
from service.domain.slow_weights import Promote, Reject, TrainReport


def optimize_at(
    after: FastWeights, *, now: float, feedbacks: int, seconds: float, edited: bool = False
) -> float | None:
    """When contexts should be optimized again: soon with enough new feedback, else when the user falls silent; None without any.

    Args:
        after: the fast weights with all feedback folded in.
        feedbacks: so many new ones are enough.
        seconds: how long after the last feedback a user counts as silent.
        edited: the items were changed by hand, which old feedback judges as well as new.
    """
    new = after.clock - after.population.clock
    if new <= 0 and not (edited and after.clock):
        return None
    return now if new >= feedbacks else now + seconds


def is_due(
    *,
    pending: int,
    total: int,
    oldest_age_seconds: float,
    due_feedbacks: int,
    due_age_seconds: float,
    min_feedbacks: int,
    min_total: int,
) -> bool:
    """Whether a scope with `pending` feedbacks past its watermark, of `total` in its logs, should be consolidated now.

    Args:
        due_feedbacks: so many pending ones are enough at once...
        due_age_seconds: ...and `min_feedbacks` when the oldest of them is this old.
        min_total: with fewer in all, replay included, no adapter is trained.
    """
    if total < min_total:
        return False
    if pending >= due_feedbacks:
        return True
    return pending >= min_feedbacks and oldest_age_seconds >= due_age_seconds


class Limits(Frozen):
    """How far is too far: what a candidate must gain, and what it may lose."""

    min_gain_nats: float = 1e-3
    """Below this a difference of margins is numerical noise between two measurements of the same weights in float32."""
    serving_loss_nats: float = 0.05
    """What the margin as it would be served may lose, by its bound: 5 % of likelihood per token, half of a chat budget's worth."""
    min_value_nats: float = 0.0
    """What the gains must exceed the drift's cost by (`price.value_nats`)."""
    accuracy_drop: float = 0.15
    """What the share of right answers may lose, by its bound: nine of sixty. At a quarter of the text budget the default model's bound
    was 0.07, with a single answer lost."""
    ability_loss_nats: float = 0.25
    """Likewise the margin of the right answers. It fell with the scale: its bound was 0.03 at a KL of 0.0005 on plain text and 0.10 at
    0.0047, so about 0.2 is what the whole budget brings with it (extrapolated)."""
    repetition_rise: float = 0.10
    """In shares of a reply."""
    loops_rise: float = 0.15
    """In shares of the replies: one of ten may."""
    style_drop: float = 0.15
    """In [0, 1], of a mean over six replies: one of them losing all that the user wants."""
    length_factor: float = 2.0
    """How many times longer or shorter than what lies between the base's replies and the wanted ones."""

    def loses(self, against_serving: Difference) -> bool:
        """Whether the margin as it would be served may be too far below what serves now."""
        return against_serving.lower95 < -self.serving_loss_nats

    def is_worthless(self, value_nats: float) -> bool:
        """Whether the gains don't pay for the drift."""
        return value_nats <= self.min_value_nats


def decide(report: TrainReport, limits: Limits = Limits()) -> Promote | Reject:
    """Promote only what is within both KL budgets, beats what serves now, and the base, on held-out feedback, and harms nothing else.

    What was not measured is a reason against it.
    """
    reasons = [
        *_over_budget(report),
        *_not_better(report, limits),
        *_worse_as_served(report, limits),
        *_less_able(report, limits),
        *_talks_worse(report, limits),
    ]
    return Reject(reasons=tuple(reasons)) if reasons else Promote()


def _over_budget(report: TrainReport) -> Iterator[str]:
    for kind, kl in (("plain-text", report.kl_text), ("chat", report.kl_chat)):
        if not kl.within:
            yield (
                f"KL on {kind} anchors is {kl.upper95_nats:.4f} nats per token (95 % bound; worst anchor {kl.worst_nats:.4f}), "
                f"over the budget of {kl.budget_nats:g}"
            )
    if report.scale == 0.0:
        yield "no scale of the adapter above 0 fits the KL budget"


def _not_better(report: TrainReport, limits: Limits) -> Iterator[str]:
    """Without a context, so that the adapter does it and not the context.

    A few noisy ratings seldom prove anything. Where the margin is higher on average, what would be served may prove it instead: by its
    margin over what is served now, each with its context, or by replies that are nearer to what the user wants.
    """
    margins = report.margins
    if margins.against_base is None:
        yield "it was not compared with the base example by example"
    for name, margin, against in (
        ("the base", margins.base, margins.against_base),
        ("the version in use", margins.current, margins.against_current),
        ("the pooled adapter", margins.pooled, margins.against_pooled),
    ):
        if against is not None and margin is not None:
            why = _not_sure(against, limits)
            if why and not (against.mean >= limits.min_gain_nats and _better_as_served(report, limits)):
                yield (
                    f"held-out margin {margins.candidate:.4f} nats per token does not beat {name}'s {margin:.4f}: "
                    f"{why} ({against.examples} examples)"
                )


def _better_as_served(report: TrainReport, limits: Limits) -> bool:
    margin, style = report.margins.against_serving, report.generated.style_change if report.generated else None
    return any(change is not None and _not_sure(change, limits) is None for change in (margin, style))


def _not_sure(against: Difference, limits: Limits) -> str | None:
    """Why a difference is no proof of a gain; None if it is one."""
    if against.mean < limits.min_gain_nats:
        return f"the difference is {against.mean:+.4f}"
    if against.examples < 2:
        return "a single example proves nothing"
    if against.is_few and against.positive < against.examples:
        return f"with so few, all must be better, and {against.positive} are"
    if against.lower95 <= 0.0:
        return f"the difference of {against.mean:+.4f} has a 95 % bound of {against.lower95:+.4f}"
    return None


def _worse_as_served(report: TrainReport, limits: Limits) -> Iterator[str]:
    """It will be served with the user's context, which may already do what the adapter learnt."""
    margins, against = report.margins, report.margins.against_serving
    if against is None or margins.serving is None or margins.would_serve is None:
        yield "it was not compared with what serves now, each with its context"
    elif limits.loses(against):
        yield (
            f"with its context its held-out margin would be {margins.would_serve:.4f} nats per token where {margins.serving:.4f} is served "
            f"now: a difference of {against.mean:+.4f} with a 95 % bound of {against.lower95:+.4f}, below -{limits.serving_loss_nats:g}"
        )
    price = report.price
    if price is None:
        yield "its drift was not priced"
    elif limits.is_worthless(price.value_nats):
        yield (
            f"its gain of {price.margin_gain_nats:+.4f} nats per token as served and {price.tokens_saved} context tokens is not worth its "
            f"drift of {price.kl_chat_nats:.4f} nats per token on chat and {price.kl_text_nats:.4f} on plain text"
        )


def _less_able(report: TrainReport, limits: Limits) -> Iterator[str]:
    ability = report.ability
    if ability is None:
        yield "its general ability was not measured"
        return
    of = f"of {ability.questions} general questions"
    if ability.accuracy_change.lower95 < -limits.accuracy_drop:
        yield (
            f"it answers {ability.accuracy:.0%} {of}, the base {ability.base_accuracy:.0%}: a change with a 95 % bound of "
            f"{ability.accuracy_change.lower95:+.1%}, below -{limits.accuracy_drop:.0%}"
        )
    if ability.margin_change.lower95 < -limits.ability_loss_nats:
        yield (
            f"the right answers {of} lose {-ability.margin_change.mean:.3f} nats per token against the wrong ones (95 % bound "
            f"{-ability.margin_change.lower95:.3f}), more than {limits.ability_loss_nats:g}"
        )


def _talks_worse(report: TrainReport, limits: Limits) -> Iterator[str]:
    said = report.generated
    if said is None:
        yield "its replies were not looked at"
        return
    if said.repetition > said.base_repetition + limits.repetition_rise:
        yield f"its replies repeat {said.repetition:.0%} of their 4-grams, the base's {said.base_repetition:.0%}"
    if said.loops > said.base_loops + limits.loops_rise:
        yield f"{said.loops:.0%} of its replies end in a loop, of the base's {said.base_loops:.0%}"
    if said.length_drift > limits.length_factor:
        wanted = "" if said.wanted_tokens is None else f" and those that users wanted {said.wanted_tokens:.0f}"
        yield f"its replies have {said.tokens:.0f} tokens, where the base's have {said.base_tokens:.0f}{wanted}"
    if said.adherence is not None and said.adherence_before is not None and said.adherence < said.adherence_before:
        yield f"its replies hold {said.adherence:.0%} of the scope's norms, what serves now {said.adherence_before:.0%}"
    if said.style is not None and said.style_before is not None and said.style < said.style_before - limits.style_drop:
        yield (
            f"its replies are as near as {said.style:.2f} of 1 to what the user wanted, what serves now {said.style_before:.2f}"
        )
