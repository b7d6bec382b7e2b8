"""Plan: the least error within a time, from one calibration.

Where the errors of intervals between keyframes add up (each weighted with how far it moves the
final latents) the best keyframes, masks and mix are a shortest path whose time is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autofr.errors import BudgetError
from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.mix import KEY, Mix, Table
from autofr.plan.choices import Choices, Rule, choices
from autofr.plan.intervals import Intervals, intervals

UNITS = 500  # of time in a call: as finely are intervals told apart
SLACK = 12  # units by which the rounded times of a plan may exceed its own


@dataclass(frozen=True)
class Plan:
    """All steps of a call with their mix, what the model of errors expects of them, their cost."""

    steps: tuple[str, ...]
    mix: Mix
    error: float
    seconds: float


def plan(calibration: Calibration, costs: Costs, rule: Rule, seconds: float) -> Plan:
    """Find the plan of least error whose predicted call takes at most `seconds`.

    Shortest path over intervals, from (keyframe, gap to the one before, time spent) to the next.
    Raises: BudgetError when even the fastest plan is slower; says what can be reached.
    """
    table = choices(calibration, costs, rule)
    paths = _Paths(table, intervals(table, rule), costs)
    fastest = paths.fastest()
    if fastest.seconds > seconds:
        raise BudgetError(out_of_reach(costs, calibration.asked, seconds, fastest.seconds))
    return paths.plan(paths.within(seconds) or fastest, rule)


class _Stretch(NamedTuple):
    """An interval from a keyframe on: its gaps, and the way it is filled (see `Intervals`)."""

    key: int
    before: int
    after: int
    way: int


@dataclass(frozen=True)
class _Route:
    """Intervals from the last one to the first, with their error, and the seconds of the call."""

    stretches: tuple[_Stretch, ...]
    error: float
    seconds: float


@dataclass(frozen=True)
class _Paths:
    """All intervals; a call is a path through them."""

    table: Choices
    ways: Intervals
    costs: Costs

    @property
    def _seconds(self) -> np.ndarray:
        """Of every stretch: its keyframe's, and those of what fills it."""
        return self.costs.key + self.ways.seconds

    def fastest(self) -> _Route:
        """The route that takes least time."""
        cost = np.where(np.isfinite(self.ways.error), self._seconds, np.inf)
        return next(self._routes(cost, np.zeros(cost.shape, int), 0))

    def within(self, seconds: float) -> _Route | None:
        """The route of least error that takes at most `seconds`, if one does."""
        unit = (seconds - self.costs.fixed) / UNITS
        spent = np.rint(self._seconds / unit).astype(int)
        routes = self._routes(self.ways.error, spent, UNITS + SLACK)
        return next((route for route in routes if route.seconds <= seconds), None)

    def _routes(self, cost: np.ndarray, spent: np.ndarray, most: int) -> Iterator[_Route]:
        """By rising cost: the route of least cost for every sum of what is `spent`, up to `most`.

        By dynamic programming over (keyframe, gap to the one before, spent before it).
        """
        n, sides, _, ways = cost.shape
        least = np.full((n, sides, most + 1), np.inf)
        last = np.zeros((n, sides, most + 1), int)  # the stretch that it ends with
        ends, origins = np.full((n, most + 1), np.inf), np.zeros((n, most + 1), int)
        least[0, 0, 0] = 0
        for key in range(n):
            for after in range(min(sides, n - key)):
                found = _joined(least[key], cost[key, :, after], spent[key, :, after])
                if after:
                    least[key + after, after], last[key + after, after] = found
                else:
                    ends[key], origins[key] = found
        for end in ends.argsort(None)[: np.isfinite(ends).sum()]:
            key, left = divmod(int(end), most + 1)
            stretches: list[_Stretch] = []
            after, origin = 0, origins[key, left]
            while not stretches or stretches[-1].key:
                before, way = divmod(int(origin), ways)
                stretches.append(_Stretch(key, before, after, way))
                left -= spent[stretches[-1]]
                origin, key, after = last[key, before, left], key - before, before
            yield self._route(stretches)

    def _route(self, stretches: Sequence[_Stretch]) -> _Route:
        error = sum(float(self.ways.error[one]) for one in stretches)
        return _Route(tuple(stretches), error, self.costs.of_call(self._steps(stretches)))

    def _picks(self, stretches: Sequence[_Stretch]) -> dict[int, tuple[int, int, int]]:
        """What each step does that is no keyframe: a choice, the gap, the gap before."""
        found = {}
        for one in stretches:
            stop = one.key + one.after if one.after else len(self.ways.error)
            for gap in range(1, stop - one.key):
                found[one.key + gap] = int(self.ways.picks[one][gap - 1]), gap, one.before
        return found

    def _steps(self, stretches: Sequence[_Stretch]) -> tuple[str, ...]:
        """Every step of the call; what it leaves out does not run."""
        picks, names = self._picks(stretches), self.table.names
        runs = range(len(self.ways.error))
        found = (names[picks[step][0]] if step in picks else KEY for step in runs)
        return (*[KEY] * self.table.first, *found)

    def plan(self, route: _Route, rule: Rule) -> Plan:
        """A route as steps and mix."""
        rows: list[tuple[float, ...]] = [()] * (self.table.first + len(self.ways.error))
        for step, (choice, gap, before) in self._picks(route.stretches).items():
            weights = self.table.weights[choice, step, gap - 1, before]
            count = 3 if weights[2] else 2
            rows[self.table.first + step] = tuple(round(float(w), 6) for w in weights[:count])
        mix = Table(weights=tuple(rows)) if isinstance(rule.mix, str) else rule.mix
        return Plan(self._steps(route.stretches), mix, route.error, route.seconds)


def _joined(
    least: np.ndarray, cost: np.ndarray, spent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least cost of each sum with one stretch more, and which (both (sums,)).

    Args: least (gaps before, sums); cost and spent (gaps before, ways) of stretches.
    """
    sums = np.arange(least.shape[1])
    before, way = np.nonzero(np.isfinite(cost) & np.isfinite(least).any(1)[:, None])
    if not len(before):
        return np.full(len(sums), np.inf), np.zeros(len(sums), int)
    rest = sums - spent[before, way][:, None]
    total = np.where(rest < 0, np.inf, least[before[:, None], np.maximum(rest, 0)])
    total += cost[before, way][:, None]
    best = total.argmin(0)
    return total[best, sums], (before * cost.shape[1] + way)[best]


def out_of_reach(costs: Costs, steps: int, asked: float, reached: float) -> str:
    """Say that a time per call cannot be met, and the largest speed-up that can, rounded down."""
    teacher = costs.teacher(steps)
    largest = math.floor(100 * teacher / reached + 1e-6) / 100
    return (
        f"a budget of {teacher / asked:.2f}x ({1000 * asked:.0f} ms per call) cannot be met: the"
        f" largest that can under these settings is {largest:.2f}x"
        f" ({1000 * reached:.0f} ms)"
    )
