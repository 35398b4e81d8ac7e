"""Reading figures off curves: known parameters come back, and what can't be known is said to be unknown."""

import pytest

from tests.benchmarks.fst.fit import Fit, crossing, fit

SAMPLES = [64 * n for n in range(1, 21)]


@pytest.mark.parametrize(("asymptote", "mid", "steepness"), [(0.7, 300.0, 2.0), (0.45, 150.0, 1.2), (0.9, 700.0, 4.0)])
def test_a_curve_without_noise_gives_its_parameters_back(asymptote, mid, steepness):
    true = Fit(start=0.1, asymptote=asymptote, mid=mid, steepness=steepness, error=0.0)
    found = fit([(c, true.at(c)) for c in SAMPLES], start=0.1)
    assert found.asymptote == pytest.approx(asymptote, abs=0.01)
    assert found.mid == pytest.approx(mid, rel=0.03)
    assert found.steepness == pytest.approx(steepness, rel=0.05)
    assert found.error < 2e-3


def test_some_noise_moves_the_asymptote_a_little():
    true = Fit(start=0.2, asymptote=0.6, mid=250.0, steepness=2.0, error=0.0)
    noisy = [(c, true.at(c) + 0.03 * (-1) ** n) for n, c in enumerate(SAMPLES)]
    assert fit(noisy, start=0.2).asymptote == pytest.approx(0.6, abs=0.04)


def test_a_curve_that_has_not_come_half_way_has_no_known_end():
    true = Fit(start=0.0, asymptote=0.9, mid=20_000.0, steepness=2.0, error=0.0)
    assert fit([(c, true.at(c)) for c in SAMPLES], start=0.0) is None


def test_a_curve_that_falls_or_has_few_points_has_no_asymptote():
    assert fit([(c, 0.5 - c / 10_000) for c in SAMPLES], start=0.5) is None
    assert fit([(100, 0.2), (200, 0.4), (300, 0.5)], start=0.1) is None


def test_a_crossing_lies_between_the_points_around_it():
    curve = [(0.0, 0.1), (100.0, 0.3), (200.0, 0.2), (300.0, 0.6)]
    assert crossing(curve, 0.2) == pytest.approx(50.0)
    assert crossing(curve, 0.4) == pytest.approx(250.0)
    assert crossing(curve, 0.1) == 0.0
    assert crossing(curve, 0.7) is None
