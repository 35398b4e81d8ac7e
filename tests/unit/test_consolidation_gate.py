"""The scales that fit the budgets, searched for by all scopes at once, and what is measured of the exported files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.domain.slow_weights import Divergence
from service.errors import JobFailed
from tests.candidates import candidate, random_adapter
from workers.consolidation.anchors import KINDS, load_anchors
from workers.consolidation.gate import AIM, MAX_MEASUREMENTS, Measured, Meter, fit_scales
from workers.consolidation.lora import LoraStack, Shape


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


def fit_all(curves):
    return fit_scales(lambda scales: {n: curves[n](scale) for n, scale in scales.items()}, len(curves))


def fit_scale(curve):
    return fit_all([curve])[0]


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


def test_scopes_side_by_side_find_what_each_finds_alone_and_stop_when_they_have_it():
    def curves():
        return [Curve(0.01, 0.05), Curve(0.3, 1.2), Curve(0.08, 0.05, power=1.2)]

    alone = [fit_scale(curve) for curve in curves()]
    together = curves()
    assert fit_all(together) == alone
    assert len(together[0].asked) == 1 < len(together[1].asked)


@pytest.fixture(scope="module")
def anchors(tiny_base, tmp_path_factory):
    return load_anchors(tiny_base, cache=tmp_path_factory.mktemp("anchors"), limit=8, progress=lambda *_: None)


@pytest.fixture
def trained(tiny_base, tiny_settings):
    """Two random adapters, the second far from the base."""
    with LoraStack.attached(tiny_base, Shape.of(tiny_settings), slots=2) as stack:
        random_adapter(stack, 0, size=0.02)
        random_adapter(stack, 1, size=0.3)
    return stack


@pytest.fixture
def judges(tiny_base, tiny_settings):
    with LoraStack.attached(tiny_base, Shape.of(tiny_settings), slots=3) as stack:
        yield stack


def meter(base, trained, judges, anchors, tmp_path, *, passes=None):
    candidates = [candidate(tmp_path / str(n), trained=n, slot=2 - n) for n in range(2)]
    passes = [] if passes is None else passes
    return Meter(base, trained, judges, anchors, candidates, on_pass=lambda: passes.append(1)), candidates


def test_each_scope_is_measured_on_its_own_file_against_its_own_budgets(tiny_base, trained, judges, anchors, tmp_path):
    measuring, _ = meter(tiny_base, trained, judges, anchors, tmp_path)
    both = measuring.measure({0: 1.0, 1: 1.0})
    assert both[0].kl["chat"].mean_nats < both[1].kl["chat"].mean_nats
    assert both[0].sha256 != both[1].sha256
    alone, _ = meter(tiny_base, trained, judges, anchors, tmp_path)
    for n in range(2):
        found = alone.measure({n: 1.0})[n]
        assert found.sha256 == both[n].sha256
        for kind in KINDS:
            assert found.kl[kind].mean_nats == pytest.approx(both[n].kl[kind].mean_nats, rel=1e-4)


def test_the_search_keeps_every_scope_within_its_budgets(tiny_base, trained, judges, anchors, tmp_path):
    measuring, candidates = meter(tiny_base, trained, judges, anchors, tmp_path)
    first, second = fit_scales(measuring.measure, 2)
    assert first.scale > second.scale > 0.0
    for measured, c in zip((first, second), candidates, strict=True):
        assert measured.used <= 1.0
        assert {kind: d.budget_nats for kind, d in measured.kl.items()} == c.budgets


def test_the_loss_on_the_anchors_is_told_beside_the_kl_and_nothing_at_scale_0(
    tiny_base, trained, judges, anchors, tmp_path
):
    measuring, _ = meter(tiny_base, trained, judges, anchors, tmp_path)
    whole = measuring.measure({1: 1.0})[1].kl["text"]
    none = measuring.measure({1: 0.0})[1].kl["text"]
    assert (none.mean_nats, none.loss_nats) == (
        pytest.approx(0.0, abs=1e-6),
        pytest.approx(none.base_loss_nats, abs=1e-5),
    )
    assert whole.loss_nats > whole.base_loss_nats
    # The rise is what the KL is the expectation of, on these completions.
    rise = whole.loss_nats - whole.base_loss_nats
    assert rise == pytest.approx(whole.mean_nats, rel=0.5)


def test_a_scale_is_measured_once_and_loaded_again_when_it_is_asked_for_again(
    tiny_base, trained, judges, anchors, tmp_path
):
    passes = []
    measuring, candidates = meter(tiny_base, trained, judges, anchors, tmp_path, passes=passes)
    first = measuring.measure({0: 0.5})
    loaded = judges.weights_U_N[candidates[0].slot].clone()
    measuring.measure({0: 0.25})
    assert not torch.equal(judges.weights_U_N[candidates[0].slot], loaded)
    assert measuring.measure({0: 0.5}) == first
    assert torch.equal(judges.weights_U_N[candidates[0].slot], loaded)
    assert len(passes) == 2


def test_an_export_that_comes_out_otherwise_the_second_time_is_told(tiny_base, trained, judges, anchors, tmp_path):
    measuring, _ = meter(tiny_base, trained, judges, anchors, tmp_path)
    measuring.measure({0: 0.5})
    with torch.no_grad():
        trained.weights_U_N[0] *= 1.01
    with pytest.raises(JobFailed, match="other weights"):
        measuring.measure({0: 0.5})
