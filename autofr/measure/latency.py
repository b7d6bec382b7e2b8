"""Budgets, honest timing and what a policy costs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autofr.errors import BudgetError, MeasurementError
from autofr.mix import JUMP, KEY
from autofr.policy import Interval

_BUDGET = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*(x|ms|s)\s*$")


@dataclass(frozen=True)
class Budget:
    """A latency target: a speed-up of the whole `pipe(...)` call, or seconds per call."""

    text: str
    speedup: float | None = None
    seconds: float | None = None

    def seconds_of(self, teacher_seconds: float) -> float:
        """Seconds per call that meet the budget.

        Raises: BudgetError when the teacher already meets it.
        """
        if self.speedup is not None:
            return teacher_seconds / self.speedup
        assert self.seconds is not None
        if self.seconds >= teacher_seconds:
            raise BudgetError(
                f"budget {self.text}: the unaccelerated pipe already takes only"
                f" {1000 * teacher_seconds:.0f} ms per call here; give a smaller budget"
            )
        return self.seconds

    def speedup_over(self, teacher_seconds: float) -> float:
        """The speed-up that meets the budget."""
        return teacher_seconds / self.seconds_of(teacher_seconds)


def parse_budget(text: str) -> Budget:
    """Read `1.5x` (speed-up of the whole call) or `180ms` / `0.18s` (time per call).

    Raises: BudgetError saying what was expected.
    """
    match = _BUDGET.match(text)
    if not match:
        hint = f"; did you mean {text.strip()}x?" if re.fullmatch(r"\s*[\d.]+\s*", text) else ""
        raise BudgetError(
            f"budget {text!r}: expected a speed-up such as 1.5x, or a time per call such as"
            f" 180ms{hint}"
        )
    value, unit = float(match[1]), match[2]
    if unit == "x":
        if not 1 < value < 1000:
            raise BudgetError(
                f"budget {text!r}: a speed-up must be above 1x (and below 1000x); 1.5x means that"
                " a call takes two thirds of its time"
            )
        return Budget(text.strip(), speedup=value)
    if value <= 0:
        raise BudgetError(f"budget {text!r}: a time must be above 0")
    return Budget(text.strip(), seconds=value / 1000 if unit == "ms" else value)


def whole(steps: int) -> int:
    """How many of the first steps a call leaves out that runs them all."""
    return 0


@dataclass(frozen=True)
class Costs:
    """Seconds of one pipe call in parts: `fixed + sum of steps`.

    `key`, `jump` and `masks[name]` are seconds per step, scheduler included; `fixed` is the rest
    of the call (latents, decoding). `jump` is a step without the network. Of a call's steps the
    first `first(steps)` do not run, and cost nothing (see `start`).
    """

    key: float
    jump: float
    fixed: float
    masks: dict[str, float]
    first: Callable[[int], int] = whole

    def of_step(self, step: str) -> float:
        """Seconds of a step by its name in the policy."""
        return self.key if step == KEY else self.jump if step == JUMP else self.masks[step]

    def of_call(self, steps: Sequence[str]) -> float:
        """Predicted seconds of a whole call."""
        return self.fixed + sum(self.of_step(step) for step in steps[self.first(len(steps)) :])

    def runs(self, steps: int) -> int:
        """How many steps of a call run."""
        return steps - self.first(steps)

    def teacher(self, steps: int) -> float:
        """Predicted seconds of the unaccelerated call."""
        return self.fixed + self.runs(steps) * self.key

    def affordable(self, seconds: float, steps: int) -> int:
        """The most steps of an unaccelerated call in so many seconds, told from one of `steps`."""
        running = max(0, int((seconds - self.fixed) / self.key))
        if not self.first(steps):
            return running
        found = running * steps // max(1, self.runs(steps))
        while found and self.runs(found) > running:
            found -= 1
        while found < steps and self.runs(found + 1) <= running:
            found += 1
        return found


@dataclass(frozen=True)
class Paired:
    """Two calls timed in turn: median of the ratios first / second, with a 95 % interval."""

    ratio: Interval
    first_seconds: float
    second_seconds: float
    pairs: int
    cpu_ratio: float


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall time of one call, device work included."""
    return _times(call, device)[0]


