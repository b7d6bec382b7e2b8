"""Tell what a search found: pictures, one table, one Markdown page and `result.json`.

The only file that imports matplotlib; nothing here touches pyplot or other global state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter
from pydantic import ValidationError
from torch import Tensor

from autofr.errors import BudgetError, RunFolderError
from autofr.evaluate import Group, Result, Row
from autofr.latency import parse_budget
from autofr.policy import JUMP, KEY, Interval, Measured, Policy
from autofr.profiling import Profile

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
INK, PALE, HELD = "#1F2933", "#C9D6DF", "#D5DBE0"
SHADES = (  # of masks and kinds: Okabe and Ito's, then Tol's
    "#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#F0E442",
    "#332288", "#117733", "#AA4499", "#999933", "#661100", "#6699CC", "#DDCC77",
)  # fmt: skip
SCORES = {  # other colours than those of the masks
    "reduced score": "#44AA99",
    "last keyframe's": "#882255",
    "the keyframe's before": "#DDCC77",
    "older keyframes'": "#9A9A9A",
}
STYLE: dict[str, Any] = {
    "savefig.dpi": 150, "figure.dpi": 150, "font.size": 9, "text.color": INK,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8A9199",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E8ECEF", "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
}  # fmt: skip


@contextmanager
def _picture(
    path: Path, width: float, height: float, title: str = "", layout: Any = "constrained"
) -> Iterator[Figure]:
    """Hand out an empty figure (inches) in the house style, and save it at the end."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure((width, height), layout=layout)
        if title:
            figure.suptitle(title, x=0.008, ha="left", fontsize=11, weight="bold")
        yield figure
        figure.savefig(path)


# -- error and FID against speed-up ---------------------------------------------------------------


def pareto(result: Result, path: Path) -> None:
    """Draw FID and error to the teacher of every row against the speed-up of the whole call.

    Filled markers are measured speed-ups, hollow ones predicted. One panel without any FID.
    """
    fids = [row.fid for row in result.rows if row.fid is not None]
    with _picture(path, 13 if fids else 9, 6) as figure:
        *others, main = figure.subplots(1, 1 + bool(fids), squeeze=False, sharex=True)[0]
        for ax in others:
            ax.set_title(f"FID ({result.features or 'unnamed features'})")
            ax.set_yscale("log" if max(fids) > 1.8 * min(fids) > 0 else "linear")
            _panel(ax, result, lambda row: None if row.fid is None else _exact(row.fid))
            for fid in (row.fid for row in result.rows if row.group == "teacher"):
                ax.axhline(fid, color=INK, linestyle=":", linewidth=1, zorder=1)
        main.set_title("Error to the teacher (relative L2 of final latents)")
        main.set_yscale("log")
        _panel(main, result, lambda row: row.error if row.error.value > 0 else None)
        for row in result.rows:
            if row.error.value == 0:  # below every logarithmic axis: it stands on the floor
                _, colour, marker = LOOKS[row.group]
                floor: dict[str, Any] = {"transform": main.get_xaxis_transform(), "color": colour}
                main.plot(_speedup(row).value, 0, marker, clip_on=False, zorder=5, **floor)
                main.text(_speedup(row).value, 0.015, "   0", **floor)
        figure.legend(handles=_legend(result), loc="outside lower center", ncols=4 if fids else 3)


def _panel(ax: Axes, result: Result, y_of: Callable[[Row], Interval | None]) -> None:
    """Draw one panel: a marker with intervals per row, lines, labels and the budget."""
    shown = [(row, _speedup(row), y) for row in result.rows if (y := y_of(row))]
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
    if budget := _wanted(result):
        ax.axvline(budget, color=INK, linestyle="--", linewidth=1, zorder=1)
    _axes(ax, [_speedup(row).value for row in result.rows] + [budget or 1.0])


def _note(
    ax: Axes, text: str, x: float, y: float, offset: tuple[float, float], colour: str
) -> None:
    """Write beside a point, with a white rim, so that lines behind do not disturb."""
    rim = [withStroke(linewidth=2.5, foreground="white")]
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 2.5}
    place["ha"] = "left" if offset[0] > 0 else "center"
    ax.annotate(text, (x, y), offset, color=colour, fontsize=8, path_effects=rim, **place)


