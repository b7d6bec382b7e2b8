"""Pictures of results, policies, samples and profiles.

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
from torch import Tensor

from autofr.evaluate import Group, Result, Row
from autofr.policy import JUMP, KEY, Interval, Policy, executed
from autofr.profiling import Profile
from autofr.wording import count, duration, exact, size, speedup_of, times, wanted_speedup

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
MOST_LABELS = 130  # points with a label each in one picture
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
    does = [executed(step, policy.weights(i)) for i, step in enumerate(policy.steps)]
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
    """One panel per kind with one row per point; labels are thinned where there are many."""
    heights = [len(names) + 0.6 for names in kinds.values()]
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=heights)
    every = -(-sum(map(len, kinds.values())) // MOST_LABELS)
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
    title = f"Where the time goes\n{_setting(profile)}; a full step {duration(profile.key_seconds)}"
    rows = max(len(points), len(profile.mask_seconds) + 6)
    with _picture(path, 12.5, _height(rows, len(kinds)), title) as figure:
        halves: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
        left, right = halves
        for ax, _, names in _panels(left, kinds):
            whole = np.array([points[name].whole_seconds for name in names]) * 1e3
            skipped = np.array([points[name].skippable_seconds for name in names]) * 1e3
            ax.barh(range(len(names)), whole, 0.8, color=PALE)
            ax.barh(range(len(names)), skipped, 0.8, color="#0072B2")
            for row, (total, part) in enumerate(zip(whole, skipped, strict=True)):
                if total and len(points) <= MOST_LABELS:
                    share = f"{part / total:.0%}"
                    ax.text(total + longest / 100, row, share, va="center", fontsize=7)
            ax.set_xlim(0, longest * 1.08 or 1)
        ax.set_xlabel("ms per evaluation")
        light, dark = Patch(color=PALE), Patch(color="#0072B2")
        words = ("whole module", "skipped by reuse (with its share)")
        left.legend((light, dark), words, loc="outside lower left", ncols=2)
        _mask_bars(right, profile, rows)


def _mask_bars(figure: SubFigure, profile: Profile, rows: int) -> None:
    """Seconds of a step with each mask as a share of a fully computed one, and memory kept."""
    seconds = {KEY: profile.key_seconds, **profile.mask_seconds, JUMP: profile.jump_seconds}
    tall = min(rows, max(2 * len(seconds), rows // 4))
    ax, rest = figure.subplots(2, 1, height_ratios=(tall, rows - tall + 1))
    rest.set_axis_off()
    for row, (name, spent) in enumerate(seconds.items()):
        share = spent / profile.key_seconds
        ax.barh(row, share, 0.8, color=INK if name == KEY else "#009E73")
        kept = profile.mask_bytes.get(name)
        memory = f", keeps {size(kept)}" if kept else ""
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
    return f"{profile.denoiser}, {count(profile.steps, 'step')}, {profile.device}"
