"""The scale that fits the budgets, and which context items become unnecessary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.slow_weights import Divergence
from workers.consolidation.gate import AIM, MAX_MEASUREMENTS, Measured, fit_scale


def divergence(nats, *, worst=None, budget):
    return Divergence(
        mean_nats=nats,
        upper95_nats=nats,
        worst_nats=nats if worst is None else worst,
        anchors=48,
        tokens=1000,
        budget_nats=budget,
    )


class Curve:
    """KL that grows with the scale as real adapters' does, and every scale that was asked for."""

    def __init__(self, text, chat, *, power=2.0, worst=1.0):
        self.text, self.chat, self.power, self.worst = text, chat, power, worst
        self.asked = []

    def __call__(self, scale):
        self.asked.append(scale)
        grown = scale**self.power
        return Measured(
            scale=scale,
            sha256=f"{scale}",
            kl={
                "text": divergence(self.text * grown, worst=self.worst * self.text * grown, budget=0.02),
                "chat": divergence(self.chat * grown, worst=self.worst * self.chat * grown, budget=0.10),
            },
        )


def test_an_adapter_within_its_budgets_is_left_whole_after_one_measurement():
    curve = Curve(0.01, 0.05)
    assert fit_scale(curve).scale == 1.0
    assert curve.asked == [1.0]


@given(
    text=st.floats(1e-4, 5.0),
    chat=st.floats(1e-4, 50.0),
    power=st.floats(1.0, 4.0),
    worst=st.floats(1.0, 40.0),
)
def test_the_chosen_scale_was_measured_and_is_never_over_a_budget(text, chat, power, worst):
    curve = Curve(text, chat, power=power, worst=worst)
    chosen = fit_scale(curve)
    assert chosen.used <= 1.0
    assert chosen.scale in curve.asked
    assert len(curve.asked) <= MAX_MEASUREMENTS + 2


@pytest.mark.parametrize(("text", "chat"), [(0.08, 0.05), (0.01, 0.9), (0.3, 1.2)])
def test_little_of_the_budget_is_left_unused(text, chat):
    curve = Curve(text, chat)
    assert fit_scale(curve).used >= AIM - 0.06
    assert len(curve.asked) <= 3


def test_one_anchor_far_over_scales_down_although_the_mean_fits():
    chosen = fit_scale(Curve(0.01, 0.05, worst=30.0))
    assert chosen.scale < 1.0
    assert chosen.kl["text"].within


def test_where_nothing_fits_the_scale_is_zero():
    class NeverFits(Curve):
        def __call__(self, scale):
            measured = super().__call__(scale)
            over = {kind: divergence(1.0, budget=d.budget_nats) for kind, d in measured.kl.items()}
            return measured if scale == 0.0 else Measured(scale=scale, sha256="", kl=over)

    assert fit_scale(NeverFits(1.0, 1.0)).scale == 0.0
