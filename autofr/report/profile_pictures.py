"""Pictures of a profile: change between steps, where the time goes, similarity against gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from autofr.measure.profile_file import Profile
from autofr.memory import size
from autofr.mix import KEY
from autofr.report.canvas import colours, label, picture
from autofr.report.policy_chart import SHADES
from autofr.report.profile_charts import changes, kinds_of, setting, shares, short_name
from autofr.report.svg import Axis
from autofr.report.wording import duration

MOST_LABELS = 130  # points with a label each in one picture


def profile_pictures(profile: Profile, folder: Path) -> list[Path]:
    """Draw similarity between steps, latency of points and masks, and similarity against gap."""
    pictures = {"similarity.png": _similarity, "latency.png": _latency, "gaps.png": _gaps}
    for name, draw in pictures.items():
        draw(profile, folder / name)
    return [folder / name for name in pictures]


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
        ax.set_yticks([])
        beside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "fontsize": 7}
        for row in range(0, len(names), every):  # a tick with a label costs five times a text
            ax.text(-0.008, row, short_name(names[row]), ha="right", va="center", **beside)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(length=0)
        ax.set_title(kind, fontsize=9)
        ax.spines[:].set_visible(False)
        ax.grid(False, axis="y")


def _similarity(profile: Profile, path: Path) -> None:
    """Heat map: how much each point's tensor changes from one step to the next."""
    change, low, high = changes(profile)
    first, kinds = profile.first, kinds_of(profile)
    where = (first - 0.5, profile.steps - 0.5)
    height = _height(len(change), len(kinds))
    title = f"Change of every point from one step to the next\n{setting(profile)}"
    with picture(path, 10, height, title) as figure:
        axes = []
        for ax, _, names in _panels(figure, kinds):
            shown = np.stack([change[name] for name in names])
            image = ax.imshow(
                shown, "magma_r", LogNorm(low, high, clip=True), aspect="auto",
                interpolation="nearest", extent=(*where, len(names) - 0.5, -0.5),
            )  # fmt: skip
            ax.set_facecolor(colours()["fixed"])
            ax.grid(False)
            axes.append(ax)
        axes[-1].set_xlabel("step (the first has none before it)")
        bar = figure.colorbar(image, ax=axes, shrink=min(1, 5 / height), anchor=(0, 1), aspect=35)
        bar.set_label("relative L1 change (light: worth reusing)")
        bar.outline.set_visible(False)
        ticks = Axis(low, high, 0, 1, log=True).ticks()
        label(bar.ax, "y", ticks, [f"{100 * value:.3g} %" for value in ticks])


def _latency(profile: Profile, path: Path) -> None:
    """Bars: time of each point with the part that reuse skips; cost of a step with each mask."""
    points = {point.name: point for point in profile.points if point.kind != "stage"}
    kinds = {kind: names for kind, names in kinds_of(profile).items() if names[0] in points}
    longest = max((point.whole_seconds for point in points.values()), default=0) * 1e3
    title = f"Where the time goes\n{setting(profile)}; a full step {duration(profile.key_seconds)}"
    rows = max(len(points), len(profile.mask_seconds) + 6)
    with picture(path, 12.5, _height(rows, len(kinds)), title) as figure:
        halves: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
        left, right = halves
        for ax, _, names in _panels(left, kinds):
            whole = np.array([points[name].whole_seconds for name in names]) * 1e3
            skipped = np.array([points[name].skippable_seconds for name in names]) * 1e3
            ax.barh(range(len(names)), whole, 0.8, color=colours()["jump"])
            ax.barh(range(len(names)), skipped, 0.8, color=colours()["fewer"])
            for row, (total, part) in enumerate(zip(whole, skipped, strict=True)):
                if total and len(points) <= MOST_LABELS:
                    share = f"{part / total:.0%}"
                    ax.text(total + longest / 100, row, share, va="center", fontsize=7)
            ax.set_xlim(0, longest * 1.08 or 1)
        ax.set_xlabel("ms per evaluation")
        light, dark = Patch(color=colours()["jump"]), Patch(color=colours()["fewer"])
        words = ("whole module", "skipped by reuse (with its share)")
        left.legend((light, dark), words, loc="outside lower left", ncols=2)
        _mask_bars(right, profile, rows)


def _mask_bars(figure: SubFigure, profile: Profile, rows: int) -> None:
    """Seconds of a step with each mask as a share of a fully computed one, and memory kept."""
    spent = dict(sorted(shares(profile).items(), key=lambda item: -item[1]))
    tall = min(rows, max(2 * len(spent), rows // 4))
    ax, rest = figure.subplots(2, 1, height_ratios=(tall, rows - tall + 1))
    rest.set_axis_off()
    for row, (name, share) in enumerate(spent.items()):
        ax.barh(row, share, 0.8, color=colours()["key" if name == KEY else "jump"])
        kept = profile.mask_bytes.get(name)
        memory = f", keeps {size(kept)}" if kept else ""
        ax.text(share + 0.01, row, f"{share:.0%}{memory}", va="center", fontsize=8)
    ax.set_yticks(range(len(spent)), list(spent), fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.35), xticks=[])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("A step with each mask, share of a full step", fontsize=9)


def _gaps(profile: Profile, path: Path) -> None:
    """Lines: mean similarity of each kind against the gap, with the band of 80 % of its points."""
    title = f"How long a kept tensor stays good\n{setting(profile)}"
    metrics = {"cosine": "Cosine similarity", "relative_l1": "Relative L1 change"}
    with picture(path, 11, 4.6, title) as figure:
        panels = figure.subplots(1, 2)
        for ax, (metric, label) in zip(panels, metrics.items(), strict=True):
            for k, (kind, names) in enumerate(kinds_of(profile).items()):
                colour = colours()[f"m{k % SHADES}"]
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
