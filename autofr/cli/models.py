"""Commands on models: which are bundled, and what one repeats and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autofr.cli import console, places
from autofr.cli.options import (
    Batch,
    Call,
    Device,
    Dtype,
    Inputs,
    Json,
    Model,
    Seed,
    Steps,
    Task,
    Threads,
    seeds,
)

app = typer.Typer()


@app.command()
def models(as_json: Json = False) -> None:
    """List the bundled models: their tasks and calls, and the scores they are expected to have.

    Example: `autofr models`
    """
    from autofr import zoo

    facts = [
        console.model_facts(name, model, zoo.tasks(name), zoo.expected(name))
        for name, model in zoo.installed().items()
    ]
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console.table(console.fact_rows(facts))


@app.command()
def profile(
    model: Model = "ldm4",
    steps: Steps = None,
    batch: Batch = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    task: Task = None,
    inputs: Inputs = None,
    call: Call = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    as_json: Json = False,
) -> None:
    """Measure similarity, latency and memory of every reuse point of a pipe.

    Example: `autofr profile --model ldm4 --out results/ldm4-profile`
    """
    from autofr.loading import load

    loaded = load(model, device, dtype, threads, task, inputs, call=call or ())
    from autofr import job

    folder = places.folder(out or Path("results") / f"{loaded.title}-profile")
    with console.progress() as on_progress:
        found, paths = job.profile(
            loaded.pipe,
            folder,
            steps or loaded.steps,
            batch or loaded.batch,
            seeds(seed, 4),
            on_progress,
        )
    if as_json:
        typer.echo(found.model_dump_json())
        return
    console.table(console.profile_rows(found))
    typer.echo(console.profile_line(found, paths, folder))