def _exact(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _speedup(row: Row) -> Interval:
    return row.speedup or _exact(row.predicted_speedup)


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
        _plain(ax)


def _plain(ax: Axes) -> None:
    """Label a logarithmic y axis with 1, 2, 5 of each power of ten, or all on a short one."""
    low, high = ax.get_ylim()
    digits = "125" if high / low > 8 else "123456789"
    for put in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        put(lambda y, _: f"{y:.6g}" if f"{y:.0e}"[0] in digits else "")


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
    does = [_does(policy, i) for i in range(n)]
    used = [name for name in policy.masks if name in does]
    colours = {KEY: INK} | dict(zip(used, SHADES * len(used), strict=False)) | {JUMP: HELD}
    with _picture(path, 13, 5 + 0.1 * len(used), _policy_title(policy, does)) as figure:
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


def _does(policy: Policy, step: int) -> str:
    """What runs at a step: a mask whose reduced score has no weight is a jump."""
    name = policy.steps[step]
    return JUMP if name != KEY and policy.weights(step)[0] == 0 else name


def _policy_title(policy: Policy, does: Sequence[str]) -> str:
    keys, jumps, n = does.count(KEY), does.count(JUMP), len(does)
    sampler, measured = policy.sampler, policy.measured
    instead = f" instead of {sampler.replaces}" if sampler.replaces != n else ""
    title = (
        f"{policy.model.name}, {sampler.scheduler}, {_count(n, 'step')}{instead}:"
        f" {_count(keys, 'keyframe')}, {_count(n - keys - jumps, 'mask step')},"
        f" {_count(jumps, 'jump')}"
    )
    return title + (f"; measured {_times(measured.speedup)}" if measured else "")


def _meaning(policy: Policy, name: str, steps: int) -> str:
    if name in (KEY, JUMP):
        what = "everything computed" if name == KEY else "network not called"
    else:
        points = policy.masks[name]
        what = _count(len(points), "point") + (f" ({points[0]})" if len(points) == 1 else "")
    return f"{name}: {what}; at {_count(steps, 'step')}"


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

    Images (n, 3, h, w) in [0, 1]; the first 10 are shown.
    """
    first, second = (images[:10].float().cpu() for images in (teacher, policy))
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
    canvas = np.ones((len(rows) * high + top, columns * wide + left, 3))
    for r, images in enumerate(rows.values()):
        for c, image in enumerate(images.clamp(0, 1)):
            pixels = image.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
            y, x = top + r * high, left + c * wide
            canvas[y : y + height * zoom, x : x + width * zoom] = pixels
    down, across = canvas.shape[:2]
    with _picture(path, across / 150, down / 150, layout=None) as figure:
        figure.figimage(canvas)
        if title:
            figure.text(gap / across, 1 - 20 / down, title, va="center", weight="bold")
            for r, name in enumerate(rows):
                place = (left - 8) / across, 1 - (top + (r + 0.5) * high - gap / 2) / down
                figure.text(*place, name, ha="right", va="center", fontsize=8)


# -- the profile ----------------------------------------------------------------------------------


def profile_pictures(profile: Profile, folder: Path) -> list[Path]:
    """Draw similarity between steps, latency of points and masks, and similarity against gap."""
    pictures = {"similarity.png": _similarity, "latency.png": _latency, "gaps.png": _gaps}
    for name, draw in pictures.items():
        draw(profile, folder / name)
    return [folder / name for name in pictures]


def _kinds(profile: Profile) -> dict[str, list[str]]:
    """Names of points by kind, in network order; the score, which is no point, comes last."""
    kinds: dict[str, list[str]] = {}
    rank = {"down": 0, "mid": 1}
    ordered = sorted(profile.points, key=lambda point: rank.get(point.name.split("_")[0], 2))
    points = {point.name: point.kind for point in ordered}
    for name in [*points, *(name for name in profile.similarity if name not in points)]:
        kinds.setdefault(points.get(name, name.split("#")[-1]), []).append(name)
    return kinds


def _short(name: str) -> str:
    """`up_blocks.2.resnets.0#conv` -> `up 2 resnet 0`."""
    path = re.sub(r"_blocks?\b", "", name.split("#")[0].replace(".", " "))
    return re.sub(r"(resnet|attention)s\b", r"\1", path)


def _height(rows: int, panels: int) -> float:
    return min(24.0, 1.4 + 0.14 * rows + 0.36 * panels)


def _panels(
    figure: Figure | SubFigure, kinds: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Axes, str, Sequence[str]]]:
    """One panel per kind with one row per point; labels are thinned above 130 points."""
    heights = [len(names) + 0.6 for names in kinds.values()]
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=heights)
    every = -(-sum(map(len, kinds.values())) // 130)
    for (kind, names), ax in zip(kinds.items(), panels[:, 0], strict=True):
        yield ax, kind, names
        labelled = range(0, len(names), every)
        ax.set_yticks(labelled, [_short(names[row]) for row in labelled], fontsize=7)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(length=0)
        ax.set_title(kind, fontsize=9)
        ax.spines[:].set_visible(False)
        ax.grid(False, axis="y")


def _similarity(profile: Profile, path: Path) -> None:
    """Heat map: how much each point's tensor changes from one step to the next."""
    change = {n: np.array(s.relative_l1[0], float) for n, s in profile.similarity.items()}
    known = np.concatenate(list(change.values()))
    low, high = np.percentile(known[known > 0] if (known > 0).any() else [1.0], [1, 99.5])
    norm = LogNorm(low, max(high, 1.01 * low), clip=True)
    kinds = _kinds(profile)
    height = _height(len(change), len(kinds))
    title = f"Change of every point from one step to the next\n{_setting(profile)}"
    with _picture(path, 10, height, title) as figure:
        axes = []
        for ax, _, names in _panels(figure, kinds):
            shown = np.stack([change[name] for name in names])
            image = ax.imshow(shown, "magma_r", norm, aspect="auto", interpolation="nearest")
            ax.set_facecolor("#E4E7EB")
            ax.grid(False)
            axes.append(ax)
        axes[-1].set_xlabel("step (the first has none before it)")
        bar = figure.colorbar(image, ax=axes, shrink=min(1, 5 / height), anchor=(0, 1), aspect=35)
        bar.set_label("relative L1 change (light: worth reusing)")
        bar.outline.set_visible(False)
        _plain(bar.ax)


def _latency(profile: Profile, path: Path) -> None:
    """Bars: time of each point with the part that reuse skips; cost of a step with each mask."""
    points = {point.name: point for point in profile.points if point.kind != "stage"}
    kinds = {kind: names for kind, names in _kinds(profile).items() if names[0] in points}
    longest = max((point.whole_seconds for point in points.values()), default=0) * 1e3
    title = f"Where the time goes\n{_setting(profile)}; a full step {_ms(profile.key_seconds)}"
    rows = max(len(points), len(profile.mask_seconds) + 6)
    with _picture(path, 12.5, _height(rows, len(kinds)), title) as figure:
        halves: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
        left, right = halves
        for ax, _, names in _panels(left, kinds):
            whole = np.array([points[name].whole_seconds for name in names]) * 1e3
            skipped = np.array([points[name].skippable_seconds for name in names]) * 1e3
            ax.barh(range(len(names)), whole, 0.8, color=PALE)
            ax.barh(range(len(names)), skipped, 0.8, color="#0072B2")
            for row, (all_, part) in enumerate(zip(whole, skipped, strict=True)):
                share = f"{part / all_:.0%}" if all_ else "–"
                ax.text(all_ + longest / 100, row, share, va="center", fontsize=7)
            ax.set_xlim(0, longest * 1.08 or 1)
        ax.set_xlabel("ms per evaluation")
        light, dark = Patch(color=PALE), Patch(color="#0072B2")
        words = ("whole module", "skipped by reuse (with its share)")
        left.legend((light, dark), words, loc="outside lower left", ncols=2)
        _mask_bars(right, profile, rows)


def _mask_bars(figure: SubFigure, profile: Profile, rows: int) -> None:
    """Seconds of a step with each mask as a share of a fully computed one, and memory kept."""
    seconds = {KEY: profile.key_seconds, **profile.mask_seconds, JUMP: profile.jump_seconds}
    tall = min(rows, 2 * len(seconds))
    ax, rest = figure.subplots(2, 1, height_ratios=(tall, rows - tall + 1))
    rest.set_axis_off()
    for row, (name, spent) in enumerate(seconds.items()):
        share = spent / profile.key_seconds
        ax.barh(row, share, 0.8, color=INK if name == KEY else "#009E73")
        kept = profile.mask_bytes.get(name)
        memory = f", keeps {_bytes(kept)}" if kept else ""
        ax.text(share + 0.01, row, f"{share:.0%}{memory}", va="center", fontsize=8)
    ax.set_yticks(range(len(seconds)), list(seconds), fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.35), xticks=[])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("A step with each mask, share of a full step", fontsize=9)


