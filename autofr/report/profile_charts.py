"""What a page shows of a profile: the heat map of points over steps, and where the time goes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np
from PIL import Image

from autofr.measure.profile_file import Profile
from autofr.memory import size
from autofr.mix import JUMP, KEY
from autofr.policy import Policy
from autofr.report.html import data_url
from autofr.report.policy_chart import OFF, does, kinds
from autofr.report.svg import drawing, mark, node
from autofr.report.wording import count, duration

HUE = (43, 112, 196)  # of the heat map; how opaque it is says how much changes
PALEST = 0.07
MOST_POINTS = 200  # in the table


def kinds_of(profile: Profile) -> dict[str, list[str]]:
    """Names of points by kind, in network order; the score, which is no point, comes last."""
    kinds: dict[str, list[str]] = {}
    rank = {"down": 0, "mid": 1}
    ordered = sorted(profile.points, key=lambda point: rank.get(point.name.split("_")[0], 2))
    points = {point.name: point.kind for point in ordered}
    for name in [*points, *(name for name in profile.similarity if name not in points)]:
        kinds.setdefault(points.get(name, name.split("#")[-1]), []).append(name)
    return kinds


def short_name(name: str) -> str:
    """`up_blocks.2.resnets.0#conv` -> `up 2 resnet 0`."""
    path = re.sub(r"_blocks?\b", "", name.split("#")[0].replace(".", " "))
    return re.sub(r"(resnet|attention)s\b", r"\1", path)


# -- similarity -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heat:
    """Points of one kind over the steps: a picture with a pixel per value, and the values.

    `rows` are (short name, full name, values in percent, in words for a script).
    """

    kind: str
    picture: str
    rows: list[tuple[str, str, str]]


@dataclass(frozen=True)
class HeatMap:
    """All kinds of points, in one scale of change per step, `low` to `high` in words."""

    kinds: list[Heat]
    steps: range
    low: str
    high: str


def heat_map(profile: Profile) -> HeatMap:
    """How much every point's tensor changes from one step to the next, of those that run."""
    change, low, high = changes(profile)
    found = []
    for kind, names in kinds_of(profile).items():
        values = np.stack([change[name] for name in names])
        rows = [(short_name(name), name, _said(change[name])) for name in names]
        found.append(Heat(kind, _picture(values, low, high), rows))
    steps = range(profile.first, profile.steps)
    return HeatMap(found, steps, f"{100 * low:.2g} %", f"{100 * high:.2g} %")


def changes(profile: Profile) -> tuple[dict[str, np.ndarray], float, float]:
    """Change of every point over the steps that run, and the range in which nearly all of it is.

    The first of these has no step before it: NaN.
    """
    change = {
        name: np.array(one.relative_l1[0], float)[profile.first :]
        for name, one in profile.similarity.items()
    }
    known = np.concatenate(list(change.values()))
    known = known[known > 0] if (known > 0).any() else np.ones(1)
    low, high = np.percentile(known, [1, 99.5])
    return change, float(low), float(max(high, 1.01 * low))


def _picture(values: np.ndarray, low: float, high: float) -> str:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(values / low) / np.log(high / low)
    opaque = np.where(np.isnan(values), 0, PALEST + (1 - PALEST) * np.clip(share, 0, 1))
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = HUE
    pixels[..., 3] = np.round(255 * opaque)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return data_url(buffer.getvalue())


def _said(values: np.ndarray) -> str:
    """Values in percent, in three digits; none where there was no step before."""
    return " ".join("-" if np.isnan(value) else f"{100 * value:.3g}" for value in values)


# -- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One call in parts, and the seconds of all."""

    name: str
    drawing: Element
    seconds: str


def shares(profile: Profile) -> dict[str, float]:
    """Seconds of a step by what it does, as a share of a full step's."""
    seconds = {KEY: profile.key_seconds, JUMP: profile.jump_seconds, **profile.mask_seconds}
    return {name: spent / profile.key_seconds for name, spent in seconds.items()}


def bars(profile: Profile, policy: Policy) -> list[Bar]:
    """A call of the teacher and one of the policy, each as the sum of what was profiled.

    None where a mask of the policy was not profiled, or not all steps run: there the sum is not
    the call.
    """
    steps, measured, costs = does(policy), policy.measured, profile.costs
    asked = policy.sampler.replaces
    run = asked - (profile.first if asked == profile.steps else 0)
    whole = costs.fixed + run * costs.key
    if not {*steps} <= {KEY, JUMP, OFF, *profile.mask_seconds} or (
        measured and not 0.7 < whole / measured.teacher_seconds < 1.4
    ):
        return []
    parts: dict[str, list[tuple[str, str, int, float]]] = {
        "teacher": [("full steps", "key", run, profile.key_seconds)],
        "policy": [
            (k.name, k.shade, k.steps, costs.of_step(k.name))
            for k in kinds(policy)
            if k.name != OFF
        ],
    }
    return [_bar(name, some, profile.fixed_seconds, whole) for name, some in parts.items()]


def _bar(
    name: str, parts: Sequence[tuple[str, str, int, float]], fixed: float, longest: float
) -> Bar:
    total = fixed + sum(times * seconds for *_, times, seconds in parts)
    label = f"{name}: {duration(total)} per call, predicted from the profile"
    root = drawing((0, 0, max(longest, total), 1), label, "stack", stretch=True)
    x = 0.0
    for what, shade, times, seconds in [*parts, ("outside the steps", "fixed", 1, fixed)]:
        wide = times * seconds
        each = f"{times} × {duration(seconds)} = " if times != 1 else ""
        part = mark(root, f"{name}, {what}: {each}{duration(wide)}")
        node(part, "rect", x=f"{x:.6g}", y=0, width=f"{wide:.6g}", height=1, kind=f"fill-{shade}")
        x += wide
    return Bar(name, root, duration(total))


def mask_rows(profile: Profile, policy: Policy) -> list[Mapping[str, object]]:
    """Every mask: share of a full step's time, memory kept, and at how many steps it is used."""
    steps = does(policy)
    looks = {kind.name: kind.shade for kind in kinds(policy)}
    return [
        {
            "name": name,
            "shade": looks.get(name, ""),
            "points": "–" if name in (KEY, JUMP) else str(len(profile.masks.get(name, ()))),
            "share": share,
            "kept": size(profile.mask_bytes[name]) if name in profile.mask_bytes else "–",
            "steps": steps.count(name),
        }
        for name, share in sorted(shares(profile).items(), key=lambda item: -item[1])
    ]


def point_rows(profile: Profile) -> list[Mapping[str, object]]:
    """The points that take most time: the whole module's, and the share that reuse skips."""
    timed = [point for point in profile.points if point.whole_seconds > 0]
    longest = max((point.whole_seconds for point in timed), default=1.0)
    return [
        {
            "name": point.name,
            "whole": duration(point.whole_seconds),
            "skipped": f"{point.skippable_seconds / point.whole_seconds:.0%}",
            "kept": size(point.bytes),
            "length": point.whole_seconds / longest,
            "part": min(1.0, point.skippable_seconds / point.whole_seconds),
        }
        for point in sorted(timed, key=lambda point: -point.whole_seconds)[:MOST_POINTS]
    ]


def setting(profile: Profile) -> str:
    """What was profiled, and where."""
    run = f" of which {profile.steps - profile.first} run" if profile.first else ""
    return (
        f"{profile.denoiser}, {count(profile.steps, 'step')}{run}, batch {profile.batch},"
        f" {profile.device}, {profile.dtype}"
    )
