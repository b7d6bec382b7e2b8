"""The command line: parse, call, print. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autofr.console import progress, say, table, words
from autofr.errors import AutofrError, RunFolderError, UserError

if TYPE_CHECKING:
    from autofr.policy import Policy
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

ModelOption = Annotated[
    str, typer.Option("--model", help="bundled name, local diffusers folder, or hub id")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16")]
Seed = Annotated[int, typer.Option(min=0, help="seed of everything random")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores")]
Steps = Annotated[int, typer.Option(min=2, max=1000, help="sampling steps of the teacher")]
Batch = Annotated[int, typer.Option(min=1, help="images per call")]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable JSON")]
PolicyOption = Annotated[Path, typer.Option("--policy", help="policy file")]


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

    rows = []
    for name, model in zoo.BUNDLED.items():
        scores = zoo.expected(name)
        rows.append(
            {
                "name": name,
                "pipeline": model.pipeline,
                "what": model.summary,
                "stands for": model.stands_for,
                "steps": model.steps,
                "parameters": scores.get("parameters"),
                "FID (bundled features)": scores.get("fid_teacher"),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table([[*rows[0]], *[["" if v is None else str(v) for v in row.values()] for row in rows]])


@app.command()
def profile(
    model: ModelOption = "ldm4",
    steps: Steps = 50,
    batch: Batch = 8,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    as_json: Json = False,
) -> None:
    """Measure similarity, latency and memory of every reuse point of a pipe.

    Example: `autofr profile --model ldm4 --out results/ldm4-profile`
    """
    loaded = _load(model, device, dtype, threads)
    from autofr import pictures, profiling
    from autofr.calibration import candidate_masks
    from autofr.points import discover, find_denoiser

    folder = _writable(out or Path("results") / f"{loaded.name}-profile")
    masks = candidate_masks(discover(find_denoiser(loaded.pipe)))
    with progress() as on_progress:
        found = profiling.profile(
            loaded.pipe,
            masks,
            steps=steps,
            batch=batch,
            seeds=range(seed * 1_000_000, seed * 1_000_000 + 4),
            on_progress=lambda done, total: on_progress("profile", done, total),
        )
    found.save(folder / "profile.json")
    written = pictures.profile_pictures(found, folder)
    if as_json:
        typer.echo(found.model_dump_json())
        return
    rows = [["mask", "points", "share of a full evaluation", "kept"]]
    for name, seconds in found.mask_seconds.items():
        kept = f"{found.mask_bytes[name] / 2**20:.2f} MiB"
        rows.append([name, str(len(masks[name])), f"{seconds / found.key_seconds:.2f}", kept])
    table(rows)
    names = ", ".join(path.name for path in written)
    typer.echo(
        f"{len(found.points)} points; a full evaluation of batch {batch} takes"
        f" {1000 * found.key_seconds:.1f} ms. Wrote profile.json, {names} to {folder}/"
    )


@app.command()
def search(
    model: ModelOption = "ldm4",
    budget: Annotated[
        str, typer.Option(help="speed-up such as 1.5x, or time per call such as 180ms")
    ] = "1.5x",
    steps: Steps = 50,
    batch: Batch = 8,
    space: Annotated[str, typer.Option(help="default, frdiff, direct, or a TOML file")] = "default",
    trials: Annotated[int, typer.Option(min=1, help="trials besides the published rows")] = 12,
    time_limit: Annotated[
        float | None, typer.Option(min=1, help="seconds after which no new trial starts")
    ] = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option(help="folder of the run; default results/MODEL-BUDGET")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and about how long")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the policy that meets a budget on this device and changes the images least.

    Stopping it (Ctrl-C, even kill -9) loses at most the running trial: the same command resumes.

    Example: `autofr search --model ldm4 --budget 1.5x`
    """
    from autofr.latency import parse_budget
    from autofr.space import load_space

    asked, chosen_space = parse_budget(budget), load_space(space)
    loaded = _load(model, device, dtype, threads)
    from autofr import report
    from autofr import search as searching
    from autofr.quality import load_features
    from autofr.study import Settings, run_folder, spec_of

    settings = Settings(
        name=loaded.name,
        budget=asked,
        space=chosen_space,
        steps=steps,
        batch=batch,
        seed=seed,
        trials=trials,
        time_limit=time_limit,
        command=shlex.join(["autofr", *sys.argv[1:]]),
    )
    folder = out or Path("results") / f"{loaded.name}-{asked.text}"
    spec = spec_of(loaded.pipe, settings)
    features = load_features(loaded.folder) if loaded.folder else None
    if dry_run:
        _dry_run(loaded, settings, folder)
        return
    with run_folder(folder, spec), progress() as on_progress:
        run = searching.Search(loaded.pipe, settings, folder, features, on_progress)
        outcome = run.run()
        on_progress("report", 0, 1)
        result = outcome.result
        result.policy.save(folder / "policy.json")
        outcome.profile.save(folder / "profile.json")
        few = slice(0, 8)
        report.write(
            result,
            folder,
            outcome.profile,
            outcome.teacher.images[few],
            outcome.chosen.images[few],
        )
        on_progress("report", 1, 1)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    table(report.table(result))
    for remark in result.remarks:
        typer.echo(remark)
    typer.echo("")
    typer.echo(report.headline(result))
    typer.echo(f"Policy: {folder / 'policy.json'}   Report: {folder / 'report.md'}")


