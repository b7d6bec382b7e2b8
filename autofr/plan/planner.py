"""Plan: the least error for every budget, from one calibration.

Under the additive model (errors of single steps add up, each weighted with how far it moves the
final latents) the best keyframes, masks and mix are a shortest path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofr.errors import BudgetError
from autofr.measure.calibration import Calibration
from autofr.measure.latency import Costs
from autofr.mix import JUMP, KEY, Family, Mix, Table

RIDGE = 1e-4


@dataclass(frozen=True)
class Rule:
    """What a plan may use.

    `masks`: names allowed ("jump" among them); `mix`: "fit1", "fit2" (least squares on the
    reduced score and one or two keyframes' scores), or a λ(t) family; `max_gap`: most steps from a
    keyframe to the next, or from the last one to the end; `phase`: log error weight
    at the start and at the end against the middle; `first`, `last`: forced keyframes at the ends
    of what runs.
    """

    masks: tuple[str, ...]
    max_gap: int = 6
    mix: Family | str = "fit2"
    phase: tuple[float, float] = (0.0, 0.0)
    first: int = 1
    last: int = 0


@dataclass(frozen=True)
class Plan:
    """All steps of a call with their mix, what the additive model expects of them, their cost."""

    steps: tuple[str, ...]
    mix: Mix
    error: float
    seconds: float


@dataclass(frozen=True)
class _Choices:
    """Weighted error and seconds of every choice: (masks, step, gap, gap before), and its mix.

    Steps are those that run, after the `first` of a call.
    """

    names: tuple[str, ...]
    error: np.ndarray
    weights: np.ndarray
    seconds: np.ndarray
    first: int


def choices(calibration: Calibration, costs: Costs, rule: Rule) -> _Choices:
    """Tabulate error and cost of each allowed mask (or jump) at each (step, gap, gap before).

    Gap index g - 1; index 0 of the last axis means that there is no keyframe before the last.
    """
    names = (*(name for name in calibration.masks if name in rule.masks),)
    names += (JUMP,) if JUMP in rule.masks else ()
    n, gaps = calibration.steps, min(rule.max_gap, calibration.max_gap)
    rows = max(1, len(names))  # without any mask: one choice that is never taken
    error = np.full((rows, n, gaps, gaps + 1), np.inf)
    weights = np.zeros((rows, n, gaps, gaps + 1, 3))
    for index, name in enumerate(names):
        for gap in range(1, gaps + 1):
            for before in range(gaps + 1):
                steps = np.arange(gap + before, n)
                last = steps - gap
                for used, older in _stretches(steps, last, last - before, calibration.switch):
                    found = _mixed(calibration, rule.mix, name, used, gap, before if older else 0)
                    error[index, used, gap - 1, before] = found[0]
                    weights[index, used, gap - 1, before] = found[1]
    share = np.linspace(-1, 1, n)
    phase = np.where(share < 0, -share * rule.phase[0], share * rule.phase[1])
    scale = calibration.gain**2 * np.exp(phase) / calibration.norm
    np.multiply(error, scale[:, None, None], out=error, where=np.isfinite(error))
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


def _mixed(
    calibration: Calibration, mix: Family | str, name: str, steps: np.ndarray, gap: int, before: int
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error and mix weights [reduced, last, before] at `steps` for one choice."""
    e, jump = calibration.teacher, name == JUMP
    last, older = steps - gap, steps - gap - before
    gram = np.zeros((len(steps), 3, 3))
    wanted = np.zeros((len(steps), 3))
    gram[:, 1, 1], wanted[:, 1] = e[last, last], e[steps, last]
    gram[:, 2, 2], wanted[:, 2] = e[older, older], e[steps, older]
    gram[:, 1, 2] = gram[:, 2, 1] = e[last, older]
    if not jump:
        m = calibration.masks.index(name)
        cross = calibration.cross[m, steps, gap - 1]
        rows = np.arange(len(steps))
        gram[:, 0, 0], wanted[:, 0] = calibration.own[m, steps, gap - 1], cross[rows, steps]
        gram[:, 0, 1] = gram[:, 1, 0] = cross[rows, last]
        gram[:, 0, 2] = gram[:, 2, 0] = cross[rows, older]
    start = np.array([0.0, 1.0, 0.0] if jump else [1.0, 0.0, 0.0])
    target = e[steps, steps]
    if isinstance(mix, str):
        free = [1] if jump else [0, 1]
        if mix == "fit2" and before:
            free.append(2)
        weights = np.tile(start, (len(steps), 1))
        part = gram[np.ix_(range(len(steps)), free, free)]
        ridge = RIDGE * target[:, None, None] * np.eye(len(free))
        right = wanted[:, free] - part @ start[free]
        weights[:, free] += np.linalg.solve(part + ridge, right[..., None])[..., 0]
    else:
        place = (calibration.first + steps) / calibration.asked
        share = [0.0 if jump else mix.weight(float(r)) for r in place]
        weights = np.stack([share, 1 - np.array(share), np.zeros(len(steps))], axis=1)
    error = target - 2 * (weights * wanted).sum(1)
    error += np.einsum("si,sij,sj->s", weights, gram, weights)
    return np.maximum(error, 0), weights


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


def front(calibration: Calibration, costs: Costs, rule: Rule, points: int = 40) -> list[Plan]:
    """The whole front from one calibration: plans that no other beats in error and seconds."""
    table = choices(calibration, costs, rule)
    prices = np.geomspace(1e-9, 1e1, points) / costs.key
    plans = [_path(table, costs, rule, price) for price in prices]
    best: list[Plan] = []
    for one in sorted(plans, key=lambda p: (p.seconds, p.error)):
        if not best or one.error < best[-1].error:
            best.append(one)
    return best


def _path(table: _Choices, costs: Costs, rule: Rule, price: float) -> Plan:
    """Exact minimum of error + price * seconds over keyframes and masks, by dynamic programming."""
    _, n, gaps, _ = table.error.shape
    priced = table.error + price * table.seconds[:, None, None, None]
    chosen = priced.argmin(0)
    cheapest = np.take_along_axis(priced, chosen[None], 0)[0]  # (step, gap - 1, before)
    best = np.full((n, gaps + 1), np.inf)
    origin = np.zeros((n, gaps + 1), int)
    best[0, 0] = price * costs.key
    end_cost, end_state = np.inf, (0, 0)
    for key in range(n):
        walked = np.zeros(gaps + 1)  # cost of the steps since this keyframe, by gap before
        for gap in range(1, gaps + 2):
            step = key + gap
            if step >= n:
                total = best[key] + walked
                state = int(total.argmin())
                if total[state] < end_cost:
                    end_cost, end_state = total[state], (key, state)
                break
            if gap <= gaps:  # `gap - 1` steps are walked; the next key may be here
                total = best[key] + walked + price * costs.key
                state = int(total.argmin())
                if total[state] < best[step, gap]:
                    best[step, gap], origin[step, gap] = total[state], state
                forced = step < rule.first or step >= n - rule.last
                walked = walked + (np.inf if forced else cheapest[step, gap - 1])
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
    picks: list[tuple[int, int, int] | None] = [None] * n
    (key, before), stop = end, n
    while True:
        for step in range(key + 1, stop):
            picks[step] = (int(chosen[step, step - key - 1, before]), step - key, before)
        if key == 0:
            break
        stop, key, before = key, key - before, int(origin[key, before])
    return _build(table, costs, picks, rule.mix)


def _build(
    table: _Choices, costs: Costs, picks: Sequence[tuple[int, int, int] | None], mix: Mix | str
) -> Plan:
    steps = [KEY] * table.first  # what a call leaves out does not run
    rows: list[tuple[float, ...]] = [()] * table.first
    error = 0.0
    for step, pick in enumerate(picks):
        if pick is None:
            steps.append(KEY)
            rows.append(())
            continue
        index, gap, before = pick
        steps.append(table.names[index])
        weights = table.weights[index, step, gap - 1, before]
        count = 3 if weights[2] else 2
        rows.append(tuple(round(float(w), 6) for w in weights[:count]))
        error += float(table.error[index, step, gap - 1, before])
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
            index, gap, before = pick
            for other in range(len(table.names)):
                extra = table.seconds[other] - table.seconds[index]
                saved = float(
                    table.error[index, step, gap - 1, before]
                    - table.error[other, step, gap - 1, before]
                )
                if extra <= left and saved > gain:
                    best, gain = (step, (other, gap, before), extra), saved
        if best is None:
            break
        picks[best[0]] = best[1]
        left -= best[2]
    mix: Mix | str = "fit" if isinstance(found.mix, Table) else found.mix
    return _build(table, costs, picks, mix)


def _picks(table: _Choices, steps: Sequence[str]) -> list[tuple[int, int, int] | None]:
    """Mask index, gap and gap before of each step of a plan; None at keyframes."""
    picks: list[tuple[int, int, int] | None] = []
    key, before = 0, 0
    for i, step in enumerate(steps):
        if step == KEY:
            key, before = i, i - key
            picks.append(None)
        else:
            picks.append((table.names.index(step), i - key, before))
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
