"""Drawings of what a search found: rows against speed-up, and the trials in their order."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from autofr import reading
from autofr.errors import damaged
from autofr.report.front import Mark, Panel
from autofr.report.svg import MARKERS, Axis, around, drawing, mark, node
from autofr.report.wording import exact, percent

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 542, 14, 356


# -- rows against speed-up ------------------------------------------------------------------------


def panel(shown: Panel | None) -> Element | None:
    """Rows against their speed-up; None without any."""
    if shown is None:
        return None
    label = f"{shown.title}, against speed-up, a mark per row"
    root = drawing((0, 0, WIDTH, HEIGHT), label, "front")
    across = Axis(*shown.across, LEFT, RIGHT, log=True)
    up = Axis(*shown.up, BOTTOM - 16, TOP, log=shown.log)
    _frame(root, across, up, "speed-up of the whole call", lambda x: f"{x:g}x", shown.write)
    if shown.budget:
        there = across(shown.budget[0])
        node(root, "line", x1=there, x2=there, y1=TOP, y2=BOTTOM, kind="budget")
        _beside(root, shown.budget[1], there, TOP + 10, 5, "tick")
    for colour, marks in shown.lines.items():
        line = [(across(mark.x.value), up(mark.y.value)) for mark in marks if mark.y.value > 0]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        node(root, "polyline", points=places, kind=f"line line-{colour}")
    for one in shown.marks:
        _mark(root, one, across, up)
    return root


def _mark(root: Element, one: Mark, across: Axis, up: Axis) -> None:
    """A row's marker with its intervals; hollow where the speed-up is predicted only."""
    x, y, look = one.x, one.y, one.look.colour
    group = mark(root, one.says)
    left, right = across(x.value), up(y.value) if y.value > 0 else float(BOTTOM)
    if y.value > 0 and y.high > y.low:
        node(group, "line", x1=left, x2=left, y1=up(y.low), y2=up(y.high), kind=f"line-{look}")
    if x.high > x.low:
        start, end = across(x.low), across(x.high)
        node(group, "line", x1=start, x2=end, y1=right, y2=right, kind=f"line-{look}")
    guessed = "" if one.measured else " hollow"
    place = f"translate({left:.1f} {right:.1f})"
    node(group, "circle", cx=left, cy=right, r=12, kind="catch")
    path = MARKERS[one.look.marker]
    node(group, "path", d=path, transform=place, kind=f"point fill-{look}{guessed}")
    if y.value == 0:  # below every logarithmic axis: it stands on the floor
        node(group, "text", "0", x=left + 9, y=right - 6, kind="tick")
    if one.row.group == "chosen":
        _beside(group, one.note, left, right + 17, 12, f"label text-{look}")


def _beside(parent: Element, text: str, x: float, y: float, gap: float, kind: str) -> None:
    """Write to the right of a place, or to the left where there is no room."""
    if x > 0.75 * WIDTH:
        node(parent, "text", text, x=x - gap, y=y, kind=f"{kind} end")
    else:
        node(parent, "text", text, x=x + gap, y=y, kind=kind)


def _frame(
    root: Element,
    across: Axis,
    up: Axis,
    title: str,
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
) -> None:
    """Grid lines with their numbers."""
    for y in up.ticks():
        node(root, "line", x1=LEFT, x2=RIGHT, y1=up(y), y2=up(y), kind="grid")
        node(root, "text", write_y(y), x=LEFT - 8, y=up(y) + 4, kind="tick end")
    for x in across.ticks(6):
        node(root, "line", x1=across(x), x2=across(x), y1=BOTTOM, y2=BOTTOM + 4, kind="axis")
        node(root, "text", write_x(x), x=across(x), y=BOTTOM + 18, kind="tick middle")
    node(root, "line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, kind="axis")
    node(root, "text", title, x=(LEFT + RIGHT) / 2, y=HEIGHT - 6, kind="tick middle")


# -- trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A line of `trials.csv`; published schedules are not `searched`: they have no choices."""

    number: int
    state: str
    error: float | None
    label: str
    repeats: str
    seconds: str
    searched: bool
    reason: str


def load_trials(path: Path) -> list[Trial]:
    """Read `trials.csv`; nothing where there is none.

    Raises: RunFolderError when it is damaged.
    """
    if not path.is_file():
        return []
    try:
        text = reading.content(path, reading.OWN).decode("utf-8")
        return [_trial(line) for line in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise damaged(path) from None


def _trial(line: dict[str, str]) -> Trial:
    known = ("trial", "state", "error", "label", "digest", "duplicate_of", "seconds", "reason")
    return Trial(
        number=int(line["trial"]),
        state=line["state"].lower(),
        error=float(line["error"]) if line["error"] else None,
        label=line["label"],
        repeats=line["duplicate_of"],
        seconds=line["seconds"],
        searched=any(value for name, value in line.items() if name not in known),
        reason=line["reason"],
    )


def history(trials: Sequence[Trial]) -> Element | None:
    """The error of every trial in their order, and the least of the searched ones so far."""
    scored = [(trial, trial.error) for trial in trials if trial.error and trial.error > 0]
    if not scored:
        return None
    root = drawing((0, 0, WIDTH, HEIGHT), "Error of every trial, in their order", "front")
    across = Axis(-0.5, max(t.number for t in trials) + 0.5, LEFT, RIGHT)
    up = Axis(*around([error for _, error in scored], True, 0.08), BOTTOM - 8, TOP + 8, log=True)
    _frame(root, across, up, "trial", lambda x: f"{x:.0f}", lambda y: f"{100 * y:.3g} %")
    best = float("inf")
    places: list[str] = []
    for trial, error in scored:
        if trial.searched and error < best:
            last = [f"{across(trial.number):.1f},{up(best):.1f}"] if places else []
            best = error
            places += [*last, f"{across(trial.number):.1f},{up(best):.1f}"]
    if places:
        places.append(f"{RIGHT},{up(best):.1f}")
    node(root, "polyline", points=" ".join(places), kind="line line-chosen")
    for trial in trials:
        _dot(root, trial, across, up)
    return root


def _dot(root: Element, trial: Trial, across: Axis, up: Axis) -> None:
    scored = trial.error is not None and trial.error > 0
    said = f"error {percent(exact(trial.error or 0.0))}" if scored else trial.reason or trial.state
    again = f", the same policy as trial {trial.repeats}" if trial.repeats else ""
    group = mark(root, f"trial {trial.number}: {trial.label or trial.state}, {said}{again}")
    x, y = across(trial.number), up(trial.error or 1.0) if scored else float(TOP)
    node(group, "circle", cx=x, cy=y, r=9, kind="catch")
    look, marker = ("planned", "circle") if trial.searched else ("other", "diamond")
    if not scored:
        look, marker = "frdiff", "cross"
    hollow = " hollow" if trial.repeats else ""
    place = f"translate({x:.1f} {y:.1f}) scale(0.7)"
    node(group, "path", d=MARKERS[marker], transform=place, kind=f"point fill-{look}{hollow}")
