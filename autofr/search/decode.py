"""The one decoder from parameters in a search space to a draft of a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autofr.errors import BudgetError, SpaceError
from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.memory import Memory
from autofr.mix import JUMP, KEY, Constant, Cosine, Family, HardSigmoid, Linear, Sigmoid, Step
from autofr.plan import baselines
from autofr.plan.baselines import Draft
from autofr.plan.choices import Rule
from autofr.plan.planner import Plan, plan
from autofr.search.space import (
    Axes,
    DirectAxes,
    Planned,
    PlannedAxes,
    Space,
    Uniform,
    UniformAxes,
    largest_gap,
)

TILTS = (0.0, -1.0, 1.0, -2.0, 2.0)
"""Guesses: how much more the end of a call counts than its gains say, as a log weight that rises
from minus this to this.
"""
PLACES = 7  # of a call, at which a phase is searched


class Trial(Protocol):
    """What `decode` needs of an Optuna trial; `optuna.trial.FixedTrial` fits too."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Frame:
    """What decoding needs to know: the teacher's steps, costs, seconds per call, calibration.

    `calibration(steps)` gives the table of a step count; `masks` names those that have a cost;
    `point_seconds` estimates masks that were not timed (skippable seconds per point).
    """

    steps: int
    seconds: float
    costs: Costs
    masks: Mapping[str, tuple[str, ...]]
    calibration: Callable[[int], Calibration]
    point_seconds: Mapping[str, float]
    memory: Memory


@dataclass(frozen=True)
class Decoded:
    """A draft, its masks and predicted seconds per call, and how many rollouts correct its mix."""

    draft: Draft
    masks: Mapping[str, tuple[str, ...]]
    seconds: float
    rollouts: int = 0


def decode(space: Space, trial: Trial, frame: Frame) -> Decoded:
    """Turn parameters into a draft that meets the budget: the only way a policy is made of them.

    Raises: BudgetError when no draft under these parameters meets it.
    """
    if isinstance(space, Planned):
        return _planned(space.axes, trial, frame)
    if isinstance(space, Uniform):
        return _uniform(space.axes, trial, frame)
    return _direct(space.axes, trial, frame)


def guesses(space: Space) -> list[dict[str, Any]]:
    """Parameters worth trying before the algorithm proposes any; inside the space's ranges."""
    if not isinstance(space, Planned):
        return []
    axes = space.axes

    def inside(value: float, span: tuple[float, float]) -> float:
        return type(span[0])(min(max(value, span[0]), span[1]))

    start = {
        "steps": axes.steps[0],
        "masks": axes.masks[0],
        "mix": axes.mix[0],
        "max_gap": axes.max_gap[1],
        "first": axes.first[0],
        "last": axes.last[0],
        "agreement": axes.agreement[1],
        "rollouts": inside(1, axes.rollouts),
        **{f"phase{at}": inside(0, axes.phase) for at in range(PLACES)},
    }
    if axes.mix[0] in ("sigmoid", "hard_sigmoid"):
        start |= {"tau": inside(30, axes.tau), "bias": inside(0.5, axes.bias)}
    elif axes.mix[0] == "step":
        start |= {"bias": inside(0.5, axes.bias)}
    tilts = [*dict.fromkeys(inside(tilt, axes.tilt) for tilt in TILTS)]
    found = [start | {"tilt": tilt} for tilt in tilts]
    if "jump+branches" in axes.masks[1:]:
        found.insert(1, found[0] | {"masks": "jump+branches"})
    return found


