"""Choose among finalists, hold the choice to the budget by measurement, and test it once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from autofr.errors import BudgetError, MeasurementError
from autofr.measure import confidence
from autofr.measure.alignment import Alignment, Judge, prompts_of
from autofr.measure.latency import Paired, paired
from autofr.measure.profiling import device_name, versions
from autofr.measure.quality import Features, band_errors, fid_difference, psnr
from autofr.mix import executed
from autofr.policy import Fid, Measured, Policy, TextAlignment
from autofr.runtime.points import Pipe, device_of, dtype_of
from autofr.runtime.sampler import Samples, apply, draw, remove, reuse
from autofr.runtime.start import Starts
from autofr.search.evaluate import Candidate, draw_all, latent_errors
from autofr.search.folder import Settings
from autofr.search.ledger import Record

ROUGHLY = 1.25  # finalists have at most this many times the least error, on the few trial seeds
ATTEMPTS = 5
HALF_WIDTH = 0.03  # the interval of a speed-up is measured until it is no wider than this
PAIRS = 60  # of calls that all measuring together should take, whatever a call takes
LEAST_PAIRS = 12  # that every policy may have
SPARE = 1.02  # a policy that is faster than asked by more than this gives time back


Choice = tuple[Record, Candidate]
"""A trial and the candidate that came of its parameters, whose error is the trial's value."""


@dataclass(frozen=True)
class Verdict:
    """The chosen trial, the candidate that came of it, and how it was measured."""

    record: Record
    found: Candidate
    timing: Paired


def different(records: Sequence[Record]) -> list[Record]:
    """The first trial of every policy, by error."""
    first = {r.notes["digest"]: r for r in reversed(records)}.values()
    return sorted(first, key=lambda r: (r.value, r.number))


def finalists(records: Sequence[Record], seconds: float, keep: int = 3) -> list[Record]:
    """The few different trials of least error that meet the time per call by prediction.

    None is further from the teacher than a published row that is fast enough.
    """
    fast = [r for r in different(records) if r.notes["seconds"] <= seconds]
    bounds = [ROUGHLY * fast[0].value for _ in fast[:1]]
    bounds += [r.value for r in fast if "row" in r.notes]
    return [r for r in fast if r.value <= min(bounds)][:keep]


def time_policy(
    pipe: Pipe,
    policy: Policy,
    steps: int,
    batch: int,
    on_pair: Callable[[int, float], None] | None = None,
    half_width: float = HALF_WIDTH,
    max_pairs: int = 60,
    max_seconds: float = 120.0,
) -> Paired:
    """Time the teacher's whole call against the policy's, in interleaved pairs."""

    def before(which: int) -> None:
        apply(pipe, policy) if which else remove(pipe)

    # A pipe that starts from a picture counts its steps itself: it is asked for the policy's own.
    counts = steps, policy.sampler.num_inference_steps
    first, second = (partial(draw, pipe, range(batch), count) for count in counts)
    try:
        return paired(
            first,
            second,
            device=device_of(pipe),
            before=before,
            on_pair=on_pair,
            half_width=half_width,
            max_pairs=max_pairs,
            max_seconds=max_seconds,
        )
    finally:
        remove(pipe)


