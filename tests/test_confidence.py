"""Laws of intervals: they hold their value, are a point where nothing differs, and are seeded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.measure import confidence
from autofr.policy import Interval

laws = settings(deadline=None, max_examples=30, derandomize=True, database=None)
some = st.lists(st.floats(-100, 100), min_size=1, max_size=20).map(np.array)


@pytest.mark.parametrize("statistic", [confidence.of_mean, confidence.of_median])
@laws
@given(values=some)
def test_a_value_lies_in_its_interval(statistic, values):
    """low ≤ value ≤ high, all among the values, and the same ones again."""
    found, slack = statistic(values), 1e-9 * (1 + abs(values).max())
    assert values.min() - slack <= found.low <= found.value + slack
    assert found.value - slack <= found.high <= values.max() + slack
    assert statistic(values) == found


@pytest.mark.parametrize("statistic", [confidence.of_mean, confidence.of_median])
@pytest.mark.parametrize("values", [[2.5], [2.5] * 7, [0.0] * 3])
def test_no_spread_no_width(statistic, values):
    """A single value and equal ones give a point."""
    assert statistic(np.array(values)) == Interval(value=values[0], low=values[0], high=values[0])


def test_what_is_resampled():
    """Of one outlier in nine a mean is unsure; a median is not, nor is it moved."""
    values = np.array([1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1.0, 50.0])
    mean, median = confidence.of_mean(values), confidence.of_median(values)
    assert mean.value == pytest.approx(values.mean()) and mean.high > 10 > 2 > mean.low
    assert median.value == 1.0 and median.high < 1.2


def test_times_are_paired():
    """Where every value is the same multiple there is no doubt, however the values differ."""
    base = np.array([0.01, 0.3, 0.02, 0.07])
    same = confidence.of_times(3 * base, base)
    assert same.low == same.value == same.high == pytest.approx(3)
    other = confidence.of_times(np.array([0.1, 0.3, 0.1, 0.1]), base)
    assert other.low < other.value < other.high and other.value == pytest.approx(1.5)
    assert confidence.of_times(base[:1], base[1:2]).value == pytest.approx(1 / 30)
