"""What is on a front: every row of a result as a mark, the same on the page and in pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autofr.plan.baselines import Group
from autofr.policy import Interval
from autofr.report.svg import around
from autofr.report.wording import exact, percent, speedup_of, times, wanted_speedup
from autofr.search.result import Result, Row

NARROW = 0.03  # of its middle: a linear axis is at least so long, lest it magnify noise


@dataclass(frozen=True)
class Look:
    """How rows of a group look: label, name of their colour in the style sheet, and marker."""

    label: str
    colour: str
    marker: str


LOOKS: dict[Group, Look] = {  # in the order in which they are listed everywhere
    "teacher": Look("teacher", "teacher", "square"),
    "chosen": Look("chosen policy", "chosen", "star"),
    "planned": Look("planned", "planned", "circle"),
    "fewer steps": Look("fewer steps", "fewer", "down"),
    "frdiff": Look("FRDiff, uniform", "frdiff", "up"),
    "deepcache": Look("DeepCache, uniform", "deepcache", "diamond"),
    "other solver": Look("another solver, no candidate", "other", "cross"),
}


@dataclass(frozen=True)
class Mark:
    """A row: speed-up and value with their intervals, a short note, and all of it in words.

    A speed-up that was not `measured` is predicted.
    """

    row: Row
    look: Look
    x: Interval
    y: Interval
    measured: bool
    note: str
    says: str


@dataclass(frozen=True)
class Panel:
    """Rows against their speed-up: marks, the last on top, and lines by the name of their colour.

    `across` and `up` are the ranges of the axes: the first is logarithmic, the second may be.
    `budget` is the speed-up that meets it, and what it is called.
    """

    title: str
    marks: list[Mark]
    lines: dict[str, list[Mark]]
    across: tuple[float, float]
    up: tuple[float, float]
    log: bool
    budget: tuple[float, str] | None
    write: Callable[[float], str]


def errors(result: Result) -> Panel:
    """Error to the teacher of every row."""
    title = "Error to the unaccelerated pipe"
    return _panel(result, title, lambda row: row.error, lambda y: f"{100 * y:.3g} %")


def fids(result: Result) -> Panel | None:
    """FID of every row; None without any."""
    if all(row.fid is None for row in result.rows):
        return None
    title = f"FID in {result.features or 'unnamed features'}"
    return _panel(
        result, title, lambda row: None if row.fid is None else exact(row.fid), lambda y: f"{y:.4g}"
    )


def legend(result: Result) -> list[Look]:
    """The looks of the groups that a result has."""
    there = {row.group for row in result.rows}
    return [look for group, look in LOOKS.items() if group in there]


def predicted(result: Result) -> bool:
    """Whether some speed-up of a result is predicted only."""
    return not all(row.speedup or row.group == "teacher" for row in result.rows)


def _panel(
    result: Result,
    title: str,
    y_of: Callable[[Row], Interval | None],
    write: Callable[[float], str],
) -> Panel:
    order = [*(group for group in LOOKS if group != "chosen"), "chosen"]
    shown = [(row, y) for row in result.rows if (y := y_of(row)) is not None]
    shown.sort(key=lambda one: (order.index(one[0].group), speedup_of(one[0]).value))
    marks = [
        Mark(
            row=row,
            look=LOOKS[row.group],
            x=speedup_of(row),
            y=y,
            measured=bool(row.speedup) or row.group == "teacher",
            note=_note(row),
            says=says(row, result),
        )
        for row, y in shown
    ]
    wanted = wanted_speedup(result)
    budget = (wanted, f"budget {result.budget}") if wanted else None
    ends = [end for mark in marks for end in (mark.x.low, mark.x.high)] + [wanted or 1.0]
    heights = [y for mark in marks for y in (mark.y.low, mark.y.value, mark.y.high) if y > 0]
    up, log = _heights(heights or [0.01, 1.0])
    lines = {"planned": _front(marks), "fewer": [m for m in marks if m.row.group == "fewer steps"]}
    return Panel(title, marks, lines, around(ends, log=True), up, log, budget, write)


def _heights(values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """The range of the upward axis, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if high > 1.8 * low:
        return around(values, log=True, room=0.08), True
    middle, half = (low + high) / 2, NARROW / 2
    return around([low, high, (1 - half) * middle, (1 + half) * middle], room=0.08), False


def _front(marks: Sequence[Mark]) -> list[Mark]:
    """Planned rows and the chosen one by speed-up, but those that a faster one beats in error."""
    ours = [mark for mark in marks if mark.row.group in ("planned", "chosen")]
    ours.sort(key=lambda mark: mark.x.value)
    least = [mark.row.error.value for mark in ours]
    return [m for i, m in enumerate(ours) if least[i] < min(least[i + 1 :], default=9e9)]


def _note(row: Row) -> str:
    """What is written beside a mark: steps, solver, or that it is the choice."""
    if row.group == "chosen":
        return "chosen"
    if row.group == "other solver":
        return f"{row.solver.split()[0]} {row.steps}"
    return str(row.steps) if row.group == "fewer steps" else ""


def says(row: Row, result: Result) -> str:
    """A row in words."""
    gain = times(row.speedup) if row.speedup else f"{row.predicted_speedup:.2f}x predicted"
    fid = "" if row.fid is None else f", FID {row.fid:.2f}"
    name = "chosen policy" if row.name == result.chosen else row.name
    return f"{name}: {gain}, error {percent(row.error)}{fid}"
