"""Published schedules as drafts of policies: the rows that a search has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autofr.measure.costs import Costs
from autofr.mix import KEY, Constant, HardSigmoid, Mix, executed, mix_row

PLAIN = Constant(value=1.0)
Group = Literal[
    "teacher", "fewer steps", "frdiff", "deepcache", "planned", "chosen", "other solver"
]
"""Kinds of rows in the comparison table."""


@dataclass(frozen=True)
class Draft:
    """What a schedule decides: a step name per solver step, and the mix."""

    name: str
    group: Group
    steps: tuple[str, ...]
    mix: Mix = PLAIN

    def seconds(self, costs: Costs) -> float:
        """Predicted seconds per call; masks that λ turns into jumps cost a jump."""
        n = len(self.steps)
        rows = (mix_row(step, self.mix, i, n) for i, step in enumerate(self.steps))
        return costs.of_call([*map(executed, self.steps, rows)])


def fewer_steps(steps: int) -> Draft:
    """The same solver, every step computed, but fewer of them: the floor of every method."""
    return Draft(f"{steps} steps", "fewer steps", (KEY,) * steps)


def uniform(
    name: str, group: Group, steps: int, interval: int, mask: str, mix: Mix = PLAIN, first: int = 0
) -> Draft:
    """A keyframe every `interval` steps from the `first` that runs, one mask in between."""
    row = tuple(KEY if i < first or (i - first) % interval == 0 else mask for i in range(steps))
    return Draft(name, group, row, mix)


def frdiff(steps: int, interval: int, mix: Mix | None = None, first: int = 0) -> Draft:
    """FRDiff with interval M; `mix` None is pure feature reuse (its figure without mixing)."""
    label = f"FRDiff M={interval}" + (", official λ" if mix else "")
    return uniform(label, "frdiff", steps, interval, "frdiff", mix or PLAIN, first)


def deepcache(steps: int, interval: int, cut: str, place: str, first: int = 0) -> Draft:
    """DeepCache with interval N; the branch is where the U-Net is cut (see points, `stage`)."""
    label = f"DeepCache N={interval}, {place}"
    return uniform(label, "deepcache", steps, interval, cut, first=first)


def cuts(masks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Names of the single-cut masks, each with the place it cuts at."""
    return {
        name: points[0].removesuffix("#stage")
        for name, points in masks.items()
        if len(points) == 1 and points[0].endswith("#stage")
    }


def deepcache_cuts(masks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The cuts at block borders plus the shallowest one: DeepCache's useful branches."""
    places = cuts(masks)
    border = {n: p for n, p in places.items() if p.startswith("up_blocks") and "resnets" not in p}
    shallowest = list(places.items())[-1:]
    return border | dict(shallowest)


def published(
    masks: Mapping[str, Sequence[str]], costs: Costs, steps: int, seconds: float
) -> list[Draft]:
    """All rows of the comparison for a teacher of `steps` and a budget of `seconds` per call."""
    first, affordable = costs.first(steps), costs.affordable(seconds, steps)
    counts = {round(steps / 1.5), round(steps / 2), round(steps / 3), affordable}
    fewer = [n for n in sorted(counts, reverse=True) if 1 <= n < steps]
    rows = [fewer_steps(n) for n in fewer if costs.runs(n)]
    if "frdiff" in masks:
        for mix in (None, HardSigmoid(tau=30.0, bias=0.5)):
            rows += [frdiff(steps, interval, mix, first) for interval in (2, 3, 5)]
    for cut, place in deepcache_cuts(masks).items():
        rows += [deepcache(steps, interval, cut, place, first) for interval in (2, 3, 5)]
    return rows
