"""What the command line prints: tables and their rows, progress, a policy in words."""

from __future__ import annotations

import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofr.errors import UserError
from autofr.memory import size
from autofr.policy import Fid, Interval, Measured, Policy, TextAlignment

if TYPE_CHECKING:
    from rich.console import Console

    from autofr.measure.profile_file import Profile

LETTERS = (string.ascii_letters + string.digits).replace("K", "")  # K is a keyframe
Report = Callable[[str, int, int], None]


def say(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr)


def table(rows: list[list[str]]) -> None:
    """Print rows as a table, the header first; columns of numbers are set to the right."""
    from rich.console import Console
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(rows[0]):
        words = any(row[index][:1].isalpha() for row in rows[1:])
        found.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in rows[1:]:
        found.add_row(*row)
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(found)


# -- progress -------------------------------------------------------------------------------------


@contextmanager
def progress() -> Iterator[Report]:
    """Progress on stderr: bars with the time left on a terminal, a line per stage elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(console) if console.is_terminal else _log() as on_progress:
        yield on_progress


@contextmanager
def _log() -> Iterator[Report]:
    now: list[tuple[str, float]] = []
    seen: set[str] = set()

    def close() -> None:
        if now:
            stage, began = now.pop()
            say(f"{stage} done in {time.monotonic() - began:.0f} s")

    def line(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            close()
            say(f"{stage} ...")
            now.append((stage, time.monotonic()))

    yield line
    close()


@contextmanager
def _bars(console: Console) -> Iterator[Report]:
    from rich import progress as rich

    bars = rich.Progress(
        rich.TextColumn("{task.description:>9}"),
        rich.BarColumn(),
        rich.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, Any] = {}

    def bar(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # not before: an early refusal prints nothing but its message
            tasks[stage] = bars.add_task(stage)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield bar
    finally:
        bars.stop()


# -- rows and lines -------------------------------------------------------------------------------


def model_facts(
    name: str, model: Any, tasks: Sequence[str], scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Say what a bundled model is, and the scores that it is expected to have."""
    return {
        "name": name,
        "pipeline": model.pipeline,
        "what": model.summary,
        "stands for": model.stands_for,
        "tasks": ", ".join(tasks) or None,
        "steps": model.steps,
        "call": arguments(model.call) or None,
        "parameters": scores.get("parameters"),
        "FID (bundled features)": scores.get("fid_teacher"),
    }


