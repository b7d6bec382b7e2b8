"""How sure a figure is: 95 % intervals by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from autofr.policy import Interval

RESAMPLES = 1000


def of_mean(values: np.ndarray) -> Interval:
    """Mean of values (n,)."""
    return _interval(float(np.mean(values)), np.mean, values)


def of_median(values: np.ndarray) -> Interval:
    """Median of values (n,)."""
    return _interval(float(np.median(values)), np.median, values)


def of_times(values: np.ndarray, base: np.ndarray) -> Interval:
    """How many times the mean of `base` the mean of `values` is; both (n,), paired."""

    def ratio(some: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
        return some.mean(axis) / others.mean(axis)

    return _interval(float(np.mean(values) / np.mean(base)), ratio, values, base)


def _interval(value: float, statistic: Callable[..., Any], *samples: np.ndarray) -> Interval:
    """The percentile interval of a statistic of samples, which are resampled together.

    It is a point where nothing differs: of a single value, of equal ones, of equal multiples.
    """
    from scipy.stats import bootstrap

    first, *others = samples
    relative = first / others[0] if others else first
    if len(first) < 2 or np.ptp(relative) <= 1e-9 * abs(relative).max():
        return Interval(value=value, low=value, high=value)
    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        paired=bool(others),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value=value, low=float(found.low), high=float(found.high))
