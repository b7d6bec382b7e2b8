"""Drawings of a policy: what every step does and costs, and how its scores are mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from autofr.mix import JUMP, KEY, Table, executed
from autofr.policy import Policy, of_guidance
from autofr.report.svg import drawing, mark, node, rect

OFF = "left out"  # steps that do not run: calls that start from a picture begin in the middle
SHADES = 8  # colours of masks in the style sheet
SCORES = ("score found here", "last keyframe's score", "keyframe's before that", "older keyframes'")
BRANCHES = ("branch found here", "last keyframe's difference", *SCORES[2:])
"""Where a mask computes one guidance branch."""


@dataclass(frozen=True)
class Kind:
    """One thing that steps do: its name, class in the style sheet, meaning, and at how many."""

    name: str
    shade: str
    means: str
    steps: int


@dataclass(frozen=True)
class Chart:
    """A drawing without text, with what a page writes around it.

    `kinds` is its legend; `ticks` are (share of the height from the top, label).
    """

    drawing: Element
    kinds: list[Kind]
    ticks: list[tuple[float, str]]


def does(policy: Policy) -> list[str]:
    """What every step does: a mask that weighs nothing is a jump, and the first ones may be `OFF`.

    As far as it is known: that is measured.
    """
    first = (policy.measured and policy.measured.skipped_steps) or 0
    steps = [executed(step, policy.weights(i)) for i, step in enumerate(policy.steps)]
    return [OFF if i < first else step for i, step in enumerate(steps)]


def kinds(policy: Policy, known: Sequence[frozenset[str]] = ()) -> list[Kind]:
    """What the steps of a policy do: keyframes first, then masks, jumps, and what does not run.

    Masks with the points of one of `known` get its colour; others get the next.
    """
    steps = does(policy)
    used = [name for name in policy.masks if name in steps]
    order = [*known, *(frozenset(policy.masks[name]) for name in used)]
    places = {name: order.index(frozenset(policy.masks[name])) for name in used}
    shades = {KEY: "key"} | {n: f"m{i % SHADES}" for n, i in places.items()}
    shades |= {JUMP: "jump", OFF: "fixed"}
    means = {KEY: "everything is computed", JUMP: "the network is not called"}
    means[OFF] = "calls start from a picture, later than here"
    means |= {name: _points(policy.masks[name]) for name in used}
    return [Kind(n, s, means[n], steps.count(n)) for n, s in shades.items() if n in steps]


def _points(points: Sequence[str]) -> str:
    inner = [point for point in points if not of_guidance(point)]
    branch = "one guidance branch is computed, the other one's difference reused"
    more = f" and {len(inner) - 1} more" if inner[1:] else ""
    kept = [f"kept and reused: {inner[0]}{more}"] if inner else []
    return "; ".join(([branch] if len(inner) < len(points) else []) + kept)


def strip(
    policy: Policy,
    shares: Mapping[str, float] | None = None,
    known: Sequence[frozenset[str]] = (),
) -> Chart:
    """One bar per step; as high as its share of a full step's time, where `shares` has it."""
    steps, legend = does(policy), kinds(policy, known)
    looks = {kind.name: kind for kind in legend}
    counted = ", ".join(f"{kind.steps} {kind.name}" for kind in legend)
    root = drawing((0, 0, len(steps), 100), f"The {len(steps)} steps: {counted}", "strip", True)
    gap = 0.08 if len(steps) <= 120 else 0.0
    for i, name in enumerate(steps):
        share = 0.0 if name == OFF else 1.0 if shares is None else shares.get(name, 1.0)
        cost = "" if shares is None else f", {share:.0%} of a full step's time"
        bar = mark(root, f"step {i}: {name}, {looks[name].means}{cost}")
        rect(bar, (i, 0, 1, 100), "catch")
        high = max(4.0, 100 * min(share, 1.0))
        place = (i + gap / 2, 100 - high, 1 - gap, high)
        rect(bar, place, f"fill-{looks[name].shade}")
    ticks = [] if shares is None else [(0.0, "100 %"), (0.5, "50 %"), (1.0, "0")]
    return Chart(root, legend, ticks)


def mix(policy: Policy) -> Chart:
    """The weights of each step's scores, stacked, negative ones downwards; λ(t) as a line."""
    rows = [weights(policy.weights(i)) for i in range(len(policy.steps))]
    high = max([1.0, *(sum(w for w in row if w > 0) for row in rows)]) * 1.04
    low = min([0.0, *(sum(w for w in row if w < 0) for row in rows)]) * 1.04
    n = len(rows)
    root = drawing((0, -high, n, high - low), "The weights of every step's scores", "mix", True)
    gap, halved = 0.08 if n <= 120 else 0.0, policy.halved
    for i, row in enumerate(rows):
        if any(row):
            names = BRANCHES if policy.steps[i] in halved else SCORES
            said = ", ".join(f"{w:.3f} of the {s}" for w, s in zip(row, names, strict=True) if w)
            bars = mark(root, f"step {i}: {said}")
            rect(bars, (i, -high, 1, high - low), "catch")
            _stack(bars, row, i + gap / 2, 1 - gap)
    for y in (0, 1):
        node(root, "line", x1=0, x2=n, y1=-y, y2=-y, kind="rule")
    if not isinstance(policy.mix, Table):
        places = " ".join(f"{i + 0.5},{-policy.mix.weight(i / n):.3f}" for i in range(n))
        node(root, "polyline", points=places, kind="lambda")
    used = [k for k in range(len(SCORES)) if any(row[k] for row in rows)]
    legend = [Kind(SCORES[k], f"w{k}", "", sum(bool(row[k]) for row in rows)) for k in used]
    values = [-1, 0, 1, 2] if high < 4 and low > -4 else [0, 1]
    ticks = [((high - v) / (high - low), f"{v:g}") for v in values if low <= v <= high]
    return Chart(root, legend, ticks)


def weights(row: Sequence[float]) -> tuple[float, ...]:
    """A step's weights by `SCORES`: those of all older keyframes are one."""
    full = [*row, 0.0, 0.0, 0.0, 0.0]
    return (*full[:3], sum(full[3:]))


def _stack(parent: Element, row: Sequence[float], x: float, width: float) -> None:
    up = down = 0.0
    for k, weight in enumerate(row):
        if weight > 0:
            up += weight
            y = -up
        else:
            y, down = -down, down + weight
        if weight:
            rect(parent, (x, y, width, abs(weight)), f"fill-w{k}")