@app.command()
def evaluate(
    policy: PolicyOption,
    model: ModelOption = "ldm4",
    samples: Annotated[int, typer.Option(min=2, help="test seeds")] = 64,
    batch: Batch = 8,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure a policy on this device: speed-up in pairs, and what it changes in the images.

    Example: `autofr evaluate --model ldm4 --policy results/ldm4-1.5x/policy.json`
    """
    found = _policy(policy)
    loaded = _load(model, device, dtype, threads)
    from autofr import sampler, verify
    from autofr.quality import load_features

    sampler.check(loaded.pipe, found)
    with progress() as on_progress:
        steps = found.sampler.replaces
        timing = verify.time_policy(
            loaded.pipe,
            found,
            steps,
            batch,
            on_pair=lambda pairs, width: on_progress("measure", pairs, pairs + 1),
        )
        start = seed * 1_000_000 + 200_000
        measured, _ = verify.test(
            loaded.pipe,
            found,
            timing,
            found.measured.predicted_speedup if found.measured else timing.ratio.value,
            seeds=range(start, start + samples),
            steps=steps,
            batch=batch,
            features=load_features(loaded.folder) if loaded.folder else None,
            on_progress=lambda done, total: on_progress("test", done, total),
        )
    if as_json:
        typer.echo(measured.model_dump_json(indent=1))
        return
    fields = measured.model_dump()
    rows = [["measure", "value"]]
    for name, value in fields.items():
        if isinstance(value, dict) and "low" in value:
            shown = f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append([name.replace("_", " "), shown])
    table(rows)


@app.command()
def sample(
    model: ModelOption = "ldm4",
    policy: Annotated[
        Path | None, typer.Option(help="policy file; none draws as the teacher")
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
    out: Annotated[Path, typer.Option(help="PNG file")] = Path("samples.png"),
) -> None:
    """Draw a grid of images, with or without a policy.

    Example: `autofr sample --model ldm4 --policy results/ldm4-1.5x/policy.json -n 16`
    """
    _png(out)
    found = _policy(policy) if policy else None
    loaded = _load(model, device, dtype, threads)
    from autofr import pictures, sampler
    from autofr.evaluate import draw_all

    if found is not None:
        sampler.apply(loaded.pipe, found)
    asked = steps or (found.sampler.replaces if found else 50)
    began = time.perf_counter()
    with progress() as on_progress:
        drawn = draw_all(
            lambda seeds: sampler.draw(loaded.pipe, seeds, asked),
            range(seed * 1_000_000, seed * 1_000_000 + count),
            batch,
            lambda done, total: on_progress("sample", done, total),
        )
    pictures.grid(drawn.images, out)
    spent = time.perf_counter() - began
    typer.echo(f"{count} images in {spent:.1f} s -> {out}")


@app.command()
def show(
    policy: Annotated[Path, typer.Argument(help="policy file")],
    as_json: Json = False,
) -> None:
    """Say in words what a policy does and what was measured.

    Example: `autofr show results/ldm4-1.5x/policy.json`
    """
    found = _policy(policy)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    for line in words(found):
        typer.echo(line)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a finished search")],
) -> None:
    """Write the tables and plots of a finished search again.

    Example: `autofr report results/ldm4-1.5x`
    """
    from autofr import report as reporting
    from autofr.profiling import Profile

    result = reporting.load_result(folder)
    path = folder / "profile.json"
    found = Profile.model_validate_json(path.read_text()) if path.is_file() else None
    paths = reporting.write(result, folder, found, None, None)
    typer.echo(reporting.headline(result))
    typer.echo("Wrote " + ", ".join(path.name for path in paths))


def main() -> None:
    """Run the command line; exit 2 for what the user can change, 1 for failures."""
    try:
        app()
    except AutofrError as error:
        if _debug():
            raise
        say(f"autofr: {error}")
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this
            say("autofr: stopped; what was finished is kept, the same command resumes")
        raise
    except Exception as error:
        if _debug():
            raise
        say(f"autofr failed: {type(error).__name__}: {error}\n(autofr --debug shows the traceback)")
        sys.exit(1)


# -- helpers --------------------------------------------------------------------------------------


def _debug() -> bool:
    return bool(os.environ.get("AUTOFR_DEBUG"))


def _load(model: str, device: str, dtype: str, threads: int) -> Loaded:
    import torch

    from autofr import zoo
    from autofr.points import discover, find_denoiser

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    loaded = zoo.load(model, device, dtype)
    discover(find_denoiser(loaded.pipe))  # a pipe without known points is refused before any work
    return loaded


def _policy(path: Path) -> Policy:
    from autofr.policy import load

    return load(path)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".autofr-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot write there ({error.strerror}); give another place with --out"
        ) from None
    return folder


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out {path}: expected the name of a PNG file, such as samples.png")
    _writable(path.resolve().parent)
    return path


def _dry_run(loaded: Loaded, settings: Any, folder: Path) -> None:
    from autofr.latency import seconds
    from autofr.sampler import draw

    batch = range(settings.batch)
    draw(loaded.pipe, batch, 2)
    long, short = (seconds(lambda n=n: draw(loaded.pipe, batch, n)) for n in (12, 2))  # type: ignore[misc]
    call = settings.steps * (long - short) / 10
    speedup = settings.budget.speedup_over(call)
    batches = -(-settings.validation_seeds // settings.batch)
    rows = 24 * batches * call / 1.4
    planned = settings.trials * (settings.trial_seeds / settings.batch + 2) * call / speedup
    fixed = (5 + 25 + 2 * batches + 2 * settings.test_seeds / settings.batch + 70) * call
    typer.echo(
        f"model {loaded.name} ({type(loaded.pipe).__name__}), {settings.steps} steps, batch"
        f" {settings.batch}: {1000 * call:.0f} ms per call here\n"
        f"budget {settings.budget.text}: at most {1000 * call / speedup:.0f} ms per call\n"
        f"space {settings.space.name}: {settings.trials} trials, after the published rows\n"
        f"seeds: {settings.calibration_seeds} calibration, {settings.validation_seeds} validation,"
        f" {settings.test_seeds} test\n"
        f"folder: {folder} (nothing written)\n"
        f"expected time: about {(rows + planned + fixed) / 60:.0f} minutes"
    )