def _gaps(profile: Profile, path: Path) -> None:
    """Lines: mean similarity of each kind against the gap, with the band of 80 % of its points."""
    title = f"How long a kept tensor stays good\n{_setting(profile)}"
    metrics = {"cosine": "Cosine similarity", "relative_l1": "Relative L1 change"}
    with _picture(path, 11, 4.6, title) as figure:
        panels = figure.subplots(1, 2)
        for ax, (metric, label) in zip(panels, metrics.items(), strict=True):
            for (kind, names), colour in zip(_kinds(profile).items(), SHADES, strict=False):
                rows = [getattr(profile.similarity[name], metric) for name in names]
                means = np.nanmean(np.array(rows, float)[:, : profile.steps - 1], axis=2)
                gaps = np.arange(1, means.shape[1] + 1)
                low, high = np.percentile(means, [10, 90], axis=0)
                ax.fill_between(gaps, low, high, color=colour, alpha=0.13, linewidth=0)
                ax.plot(gaps, means.mean(0), "o-", color=colour, markersize=4, label=kind)
            ax.set_title(label)
            ax.set_xlabel("gap (steps since the tensor was kept)")
            ax.set_xticks(gaps)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _setting(profile: Profile) -> str:
    return f"{profile.denoiser}, {_count(profile.steps, 'step')}, {profile.device}"


