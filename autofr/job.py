"""Whole jobs on a pipe: a search in its folder, its estimate, a profile, a measured policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from autofr.errors import ModelError
from autofr.measure import profile_file, profiling
from autofr.measure.alignment import NOBODY, Judge
from autofr.measure.gains import PLACES
from autofr.measure.latency import seconds
from autofr.measure.masks import candidate_masks
from autofr.measure.profile_file import Profile
from autofr.policy import Measured, Policy
from autofr.report import before_after, page, profile_pictures, report
from autofr.report.wording import count
from autofr.runtime import guidance, sampler
from autofr.runtime.families import discover
from autofr.runtime.points import Pipe, device_of, dtype_of, find_denoiser, name_of
from autofr.runtime.start import Starts
from autofr.search import verify
from autofr.search.crew import Crew
from autofr.search.evaluate import check_runs, check_steps
from autofr.search.folder import Settings, run_folder, spec_of
from autofr.search.result import Result
from autofr.search.search import OnProgress, Search
from autofr.search.shared import Share
from autofr.search.shelf import shared
from autofr.task import plain

FEW = 8  # images of teacher and policy that the report shows


def run(
    pipe: Pipe,
    settings: Settings,
    folder: Path,
    judge: Judge = NOBODY,
    on_progress: OnProgress = lambda stage, done, total: None,
    shelf: Path | None = None,
    crew: Crew | None = None,
    share: Share | None = None,
) -> Result:
    """Search in a folder of its own, and leave policy, profile, result and report there.

    Where the folder holds the same run, unfinished or finished, that is resumed. `shelf` is a
    folder of profiles and calibrations that runs of the same pipe share. Trials are scored here,
    by a `crew` of children, or with the workers of a study in a database (`share`).
    Raises: RunFolderError when the folder cannot be written, is in use or holds another run;
        StorageError when the database cannot be used, or its study is another search's;
        BudgetError when the budget cannot be met; MeasurementError when the model gives NaN or
        latency does not settle.
    """
    spec = spec_of(pipe, settings)
    with run_folder(folder, spec), shared(shelf, folder, pipe, settings, spec):
        found = Search(pipe, settings, folder, judge, on_progress, crew, share).run()
        on_progress("report", 0, 1)
        found.result.policy.save(folder / "policy.json")
        found.profile.save(folder / profile_file.FILE)
        few = [samples.images[:FEW] for samples in (found.teacher, found.chosen)]
        report.write(found.result, folder, found.profile, *few)
        before_after.save(few[0], few[1], folder)
        page.write(found.result, folder, found.profile)
        on_progress("report", 1, 1)
    return found.result


# -- how long a search takes ----------------------------------------------------------------------


def estimate(pipe: Pipe, settings: Settings, folder: Path) -> str:
    """Say what `run` would do and about how long it would take; a few short calls, no files.

    Raises: BudgetError when the unaccelerated pipe already meets the budget; ModelError when it
        cannot take so many steps.
    """
    call = call_seconds(pipe, settings)
    speedup = settings.budget.speedup_over(call)
    minutes = search_seconds(settings, call) / 60
    return (
        f"model {settings.name} ({name_of(pipe)}), {settings.steps} steps, batch"
        f" {settings.batch}: {1000 * call:.0f} ms per call here\n"
        f"budget {settings.budget.text}: at most {1000 * call / speedup:.0f} ms per call\n"
        f"space {settings.space.name}: {settings.trials} trials, after the published rows\n"
        f"seeds: {settings.calibration_seeds} calibration, {settings.validation_seeds} validation,"
        f" {settings.test_seeds} test\n"
        f"folder: {folder} (nothing written)\n"
        f"expected time: about {count(max(1, round(minutes)), 'minute')}"
    )


def call_seconds(pipe: Pipe, settings: Settings) -> float:
    """Seconds of the unaccelerated call, from the difference of two that are shorter.

    Raises: ModelError when the pipe cannot take so many steps.
    """
    check_steps(pipe, settings.steps)
    starts = Starts(pipe)
    check_runs(starts, settings.steps)
    draw, device = partial(sampler.draw, pipe, range(settings.batch)), device_of(pipe)
    long, short = (starts.short(count, settings.steps) for count in (12, 2))
    draw(short)  # warms up
    more, less = (  # what else runs only makes them longer
        min(seconds(partial(draw, steps), device) for _ in range(3)) for steps in (long, short)
    )
    return starts.runs(settings.steps) * (more - less) / (starts.runs(long) - starts.runs(short))


def search_seconds(settings: Settings, call: float) -> float:
    """About how many seconds a search takes where an unaccelerated call takes `call`.

    Raises: BudgetError when that meets the budget already.
    """
    return _calls(settings, settings.budget.speedup_over(call)) * call


def _calls(settings: Settings, speedup: float) -> float:
    """How many unaccelerated calls take as long as the search: rough counts of its stages."""
    seeds = settings.validation_seeds, settings.calibration_seeds
    batches, calibrated = (-(-many // settings.batch) for many in seeds)
    rows = 24 * batches / 1.4  # published schedules, at about their mean speed-up
    trial = (settings.trial_seeds / settings.batch + 2) / speedup  # scored, and its mix corrected
    tests = settings.test_seeds / settings.batch
    drawn = 2 * batches + (1 + 4 / speedup) * tests  # unaccelerated, by the policy and its rivals
    gains = PLACES / 2 * calibrated  # half a call for each
    rest = 5 + 25 + 70  # profile, calibration, timing in pairs
    return rows + settings.trials * trial + drawn + gains + rest


# -- parts of a search, on their own --------------------------------------------------------------


def profile(
    pipe: Pipe,
    folder: Path,
    steps: int,
    batch: int,
    seeds: Sequence[int],
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[Profile, list[Path]]:
    """Profile a pipe with all its candidate masks, and leave profile and pictures in a folder.

    Returns: the profile, and the paths of the pictures.
    Raises: ModelError for a denoiser without known points, or calls of which too little runs;
        MeasurementError when it gives NaN.
    """
    starts, branch = Starts(pipe), None
    check_runs(starts, steps)
    with suppress(ModelError):  # nothing can be planned for it, which a search says
        branch = guidance.of(pipe, starts.short(3, steps)).alone
    found = profiling.profile(
        pipe,
        candidate_masks(discover(find_denoiser(pipe)), branch),
        steps=steps,
        batch=batch,
        seeds=seeds,
        on_progress=partial(on_progress, "profile"),
    )
    found.save(folder / profile_file.FILE)
    return found, profile_pictures.profile_pictures(found, folder)


def evaluate(
    pipe: Pipe,
    policy: Policy,
    seeds: Sequence[int],
    batch: int,
    judge: Judge = NOBODY,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Measured:
    """Measure a policy on the pipe's device: its speed-up in pairs, what it changes on the seeds.

    What was predicted when it was made is repeated only for the same device, batch, type and call:
    another strength leaves out other steps.
    Raises: PolicyError when it was made for another pipe; ModelError when too little of a call
        runs; MeasurementError when it draws NaN.
    """
    sampler.check(pipe, policy)
    steps = policy.sampler.replaces
    starts = Starts(pipe)
    check_runs(starts, steps)
    timing = verify.time_policy(
        pipe,
        policy,
        steps,
        batch,
        on_pair=lambda pairs, width: on_progress("measure", pairs, pairs + 1),
    )
    there, made = policy.measured, policy.provenance.call if policy.provenance else {}
    skipped = starts(policy.sampler.num_inference_steps) or None
    here = (profiling.device_name(pipe), batch, dtype_of(pipe), skipped, plain(pipe))
    if there and (there.device, there.batch, there.dtype, there.skipped_steps, made) != here:
        there = None
    measured, _ = verify.test(
        pipe,
        policy,
        timing,
        there.predicted_speedup if there else None,
        seeds=seeds,
        steps=steps,
        batch=batch,
        judge=judge,
        on_progress=partial(on_progress, "test"),
        predicted_bytes=there.predicted_bytes if there else None,
    )
    return measured
