"""The command line: parse, call, print. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autofr import console, hub, places, policy_cli
from autofr.errors import AutofrError
from autofr.policy import Keep

if TYPE_CHECKING:
    from autofr.points import Pipe
    from autofr.quality import Features
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

app.add_typer(policy_cli.app)

Model = Annotated[str, typer.Option(help="bundled name, local diffusers folder, or hub id")]
Budget = Annotated[str, typer.Option(help="speed-up such as 1.5x, or time per call such as 180ms")]
Space = Annotated[str, typer.Option(help="default, frdiff, direct, or a TOML file")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16")]
Seed = Annotated[int, typer.Option(min=0, help="seed of everything random")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores")]
Steps = Annotated[int, typer.Option(min=2, max=1000, help="sampling steps of the teacher")]
Batch = Annotated[int, typer.Option(min=1, help="images per call")]
Trials = Annotated[int, typer.Option(min=1, help="trials besides the published rows")]
TimeLimit = Annotated[
    float | None, typer.Option(min=1, help="seconds after which no new trial starts")
]
Out = Annotated[Path | None, typer.Option(help="folder of the run; default results/MODEL-BUDGET")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        "--prompts",
        help="prompts, a line each; or .jsonl: an object of call arguments per line",
    ),
]
Call = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="argument of every call, such as guidance_scale=5"),
]
KeepDtype = Annotated[
    Literal["float16", "bfloat16"] | None, typer.Option(help="store kept tensors in half precision")
]
KeepOnHost = Annotated[bool, typer.Option("--keep-on-host", help="store kept tensors on the host")]
MaxMemory = Annotated[
    str | None, typer.Option(help="most that may be kept on the device, such as 200MB")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be done, and about how long")
]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable JSON")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of failures")] = False,
) -> None:
    if debug:
        os.environ["AUTOFR_DEBUG"] = "1"


@app.command()
def models(as_json: Json = False) -> None:
    """List the bundled models, with the scores that they are expected to have.

    Example: `autofr models`
    """
    from autofr import zoo

    facts = [console.model_facts(n, m, zoo.expected(n)) for n, m in zoo.BUNDLED.items()]
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console.table(console.fact_rows(facts))


@app.command()
def profile(
    model: Model = "ldm4",
    steps: Steps = 50,
    batch: Batch = 8,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    inputs: Inputs = None,
    call: Call = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    as_json: Json = False,
) -> None:
    """Measure similarity, latency and memory of every reuse point of a pipe.

    Example: `autofr profile --model ldm4 --out results/ldm4-profile`
    """
    loaded = _load(model, device, dtype, threads, inputs, call)
    from autofr import job

    folder = places.folder(out or Path("results") / f"{loaded.name}-profile")
    with console.progress() as on_progress:
        found, paths = job.profile(loaded.pipe, folder, steps, batch, _seeds(seed, 4), on_progress)
    if as_json:
        typer.echo(found.model_dump_json())
        return
    console.table(console.profile_rows(found))
    typer.echo(console.profile_line(found, paths, folder))


@app.command()
def search(
    model: Model = "ldm4",
    budget: Budget = "1.5x",
    steps: Steps = 50,
    batch: Batch = 8,
    space: Space = "default",
    trials: Trials = 20,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    inputs: Inputs = None,
    call: Call = None,
    keep_dtype: KeepDtype = None,
    keep_on_host: KeepOnHost = False,
    max_memory: MaxMemory = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Find the policy that meets a budget on this device and changes the images least.

    Stopping it (Ctrl-C, even kill -9) loses at most the running trial: the same command resumes.

    Example: `autofr search --model ldm4 --budget 1.5x`
    """
    from autofr.latency import parse_budget
    from autofr.memory import parse_size
    from autofr.space import load_space

    asked, allowed = parse_budget(budget), load_space(space)
    memory = parse_size(max_memory) if max_memory else None
    keep = Keep(dtype=keep_dtype, host=keep_on_host)
    loaded = _load(model, device, dtype, threads, inputs, call)
    from autofr import job, report
    from autofr.study import Settings

    settings = Settings(
        name=loaded.name,
        budget=asked,
        space=allowed,
        steps=steps,
        batch=batch,
        seed=seed,
        trials=trials,
        time_limit=time_limit,
        inputs=getattr(loaded.pipe, "digest", ""),
        inputs_count=getattr(loaded.pipe, "rows", 0),
        keep=keep,
        max_memory=memory,
        command=shlex.join(["autofr", *sys.argv[1:]]),
    )
    folder = out or Path("results") / f"{loaded.name}-{asked.text}"
    features = _features(loaded)
    if dry_run:
        typer.echo(job.estimate(loaded.pipe, settings, folder))
        return
    with console.progress() as on_progress:
        result = job.run(loaded.pipe, settings, folder, features, on_progress)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    console.table(report.table(result))
    places = f"Policy: {folder / 'policy.json'}   Report: {folder / 'report.md'}"
    typer.echo("\n".join([*result.remarks, "", report.headline(result), places]))