def within_budget(
    pipe: Pipe,
    settings: Settings,
    ranked: Sequence[Choice],
    again: Callable[[Record, float], Choice | None],
    on_pair: Callable[[int, float], None],
) -> Verdict:
    """Take the first candidate whose measured speed-up keeps the budget with its lower end.

    Where one misses, or keeps it with time to spare, policies at other times on the front are
    tried: `again(record, seconds)` plans anew, or gives None where there is no front. Of those that
    keep the budget the one of least error is taken. Effort is counted in calls, so that a slow
    device comes as near to the budget as a fast one.
    Raises: BudgetError when none keeps it; says what was measured.
    """
    closest, pairs = 0.0, 0
    for first in ranked:
        choice: Choice | None = first
        best: Verdict | None = None
        missed = math.inf  # predicted seconds of the fastest plan that missed
        for _ in range(ATTEMPTS):
            if choice is None:
                break
            record, found = choice
            timing = time_policy(
                pipe,
                found.policy,
                settings.steps,
                settings.batch,
                on_pair,
                max_pairs=min(PAIRS // 2, max(LEAST_PAIRS, PAIRS - pairs)),
                max_seconds=math.inf,
            )
            pairs += timing.pairs
            replanned = best is not None  # to give time back
            asked = settings.budget.speedup_over(timing.first_seconds)
            spare = timing.ratio.low / asked
            closest = max(closest, timing.ratio.low)
            if spare >= 1:
                if best is None or record.value < best.record.value:
                    best = Verdict(record, found, timing)
                seconds = min(found.seconds * spare * 0.995, 0.99 * missed)
            else:
                missed = min(missed, found.seconds)
                # A noisy moment widens the interval; the next one is expected to be narrow.
                expected = max(timing.ratio.low, (1 - HALF_WIDTH) * timing.ratio.value)
                seconds = found.seconds * min(0.995, expected / asked)
            if best is not None and (replanned or spare < SPARE or seconds < found.seconds * 1.005):
                break
            choice = again(record, seconds)
        if best is not None:
            return best
    raise BudgetError(
        f"no policy kept the budget {settings.budget.text} when measured: the lower end of the best"
        f" one's speed-up was {closest:.2f}x; ask for a smaller speed-up, or quieten the machine"
    )


def drawn_with(
    pipe: Pipe,
    policy: Policy,
    seeds: Sequence[int],
    batch: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Samples, int]:
    """Draw seeds with a policy; also the most bytes that were kept."""

    def one(some: Sequence[int]) -> Samples:
        return draw(pipe, some, policy.sampler.num_inference_steps)

    with reuse(pipe, policy) as patch:
        return draw_all(one, seeds, batch, on_progress), patch.run.peak_bytes


def policy_steps(policy: Policy) -> list[str]:
    """Step names as they run and cost."""
    return [executed(step, policy.weights(i)) for i, step in enumerate(policy.steps)]


def test(
    pipe: Pipe,
    policy: Policy,
    timing: Paired,
    predicted_speedup: float | None,
    *,
    seeds: Sequence[int],
    steps: int,
    batch: int,
    judge: Judge,
    on_progress: Callable[[int, int], None],
    predicted_bytes: int | None = None,
) -> tuple[Measured, tuple[Samples, Samples]]:
    """Draw the test seeds once, with and without the policy, and measure what it cost.

    Returns: the numbers, and the samples (teacher's, policy's).
    Raises: MeasurementError when the policy draws NaN.
    """
    total = 2 * len(seeds)

    def one(some: Sequence[int]) -> Samples:
        return draw(pipe, some, steps)

    teacher = draw_all(one, seeds, batch, lambda done, _: on_progress(done, total))
    found, kept_bytes = drawn_with(
        pipe, policy, seeds, batch, lambda done, _: on_progress(len(seeds) + done, total)
    )
    error = confidence.of_mean(latent_errors(found.latents, teacher.latents))
    if error.value > 1:
        raise MeasurementError(
            f"the policy's latents differ from the teacher's by {100 * error.value:.0f} % on the"
            " test seeds: this is no usable policy"
        )
    low, high = band_errors(found.images, teacher.images)
    measured = Measured(
        speedup=timing.ratio,
        teacher_seconds=timing.first_seconds,
        policy_seconds=timing.second_seconds,
        predicted_speedup=predicted_speedup,
        batch=batch,
        device=device_name(pipe),
        dtype=dtype_of(pipe),
        threads=torch.get_num_threads(),
        versions=versions(),
        samples=len(seeds),
        seeds=f"{seeds[0]} to {seeds[-1]}",
        fid=_fid(judge.features, teacher, found) if judge.features else None,
        alignment=_aligned(judge.alignment, prompts_of(pipe, seeds), teacher, found),
        trajectory_error=error,
        psnr=psnr(found.images, teacher.images),
        low_frequency_error=low,
        high_frequency_error=high,
        kept_bytes=kept_bytes,
        predicted_bytes=predicted_bytes,
        skipped_steps=Starts(pipe)(policy.sampler.num_inference_steps) or None,
    )
    return measured, (teacher, found)


def _fid(features: Features, teacher: Samples, found: Samples) -> Fid:
    theirs, ours = features(teacher.images), features(found.images)
    return Fid(
        features=features.name,
        teacher=features.fid(theirs),
        policy=features.fid(ours),
        difference=fid_difference(features, theirs, ours),
    )


def _aligned(
    alignment: Alignment | None, prompts: Sequence[str] | None, teacher: Samples, found: Samples
) -> TextAlignment | None:
    if alignment is None or prompts is None:
        return None
    theirs, ours = (alignment(samples.images, prompts) for samples in (teacher, found))
    return TextAlignment(
        towers=alignment.name,
        teacher=float(theirs.mean()),
        policy=float(ours.mean()),
        difference=confidence.of_mean(ours - theirs),
    )