def _times(call: Callable[[], object], device: torch.device | str) -> tuple[float, float]:
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    half_width: float = 0.03,
    min_pairs: int = 6,
    max_pairs: int = 60,
    max_seconds: float = 120.0,
    before: Callable[[int], None] = lambda which: None,
    on_pair: Callable[[int, float], None] | None = None,
) -> Paired:
    """Time two calls in interleaved pairs until the interval of the ratio is narrow.

    One warm-up pair is dropped; the order alternates from pair to pair, so that a drift of the
    machine's speed cancels. `before(0)` or `before(1)` runs untimed before each call. The interval
    is the percentile bootstrap's of the median ratio.
    Raises: MeasurementError when a call takes no measurable time.
    """
    began = time.perf_counter()
    calls = (first, second)
    for which in (0, 1):
        before(which)
        calls[which]()
    walls: list[tuple[float, float]] = []
    cpus: list[tuple[float, float]] = []
    while True:
        pair = [(0.0, 0.0), (0.0, 0.0)]
        for which in (0, 1) if len(walls) % 2 == 0 else (1, 0):
            before(which)
            pair[which] = _times(calls[which], device)
        if min(pair[0][0], pair[1][0]) <= 0:
            raise MeasurementError("a timed call took no measurable time")
        walls.append((pair[0][0], pair[1][0]))
        cpus.append((pair[0][1], pair[1][1]))
        pairs = len(walls)
        if pairs < min_pairs:
            continue
        ratio = median_interval(np.array([x / y for x, y in walls]))
        narrow = (ratio.high - ratio.low) / 2 <= half_width * ratio.value
        if on_pair:
            on_pair(pairs, (ratio.high - ratio.low) / 2 / ratio.value)
        if narrow or pairs >= max_pairs or time.perf_counter() - began > max_seconds:
            break
    one, two = np.median(np.array(walls), axis=0)
    busy = np.median([x / y if y > 0 else np.nan for x, y in cpus])
    return Paired(ratio, float(one), float(two), pairs, float(busy))


def median_interval(values: np.ndarray) -> Interval:
    """Median with its 95 % percentile-bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value=float(np.median(values)), low=float(low), high=float(high))


def measure_costs(
    call: Callable[[Sequence[str]], object],
    evaluate: Callable[[str], object],
    steps: int,
    masks: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 9,
    refresh: Callable[[], object] = lambda: None,
    first: Callable[[int], int] = whole,
    few: int = 2,
    on_round: Callable[[int, int], None] | None = None,
) -> Costs:
    """Measure the parts of a call.

    Args: `call(steps)` runs the whole pipe with those steps; `evaluate(step)` runs the denoiser
        once, as a keyframe or with a mask; `refresh()` runs untimed before masks are timed; `first`
        says how many steps a call leaves out, `few` are those of a short one that runs two or more.
    A full call against one with a single keyframe gives the network's time as it is inside a
    call; a shorter one separates the fixed part from the cost of a step without network. Masks
    are timed in turn with keyframes, and their ratio to the keyframes around them counts, so that
    a slow moment of the machine cancels.
    """
    runs, short = steps - first(steps), few - first(few)
    if runs < 2:
        raise MeasurementError("a call of one step has nothing to reuse; ask for 2 steps or more")
    lengths = ([KEY] * steps, [KEY, *[JUMP] * (steps - 1)], [KEY, *[JUMP] * (few - 1)])
    ratios: dict[str, list[float]] = {name: [] for name in masks}
    calls: list[list[float]] = []
    evaluate(KEY), call(lengths[2])
    for index in range(rounds):
        if index < max(3, rounds // 2):
            calls.append([seconds(lambda s=s: call(s), device) for s in lengths])  # type: ignore[misc]
        refresh()
        before = seconds(lambda: evaluate(KEY), device)
        for name in masks:
            spent = seconds(lambda name=name: evaluate(name), device)  # type: ignore[misc]
            after = seconds(lambda: evaluate(KEY), device)
            ratios[name].append(2 * spent / (before + after))
            before = after
        if on_round:
            on_round(index + 1, rounds)
    full, idle, least = np.median(np.array(calls), axis=0)
    network = max(1e-9, (full - idle) / (runs - 1))
    jump = max(0.0, (idle - least) / (runs - short)) if runs > short else 0.0
    fixed = max(0.0, idle - network - runs * jump)
    reduced = {name: float(np.median(r)) * network + jump for name, r in ratios.items()}
    return Costs(network + jump, jump, fixed, reduced, first)
