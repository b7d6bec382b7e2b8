"""Score policies by real rollouts on fixed seeds, against the teacher and a fine solution."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autofr.errors import MeasurementError, ModelError, TaskError
from autofr.measure import confidence
from autofr.measure.latency import seconds
from autofr.measure.quality import Features, relative_error, trimmed_mean
from autofr.plan.baselines import Group
from autofr.policy import Interval, Policy
from autofr.runtime.clock import Clock, Listener
from autofr.runtime.points import Pipe, device_of, find_denoiser, name_of
from autofr.runtime.recording import record
from autofr.runtime.sampler import Samples, batches, draw, reuse
from autofr.runtime.start import Starts

FINE = 5  # the fine reference takes this many times the teacher's steps
_log = logging.getLogger("autofr")


@dataclass(frozen=True)
class Candidate:
    """A policy with its name and group in the table, and its predicted seconds per call."""

    name: str
    group: Group
    policy: Policy
    seconds: float


@dataclass(frozen=True)
class Score:
    """Error of each seed's final latents, to the teacher and to the fine reference; images.

    `speedup` is measured while the samples are drawn: see `Pulse`. It is None where no batch was
    as large as the teacher's.
    """

    errors: np.ndarray
    reference_errors: np.ndarray
    samples: Samples
    speedup: Interval | None

    @property
    def error(self) -> Interval:
        """Mean error to the teacher with its interval."""
        return confidence.of_mean(self.errors)

    @property
    def typical(self) -> float:
        """Error without the few samples whose drawing changed: what policies are chosen by."""
        return trimmed_mean(self.errors)

    @property
    def reference_error(self) -> Interval:
        """Mean error to the fine reference with its interval."""
        return confidence.of_mean(self.reference_errors)


def latent_errors(found: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """Relative error of each sample's final latents, where the wanted ones are drawn.

    Elsewhere inpainting overwrites them, which a run of a single step does not show.
    """
    return relative_error(found * (wanted != 0), wanted)


def draw_all(
    one: Callable[[Sequence[int]], Samples],
    seeds: Sequence[int],
    batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Draw any number of seeds in batches; `one` draws a batch.

    Raises: MeasurementError when the latents or images hold NaN.
    """
    parts = []
    drawn = 0
    for some in batches(seeds, batch):
        parts.append(one(some))
        drawn += len(some)
        if on_progress:
            on_progress(drawn, len(seeds))
    samples = Samples.join(parts)
    if not bool(samples.latents.isfinite().all() and samples.images.isfinite().all()):
        raise MeasurementError("the model drew NaN or infinity; try --dtype float32")
    return samples


class Pulse:
    """Says what a teacher call would take at this moment, from a few denoiser calls.

    Rows of a table are drawn minutes apart on machines whose speed drifts. A pulse before and
    after every timed call follows the drift (one between two calls serves both); its ratio to whole
    teacher calls is measured first. Calls count only at the batch of the first one, which is that
    of the pulse.
    """

    def __init__(self, pipe: Pipe, calls: int = 2) -> None:
        self._denoiser, self._device, self._calls = find_denoiser(pipe), device_of(pipe), calls
        self._call: tuple[Any, Any] | None = None
        self._batch = 0
        self._ratio = 1.0
        self._last: float | None = None
        self.taken: list[tuple[float, float]] = []

    def begin(self) -> None:
        """Forget the notes: other calls are timed from here on."""
        self._last, self.taken = None, []

    @torch.inference_mode()
    def beat(self) -> float:
        """Seconds of a few denoiser calls, now."""
        assert self._call is not None
        args, kwargs = self._call
        return sum(
            seconds(lambda: self._denoiser(*args, **kwargs), self._device)
            for _ in range(self._calls)
        )

    def timed(self, pipe: Pipe, seeds: Sequence[int], steps: int) -> Samples:
        """Draw, and note (pulse around the call, seconds of the call) if the batch is full."""
        if self._call is None:
            with record(pipe, calls=True) as tape:
                draw(pipe, seeds, Starts(pipe).short(2, steps))
            self._call, self._batch = tape.calls[0].given, len(seeds)
        if len(seeds) != self._batch:
            return draw(pipe, seeds, steps)
        before = self._last or self.beat()
        began = time.perf_counter()
        samples = draw(pipe, seeds, steps)
        spent = time.perf_counter() - began
        self._last = self.beat()
        self.taken.append(((before + self._last) / 2, spent))
        return samples

    def calibrate(self) -> None:
        """Learn teacher seconds per pulse from the teacher calls noted so far."""
        self._ratio = float(np.median([spent / beat for beat, spent in self.taken]))

    def speedup(self) -> Interval | None:
        """Teacher seconds over the noted calls' seconds, with its interval; None without notes."""
        ratios = np.array([self._ratio * beat / spent for beat, spent in self.taken])
        return confidence.of_median(ratios) if len(ratios) else None


