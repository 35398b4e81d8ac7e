"""When contexts are optimized, when a scope is consolidated, and whether the candidate is served."""

from service.domain.fast_weights import FastWeights
from service.domain.slow_weights import Promote, Reject, TrainReport

# Below this a difference of margins is numerical noise between two measurements of the same weights in float32.
MIN_GAIN_NATS = 1e-3


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
    *, pending: int, oldest_age_seconds: float, due_feedbacks: int, due_age_seconds: float, min_feedbacks: int
) -> bool:
    """Whether a scope with `pending` feedbacks past its watermark should be consolidated now."""
    if pending >= due_feedbacks:
        return True
    return pending >= min_feedbacks and oldest_age_seconds >= due_age_seconds


def decide(report: TrainReport) -> Promote | Reject:
    """Promote only what is within both KL budgets and beats what serves now, and the base, on held-out feedback."""
    reasons = []
    for kind, kl in (("plain-text", report.kl_text), ("chat", report.kl_chat)):
        if not kl.within:
            reasons.append(
                f"KL on {kind} anchors is {kl.upper95_nats:.4f} nats per token (95 % bound; worst anchor {kl.worst_nats:.4f}), "
                f"over the budget of {kl.budget_nats:g}"
            )
    if report.scale == 0.0:
        reasons.append("no scale of the adapter above 0 fits the KL budget")
    margins = report.margins
    for name, margin in (("the base", margins.base), ("the version in use", margins.current)):
        if margins.candidate < margin + MIN_GAIN_NATS:
            reasons.append(
                f"held-out margin {margins.candidate:.4f} nats per token does not beat {name}'s {margin:.4f} "
                f"({report.heldout_examples} examples)"
            )
    # It will be served with the user's context, which may already do what the adapter learnt.
    with_context, base_with_context = margins.candidate_with_context, margins.base_with_context
    if with_context is not None and base_with_context is not None and with_context < base_with_context:
        reasons.append(
            f"with the context its held-out margin of {with_context:.4f} nats per token is below the base's {base_with_context:.4f}"
        )
    return Reject(reasons=tuple(reasons)) if reasons else Promote()
