"""Pictures of what a search found: rows against speed-up, the policy, and samples.

What they show is prepared in `front` and `policy_chart`, for the page and for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from autofr.mix import JUMP, KEY, Table
from autofr.policy import Policy
from autofr.report import front, notes
from autofr.report.canvas import DPI, INK, MARKERS, SOFT, colours, label, picture
from autofr.report.front import Mark, Panel
from autofr.report.policy_chart import OFF, SCORES, does, kinds, weights
from autofr.report.svg import Axis
from autofr.report.wording import count, times
from autofr.search.result import Result

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10  # seeds in samples.png


# -- error and FID against speed-up ---------------------------------------------------------------


def pareto(result: Result, path: Path) -> None:
    """Draw error to the teacher and FID of every row against the speed-up of the whole call.

    Filled markers are measured speed-ups, hollow ones predicted. One panel without any FID.
    """
    panels = [one for one in (front.errors(result), front.fids(result)) if one]
    with picture(path, 13 if panels[1:] else 9, 6) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, shown in zip(axes, panels, strict=True):
            _panel(ax, shown)
        figure.legend(handles=_legend(result), loc="outside lower center", ncols=5)
        if layout := figure.get_layout_engine():
            layout.execute(figure)
        for ax, shown in zip(axes, panels, strict=True):
            notes.write(ax, shown.marks)


def _panel(ax: Axes, shown: Panel) -> None:
    """Draw one panel: axes, the budget, lines, and a marker with intervals per row."""
    low, high = shown.up
    floor = low * (low / high) ** 0.05 if shown.log else low
    ax.set(title=shown.title, xlabel="speed-up of the whole call")
    ax.set(xscale="log", yscale="log" if shown.log else "linear")
    ax.set(xlim=shown.across, ylim=(floor, high))
    across, up = Axis(*shown.across, 0, 1, log=True), Axis(low, high, 0, 1, log=shown.log)
    label(ax, "x", across.ticks(), [f"{x:g}x" for x in across.ticks()])
    label(ax, "y", up.ticks(), [shown.write(y) for y in up.ticks()])
    if shown.budget:
        ax.axvline(shown.budget[0], color=SOFT, linestyle="--", linewidth=1, zorder=1)
    for colour, marks in shown.lines.items():
        line = [(mark.x.value, mark.y.value) for mark in marks if mark.y.value > 0]
        ax.plot(*zip(*line, strict=True), color=colours()[colour], alpha=0.6, zorder=2)
    for mark in shown.marks:
        _mark(ax, mark, floor)


def _mark(ax: Axes, mark: Mark, floor: float) -> None:
    """A row's marker with its intervals; error 0, which no logarithmic axis has, on the floor."""
    colour, y = colours()[mark.look.colour], mark.y.value
    size, above = (17, 5) if mark.row.group == "chosen" else (6.5, 3)
    up, across = (
        [[max(0.0, v.value - v.low)], [max(0.0, v.high - v.value)]] for v in (mark.y, mark.x)
    )
    ax.errorbar(
        mark.x.value, max(y, floor), up, across, fmt=MARKERS[mark.look.marker], color=colour,
        elinewidth=1, markerfacecolor=colour if mark.measured else "white", markersize=size,
        markeredgewidth=1, zorder=above, clip_on=y > floor,
    )  # fmt: skip


def _legend(result: Result) -> list[Line2D]:
    """Name groups and lines; it stands below the panels, where no point can be covered."""
    lines = front.errors(result).lines
    handles = [
        Line2D(
            [], [], color=colours()[look.colour], marker=MARKERS[look.marker], label=look.label,
            markersize=7, linestyle="-" if look.colour in lines else "",
        )
        for look in front.legend(result)
    ]  # fmt: skip
    more: dict[str, dict[str, Any]] = {f"budget {result.budget}": {"linestyle": "--"}}
    if front.predicted(result):
        more["hollow: speed-up predicted only"] = {"ls": "", "marker": "o", "mfc": "white"}
    return handles + [Line2D([], [], color=SOFT, label=name, **look) for name, look in more.items()]


# -- the policy -----------------------------------------------------------------------------------


