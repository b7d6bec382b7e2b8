"""Pictures of what a search found: rows against speed-up, the policy, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter
from torch import Tensor

from autofr.mix import JUMP, KEY, executed
from autofr.plan.baselines import Group
from autofr.policy import Interval, Policy
from autofr.report.canvas import INK, SHADES, picture, plain_numbers
from autofr.report.wording import count, exact, speedup_of, times, wanted_speedup
from autofr.search.result import Result, Row

# Label, colour (Okabe and Ito's palette, safe for the colour-blind) and marker of each group, in
# the order in which they are listed everywhere.
LOOKS: dict[Group, tuple[str, str, str]] = {
    "teacher": ("teacher", "#000000", "s"),
    "chosen": ("chosen policy", "#D55E00", "*"),
    "planned": ("planned, with their front", "#009E73", "o"),
    "fewer steps": ("fewer steps (how many: beside it)", "#0072B2", "v"),
    "frdiff": ("FRDiff, uniform", "#E69F00", "^"),
    "deepcache": ("DeepCache, uniform", "#CC79A7", "D"),
    "other solver": ("other solver, not a candidate", "#9A9A9A", "X"),
}
SHOWN = 10  # seeds in samples.png
HELD = "#D5DBE0"
SCORES = {  # other colours than those of the masks
    "reduced score": "#44AA99",
    "last keyframe's": "#882255",
    "the keyframe's before": "#DDCC77",
    "older keyframes'": "#9A9A9A",
}


# -- error and FID against speed-up ---------------------------------------------------------------


def pareto(result: Result, path: Path) -> None:
    """Draw FID and error to the teacher of every row against the speed-up of the whole call.

    Filled markers are measured speed-ups, hollow ones predicted. One panel without any FID.
    """
    fids = [row.fid for row in result.rows if row.fid is not None]
    with picture(path, 13 if fids else 9, 6) as figure:
        *others, main = figure.subplots(1, 1 + bool(fids), squeeze=False, sharex=True)[0]
        for ax in others:
            ax.set_title(f"FID ({result.features or 'unnamed features'})")
            ax.set_yscale("log" if max(fids) > 1.8 * min(fids) > 0 else "linear")
            _panel(ax, result, lambda row: None if row.fid is None else exact(row.fid))
            for fid in (row.fid for row in result.rows if row.group == "teacher"):
                ax.axhline(fid, color=INK, linestyle=":", linewidth=1, zorder=1)
        main.set_title("Error to the teacher (relative L2 of final latents)")
        main.set_yscale("log")
        _panel(main, result, lambda row: row.error if row.error.value > 0 else None)
        for row in result.rows:
            if row.error.value == 0:  # below every logarithmic axis: it stands on the floor
                _, colour, marker = LOOKS[row.group]
                floor: dict[str, Any] = {"transform": main.get_xaxis_transform(), "color": colour}
                main.plot(speedup_of(row).value, 0, marker, clip_on=False, zorder=5, **floor)
                main.text(speedup_of(row).value, 0.015, "   0", **floor)
        figure.legend(handles=_legend(result), loc="outside lower center", ncols=4 if fids else 3)


def _panel(ax: Axes, result: Result, y_of: Callable[[Row], Interval | None]) -> None:
    """Draw one panel: a marker with intervals per row, lines, labels and the budget."""
    shown = [(row, speedup_of(row), y) for row in result.rows if (y := y_of(row))]
    for group, (_, colour, marker) in LOOKS.items():
        some = sorted((item for item in shown if item[0].group == group), key=lambda i: i[1].value)
        size, above = (17, 5) if group == "chosen" else (6.5, 3)
        for row, x, y in some:
            up, across = (np.maximum(0, [[v.value - v.low], [v.high - v.value]]) for v in (y, x))
            full = row.speedup is not None or group == "teacher"
            ax.errorbar(
                x.value, y.value, up, across, fmt=marker, color=colour, elinewidth=1,
                markerfacecolor=colour if full else "white", markersize=size, zorder=above,
            )  # fmt: skip
            if group == "chosen":
                _note(ax, f"{row.name}\n{x.value:.2f}x", x.value, y.value, (11, -16), colour)
            elif group == "fewer steps":
                _note(ax, str(row.steps), x.value, y.value, (-13, 8), colour)
            elif group == "other solver":
                words = f"{row.solver.split()[0]} {row.steps}"
                _note(ax, words, x.value, y.value, (0, 11), colour)
        line = {"fewer steps": some, "planned": _front(some)}.get(group, [])
        ax.plot([x.value for _, x, _ in line], [y.value for *_, y in line], color=colour, alpha=0.6)
    if budget := wanted_speedup(result):
        ax.axvline(budget, color=INK, linestyle="--", linewidth=1, zorder=1)
    _axes(ax, [speedup_of(row).value for row in result.rows] + [budget or 1.0])


def _note(
    ax: Axes, text: str, x: float, y: float, offset: tuple[float, float], colour: str
) -> None:
    """Write beside a point, with a white rim, so that lines behind do not disturb."""
    rim = [withStroke(linewidth=2.5, foreground="white")]
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 2.5}
    place["ha"] = "left" if offset[0] > 0 else "center"
    ax.annotate(text, (x, y), offset, color=colour, fontsize=8, path_effects=rim, **place)


def _front(items: Sequence[tuple[Row, Interval, Interval]]) -> list[Any]:
    """Keep the rows (sorted by speed-up) that no faster one of them beats in error."""
    errors = [row.error.value for row, *_ in items]
    return [item for i, item in enumerate(items) if errors[i] < min(errors[i + 1 :], default=9e9)]


def _axes(ax: Axes, speedups: Sequence[float]) -> None:
    """Scale the axes logarithmically, with plain numbers on them and room below."""
    low, high = 0.94 * min(speedups), 1.08 * max(speedups)
    step = 0.25 if high / low < 3 else 0.5 if high / low < 6 else 1
    ax.set(xscale="log", xlabel="speed-up of the whole call")
    ax.set_xticks(np.arange(step, min(high, 12), step))
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(y=0.12)
    if ax.get_yscale() == "log":
        plain_numbers(ax)


def _legend(result: Result) -> list[Line2D]:
    """Name groups and lines; it stands below the panels, where no point can be covered."""
    present = {row.group for row in result.rows}
    handles = [
        Line2D(
            [], [], color=colour, marker=marker, label=label, markersize=7,
            linestyle="-" if group in ("planned", "fewer steps") else "",
        )
        for group, (label, colour, marker) in LOOKS.items()
        if group in present
    ]  # fmt: skip
    more: dict[str, dict[str, Any]] = {f"budget {result.budget}": {"linestyle": "--"}}
    if any(row.speedup is None and row.group != "teacher" for row in result.rows):
        more["hollow: speed-up predicted only"] = {"ls": "", "marker": "o", "mfc": "white"}
    return handles + [Line2D([], [], color=INK, label=name, **look) for name, look in more.items()]


# -- the policy -----------------------------------------------------------------------------------


def policy_strip(policy: Policy, path: Path) -> None:
    """Draw what every step does, and below it the weights that mix the scores there."""
    n = len(policy.steps)
    does = [executed(step, policy.weights(i)) for i, step in enumerate(policy.steps)]
    used = [name for name in policy.masks if name in does]
    colours = {KEY: INK} | dict(zip(used, SHADES * len(used), strict=False)) | {JUMP: HELD}
    with picture(path, 13, 5 + 0.1 * len(used), _policy_title(policy, does)) as figure:
        strip, mix = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
        strip.bar(range(n), 1, 0.92 if n <= 120 else 1.0, color=[colours[name] for name in does])
        for i, name in enumerate(does if n <= 60 else ()):
            dark = np.dot(to_rgb(colours[name]), (0.299, 0.587, 0.114)) < 0.5
            look: dict[str, Any] = {"color": "white" if dark else INK, "rotation": 90}
            strip.text(i, 0.5, name, ha="center", va="center", fontsize=min(9, 400 / n), **look)
        strip.set(yticks=[], xlim=(-0.6, n - 0.4), ylim=(0, 1))
        strip.set_xticks(range(0, n, 1 if n <= 60 else 5 if n <= 150 else max(10, n // 250 * 10)))
        strip.tick_params(labelbottom=True, length=0)
        strip.spines[:].set_visible(False)
        strip.grid(False)
        _mix(mix, policy)
        handles = [
            Patch(color=colour, label=_meaning(policy, name, does.count(name)))
            for name, colour in colours.items()
            if name in does
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)


def _policy_title(policy: Policy, does: Sequence[str]) -> str:
    keys, jumps, n = does.count(KEY), does.count(JUMP), len(does)
    sampler, measured = policy.sampler, policy.measured
    instead = f" instead of {sampler.replaces}" if sampler.replaces != n else ""
    title = (
        f"{policy.model.name}, {sampler.scheduler}, {count(n, 'step')}{instead}:"
        f" {count(keys, 'keyframe')}, {count(n - keys - jumps, 'mask step')},"
        f" {count(jumps, 'jump')}"
    )
    return title + (f"; measured {times(measured.speedup)}" if measured else "")


def _meaning(policy: Policy, name: str, steps: int) -> str:
    if name in (KEY, JUMP):
        what = "everything computed" if name == KEY else "network not called"
    else:
        points = policy.masks[name]
        what = count(len(points), "point") + (f" ({points[0]})" if len(points) == 1 else "")
    return f"{name}: {what}; at {count(steps, 'step')}"


def _mix(ax: Axes, policy: Policy) -> None:
    """Stack the weights of each step's scores, negative ones downwards."""
    n = len(policy.steps)
    weights, up, down = np.zeros((len(SCORES), n)), np.zeros(n), np.zeros(n)
    for i in range(n):
        for k, weight in enumerate(policy.weights(i)):
            weights[min(k, len(SCORES) - 1), i] += weight
    for (label, colour), row in zip(SCORES.items(), weights, strict=True):
        if row.any():
            base = np.where(row >= 0, up, down)
            ax.bar(range(n), row, 0.92 if n <= 120 else 1.0, base, color=colour, label=label)
            up, down = up + np.maximum(row, 0), down + np.minimum(row, 0)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    ax.set_ylim(down.min() - 0.06, max(1.0, up.max()) + 0.06)
    ax.set_title("Mix: weight of each score (none at keyframes)")
    ax.set_xlabel("step")
    ax.grid(False, axis="x")
    if weights.any():
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(SCORES), borderpad=0)


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
    with picture(path, across / 150, down / 150, layout=None) as figure:
        figure.figimage(page)
        if title:
            figure.text(gap / across, 1 - 20 / down, title, va="center", weight="bold")
            for r, name in enumerate(rows):
                place = (left - 8) / across, 1 - (top + (r + 0.5) * high - gap / 2) / down
                figure.text(*place, name, ha="right", va="center", fontsize=8)
