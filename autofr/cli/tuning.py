"""The command on job files: run them, say what would be done, say how far they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from autofr.cli import console
from autofr.cli.options import Json
from autofr.errors import UserError
from autofr.tune import job_file, states, tune
from autofr.tune.jobs import Job
from autofr.tune.states import Line
from autofr.tune.tune import Expected

app = typer.Typer()

File = Annotated[Path, typer.Argument(help="TOML file of jobs")]
Status = Annotated[bool, typer.Option("--status", help="say how far the jobs are; runs nothing")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be done, and about how long; a few calls")
]
TimeLimit = Annotated[
    float | None,
    typer.Option(min=1, help="seconds for all jobs, after which no job and no trial starts"),
]
Out = Annotated[Path | None, typer.Option(help="folder of all results; default the file's own")]
Root = Annotated[
    Path, typer.Option(help="folder that the file's paths start from and must stay in")
]


@app.command("tune")
def tune_(
    file: File,
    status: Status = False,
    dry_run: DryRun = False,
    time_limit: TimeLimit = None,
    out: Out = None,
    root: Root = Path(),
    as_json: Json = False,
) -> None:
    """Run a file of searches: models, tasks, budgets, devices, one after another.

    What is finished is skipped, so that the same command resumes; a job that fails does not stop
    the others. Exit codes: 0 when all are finished, 1 when some are not.

    Example: `autofr tune examples/jobs.toml --dry-run`
    """
    if status and (dry_run or time_limit):
        raise UserError("--status goes with neither --dry-run nor --time-limit: it runs nothing")
    if status:
        lines = states.status(job_file.read(file, out, root))
        _show(lines, as_json)
        raise typer.Exit(states.exit_code(lines))
    plan = job_file.read_checked(file, out, root)
    if dry_run:
        _show_expected(tune.foresee(plan), as_json)
        return
    with ExitStack() as bars:
        follow = _Follow(bars, len(plan.jobs))
        try:
            lines = tune.run(plan, time_limit, follow)
        except KeyboardInterrupt:
            bars.close()
            _show(states.status(plan), as_json)
            raise
    _show(lines, as_json)
    raise typer.Exit(states.exit_code(lines))


class _Follow:
    """Progress of the running job on stderr, under its name."""

    def __init__(self, bars: ExitStack, total: int) -> None:
        self._bars, self._total = bars, total
        self._job: Job | None = None
        self._report: console.Report = lambda stage, done, total: None

    def __call__(self, job: Job, stage: str, done: int, total: int) -> None:
        if job is not self._job:
            self._job = job
            self._bars.close()
            console.say(f"{job.name}:")
            self._report = self._bars.enter_context(console.progress())
        self._report(stage, done, total)


# -- tables ---------------------------------------------------------------------------------------


def _show(lines: Sequence[Line], as_json: bool) -> None:
    """Print how all jobs are."""
    if as_json:
        typer.echo(json.dumps([line.model_dump(mode="json") for line in lines], indent=1))
        return
    rows = [["job", "state", "minutes", "speed-up", "error", "remark"]]
    console.table(rows + [_row(line) for line in lines])
    counts = Counter(line.state for line in lines)
    typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))


def _row(line: Line) -> list[str]:
    speedup = line.speedup
    measured = f"{speedup.value:.2f}x ({speedup.low:.2f}–{speedup.high:.2f})" if speedup else ""
    return [
        line.job,
        line.state,
        f"{line.seconds / 60:.1f}" if line.seconds else "",
        measured,
        f"{line.error:.4f}" if line.error is not None else "",
        _remark(line),
    ]


def _remark(line: Line) -> str:
    """What else there is to say: how far it is, why it ended, where its policy lies."""
    if line.state == "running":
        return line.stage
    if line.state == "short":
        return "out of time before all trials; the same command goes on"
    if line.state == "finished":
        return line.folder
    return line.reason or line.stage


def _show_expected(found: Sequence[Expected], as_json: bool) -> None:
    """Print how long all jobs are expected to take."""
    if as_json:
        facts = [
            {"job": one.job.name, "seconds": one.seconds, "reason": one.reason} for one in found
        ]
        typer.echo(json.dumps(facts, indent=1))
        return
    rows = [["job", "minutes", "device", "folder", "remark"]]
    for one in found:
        minutes = "unknown" if one.seconds is None else _minutes(one.seconds)
        request = one.job.request
        rows.append([one.job.name, minutes, request.device, str(one.job.folder), one.reason])
    console.table(rows)
    known = [one.seconds for one in found if one.seconds is not None]
    more = ", and what is unknown" if len(known) < len(found) else ""
    minutes = _minutes(sum(known))
    unit = "minute" if minutes.endswith(" 1") else "minutes"
    typer.echo(f"expected time: {minutes} {unit}{more} (nothing written)")


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f}" if seconds >= 30 else "under 1" if seconds else "0"
