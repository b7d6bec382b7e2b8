"""What the command line prints: tables, progress, and a policy in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autofr.policy import Policy

Report = Callable[[str, int, int], None]


def say(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr)


def table(rows: list[list[str]]) -> None:
    """Print rows as a table, the header first."""
    from rich.console import Console
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(rows[0]):
        found.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows[1:]:
        found.add_row(*row)
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(found)


@contextmanager
def progress() -> Iterator[Report]:
    """Progress on stderr: bars with the time left on a terminal, a line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    if not console.is_terminal:
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
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def bar(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield bar


def words(policy: Policy) -> list[str]:
    """Say what a policy does, line by line; the steps as a strip of letters."""
    steps, n = policy.steps, len(policy.steps)
    marks = {"key": "K", "jump": "·"}
    letters = {name: chr(ord("a") + i) for i, name in enumerate(policy.masks)}
    strip = "".join(marks.get(step) or letters[step] for step in steps)
    counts = {name: steps.count(name) for name in dict.fromkeys(steps)}
    lines = [
        f"model     {policy.model.name} ({policy.model.denoiser}, {policy.model.fingerprint})",
        f"sampler   {policy.sampler.scheduler}, {n} steps for a call of {policy.sampler.replaces}",
        f"steps     {strip}",
        "          " + ", ".join(["K key", "· jump", *(f"{v} {k}" for k, v in letters.items())]),
        "counts    " + ", ".join(f"{count} {name}" for name, count in counts.items()),
        f"keyframes {', '.join(map(str, policy.keyframes))}",
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
        ]
        if fid := found.fid:
            change = fid.difference
            lines.append(
                f"FID       {fid.policy:.3f} against {fid.teacher:.3f} ({fid.features});"
                f" difference {change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
            )
    if policy.provenance:
        lines.append(f"made by   {policy.provenance.command} ({policy.provenance.date})")
    return lines
