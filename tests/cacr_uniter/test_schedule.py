"""Learning rate and weight of the auxiliary loss, against the published values."""

from __future__ import annotations

import math

import pytest

from cacr_uniter.training.schedule import auxiliary_weight, learning_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 1e-7), (250, 2.5e-5), (499, 4.99e-5), (500, 5e-5), (2750, 2.5e-5), (4999, 5e-5 / 4500), (5000, 1e-8)],
)
def test_learning_rate_follows_the_published_recipe(step: int, expected: float) -> None:
    assert learning_rate(step, 5e-5, 5000, 500) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_warmup_starts_at_its_largest_value() -> None:
    assert learning_rate(1, 1.0, 11, 0) == pytest.approx(10 / 11)
    assert learning_rate(7, 1.0, 11, 11, "linear") == pytest.approx(7 / 11)


def test_constant_learning_rate_stays_after_the_warmup() -> None:
    assert [learning_rate(s, 2.0, 10, 4, "constant") for s in (1, 4, 10)] == [0.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("done", "expected"), [(0, 0.0067), (500, 0.0111), (1000, 0.0183), (2500, 0.0821), (4000, 0.3679), (5000, 1.0)]
)
def test_exponential_weight_has_the_published_values(done: int, expected: float) -> None:
    assert auxiliary_weight(done, 5000, "exp") == pytest.approx(expected, abs=5e-5)


def test_mean_exponential_weight_over_a_run() -> None:
    assert sum(auxiliary_weight(s, 5000, "exp") for s in range(5000)) / 5000 == pytest.approx(0.1986, abs=2e-4)


def test_other_schedules() -> None:
    assert auxiliary_weight(3, 12, "linear") == 0.25
    assert auxiliary_weight(3, 12, "log") == pytest.approx(1 - math.exp(-1.25))
    assert auxiliary_weight(0, 12, "constant") == 1.0
