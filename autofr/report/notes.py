"""Notes beside the marks of a picture, each where it covers least, and by its own mark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from autofr.report.canvas import DPI, colours
from autofr.report.front import Mark

Place = tuple[float, float, str]
"""Offset from a mark in points, and which end of the note stands there."""

PLACES: tuple[Place, ...] = (
    (8, -5, "left"), (-8, -5, "right"), (8, 5, "left"), (-8, 5, "right"), (0, -11, "center"),
    (0, 11, "center"), (11, -14, "left"), (-11, -14, "right"), (11, 14, "left"), (-11, 14, "right"),
)  # fmt: skip
FIRST: dict[str, Place] = {
    "chosen": (11, -14, "left"), "fewer steps": (0, -11, "center"), "teacher": (8, 0, "left"),
}  # fmt: skip
HALF = {"chosen": 8.5}  # of a marker's size in points
SMALL = 3.5  # of all others
OUTSIDE = 100  # marks that a note may rather cover than be cut off at an edge


def write(ax: Axes, marks: Sequence[Mark]) -> None:
    """Write beside marks, that of the choice first. The figure's layout has to be done."""
    canvas = ax.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer, room = canvas.get_renderer(), ax.get_window_extent()
    taken = [_box(ax, mark) for mark in marks]
    noted = [one for one in zip(marks, taken, strict=True) if _text(one[0])]
    for mark, own in sorted(noted, key=lambda one: one[0].row.group != "chosen"):
        note = _note(ax, mark)
        first = FIRST.get(mark.row.group, PLACES[0])
        found: list[tuple[float, Place, Bbox]] = []
        for place in (first, *PLACES):
            box = _put(note, place).get_window_extent(renderer)
            covered = sum(Bbox.intersection(box, other) is not None for other in taken)
            far = _gap(box, own)
            covered += any(_gap(box, other) <= far for _, other in noted if other is not own)
            outside = box.x0 < room.x0 or box.x1 > room.x1 or box.y0 < room.y0
            found.append((covered + OUTSIDE * outside, place, box))
        _, place, box = min(found, key=lambda one: one[0])
        _put(note, place)
        taken.append(box)


def _box(ax: Axes, mark: Mark) -> Bbox:
    """The place of a marker on the canvas."""
    x, y = ax.transData.transform(_at(ax, mark))
    half = HALF.get(mark.row.group, SMALL) * DPI / 72
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _at(ax: Axes, mark: Mark) -> tuple[float, float]:
    """Where a mark is drawn: error 0, which no logarithmic axis has, on the floor."""
    return mark.x.value, max(mark.y.value, ax.get_ylim()[0])


def _gap(one: Bbox, other: Bbox) -> float:
    """The distance of two boxes, 0 where they meet."""
    across = max(one.x0 - other.x1, other.x0 - one.x1, 0.0)
    return math.hypot(across, max(one.y0 - other.y1, other.y0 - one.y1, 0.0))


def _text(mark: Mark) -> str:
    if mark.row.group == "chosen":
        return f"{mark.note}\n{mark.x.value:.2f}x"
    return "0" if mark.y.value == 0 else mark.note


def _note(ax: Axes, mark: Mark) -> Annotation:
    """A note with a white rim, so that lines behind do not disturb."""
    look: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 2.5}
    look["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]
    look |= {"color": colours()[mark.look.colour], "fontsize": 8}
    note = ax.annotate(_text(mark), _at(ax, mark), (0, 0), **look)
    note.set_in_layout(False)
    return note


def _put(note: Annotation, place: Place) -> Annotation:
    x, y, end = place
    note.xyann = (x, y)
    note.set_horizontalalignment(end)  # type: ignore[arg-type]
    return note
