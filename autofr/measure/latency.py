"""Honest timing: of two calls in turn, and of the parts of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autofr.errors import MeasurementError
from autofr.measure import confidence
from autofr.measure.costs import Costs, whole
from autofr.mix import JUMP, KEY
from autofr.policy import Interval


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
        ratio = confidence.of_median(np.array([x / y for x, y in walls]))
        narrow = (ratio.high - ratio.low) / 2 <= half_width * ratio.value
        if on_pair:
            on_pair(pairs, (ratio.high - ratio.low) / 2 / ratio.value)
        if narrow or pairs >= max_pairs or time.perf_counter() - began > max_seconds:
            break
    one, two = np.median(np.array(walls), axis=0)
    busy = np.median([x / y if y > 0 else np.nan for x, y in cpus])
    return Paired(ratio, float(one), float(two), pairs, float(busy))


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
