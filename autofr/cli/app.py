"""The command line: parse, call, print. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autofr import hub
from autofr.cli import console, places, policies, results, tuning, worker
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
    Prompt,
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
from autofr.errors import AutofrError
from autofr.request import Request, check_help, crew, prepare, share
from autofr.search.address import redacted

if TYPE_CHECKING:
    from autofr.measure.alignment import Judge
    from autofr.policy import Policy
    from autofr.runtime.points import Pipe
    from autofr.zoo import Loaded

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

app = typer.Typer(
    name="autofr",
    help="Find, keep and use policies that make diffusion pipelines faster without changing what"
    " they draw.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.add_typer(results.app)
app.add_typer(policies.app)
app.add_typer(tuning.app)
app.add_typer(worker.app)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of failures")] = False,
) -> None:
    if debug:
        os.environ["AUTOFR_DEBUG"] = "1"


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
            _seeds(seed, 4),
            on_progress,
        )
    if as_json:
        typer.echo(found.model_dump_json())
        return
    console.table(console.profile_rows(found))
    typer.echo(console.profile_line(found, paths, folder))


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
    places = f"Policy: {folder / 'policy.json'}   Report: {folder / 'report.html'}"
    typer.echo("\n".join([*result.remarks, "", report.headline(result), places]))


@app.command()
def evaluate(
    policy: Annotated[Path, typer.Option(help="policy file, or hub:owner/name@revision")],
    model: Model = "ldm4",
    against: Annotated[
        Path | None, typer.Option(help="another policy, to say what is lost to it")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="test seeds")] = 64,
    batch: Batch = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    task: Task = None,
    inputs: Inputs = None,
    call: Call = None,
    as_json: Json = False,
) -> None:
    """Measure a policy on this device: speed-up in pairs, and what it changes in the images.

    With --against, say what is lost to another policy: one that was searched for this use, say,
    when the first was retimed or made for another batch or size.

    Example: `autofr evaluate --model ldm4 --policy results/ldm4-1.5x/policy.json`
    """
    policies = [hub.read(place) for place in (policy, against) if place]
    console.check_teachers(policies[0], policies[-1])
    from autofr.loading import load

    loaded = load(model, device, dtype, threads, task, inputs, call=call or ())
    from autofr import job
    from autofr.search.folder import Seeds

    _say_other_calls(loaded.pipe, policies)
    rows = getattr(loaded.pipe, "rows", 0)
    seeds = Seeds(seed=seed, test_seeds=samples, inputs_count=rows).seeds("test")
    judge = _judge(loaded)
    with console.progress() as on_progress:
        measured = [
            job.evaluate(loaded.pipe, one, seeds, batch or loaded.batch, judge, on_progress)
            for one in policies
        ]
    if as_json:
        facts = [one.model_dump(mode="json") for one in measured]
        typer.echo(json.dumps(facts if against else facts[0], indent=1))
        return
    for one in measured:
        console.table(console.measured_rows(one))
    if against:
        typer.echo(console.penalty(*measured))


@app.command()
def sample(
    model: Model = "ldm4",
    policy: Annotated[
        Path | None, typer.Option(help="policy file, or hub:owner/name; none draws as the teacher")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="images")] = 16,
    steps: Annotated[
        int | None,
        typer.Option(min=2, max=1000, help="sampling steps; the policy's, or the model's"),
    ] = None,
    batch: Batch = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    task: Task = None,
    prompt: Prompt = None,
    inputs: Inputs = None,
    call: Call = None,
    out: Annotated[Path, typer.Option(help="PNG file")] = Path("samples.png"),
) -> None:
    """Draw a grid of images, with or without a policy.

    Example: `autofr sample --model ldm4 --policy results/ldm4-1.5x/policy.json -n 16`
    """
    places.file(out, ".png")
    found = hub.read(policy) if policy else None
    from autofr.loading import load

    loaded = load(model, device, dtype, threads, task, inputs, prompt or (), call or ())
    from autofr.report import pictures
    from autofr.runtime import sampler
    from autofr.search.evaluate import draw_all

    if found is not None:
        _say_other_calls(loaded.pipe, [found])
        sampler.apply(loaded.pipe, found)
    asked = steps or (found.sampler.num_inference_steps if found else loaded.steps)
    began = time.perf_counter()
    with console.progress() as on_progress:
        drawn = draw_all(
            lambda seeds: sampler.draw(loaded.pipe, seeds, asked),
            _seeds(seed, count),
            batch or loaded.batch,
            partial(on_progress, "sample"),
        )
    pictures.grid(drawn.images, out)
    typer.echo(f"{count} images in {time.perf_counter() - began:.1f} s -> {out}")


@app.command()
def show(
    policy: Annotated[Path, typer.Argument(help="policy file, or hub:owner/name@revision")],
    as_json: Json = False,
) -> None:
    """Say in words what a policy does and what was measured.

    Example: `autofr show results/ldm4-1.5x/policy.json`
    """
    found = hub.read(policy)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    typer.echo("\n".join(console.words(found)))


def main() -> None:
    """Run the command line; exit 2 for what the user can change, 1 for failures."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this
            console.say("autofr: stopped; what was finished is kept, the same command resumes")
        raise
    except Exception as error:
        if os.environ.get("AUTOFR_DEBUG"):
            raise
        if isinstance(error, AutofrError):
            console.say(f"autofr: {redacted(str(error))}")
            sys.exit(error.exit_code)
        console.say(f"autofr failed: {type(error).__name__}: {redacted(str(error))}")
        console.say("(autofr --debug shows the traceback)")
        sys.exit(1)


# -- helpers --------------------------------------------------------------------------------------


def _judge(loaded: Loaded) -> Judge:
    from autofr.measure.alignment import load_judge

    return load_judge(loaded.folder, loaded.pipe)


def _seeds(seed: int, count: int) -> range:
    return range(seed * 1_000_000, seed * 1_000_000 + count)


def _say_other_calls(pipe: Pipe, policies: Sequence[Policy]) -> None:
    """A notice where policies were made for calls with other arguments, another guidance say."""
    from autofr.task import plain

    for policy in policies:
        if said := console.other_call(policy, plain(pipe)):
            console.say(f"notice: {said}")