# -- words ----------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"


def _percent(value: Interval) -> str:
    digits = 1 if value.value >= 0.01 or value.value == 0 else 2
    spread = f" ({100 * value.low:.{digits}f}–{100 * value.high:.{digits}f})"
    return f"{100 * value.value:.{digits}f} %{spread if value.high > value.low else ''}"


def _times(value: Interval) -> str:
    return f"{value.value:.2f}x ({value.low:.2f}–{value.high:.2f})"


def _wanted(result: Result) -> float | None:
    """The speed-up that meets the budget; None for a time per call if no call was timed."""
    measured = result.policy.measured
    try:
        budget = parse_budget(result.budget)
        if budget.speedup or measured is None:
            return budget.speedup
        return budget.speedup_over(measured.teacher_seconds)
    except BudgetError:
        return None


def headline(result: Result) -> str:
    """Say in one sentence what was gained and what it cost."""
    measured = result.policy.measured
    if measured is None:
        row = next(row for row in result.rows if row.name == result.chosen)
        return (
            f"{result.model} is predicted to take {1 / row.predicted_speedup:.0%} of its time"
            f" ({row.predicted_speedup:.2f}x, not measured); its latents differ from the"
            f" unaccelerated ones by {_percent(_exact(row.error.value))}."
        )
    per = "per image" if measured.batch == 1 else f"per batch of {measured.batch} images"
    speedup = measured.speedup
    vain = ": no measurable gain" if speedup.low <= 1 <= speedup.high else ""
    return (
        f"{result.model} now takes {_ms(measured.policy_seconds)} {per} instead of"
        f" {_ms(measured.teacher_seconds)} ({speedup.value:.2f}x, 95 % interval"
        f" {speedup.low:.2f}–{speedup.high:.2f}{vain}); its latents differ from the unaccelerated"
        f" ones by {_percent(_exact(measured.trajectory_error.value))}"
        f"{_fid_words(measured) if result.features else ''}."
    )


