"""What lies between two keyframes: the ways to fill an interval, from the cheapest to the nearest.

What the steps of an interval miss mostly points the same way, and moves the final latents together:
its error is |sum of g_i m_i|^2, with the gain g_i of a step and what it misses m_i, and more than
the sum of squares. Intervals count as independent of each other: the next keyframe makes up for
most of what came before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autofr.plan.choices import Choices, Rule

ROUNDS = 5
"""Ways to fill an interval: as many per step."""


@dataclass(frozen=True)
class Intervals:
    """Ways to fill every interval: (keyframe, gap before, gap after, way), from the cheapest on.

    The gap after is that to the next keyframe, 0 where the call ends first. `error` is infinite for
    intervals that a rule does not allow; `picks` (..., way, g - 1) are the choices of the steps.
    """

    error: np.ndarray
    seconds: np.ndarray
    picks: np.ndarray


def intervals(table: Choices, rule: Rule) -> Intervals:
    """Find ways to fill all intervals: from the cheapest one on, always the upgrade of one step
    that takes off most error per second.
    """
    n, gaps = table.error.shape[1:3]
    ways = 1 + ROUNDS * gaps
    found = Intervals(
        np.full((n, gaps + 1, gaps + 1, ways), np.inf),
        np.zeros((n, gaps + 1, gaps + 1, ways)),
        np.zeros((n, gaps + 1, gaps + 1, ways, gaps), int),
    )
    steps = np.arange(n)
    free = (steps >= rule.first) & (steps < n - rule.last)
    for before, after in np.ndindex(gaps + 1, gaps + 1):
        keys = steps[before : n - after] if after else steps[max(before, n - 1 - gaps) :]
        keys = keys if before else keys[keys == 0]
        if after == 1:  # the next step is a keyframe
            found.error[keys, before, after] = 0
        if after == 1 or not len(keys):
            continue
        inner = np.arange(1, after or gaps + 1)
        at = keys[:, None] + inner
        inside, at = at < n, np.minimum(at, n - 1)
        missed = np.sqrt(table.error[:, at, inner - 1, before, after]).transpose(1, 2, 0)
        missed[~free[at]] = np.inf
        agreement = table.agreement[keys, before, after][:, : len(inner), : len(inner)]
        errors, seconds, picks = _fill(missed, table.seconds, agreement, inside, ways)
        found.error[keys, before, after], found.seconds[keys, before, after] = errors, seconds
        found.picks[keys, before, after, :, : len(inner)] = picks
    return found


def _fill(
    missed: np.ndarray, seconds: np.ndarray, agreement: np.ndarray, inside: np.ndarray, ways: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors (n, ways), seconds (n, ways) and choices (n, ways, steps) of n intervals.

    Args: missed (n, steps, choices), how far each choice misses; seconds (choices,); agreement
        (n, steps, steps); inside (n, steps), which steps there are.
    """
    n, width = inside.shape
    errors, spent = np.full((n, ways), np.inf), np.zeros((n, ways))
    picks = np.zeros((n, ways, width), int)
    possible = np.isfinite(missed)
    alive = (possible.any(2) | ~inside).all(1)
    pick = np.where(possible, seconds, np.inf).argmin(2)
    rows, columns = np.arange(n), np.arange(width)
    for way in range(ways):
        now = np.where(inside, missed[rows[:, None], columns, pick], 0.0)
        now[~alive] = 0
        pull = np.einsum("nst,nt->ns", agreement, now)
        errors[:, way] = np.where(alive, np.maximum((now * pull).sum(1), 0), np.inf)
        spent[:, way] = np.where(inside, seconds[pick], 0.0).sum(1)
        picks[:, way] = pick
        change = np.where(possible, missed, 0.0) - now[:, :, None]
        gain = -(2 * pull[:, :, None] + change) * change
        extra = seconds - seconds[pick][:, :, None]
        worth = np.full_like(gain, -np.inf)
        useful = possible & inside[:, :, None] & (gain > 1e-9 * errors[:, way, None, None])
        np.divide(gain, extra, out=worth, where=useful & (extra > 0))
        worth[useful & (extra <= 0)] = np.inf
        step, choice = np.unravel_index(worth.reshape(n, -1).argmax(1), worth.shape[1:])
        better = rows[worth[rows, step, choice] > 0]
        pick = pick.copy()
        pick[better, step[better]] = choice[better]
    return errors, spent, picks