class Evaluator:
    """Holds the teacher's and the fine reference's samples of some seeds, and scores against them.

    Policies of one search share the seeds, so that their scores are paired. Without `rows` there is
    no fine reference and nothing is timed: what the table shows of its rows, and trials do without.
    """

    def __init__(
        self,
        pipe: Pipe,
        seeds: Sequence[int],
        steps: int,
        batch: int,
        features: Features | None = None,
        fine_seeds: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
        rows: bool = True,
    ) -> None:
        self.pipe, self.seeds, self.steps, self.batch = pipe, list(seeds), steps, batch
        self.features, self._rows = features, rows
        self._on_progress = on_progress
        self.pulse = Pulse(pipe)
        self.teacher = self._draw(self.seeds, steps)
        self.fine = Samples(self.teacher.images[:0], self.teacher.latents[:0])
        if rows:
            self.pulse.calibrate()
            self.teacher_speedup = self.pulse.speedup()
            few = self.seeds[: min(fine_seeds, len(self.seeds))]
            self.fine = self._draw(few, fine_steps(pipe, steps))
        self._on_progress = None  # scores of single policies report nothing

    def score(self, policy: Policy, seeds: int | None = None) -> Score:
        """Roll the policy out on the first `seeds` seeds (all by default)."""
        with reuse(self.pipe, policy):
            found = self._draw(self.seeds[:seeds], policy.sampler.num_inference_steps)
        return self._compare(found)

    def score_solver(self, scheduler: object, steps: int) -> Score:
        """Sample with another scheduler, without reuse."""
        with solver(self.pipe, scheduler):
            return self._compare(self._draw(self.seeds, steps))

    def teacher_score(self) -> Score:
        """The teacher against itself and the fine reference."""
        errors = np.zeros(len(self.seeds))
        fine = self._reference_errors(self.teacher)
        return Score(errors, fine, self.teacher, self.teacher_speedup)

    def _draw(self, seeds: Sequence[int], steps: int) -> Samples:
        self.pulse.begin()

        def one(some: Sequence[int]) -> Samples:
            timed = self.pulse.timed if self._rows else draw
            return timed(self.pipe, some, steps)

        return draw_all(one, seeds, self.batch, self._on_progress)

    def fid(self, score: Score) -> float | None:
        """FID of a score's images in the given features."""
        if self.features is None:
            return None
        return self.features.fid(self.features(score.samples.images))

    def _compare(self, found: Samples) -> Score:
        errors = latent_errors(found.latents, self.teacher.latents[: len(found.latents)])
        return Score(errors, self._reference_errors(found), found, self.pulse.speedup())

    def _reference_errors(self, found: Samples) -> np.ndarray:
        n = min(len(self.fine.latents), len(found.latents))
        return latent_errors(found.latents[:n], self.fine.latents[:n])


def fine_steps(pipe: Pipe, steps: int) -> int:
    """Steps of the fine reference; a scheduler has only so many timesteps (LCM, TCD: very few)."""
    config = pipe.scheduler.config
    most = config.get("original_inference_steps") or config.get("num_train_timesteps", 1000)
    return max(steps, min(FINE * steps, int(most)))


class _BegunError(Exception):
    """A run has set its timesteps."""


class _Stop(Listener):
    asked = False

    def stopped(self) -> None:  # what ran before is over: the scheduler is asked for its timesteps
        self.asked = True

    def started(self, steps: int) -> None:
        raise _BegunError


def check_steps(pipe: Pipe, steps: int) -> None:
    """Begin a run, as far as its timesteps, to see that the scheduler takes so many steps.

    Raises: ModelError with what the scheduler says.
    """
    listener = _Stop()
    clock = Clock(pipe.scheduler, listener)
    clock.install()
    try:
        draw(pipe, [0], steps)
    except _BegunError:
        pass
    except (TaskError, ValueError) as error:
        if isinstance(error, TaskError) and not listener.asked:
            raise
        raise ModelError(
            f"{name_of(pipe)} with {type(pipe.scheduler).__name__} cannot take {steps} steps:"
            f" {error.__cause__ or error}; ask for fewer with --steps"
        ) from error
    finally:
        clock.remove()


@contextmanager
def solver(pipe: Pipe, scheduler: object) -> Iterator[None]:
    """Put another scheduler into the pipe inside the block."""
    own = pipe.scheduler
    pipe.scheduler = copy.deepcopy(scheduler)
    try:
        yield
    finally:
        pipe.scheduler = own


def check_runs(starts: Starts, steps: int) -> None:
    """Refuse a call of which so little runs that nothing can be reused.

    Raises: ModelError saying what could be changed.
    """
    if starts.runs(steps) < min(2, steps):
        raise ModelError(
            f"of {steps} steps {starts.runs(steps) or 'none'} would run, so that there is nothing"
            " to reuse: ask for more with --steps, or for a larger --call strength"
        )


def other_solvers(pipe: Pipe, steps: int = 2) -> dict[str, object]:
    """Better solvers of the same model, as users would set them; never candidates.

    Each is tried in a call of `steps`, which should run two of them.
    Some models ask for more than a timestep of the training schedule (SVD, EDM), and some pipes
    pass arguments that only their own solver takes: what such a pipe cannot drive is left out.
    """
    own, config = pipe.scheduler, pipe.scheduler.config
    if config.get("timestep_type") == "continuous" or hasattr(own, "precondition_outputs"):
        return {}
    flows = type(own).__name__.startswith("FlowMatch")
    if flows or config.get("prediction_type") == "flow_prediction":
        shift = config.get("shift", config.get("flow_shift", 1.0))
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        changes: dict[str, dict[str, Any]] = {"DPM-Solver++ 2M": flow, "UniPC": flow}
    else:
        changes = {
            "DPM-Solver++ 2M Karras": {"use_karras_sigmas": True},
            "UniPC": {"timestep_spacing": "trailing"},
        }
    found = {name: _driven(pipe, name, change, steps) for name, change in changes.items()}
    return {name: scheduler for name, scheduler in found.items() if scheduler is not None}


def _driven(pipe: Pipe, name: str, changes: dict[str, Any], steps: int) -> object | None:
    """The solver, if a short run of the pipe can use it; whatever fails is of that solver alone."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind = UniPCMultistepScheduler if name == "UniPC" else DPMSolverMultistepScheduler
    try:
        scheduler = kind.from_config(pipe.scheduler.config, **changes)
        with solver(pipe, scheduler):
            draw(pipe, [0], steps)
    except Exception as error:
        _log.debug("%s cannot use %s: %s", name_of(pipe), name, error, exc_info=True)
        return None
    return scheduler
