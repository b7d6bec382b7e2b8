"""Numbers in words: how reports, pictures and the console write them."""

from __future__ import annotations

from autofr.errors import BudgetError
from autofr.measure.costs import parse_budget
from autofr.policy import Interval
from autofr.search.result import Result, Row


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as milliseconds or seconds."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def percent(value: Interval) -> str:
    """A share with its interval, as percent."""
    digits = 1 if value.value >= 0.01 or value.value == 0 else 2
    spread = f" ({100 * value.low:.{digits}f}–{100 * value.high:.{digits}f})"
    return f"{100 * value.value:.{digits}f} %{spread if value.high > value.low else ''}"


def times(value: Interval, unit: str = "x") -> str:
    """A speed-up with its interval."""
    return f"{value.value:.2f}{unit} ({value.low:.2f}–{value.high:.2f})"


def wanted_speedup(result: Result) -> float | None:
    """The speed-up that meets the budget; None for a time per call if no call was timed."""
    measured = result.policy.measured
    try:
        budget = parse_budget(result.budget)
        if budget.speedup or measured is None:
            return budget.speedup
        return budget.speedup_over(measured.teacher_seconds)
    except BudgetError:
        return None


def exact(value: float) -> Interval:
    """A number as an interval of no width."""
    return Interval(value=value, low=value, high=value)


def speedup_of(row: Row) -> Interval:
    """Measured speed-up of a row, else the predicted one."""
    return row.speedup or exact(row.predicted_speedup)
