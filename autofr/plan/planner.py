"""Plan: the least error for every budget, from one calibration.

Where the errors of intervals between keyframes add up (each weighted with how far it moves the
final latents) the best keyframes, masks and mix are a shortest path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autofr.errors import BudgetError
from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.mix import KEY, Mix, Table
from autofr.plan.choices import Choices, Rule, choices
from autofr.plan.intervals import Intervals, intervals


@dataclass(frozen=True)
class Plan:
    """All steps of a call with their mix, what the model of errors expects of them, their cost."""

    steps: tuple[str, ...]
    mix: Mix
    error: float
    seconds: float


def plan(calibration: Calibration, costs: Costs, rule: Rule, seconds: float) -> Plan:
    """Find the plan of least error whose predicted call takes at most `seconds`.

    Shortest path over intervals, from (keyframe, gap to the one before) to the next, under a price
    on time, the price found by bisection; what time is left then fills single intervals better.
    Raises: BudgetError when even the fastest plan is slower; says what can be reached.
    """
    table = choices(calibration, costs, rule)
    paths = _Paths(table, intervals(table, rule), costs)
    fastest = paths.path(price=1e9 / costs.key)
    if fastest.seconds > seconds:
        raise BudgetError(out_of_reach(costs, calibration.asked, seconds, fastest.seconds))
    free = paths.path(price=0.0)
    if free.seconds <= seconds:
        return paths.plan(free, rule)
    return paths.plan(paths.spend(paths.priced(fastest, seconds), seconds), rule)


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

    def path(self, price: float) -> _Route:
        """Exact minimum of error + price * seconds over the intervals, by dynamic programming."""
        n, sides = self.ways.error.shape[:2]
        priced = self.ways.error + price * self.ways.seconds
        chosen = priced.argmin(-1)
        cheapest = np.take_along_axis(priced, chosen[..., None], -1)[..., 0]  # (key, before, after)
        best = np.full((n, sides), np.inf)
        origin = np.zeros((n, sides), int)
        best[0, 0] = price * self.costs.key
        end_cost, end_state = np.inf, (0, 0)
        for key in range(n):
            for after in range(1, min(sides, n - key)):
                total = best[key] + cheapest[key, :, after] + price * self.costs.key
                before = int(total.argmin())
                if total[before] < best[key + after, after]:
                    best[key + after, after] = total[before]
                    origin[key + after, after] = before
            total = best[key] + cheapest[key, :, 0]
            before = int(total.argmin())
            if total[before] < end_cost:
                end_cost, end_state = total[before], (key, before)
        return self._traced(chosen, origin, end_state)

    def _traced(self, chosen: np.ndarray, origin: np.ndarray, end: tuple[int, int]) -> _Route:
        (key, before), after = end, 0
        found = []
        while True:
            found.append(_Stretch(key, before, after, int(chosen[key, before, after])))
            if key == 0:
                return self._route(found)
            key, before, after = key - before, int(origin[key, before]), before

    def _route(self, stretches: Sequence[_Stretch]) -> _Route:
        error = sum(float(self.ways.error[one]) for one in stretches)
        return _Route(tuple(stretches), error, self.costs.of_call(self._steps(stretches)))

    def priced(self, fastest: _Route, seconds: float) -> _Route:
        """The path of least error that some price on time brings to at most `seconds`."""
        unit = 1 / self.costs.key  # prices are errors per keyframe's time, whatever the device
        low, high, best = 1e-12 * unit, 1e6 * unit, fastest
        for _ in range(50):
            price = float(np.sqrt(low * high))
            found = self.path(price)
            if found.seconds <= seconds:
                high = price
                if found.error <= best.error:
                    best = found
            else:
                low = price
            if high / low < 1.0001:
                break
        return best

    def spend(self, found: _Route, seconds: float) -> _Route:
        """Use the time that the price left over: better ways to fill intervals, best gain first."""
        stretches, left = list(found.stretches), seconds - found.seconds
        while True:
            best, gain = None, 0.0
            for index, one in enumerate(stretches):
                errors, spent = self.ways.error[one[:3]], self.ways.seconds[one[:3]]
                fits = np.where(spent - spent[one.way] <= left, errors, np.inf)
                way = int(fits.argmin())
                if errors[one.way] - errors[way] > gain:
                    gain = float(errors[one.way] - errors[way])
                    best = index, one._replace(way=way), float(spent[way] - spent[one.way])
            if best is None:
                return self._route(stretches)
            stretches[best[0]] = best[1]
            left -= best[2]

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


def out_of_reach(costs: Costs, steps: int, asked: float, reached: float) -> str:
    """Say that a time per call cannot be met, and the largest speed-up that can, rounded down."""
    teacher = costs.teacher(steps)
    largest = math.floor(100 * teacher / reached + 1e-6) / 100
    return (
        f"a budget of {teacher / asked:.2f}x ({1000 * asked:.0f} ms per call) cannot be met: the"
        f" largest that can under these settings is {largest:.2f}x"
        f" ({1000 * reached:.0f} ms)"
    )
