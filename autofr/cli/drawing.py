"""Commands that draw with a policy: to measure it, or to look at its images."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autofr import hub
from autofr.cli import console, places
from autofr.cli.options import (
    Batch,
    Call,
    Device,
    Dtype,
    Inputs,
    Json,
    Model,
    Prompt,
    Seed,
    Task,
    Threads,
    seeds,
)

if TYPE_CHECKING:
    from autofr.policy import Policy
    from autofr.runtime.points import Pipe

app = typer.Typer()


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
    from autofr.measure.alignment import load_judge
    from autofr.search.folder import Seeds

    _say_other_calls(loaded.pipe, policies)
    rows = getattr(loaded.pipe, "rows", 0)
    seeds = Seeds(seed=seed, test_seeds=samples, inputs_count=rows).seeds("test")
    judge = load_judge(loaded.folder, loaded.pipe)
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
    """Draw a grid of images, with or without a policy, each beside the picture it starts from.

    Example: `autofr sample --model ldm4 --policy results/ldm4-1.5x/policy.json -n 16`
    """
    places.file(out, ".png")
    found = hub.read(policy) if policy else None
    from autofr.loading import load

    loaded = load(model, device, dtype, threads, task, inputs, prompt or (), call or ())
    from autofr.report import pictures
    from autofr.runtime import sampler
    from autofr.search.evaluate import draw_all
    from autofr.task import with_starts

    if found is not None:
        _say_other_calls(loaded.pipe, [found])
        sampler.apply(loaded.pipe, found)
    asked = steps or (found.sampler.num_inference_steps if found else loaded.steps)
    began = time.perf_counter()
    with console.progress() as on_progress:
        drawn = draw_all(
            lambda seeds: sampler.draw(loaded.pipe, seeds, asked),
            seeds(seed, count),
            batch or loaded.batch,
            partial(on_progress, "sample"),
        )
    shown = with_starts(loaded.pipe, seeds(seed, count), drawn.images)
    pictures.grid(shown, out, 8 * len(shown) // count)
    typer.echo(f"{count} images in {time.perf_counter() - began:.1f} s -> {out}")


def _say_other_calls(pipe: Pipe, policies: Sequence[Policy]) -> None:
    """A notice where policies were made for calls with other arguments, another guidance say."""
    from autofr.task import plain

    for policy in policies:
        if said := console.other_call(policy, plain(pipe)):
            console.say(f"notice: {said}")