def policy_strip(policy: Policy, path: Path) -> None:
    """Draw what every step does, and below it the weights that mix the scores there."""
    steps, legend, n = does(policy), kinds(policy), len(policy.steps)
    shades = {kind.name: colours()[kind.shade] for kind in legend}
    with picture(path, 13, 4.6 + 0.1 * len(legend), _policy_title(policy, steps)) as figure:
        strip, mix = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
        strip.bar(range(n), 1, 0.92 if n <= 120 else 1.0, color=[shades[name] for name in steps])
        for i, name in enumerate(steps if n <= 60 else ()):
            dark = np.dot(to_rgb(shades[name]), (0.299, 0.587, 0.114)) < 0.5
            look: dict[str, Any] = {"color": "white" if dark else INK, "rotation": 90}
            strip.text(i, 0.5, name, ha="center", va="center", fontsize=min(9, 400 / n), **look)
        strip.set(yticks=[], xlim=(-0.6, n - 0.4), ylim=(0, 1))
        strip.set_xticks(range(0, n, 1 if n <= 60 else 5 if n <= 150 else max(10, n // 250 * 10)))
        strip.tick_params(labelbottom=True, length=0)
        strip.spines[:].set_visible(False)
        strip.grid(False)
        _mix(mix, policy)
        handles = [
            Patch(color=shades[kind.name], label=f"{kind.name} × {kind.steps}: {kind.means}")
            for kind in legend
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)


def _policy_title(policy: Policy, steps: Sequence[str]) -> str:
    keys, jumps, off, n = steps.count(KEY), steps.count(JUMP), steps.count(OFF), len(steps)
    sampler, measured = policy.sampler, policy.measured
    instead = f" instead of {sampler.replaces}" if sampler.replaces != n else ""
    run = f", of which {n - off} run" if off else ""
    title = (
        f"{policy.model.name}, {sampler.scheduler}, {count(n, 'step')}{instead}{run}:"
        f" {count(keys, 'keyframe')}, {count(n - off - keys - jumps, 'mask step')},"
        f" {count(jumps, 'jump')}"
    )
    return title + (f"; measured {times(measured.speedup)}" if measured else "")


def _mix(ax: Axes, policy: Policy) -> None:
    """Stack the weights of each step's scores, negative ones downwards; λ(t) as a line."""
    n = len(policy.steps)
    rows = np.array([weights(policy.weights(i)) for i in range(n)]).T
    up, down = np.zeros(n), np.zeros(n)
    for k, (name, row) in enumerate(zip(SCORES, rows, strict=True)):
        if row.any():
            base = np.where(row >= 0, up, down)
            wide = 0.92 if n <= 120 else 1.0
            ax.bar(range(n), row, wide, base, color=colours()[f"w{k}"], label=name)
            up, down = up + np.maximum(row, 0), down + np.minimum(row, 0)
    if not isinstance(policy.mix, Table):
        ax.plot(range(n), [policy.mix.weight(i / n) for i in range(n)], color=INK, label="λ(t)")
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    ax.set_ylim(down.min() - 0.06, max(1.0, up.max()) + 0.06)
    ax.set_title("Mix: weight of each score (none: found here alone)")
    ax.set_xlabel("step")
    ax.grid(False, axis="x")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(SCORES) + 1, borderpad=0)


# -- images ---------------------------------------------------------------------------------------


def samples(teacher: Tensor, policy: Tensor, path: Path, title: str) -> None:
    """Show the same seeds in columns: teacher, policy, and their difference times 5.

    Images (n, 3, h, w) in [0, 1]; the first `SHOWN` are shown.
    """
    first, second = (images[:SHOWN].float().cpu() for images in (teacher, policy))
    difference = 5 * (first - second).abs()
    _sheet({"teacher": first, "policy": second, "difference × 5": difference}, path, title)


def grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Show images (n, 3, h, w) in [0, 1], row by row."""
    _sheet(dict(enumerate(images.float().cpu().split(columns))), path)


def _sheet(rows: Mapping[Any, Tensor], path: Path, title: str = "") -> None:
    """Put rows of images on a page, every pixel enlarged by the same whole number."""
    height, width = next(iter(rows.values())).shape[-2:]
    zoom, gap = max(1, round(160 / width)), 6
    wide, high = width * zoom + gap, height * zoom + gap
    left, top = (145, 40) if title else (gap, gap)
    columns = max(map(len, rows.values()))
    page = np.ones((len(rows) * high + top, columns * wide + left, 3))
    for r, images in enumerate(rows.values()):
        for c, image in enumerate(images.clamp(0, 1)):
            pixels = image.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
            y, x = top + r * high, left + c * wide
            page[y : y + height * zoom, x : x + width * zoom] = pixels
    down, across = page.shape[:2]
    with picture(path, across / DPI, down / DPI, layout=None) as figure:
        figure.figimage(page)
        if title:
            figure.text(gap / across, 1 - 20 / down, title, va="center", weight="bold")
            for r, name in enumerate(rows):
                place = (left - 8) / across, 1 - (top + (r + 0.5) * high - gap / 2) / down
                figure.text(*place, name, ha="right", va="center", fontsize=8)