@app.command()
def evaluate(
    policy: Annotated[Path, typer.Option(help="policy file, or hub:owner/name@revision")],
    model: Model = "ldm4",
    against: Annotated[
        Path | None, typer.Option(help="another policy, to say what is lost to it")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="test seeds")] = 64,
    batch: Batch = 8,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
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
    loaded = _load(model, device, dtype, threads, inputs, call)
    from autofr import job

    seeds = _test_seeds(loaded.pipe, seed, samples)
    features = _features(loaded)
    with console.progress() as on_progress:
        measured = [
            job.evaluate(loaded.pipe, one, seeds, batch, features, on_progress) for one in policies
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
        int | None, typer.Option(min=2, max=1000, help="sampling steps; the policy's, or 50")
    ] = None,
    batch: Batch = 8,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    inputs: Inputs = None,
    call: Call = None,
    out: Annotated[Path, typer.Option(help="PNG file")] = Path("samples.png"),
) -> None:
    """Draw a grid of images, with or without a policy.

    Example: `autofr sample --model ldm4 --policy results/ldm4-1.5x/policy.json -n 16`
    """
    places.file(out, ".png")
    found = hub.read(policy) if policy else None
    loaded = _load(model, device, dtype, threads, inputs, call)
    from autofr import pictures, sampler
    from autofr.evaluate import draw_all

    if found is not None:
        sampler.apply(loaded.pipe, found)
    asked = steps or (found.sampler.replaces if found else 50)
    began = time.perf_counter()
    with console.progress() as on_progress:
        drawn = draw_all(
            lambda seeds: sampler.draw(loaded.pipe, seeds, asked),
            _seeds(seed, count),
            batch,
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


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="folder of a finished search")]) -> None:
    """Write the tables and plots of a finished search again.

    Example: `autofr report results/ldm4-1.5x`
    """
    from autofr import job
    from autofr import report as reporting

    result = reporting.load_result(folder)
    paths = reporting.write(result, folder, job.load_profile(folder), None, None)
    typer.echo(reporting.headline(result))
    typer.echo("Wrote " + ", ".join(path.name for path in paths))


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
            console.say(f"autofr: {error}")
            sys.exit(error.exit_code)
        console.say(f"autofr failed: {type(error).__name__}: {error}")
        console.say("(autofr --debug shows the traceback)")
        sys.exit(1)


# -- helpers --------------------------------------------------------------------------------------


def _load(
    model: str,
    device: str,
    dtype: str,
    threads: int,
    inputs: Path | None,
    call: Sequence[str] | None,
) -> Loaded:
    from autofr import task

    arguments = task.parse_call(call or ())
    rows = task.read_inputs(inputs) if inputs else None
    import torch

    from autofr import zoo
    from autofr.families import discover
    from autofr.points import find_denoiser

    torch.set_num_threads(threads or _cores())
    loaded = zoo.load(model, device, dtype)
    discover(find_denoiser(loaded.pipe))  # a pipe without known points is refused before any work
    return replace(loaded, pipe=task.as_task(loaded.pipe, rows, arguments))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _features(loaded: Loaded) -> Features | None:
    from autofr.quality import load_features

    return load_features(loaded.folder) if loaded.folder else None


def _seeds(seed: int, count: int) -> range:
    return range(seed * 1_000_000, seed * 1_000_000 + count)


def _test_seeds(pipe: Pipe, seed: int, count: int) -> list[int]:
    """The seeds that a search leaves for its test, as many as are asked for."""
    from autofr.latency import parse_budget
    from autofr.space import load_space
    from autofr.study import Settings

    # Budget and space say nothing of seeds.
    asked = Settings(
        name="",
        budget=parse_budget("2x"),
        space=load_space("default"),
        seed=seed,
        test_seeds=count,
        inputs_count=getattr(pipe, "rows", 0),
    )
    return asked.seeds("test")