def _fid_words(measured: Measured) -> str:
    """Say `no measurable difference` only where the interval of the difference contains 0."""
    change = measured.fid_difference
    verdict = "no measurable difference"
    if not change.low <= 0 <= change.high:
        word = "higher" if change.low > 0 else "lower"
        low, high = sorted((abs(change.low), abs(change.high)))
        verdict = f"{word} by {abs(change.value):.2g}, 95 % interval {low:.2g}–{high:.2g}"
    fids = f"{measured.fid_policy:.2f} against {measured.fid_teacher:.2f}"
    return f" (FID in {measured.features} {fids}: {verdict})"


def table(result: Result, predicted: str = "{} (predicted)") -> list[list[str]]:
    """Compare all rows, header first; `predicted` formats speed-ups that were not measured."""
    head = ["name", "group", "solver", "steps", "network calls", "speed-up", "error to teacher"]
    lines = [[*head, "error to reference", f"FID ({result.features})"]]
    order = list(LOOKS)
    for row in sorted(result.rows, key=lambda row: (order.index(row.group), _speedup(row).value)):
        guess = predicted.format(f"{row.predicted_speedup:.2f}x")
        line = [
            row.name,
            row.group if row.candidate else "another solver",
            row.solver,
            str(row.steps),
            f"{row.network_calls:g}",
            _times(row.speedup) if row.speedup else "1" if row.group == "teacher" else guess,
            _percent(row.error),
            _percent(row.reference_error),
            "–" if row.fid is None else f"{row.fid:.2f}",
        ]
        lines.append(line)
    return lines if result.features else [line[:-1] for line in lines]


# -- files ----------------------------------------------------------------------------------------

BEFORE_AFTER = {
    "samples.png": "The same seeds: teacher, policy, and their difference times 5",
    "grid.png": "More images drawn with the policy",
    "pareto.png": "FID and error to the teacher against speed-up",
    "policy.png": "What every step does, and how the scores are mixed",
}
PROFILE = {
    "similarity.png": "How much every point changes from one step to the next",
    "latency.png": "Where the time goes",
    "gaps.png": "How long a kept tensor stays good",
}
LEGEND = """\
The chosen policy is in bold. Speed-ups are of the whole call: measured, with a 95 % interval, or
*predicted* (italics). Errors are the relative L2 distance of the final latents on validation
seeds, to the teacher and to the reference ({reference}). FID is comparable within this table only:
features are {features}. Rows marked "another solver" change the solver itself, so they draw other
images; they are shown for comparison and are no candidates."""
USAGE = """\
```python
import autofr

autofr.apply(pipe, "policy.json")  # pipe: your {pipeline}
images = pipe(num_inference_steps={steps}).images
```"""


def markdown(result: Result, folder: Path) -> None:
    """Write `report.md` into the folder; it shows the pictures that lie there."""
    lines = table(result, "*{}*")
    for line in lines[1:]:
        line[0] = f"**{line[0]}**" if line[0] == result.chosen else line[0]
    features = result.features or "none"
    sections = {
        f"# {result.model}, budget {result.budget}": [headline(result), _verdict(result)],
        "## Before and after": _links(folder, BEFORE_AFTER),
        "## Remarks": ["\n".join(f"- {remark}" for remark in result.remarks)],
        "## Results": [_rows(lines), LEGEND.format(reference=result.reference, features=features)],
        "## The chosen policy on test seeds": [_rows(_final(result))],
        "## How to use it": [USAGE.format(pipeline=result.pipeline, steps=result.steps)],
        "## The profile": _links(folder, PROFILE),
        "## Protocol": [_rows(_protocol(result)), f"```sh\n{result.command}\n```"],
    }
    parts = [[head, *filter(None, body)] for head, body in sections.items() if any(body)]
    text = "\n\n".join("\n\n".join(part) for part in parts)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")


def _links(folder: Path, pictures: Mapping[str, str]) -> list[str]:
    there = {name: text for name, text in pictures.items() if (folder / name).is_file()}
    return [f"![{text}]({name})\n\n*{text}.*" for name, text in there.items()]


