"""What every choice for a step costs, in error and in time, and its mix: from the calibration."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.mix import JUMP, Family

RIDGE = 1e-5


@dataclass(frozen=True)
class Rule:
    """What a plan may use.

    `masks`: names allowed ("jump" among them); `mix`: "fit1", "fit2" (least squares on the
    reduced score and one or two keyframes' scores), or a λ(t) family; `max_gap`: most steps from a
    keyframe to the next, or from the last one to the end; `phase`: log error weights at evenly
    spaced places of what runs, straight lines between; `first`, `last`: forced keyframes at the
    ends of what runs; `corrected`: a fitted mix is corrected afterwards, at keyframes too, which
    makes up for what the next keyframe's score explains of a step's error; `agreement`: how far
    what the steps between keyframes miss adds up by its directions (1), or as squares (0).
    """

    masks: tuple[str, ...]
    max_gap: int = 6
    mix: Family | str = "fit2"
    phase: tuple[float, ...] = (0.0,)
    first: int = 1
    last: int = 0
    corrected: bool = False
    agreement: float = 1.0


@dataclass(frozen=True)
class Choices:
    """Weighted error and seconds of every choice: (masks, step, gap, gap before, gap after), and
    its mix, whatever the gap after.

    Gap index g - 1; the gaps between the last keyframe and the one before it, and from the last
    keyframe to the next one, are 0 where there is none. Steps are those that run, after the `first`
    of a call. `agreement` (keyframe, gap before, gap after, g - 1, g' - 1): the cosine of what two
    steps after a keyframe miss.
    """

    names: tuple[str, ...]
    error: np.ndarray
    weights: np.ndarray
    seconds: np.ndarray
    agreement: np.ndarray
    first: int


def choices(calibration: Calibration, costs: Costs, rule: Rule) -> Choices:
    """Tabulate error and cost of each allowed mask (or jump) between any keyframes around it."""
    fitted = isinstance(rule.mix, str)
    names = (*(name for name in calibration.masks if name in rule.masks),)
    names = (*(name for name in names if fitted or not calibration.halved(name)),)
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
                    weights[index, used, gap - 1, before] = found[1][:, :3]
                    if rule.corrected and isinstance(rule.mix, str):
                        again, after = _corrected(used, gap, gaps, n, calibration.switch)
                        left = _mixed(calibration, rule.mix, name, again, gap, known, after)[0]
                        error[index, again, gap - 1, before, after] = left
    scale = _scale(calibration, rule)[:, None, None, None]
    np.multiply(error, scale, out=error, where=np.isfinite(error))
    seconds = np.array([costs.of_step(name) for name in names] or [0.0])
    agreement = _agreement(calibration, rule, gaps)
    return Choices(names, error, weights, seconds, agreement, calibration.first)


def _scale(calibration: Calibration, rule: Rule) -> np.ndarray:
    """How a squared error of each step counts (steps,): in the final latents, by its phase."""
    places = np.linspace(0, 1, len(rule.phase))
    phase = np.interp(np.linspace(0, 1, calibration.steps), places, rule.phase)
    scale: np.ndarray = calibration.gain**2 * np.exp(phase) / calibration.norm
    return scale


def _agreement(calibration: Calibration, rule: Rule, gaps: int) -> np.ndarray:
    """The cosine of what two steps after a keyframe miss, when both hold its score.

    All the teacher's scores that they hold are in the table, so that it is exact there; what masks
    leave is taken to point the same way.
    """
    n, switch = calibration.steps, calibration.switch
    found = np.zeros((n, gaps + 1, gaps + 1, gaps, gaps))
    corrected = rule.corrected and isinstance(rule.mix, str)
    for before, after in np.ndindex(gaps + 1, gaps + 1):
        keys = np.arange(before, n - max(after, 1))
        older = _same(switch, keys, keys - before)
        following = _same(switch, keys, keys + after) & (corrected and after > 0)
        for own, makes_up in itertools.product((True, False), repeat=2):
            used = keys[(older == own) & (following == makes_up)]
            if not len(used):
                continue
            around = before if own else 0, after if makes_up else 0
            products = _missed(calibration, rule.mix, used, *around, gaps)
            found[used, before, after] = _cosines(products)
    found *= rule.agreement
    found[..., range(gaps), range(gaps)] = 1
    return found


def _missed(
    calibration: Calibration,
    mix: Family | str,
    keys: np.ndarray,
    before: int,
    after: int,
    gaps: int,
) -> np.ndarray:
    """Products (keys, gaps, gaps) of what the steps after keyframes miss that hold their scores:
    each a sum of scores, its own and those of three keyframes. Nothing where no step is.
    """
    at = np.zeros((len(keys), gaps, 4), int)
    share = np.zeros((len(keys), gaps, 4))
    for gap in range(1, after or gaps + 1):
        some = keys[keys + gap < calibration.steps]
        later = np.full(len(some), after) if after else None
        weights = _mixed(calibration, mix, JUMP, some + gap, gap, before, later)[1]
        scores = [some + gap, some, some - before, some + after]
        at[: len(some), gap - 1] = np.stack(scores, axis=1)
        share[: len(some), gap - 1, 0] = 1
        share[: len(some), gap - 1, 1:] = -weights[:, 1:]
    products = calibration.teacher[at[:, :, None, :, None], at[:, None, :, None, :]]
    found: np.ndarray = np.einsum("ksa,ktb,kstab->kst", share, share, products)
    return found


def _cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of vectors from their inner products, (..., n, n); 0 with one that is nothing."""
    size = np.sqrt(np.maximum(np.einsum("...ss->...s", products), 0))
    size = size[..., :, None] * size[..., None, :]
    found = np.zeros_like(products)
    np.divide(products, size, out=found, where=size > 0)
    return found.clip(-1, 1)


def _same(switch: int, steps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether one denoiser runs both of each pair of steps."""
    found: np.ndarray = (steps < switch) == (others < switch)
    return found


def _stretches(
    steps: np.ndarray, last: np.ndarray, older: np.ndarray, switch: int
) -> list[tuple[np.ndarray, bool]]:
    """Steps that one denoiser serves from its own last keyframe, and whether the one before it is
    its own too. What another denoiser kept is of no use (two experts), so its keyframe is forced.
    """
    served, own = _same(switch, steps, last), _same(switch, steps, older)
    return [(steps[served & own], True), (steps[served & ~own], False)]


def _corrected(
    steps: np.ndarray, gap: int, gaps: int, n: int, switch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a step and the gap from its keyframe to the next one, where the same denoiser runs
    that too: what it finds there corrects the step.
    """
    again, after = (grid.ravel() for grid in np.meshgrid(steps, np.arange(gap + 1, gaps + 1)))
    following = again - gap + after
    own = (following < n) & _same(switch, again, following)
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
    """Squared error (steps,) and mix weights [reduced, last, before, next] (steps, 4) of a choice.

    With the gaps to the next keyframes (`after`, one per step) the error is what is left when
    their scores have made up for what they explain of it.
    """
    jump = name == JUMP
    last = steps - gap
    keys = np.stack([last, last - before, last if after is None else last + after], axis=1)
    gram, wanted = _products(calibration, name, steps, gap, keys)
    start = np.array(
        [0.0, 1.0, 0.0, 0.0] if jump else [1.0, float(calibration.halved(name)), 0.0, 0.0]
    )
    target = calibration.teacher[steps, steps]
    if isinstance(mix, str):
        free = [1] if jump else [0, 1]
        free += [2] if mix == "fit2" and before else []
        free += [] if after is None else [3]
        weights = _fitted(gram, wanted, target, start, free)
    else:
        place = (calibration.first + steps) / calibration.asked
        share = [0.0 if jump else mix.weight(float(r)) for r in place]
        weights = np.stack([share, 1 - np.array(share), *np.zeros((2, len(steps)))], axis=1)
    error = target - 2 * (weights * wanted).sum(1)
    error += np.einsum("si,sij,sj->s", weights, gram, weights)
    return np.maximum(error, 0), weights


def _products(
    calibration: Calibration, name: str, steps: np.ndarray, gap: int, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Products of what a choice can mix, with each other (steps, 4, 4) and with what is wanted
    (steps, 4): the reduced score (nothing at a jump) and those of the keyframes `keys` (steps, 3).

    Of the first two keyframes, a guidance branch mixes what the other one added to it.
    """
    e = calibration.teacher
    if calibration.halved(name):
        return _guided(e, calibration.branch, steps, keys)
    rows, count = np.arange(len(steps)), len(steps)
    gram, wanted = np.zeros((count, 4, 4)), np.zeros((count, 4))
    gram[:, 1:, 1:], wanted[:, 1:] = e[keys[:, :, None], keys[:, None]], e[steps[:, None], keys]
    if name != JUMP:
        m = calibration.masks.index(name)
        cross = calibration.cross[m, steps, gap - 1]
        gram[:, 0, 0], wanted[:, 0] = calibration.own[m, steps, gap - 1], cross[rows, steps]
        gram[:, 0, 1:] = gram[:, 1:, 0] = cross[rows[:, None], keys]
    return gram, wanted


def _guided(
    e: np.ndarray, branch: np.ndarray, steps: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`_products` for a guidance branch, of the products of scores and branches at all steps.

    With s the scores and b the branch's, what is mixed is [b_i, s_k - b_k, s_k' - b_k', s_next]:
    sums of the six vectors [b_i, b_k, b_k', s_k, s_k', s_next].
    """
    eb, bb = branch
    at = np.concatenate(
        [steps[:, None], keys[:, :2], keys], axis=1
    )  # (steps, 6): steps they are of
    here, there = at[:, :, None], at[:, None, :]
    scores = np.arange(6) >= 3
    both, none = scores[:, None] & scores, ~scores[:, None] & ~scores
    mixed = np.where(scores[:, None], eb[here, there], eb[there, here])
    six = np.where(both, e[here, there], np.where(none, bb[here, there], mixed))
    known = np.where(scores, e[steps[:, None], at], eb[steps[:, None], at])
    sums = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [0, -1, 0, 1, 0, 0],
            [0, 0, -1, 0, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    )
    return sums @ six @ sums.T, known @ sums.T


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
