"""The command that searches."""

from __future__ import annotations

import shlex
import sys

import typer

from autofr.cli import console
from autofr.cli.options import (
    Batch,
    Budget,
    Call,
    Device,
    DryRun,
    Dtype,
    Inputs,
    Json,
    KeepDtype,
    KeepOnHost,
    MaxMemory,
    Model,
    Out,
    Seed,
    Space,
    Steps,
    Storage,
    Study,
    Task,
    Threads,
    TimeLimit,
    Trials,
    Workers,
)
from autofr.errors import redacted
from autofr.request import Request, check_help, crew, prepare, share

app = typer.Typer()


@app.command()
def search(
    model: Model = "ldm4",
    budget: Budget = "1.5x",
    steps: Steps = None,
    batch: Batch = None,
    space: Space = "default",
    trials: Trials = 20,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    task: Task = None,
    inputs: Inputs = None,
    call: Call = None,
    keep_dtype: KeepDtype = None,
    keep_on_host: KeepOnHost = False,
    max_memory: MaxMemory = None,
    workers: Workers = None,
    storage: Storage = None,
    study: Study = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Find the policy that meets a budget on this device and changes the images least.

    Stopping it (Ctrl-C, even kill -9) loses at most the running trials: the same command resumes.
    With --storage, `autofr worker` on any number of machines scores trials too.

    Example: `autofr search --model ldm4 --budget 1.5x`
    """
    asked = Request(
        model=model,
        budget=budget,
        steps=steps,
        batch=batch,
        space=space,
        trials=trials,
        time_limit=time_limit,
        seed=seed,
        threads=threads,
        device=device,
        dtype=dtype,
        task=task,
        inputs=inputs,
        call=tuple(call or ()),
        keep_dtype=keep_dtype,
        keep_on_host=keep_on_host,
        max_memory=max_memory,
        out=out,
    )
    check_help(workers, storage, study)
    _search(asked, workers, storage, study, dry_run, as_json)


def _search(
    asked: Request,
    workers: int | None,
    storage: str | None,
    study: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    found = prepare(asked, redacted(shlex.join(["autofr", *sys.argv[1:]])))
    from autofr import job
    from autofr.report import report

    pipe, settings, folder = found.pipe, found.settings, found.folder
    if dry_run:
        typer.echo(job.estimate(pipe, settings, folder))
        return
    with console.progress() as on_progress:
        result = job.run(
            pipe,
            settings,
            folder,
            found.judge,
            on_progress,
            crew=crew(asked, workers) if workers else None,
            share=share(asked, storage, study) if storage else None,
        )
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    console.table(report.table(result))
    paths = f"Policy: {folder / 'policy.json'}   Report: {folder / 'report.html'}"
    typer.echo("\n".join([*result.remarks, "", report.headline(result), paths]))
