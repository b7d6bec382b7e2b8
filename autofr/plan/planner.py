"""Plan: the least error for every budget, from one calibration.

Under the additive model (errors of single steps add up, each weighted with how far it moves the
final latents) the best keyframes, masks and mix are a shortest path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autofr.errors import BudgetError
from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.mix import JUMP, KEY, Family, Mix, Table

RIDGE = 1e-5


@dataclass(frozen=True)
class Rule:
    """What a plan may use.

    `masks`: names allowed ("jump" among them); `mix`: "fit1", "fit2" (least squares on the
    reduced score and one or two keyframes' scores), or a λ(t) family; `max_gap`: most steps from a
    keyframe to the next, or from the last one to the end; `phase`: log error weight at the start
    and at the end against the middle; `first`, `last`: forced keyframes at the ends of what runs;
    `corrected`: a fitted mix is corrected afterwards, at keyframes too, which makes up for what the
    next keyframe's score explains of a step's error.
    """

    masks: tuple[str, ...]
    max_gap: int = 6
    mix: Family | str = "fit2"
    phase: tuple[float, float] = (0.0, 0.0)
    first: int = 1
    last: int = 0
    corrected: bool = False


@dataclass(frozen=True)
class Plan:
    """All steps of a call with their mix, what the additive model expects of them, their cost."""

    steps: tuple[str, ...]
    mix: Mix
    error: float
    seconds: float


_Pick = tuple[int, int, int, int]
"""What a step does: the index of its mask, the gap, the gap before, the gap after."""


@dataclass(frozen=True)
class _Choices:
    """Weighted error and seconds of every choice: (masks, step, gap, gap before, gap after), and
    its mix, whatever the gap after.

    Gap index g - 1; the gaps between the last keyframe and the one before it, and from the last
    keyframe to the next one, are 0 where there is none. Steps are those that run, after the `first`
    of a call.
    """

    names: tuple[str, ...]
    error: np.ndarray
    weights: np.ndarray
    seconds: np.ndarray
    first: int


def choices(calibration: Calibration, costs: Costs, rule: Rule) -> _Choices:
    """Tabulate error and cost of each allowed mask (or jump) between any keyframes around it."""
    names = (*(name for name in calibration.masks if name in rule.masks),)
    names += (JUMP,) if JUMP in rule.masks else ()
    n, gaps = calibration.steps, min(rule.max_gap, calibration.max_gap)
    rows = max(1, len(names))  # without any mask: one choice that is never taken
    error = np.full((rows, n, gaps, gaps + 1, gaps + 1), np.inf)
    weights = np.zeros((rows, n, gaps, gaps + 1, 3))
    for index, name in enumerate(names):
        for gap in range(1, gaps + 1):
            for before in range(gaps + 1):
                steps = np.arange(gap + before, n)
                last = steps - gap
                for used, older in _stretches(steps, last, last - before, calibration.switch):
                    known = before if older else 0
                    found = _mixed(calibration, rule.mix, name, used, gap, known)
                    error[index, used, gap - 1, before] = found[0][:, None]
                    weights[index, used, gap - 1, before] = found[1]
                    if rule.corrected and isinstance(rule.mix, str):
                        again, after = _corrected(used, gap, gaps, n, calibration.switch)
                        left = _mixed(calibration, rule.mix, name, again, gap, known, after)[0]
                        error[index, again, gap - 1, before, after] = left
    share = np.linspace(-1, 1, n)
    phase = np.where(share < 0, -share * rule.phase[0], share * rule.phase[1])
    scale = calibration.gain**2 * np.exp(phase) / calibration.norm
    np.multiply(error, scale[:, None, None, None], out=error, where=np.isfinite(error))
    seconds = np.array([costs.of_step(name) for name in names] or [0.0])
    return _Choices(names, error, weights, seconds, calibration.first)


def _stretches(
    steps: np.ndarray, last: np.ndarray, older: np.ndarray, switch: int
) -> list[tuple[np.ndarray, bool]]:
    """Steps that one denoiser serves from its own last keyframe, and whether the one before it is
    its own too. What another denoiser kept is of no use (two experts), so its keyframe is forced.
    """
    served = (steps < switch) | (last >= switch)
    own = (steps < switch) | (older >= switch)
    return [(steps[served & own], True), (steps[served & ~own], False)]


def _corrected(
    steps: np.ndarray, gap: int, gaps: int, n: int, switch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a step and the gap from its keyframe to the next one, where the same denoiser runs
    that too: what it finds there corrects the step.
    """
    again, after = (grid.ravel() for grid in np.meshgrid(steps, np.arange(gap + 1, gaps + 1)))
    following = again - gap + after
    own = (following < n) & ((again >= switch) | (following < switch))
    return again[own], after[own]


def _mixed(
    calibration: Calibration,
    mix: Family | str,
    name: str,
    steps: np.ndarray,
    gap: int,
    before: int,
    after: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error (steps,) and mix weights [reduced, last, before] (steps, 3) of one choice.

    With the gaps to the next keyframes (`after`, one per step) the error is what is left when
    their scores have made up for what they explain of it.
    """
    e, jump = calibration.teacher, name == JUMP
    last = steps - gap
    keys = np.stack([last, last - before, last if after is None else last + after], axis=1)
    rows, count = np.arange(len(steps))[:, None], len(steps)
    gram, wanted = np.zeros((count, 4, 4)), np.zeros((count, 4))
    gram[:, 1:, 1:], wanted[:, 1:] = e[keys[:, :, None], keys[:, None]], e[steps[:, None], keys]
    if not jump:
        m = calibration.masks.index(name)
        cross = calibration.cross[m, steps, gap - 1]
        gram[:, 0, 0], wanted[:, 0] = calibration.own[m, steps, gap - 1], cross[rows[:, 0], steps]
        gram[:, 0, 1:] = gram[:, 1:, 0] = cross[rows, keys]
    start = np.array([0.0, 1.0, 0.0, 0.0] if jump else [1.0, 0.0, 0.0, 0.0])
    target = e[steps, steps]
    if isinstance(mix, str):
        free = [1] if jump else [0, 1]
        free += [2] if mix == "fit2" and before else []
        free += [] if after is None else [3]
        weights = _fitted(gram, wanted, target, start, free)
    else:
        place = (calibration.first + steps) / calibration.asked
        share = [0.0 if jump else mix.weight(float(r)) for r in place]
        weights = np.stack([share, 1 - np.array(share), *np.zeros((2, count))], axis=1)
    error = target - 2 * (weights * wanted).sum(1)
    error += np.einsum("si,sij,sj->s", weights, gram, weights)
    return np.maximum(error, 0), weights[:, :3]


def _fitted(
    gram: np.ndarray, wanted: np.ndarray, target: np.ndarray, start: np.ndarray, free: list[int]
) -> np.ndarray:
    """Mix weights (steps, 4): least squares in the `free` ones, with a ridge towards `start`.

    It bounds their distance to `start` by 1 + 1 / (2 sqrt(RIDGE)), whatever the network does.
    """
    weights = np.tile(start, (len(gram), 1))
    part = gram[np.ix_(range(len(gram)), free, free)]
    size = np.where(target > 0, target, 1.0)  # a score that is nothing can be had in many ways
    ridge = RIDGE * size[:, None, None] * np.eye(len(free))
    right = wanted[:, free] - part @ start[free]
    weights[:, free] += np.linalg.solve(part + ridge, right[..., None])[..., 0]
    return weights


def plan(calibration: Calibration, costs: Costs, rule: Rule, seconds: float) -> Plan:
    """Find the plan of least error whose predicted call takes at most `seconds`.

    Shortest path over (keyframe, gap to the one before) under a price on time, the price found by
    bisection; what time is left then buys the best upgrades.
    Raises: BudgetError when even the fastest plan is slower; says what can be reached.
    """
    table = choices(calibration, costs, rule)
    unit = 1 / costs.key  # prices are errors per keyframe's time, whatever the device
    fastest = _path(table, costs, rule, price=1e9 * unit)
    if fastest.seconds > seconds:
        raise BudgetError(out_of_reach(costs, calibration.asked, seconds, fastest.seconds))
    best = fastest
    free = _path(table, costs, rule, price=0.0)
    if free.seconds <= seconds:
        return free
    low, high = 1e-12 * unit, 1e6 * unit
    for _ in range(50):
        price = float(np.sqrt(low * high))
        found = _path(table, costs, rule, price)
        if found.seconds <= seconds:
            high = price
            if found.error <= best.error:
                best = found
        else:
            low = price
        if high / low < 1.0001:
            break
    return _spend(table, costs, best, seconds)


def _path(table: _Choices, costs: Costs, rule: Rule, price: float) -> Plan:
    """Exact minimum of error + price * seconds over keyframes and masks, by dynamic programming."""
    n, gaps = table.error.shape[1:3]
    priced = table.error + price * table.seconds[:, None, None, None, None]
    chosen = priced.argmin(0)
    cheapest = np.take_along_axis(priced, chosen[None], 0)[0]  # (step, gap - 1, before, after)
    steps = np.arange(n)
    cheapest[(steps < rule.first) | (steps >= n - rule.last)] = np.inf
    best = np.full((n, gaps + 1), np.inf)
    origin = np.zeros((n, gaps + 1), int)
    best[0, 0] = price * costs.key
    end_cost, end_state = np.inf, (0, 0)
    for key in range(n):
        for length in range(1, min(gaps + 1, n - key) + 1):  # to the next keyframe, or the end
            between, ends = np.arange(1, length), key + length == n
            if length > gaps and not ends:
                break
            walked = cheapest[key + between, between - 1, :, 0 if ends else length].sum(0)
            total = best[key] + walked + (0 if ends else price * costs.key)
            state = int(total.argmin())
            if ends and total[state] < end_cost:
                end_cost, end_state = total[state], (key, state)
            if not ends and total[state] < best[key + length, length]:
                best[key + length, length] = total[state]
                origin[key + length, length] = state
    return _trace(table, costs, chosen, origin, end_state, rule)


def _trace(
    table: _Choices,
    costs: Costs,
    chosen: np.ndarray,
    origin: np.ndarray,
    end: tuple[int, int],
    rule: Rule,
) -> Plan:
    n = chosen.shape[0]
    picks: list[_Pick | None] = [None] * n
    (key, before), stop = end, n
    while True:
        after = stop - key if stop < n else 0
        for step in range(key + 1, stop):
            index = int(chosen[step, step - key - 1, before, after])
            picks[step] = index, step - key, before, after
        if key == 0:
            break
        stop, key, before = key, key - before, int(origin[key, before])
    return _build(table, costs, picks, rule.mix)


def _build(table: _Choices, costs: Costs, picks: Sequence[_Pick | None], mix: Mix | str) -> Plan:
    steps = [KEY] * table.first  # what a call leaves out does not run
    rows: list[tuple[float, ...]] = [()] * table.first
    error = 0.0
    for step, pick in enumerate(picks):
        if pick is None:
            steps.append(KEY)
            rows.append(())
            continue
        index, gap, before, after = pick
        steps.append(table.names[index])
        weights = table.weights[index, step, gap - 1, before]
        count = 3 if weights[2] else 2
        rows.append(tuple(round(float(w), 6) for w in weights[:count]))
        error += float(table.error[index, step, gap - 1, before, after])
    used = Table(weights=tuple(rows)) if isinstance(mix, str) else mix
    return Plan(tuple(steps), used, error, costs.of_call(steps))


def _spend(table: _Choices, costs: Costs, found: Plan, seconds: float) -> Plan:
    """Use the time that the price left over: upgrade single masks, best gain first."""
    picks = _picks(table, found.steps[table.first :])
    left = seconds - found.seconds
    while True:
        best, gain = None, 0.0
        for step, pick in enumerate(picks):
            if pick is None:
                continue
            index, gap, *around = pick
            error = table.error[:, step, gap - 1, around[0], around[1]]
            for other in range(len(table.names)):
                extra = table.seconds[other] - table.seconds[index]
                saved = float(error[index] - error[other])
                if extra <= left and saved > gain:
                    best, gain = (step, (other, gap, around[0], around[1]), extra), saved
        if best is None:
            break
        picks[best[0]] = best[1]
        left -= best[2]
    mix: Mix | str = "fit" if isinstance(found.mix, Table) else found.mix
    return _build(table, costs, picks, mix)


def _picks(table: _Choices, steps: Sequence[str]) -> list[_Pick | None]:
    """Mask index and gaps of each step of a plan; None at keyframes."""
    picks: list[_Pick | None] = []
    keys = [i for i, step in enumerate(steps) if step == KEY]
    lengths = [0, *(after - key for key, after in pairwise(keys)), 0]
    for (key, stop), (before, after) in zip(
        pairwise([*keys, len(steps)]), pairwise(lengths), strict=True
    ):
        picks.append(None)
        picks += [
            (table.names.index(steps[i]), i - key, before, after) for i in range(key + 1, stop)
        ]
    return picks


def out_of_reach(costs: Costs, steps: int, asked: float, reached: float) -> str:
    """Say that a time per call cannot be met, and the largest speed-up that can, rounded down."""
    teacher = costs.teacher(steps)
    largest = math.floor(100 * teacher / reached + 1e-6) / 100
    return (
        f"a budget of {teacher / asked:.2f}x ({1000 * asked:.0f} ms per call) cannot be met: the"
        f" largest that can under these settings is {largest:.2f}x"
        f" ({1000 * reached:.0f} ms)"
    )