def _rows(lines: Sequence[Sequence[str]]) -> str:
    """Markdown table, header first."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*rows[:1], "|" + " --- |" * len(lines[0]), *rows[1:]]) if rows else ""


def _verdict(result: Result) -> str:
    measured, wanted = result.policy.measured, _wanted(result)
    if not measured or not wanted:
        return ""
    met = "met" if measured.speedup.low >= wanted else "**not met**"
    return (
        f"The budget {result.budget} is {met}: the lower end of the measured speed-up is"
        f" {measured.speedup.low:.3f}x, and {wanted:.3f}x was asked for."
    )


def _final(result: Result) -> list[list[str]]:
    """Numbers of the chosen policy on seeds that were used for nothing else."""
    measured = result.policy.measured
    if measured is None:
        return []
    change = measured.fid_difference
    fids = [
        [f"FID, teacher ({measured.features})", f"{measured.fid_teacher:.2f}"],
        [f"FID, policy ({measured.features})", f"{measured.fid_policy:.2f}"],
        ["FID, difference", f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"],
    ]
    return [
        [f"{measured.samples} samples, seeds {measured.seeds}", "value (95 % interval)"],
        ["speed-up", f"{_times(measured.speedup)}; predicted {measured.predicted_speedup:.2f}x"],
        ["time per call, teacher", _ms(measured.teacher_seconds)],
        ["time per call, policy", _ms(measured.policy_seconds)],
        *(fids if result.features else []),
        ["error of final latents to the teacher", _percent(measured.trajectory_error)],
        ["PSNR to the teacher's images", f"{measured.psnr:.1f} dB"],
        ["error at low frequencies", _percent(_exact(measured.low_frequency_error))],
        ["error at high frequencies", _percent(_exact(measured.high_frequency_error))],
        ["memory kept between steps", _bytes(measured.kept_bytes)],
    ]


def _protocol(result: Result) -> list[list[str]]:
    """How the numbers were made."""
    policy = result.policy
    stages = [f"{name} {seconds:.0f} s" for name, seconds in result.stage_seconds.items()]
    return [
        ["what", "value"],
        ["pipeline", f"{result.pipeline}, {policy.model.denoiser}, {policy.sampler.scheduler}"],
        ["teacher", _count(result.steps, "step")],
        ["device", f"{result.device}, {result.dtype}, {_count(result.threads, 'thread')}"],
        ["batch", str(result.batch)],
        ["versions", ", ".join(f"{name} {text}" for name, text in result.versions.items())],
        ["seeds", "; ".join(f"{name} {text}" for name, text in result.seeds.items())],
        ["features of FID", result.features or "none"],
        ["reference", result.reference],
        ["search", f"{_count(result.trials, 'trial')}, {result.duplicates} of them duplicates"],
        ["time of each stage", ", ".join(stages)],
        ["policy", policy.digest],
        ["date", result.date],
    ]


def write(
    result: Result,
    folder: Path,
    profile: Profile | None,
    teacher_images: Tensor | None,
    policy_images: Tensor | None,
) -> list[Path]:
    """Write `result.json`, the pictures and `report.md` into a folder, and return their paths.

    Raises: RunFolderError when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("result.json", "pareto.png", "policy.png")]
        part = folder / "result.json.part"
        part.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(paths[0])
        pareto(result, paths[1])
        policy_strip(result.policy, paths[2])
        if teacher_images is not None and policy_images is not None:
            paths += [folder / "samples.png", folder / "grid.png"]
            samples(teacher_images, policy_images, paths[3], f"{result.model}, {result.chosen}")
            grid(policy_images, paths[4])
        if profile is not None:
            paths += profile_pictures(profile, folder)
        markdown(result, folder)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot write the report ({error.strerror})") from None
    return [*paths, folder / "report.md"]


def load_result(folder: Path) -> Result:
    """Read `result.json` of a finished search.

    Raises: RunFolderError when the folder holds none, or a damaged one.
    """
    path = folder / "result.json"
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot read the result ({error.strerror}); give the folder of a finished"
            " search, or run its command again, which resumes it"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise RunFolderError(
            f"{path}: not a valid result ({place}{first['msg']}); run the search's command again,"
            " which resumes it and writes the file anew"
        ) from None