def fact_rows(facts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Write facts as rows, one for each mapping; None is an empty cell."""
    if not facts:
        return [["no model is bundled with this installation"]]
    rows = [["" if value is None else str(value) for value in row.values()] for row in facts]
    return [[*facts[0]], *rows]


def profile_rows(profile: Profile) -> list[list[str]]:
    """Say what every mask of a profile costs, in time and in memory."""
    rows = [["mask", "points", "share of a full evaluation", "kept"]]
    for name, seconds in profile.mask_seconds.items():
        kept = size(profile.mask_bytes[name])
        share = f"{seconds / profile.key_seconds:.2f}"
        rows.append([name, str(len(profile.masks[name])), share, kept])
    return rows


def profile_line(profile: Profile, pictures: Sequence[Path], folder: Path) -> str:
    """Say how long a full evaluation takes, and what was written where."""
    names = ", ".join(path.name for path in pictures)
    return (
        f"{len(profile.points)} points; a full evaluation of batch {profile.batch} takes"
        f" {1000 * profile.key_seconds:.1f} ms. Wrote profile.json, {names} to {folder}/"
    )


def measured_rows(measured: Measured) -> list[list[str]]:
    """Say what was measured of a policy, a value with its interval where it has one."""
    rows = [["measure", "value"]]
    for name, value in measured:
        if value is None:
            continue
        title = name.replace("_", " ")
        if isinstance(value, Fid | TextAlignment):
            shown = f"{_shown(value.policy)} (teacher {_shown(value.teacher)})"
            rows.append([value.title, shown])
            rows.append([f"{title} difference", _shown(value.difference)])
        else:
            rows.append([title, _shown(value)])
    return rows


def arguments(call: Mapping[str, Any]) -> str:
    """Arguments of a call, as one would type them."""
    return ", ".join(f"{name}={value}" for name, value in call.items())


def other_call(policy: Policy, call: Mapping[str, Any]) -> str | None:
    """Say that a policy was made for other calls than these; None where it was not.

    Policies of older versions do not say what for.
    """
    made = policy.provenance.call if policy.provenance else {}
    if not made or made == dict(call):
        return None
    return (
        f"the policy was made for calls with {arguments(made)}, and is used with"
        f" {arguments(call) or 'none of them'}"
    )


def check_teachers(ours: Policy, theirs: Policy) -> None:
    """Refuse to compare policies whose errors are to different teachers.

    Raises: UserError naming what differs.
    """
    one, other = (
        {"scheduler": s.scheduler, "steps of a call": s.replaces} | dict(s.config)
        for s in (ours.sampler, theirs.sampler)
    )
    # Policies of older versions say less of the scheduler.
    wrong = [f"{k} {one[k]} and {other[k]}" for k in one if k in other and one[k] != other[k]]
    if wrong:
        raise UserError(
            f"--against: the policies are for different teachers ({'; '.join(wrong)}), so that what"
            " they lose cannot be compared; `autofr retime` carries a policy over to another step"
            " count"
        )


def penalty(ours: Measured, theirs: Measured) -> str:
    """Say what the first policy loses to the second, measured on the same seeds and device."""
    error = ours.trajectory_error.value / max(1e-12, theirs.trajectory_error.value)
    speed = ours.speedup.value / theirs.speedup.value
    return (
        f"The first policy has {error:.2f} times the error of the second"
        f" ({ours.trajectory_error.value:.4f} against {theirs.trajectory_error.value:.4f}), at"
        f" {speed:.2f} times its speed-up ({ours.speedup.value:.2f}x against"
        f" {theirs.speedup.value:.2f}x)."
    )


def _shown(value: object) -> str:
    if isinstance(value, Interval):
        return f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _against(found: Fid | TextAlignment, by: str) -> str:
    change = found.difference
    return (
        f"{found.policy:.3f} against {found.teacher:.3f} ({by});"
        f" difference {change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
    )


def words(policy: Policy) -> list[str]:
    """Say what a policy does, line by line; the steps as a strip of letters."""
    n, first = len(policy.steps), (policy.measured and policy.measured.skipped_steps) or 0
    steps = policy.steps[first:]
    marks = {"key": "K", "jump": "·"}
    letters = dict.fromkeys(policy.masks, "?") | dict(zip(policy.masks, LETTERS, strict=False))
    run = f", of which {n - first} run: the calls start from a picture" if first else ""
    strip = "-" * first + "".join(marks.get(step) or letters[step] for step in steps)
    counts = {name: steps.count(name) for name in dict.fromkeys(steps)}
    lines = [
        f"model     {policy.model.name} ({policy.model.denoiser}, {policy.model.fingerprint})",
        f"sampler   {policy.sampler.scheduler}, {n} steps for a call of"
        f" {policy.sampler.replaces}{run}",
        f"steps     {strip}",
        "          " + ", ".join(["K key", "· jump", *(f"{v} {k}" for k, v in letters.items())]),
        "counts    " + ", ".join(f"{count} {name}" for name, count in counts.items()),
        f"keyframes {', '.join(str(key) for key in policy.keyframes if key >= first)}",
        f"mix       {policy.mix.kind}",
    ]
    for name, points in policy.masks.items():
        shown = ", ".join(points[:2]) + (f" and {len(points) - 2} more" if points[2:] else "")
        lines.append(f"mask      {name}: {shown}")
    found = policy.measured
    if found:
        speed = found.speedup
        lines += [
            f"measured  {speed.value:.2f}x ({speed.low:.2f} to {speed.high:.2f}) on {found.device},"
            f" batch {found.batch}, {found.dtype}, {found.threads} threads",
            f"error     {found.trajectory_error.value:.4f} of the latents,"
            f" PSNR {found.psnr:.1f} dB, {found.samples} test seeds",
            f"memory    {size(found.kept_bytes)} kept between steps",
        ]
        if found.fid:
            lines.append(f"FID       {_against(found.fid, found.fid.features)}")
        if found.alignment:
            lines.append(f"alignment {_against(found.alignment, found.alignment.towers)}")
    if policy.provenance:
        lines.append(f"made by   {policy.provenance.command} ({policy.provenance.date})")
        if policy.provenance.call:
            lines.append(f"for calls with {arguments(policy.provenance.call)}")
    return lines