def fastest_seconds(space: Space, frame: Frame) -> float:
    """The least seconds per call that any policy of the space could take.

    The planner sets keyframes at most `max_gap` apart; as many steps may follow the last one.
    """
    steps, gap = frame.steps, frame.steps
    if isinstance(space, Planned):
        steps, gap = _steps(frame, min(space.axes.steps)), largest_gap(space)
    costs, runs = frame.costs, frame.costs.runs(steps)
    keys = max(1, -(-(runs - 1) // gap))
    return costs.fixed + keys * costs.key + (runs - keys) * costs.jump


def family(name: str, masks: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Names of the masks (and "jump") that a mask family of the space allows."""
    if name == "all":
        return (*masks, JUMP)
    parts = {
        "jump": (JUMP,),
        "cuts": tuple(baselines.cuts(masks)),
        "branches": ("branches",),
        "frdiff": ("frdiff",),
    }
    return tuple(mask for part in name.split("+") for mask in parts[part])


def _steps(frame: Frame, share: float) -> int:
    return max(2, round(frame.steps * share))


def _planned(axes: PlannedAxes, trial: Trial, frame: Frame) -> Decoded:
    share = trial.suggest_categorical("steps", axes.steps)
    name = trial.suggest_categorical("masks", axes.masks)
    mix = _mix(axes, trial)
    steps = _steps(frame, share)
    calibration = frame.calibration(steps)
    tilt = trial.suggest_float("tilt", *axes.tilt)
    rule = Rule(
        masks=family(name, frame.masks),
        max_gap=trial.suggest_int("max_gap", *axes.max_gap),
        mix=mix,
        phase=tuple(
            tilt * (2 * at / (PLACES - 1) - 1) + trial.suggest_float(f"phase{at}", *axes.phase)
            for at in range(PLACES)
        ),
        first=trial.suggest_int("first", *axes.first),
        last=trial.suggest_int("last", *axes.last),
        agreement=trial.suggest_float("agreement", *axes.agreement),
    )
    rollouts = trial.suggest_int("rollouts", *axes.rollouts)
    rollouts = rollouts if isinstance(mix, str) else 0
    # Only paths of the teacher's own steps, with one score each, are corrected.
    corrected = rollouts > 0 and steps == frame.steps and calibration.stages == 1
    found = _within_memory(frame, calibration, replace(rule, corrected=corrected))
    draft = Draft(f"planned ({name}, {mix_name(mix)})", "planned", found.steps, found.mix)
    return Decoded(draft, frame.masks, found.seconds, rollouts)


def _within_memory(frame: Frame, calibration: Calibration, rule: Rule) -> Plan:
    """Plan; as long as that keeps too much, without the mask that keeps most.

    Raises: BudgetError when nothing that fits into memory meets the time.
    """
    while True:
        found = plan(calibration, frame.costs, rule, frame.seconds)
        used = set(found.steps) & set(frame.masks)
        if not used:
            frame.memory.check(found.steps, frame.masks, found.mix)
        if frame.memory.fits(found.steps, frame.masks, found.mix):
            return found
        size = {name: frame.memory.tensors(frame.masks[name]) for name in sorted(used)}
        largest = max(size, key=size.__getitem__)
        rule = replace(rule, masks=tuple(name for name in rule.masks if name != largest))


def _uniform(axes: UniformAxes, trial: Trial, frame: Frame) -> Decoded:
    """The interval is widened until the budget is met."""
    mix = _family(axes, trial)
    interval = trial.suggest_int("interval", *axes.interval)
    if "frdiff" not in frame.masks:
        raise BudgetError("FRDiff's points save too little time here")
    first = frame.costs.first(frame.steps)
    for wider in range(min(interval, frame.steps), frame.steps + 1):
        name = f"FRDiff M={wider}, {mix_name(mix)}"
        draft = baselines.uniform(name, "frdiff", frame.steps, wider, "frdiff", mix, first)
        spent = draft.seconds(frame.costs)
        if spent <= frame.seconds:
            frame.memory.check(draft.steps, frame.masks, mix)
            return Decoded(draft, frame.masks, spent)
    raise BudgetError("no interval of FRDiff meets the budget with this λ(t)")


def _direct(axes: DirectAxes, trial: Trial, frame: Frame) -> Decoded:
    """The keyframes are the largest of one number per step, as many as the budget allows."""
    mix = _family(axes, trial)
    points = [
        point
        for group in _groups(axes, frame)
        if trial.suggest_categorical(f"reuse {group[0]}", [False, True])
        for point in group[1]
    ]
    first = frame.costs.first(frame.steps)
    free = range(first + 1, frame.steps)
    order = sorted(free, key=lambda i: -trial.suggest_float(f"key{i}", 0.0, 1.0))
    masks = {"chosen": tuple(points)} if points else {}
    saved = sum(frame.point_seconds[point] for point in _outer(points))
    reduced = max(frame.costs.jump, frame.costs.key - saved)
    costs = replace(frame.costs, masks={"chosen": reduced})
    between = "chosen" if points else JUMP
    for count in range(len(free), -1, -1):
        keys = {*range(first + 1), *order[:count]}
        row = tuple(KEY if i in keys else between for i in range(frame.steps))
        draft = Draft("direct", "planned", row, mix)
        spent = draft.seconds(costs)
        if spent <= frame.seconds:
            frame.memory.check(row, masks, mix)
            return Decoded(draft, masks, spent)
    raise BudgetError("these points save too little time for the budget")


def _groups(axes: DirectAxes, frame: Frame) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for point in frame.point_seconds:
        path, kind = point.split("#")
        if kind in axes.groups:
            block = ".".join(path.split(".")[:2]) if "blocks" in path else path.split(".")[0]
            groups.setdefault(f"{kind} {block}", []).append(point)
    return sorted(groups.items())


def _outer(points: Sequence[str]) -> list[str]:
    """Leave out first convolutions whose whole branch is reused anyway."""
    chosen = set(points)
    return [p for p in points if not p.endswith("#conv") or p[:-4] + "branch" not in chosen]


def _mix(axes: Axes, trial: Trial) -> Family | str:
    name = trial.suggest_categorical("mix", axes.mix)
    if name in ("fit1", "fit2"):
        return str(name)
    if name in ("sigmoid", "hard_sigmoid"):
        tau = trial.suggest_float("tau", *axes.tau)
        bias = trial.suggest_float("bias", *axes.bias)
        return Sigmoid(tau=tau, bias=bias) if name == "sigmoid" else HardSigmoid(tau=tau, bias=bias)
    if name == "step":
        return Step(bias=trial.suggest_float("bias", *axes.bias))
    plain: dict[str, Family] = {"linear": Linear(), "cosine": Cosine(), "constant": Constant()}
    return plain[name]


def _family(axes: Axes, trial: Trial) -> Family:
    """A λ(t): what spaces without the planner can mix with."""
    found = _mix(axes, trial)
    if isinstance(found, str):
        raise SpaceError(f"mix {found!r} is fitted by the planner: this space needs a λ(t) family")
    return found


def mix_name(mix: Family | str) -> str:
    """A short label: "fit2", or "sigmoid τ=30 b=0.5"."""
    if isinstance(mix, str):
        return mix
    parts = {"tau": "τ", "bias": "b"}
    shown = [f"{parts[k]}={v:.2g}" for k, v in mix.model_dump().items() if k in parts]
    return " ".join([mix.kind, *shown])
