"""Measure once what every reuse costs in error: the table that planning works on.

For keyframe k, step i = k + g and mask m, calibration measures the score that the reduced network
gives at the teacher's own input. All that planning needs of these scores are inner products with
the teacher's, so the table stays small and every mix can be tried without the network.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autofr import files, reading
from autofr.errors import MeasurementError, damaged
from autofr.measure import gains
from autofr.measure.masks import GUIDANCE, Masks
from autofr.runtime import guidance, halves
from autofr.runtime.families import discover
from autofr.runtime.held import forms
from autofr.runtime.patch import Patch
from autofr.runtime.points import Pipe, find_denoiser
from autofr.runtime.recording import Tape, record
from autofr.runtime.sampler import batches, draw

MAX_BYTES = 2**31
"""Of a calibration, unpacked."""
_log = logging.getLogger("autofr")


def no_branch() -> np.ndarray:
    """Products of no guidance branch."""
    return np.zeros((0, 0, 0))


@dataclass(frozen=True)
class Calibration:
    """Inner products of scores, summed over calibration samples and elements.

    `teacher` (N, N): teacher's scores with each other. `cross` (M, N, G, N): reduced score of
    mask m at step i, kept at i - 1 - g', with the teacher's score j. `own` (M, N, G): the reduced
    score with itself. Entries that no keyframe reaches are NaN, as are those of a mask that
    computes one guidance branch: of its scores, which need no further run, `branch` (2, N, N) has
    the products with the teacher's (row: the teacher's step) and with each other; it is empty where
    no mask does. `gain` (N,): how a unit error of the score at a step moves the final latents,
    through the network.
    `norm`: mean squared norm of the final latents.
    `switch`: the step at which a second denoiser takes over; 0 where there is one only.
    `stages`: the most calls of the denoiser, per guidance branch, that make up a step after the
    first one. Steps are those that run: the `first` of a call are left out where it starts from a
    picture.
    """

    masks: tuple[str, ...]
    teacher: np.ndarray
    cross: np.ndarray
    own: np.ndarray
    gain: np.ndarray
    norm: float
    switch: int = 0
    first: int = 0
    stages: int = 1
    branch: np.ndarray = field(default_factory=no_branch)

    @property
    def steps(self) -> int:
        """How many steps run."""
        return len(self.teacher)

    @property
    def asked(self) -> int:
        """How many steps a call asks for."""
        return self.first + self.steps

    @property
    def max_gap(self) -> int:
        return self.own.shape[2]

    def halved(self, name: str) -> bool:
        """Whether a mask computes one guidance branch: its scores are in `branch`."""
        return name == GUIDANCE

    def save(self, path: Path) -> None:
        """Write an .npz file, atomically."""
        packed = io.BytesIO()
        np.savez_compressed(
            packed, masks=np.array(self.masks), teacher=self.teacher, cross=self.cross,
            own=self.own, gain=self.gain, norm=self.norm, switch=self.switch,
            first=self.first, stages=self.stages, branch=self.branch,
        )  # fmt: skip
        files.write(path, packed.getvalue())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote; plain arrays only.

        Raises: RunFolderError when the file is damaged.
        """
        try:
            file = reading.arrays(path, MAX_BYTES)
            found = cls(
                tuple(map(str, file["masks"])), file["teacher"], file["cross"], file["own"],
                file["gain"], float(file["norm"]), int(file["switch"]),
                int(file.get("first", 0)), int(file.get("stages", 1)),  # runs of older versions
                file.get("branch", no_branch()),
            )  # fmt: skip
            found._check_shapes()
            return found
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise damaged(path) from None

    def _check_shapes(self) -> None:
        """Refuse arrays that do not belong together.

        Raises: ValueError.
        """
        M, N, G = self.own.shape
        shapes = [one.shape for one in (self.teacher, self.cross, self.gain)]
        numbers = (self.teacher, self.cross, self.own, self.gain, self.branch)
        if shapes != [(N, N), (M, N, G, N), (N,)] or len(self.masks) != M or N < 1:
            raise ValueError("shapes differ")
        if self.branch.size and self.branch.shape != (2, N, N):
            raise ValueError("shapes differ")
        if not all(np.issubdtype(one.dtype, np.floating) for one in numbers):
            raise ValueError("not numbers")


@torch.inference_mode()
def calibrate(
    pipe: Pipe,
    seeds: Sequence[int],
    steps: int,
    masks: Masks,
    max_gap: int = 6,
    batch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run the teacher once on `seeds`, then every mask at every gap on its inputs.

    `batch` seeds at a time (all by default): inner products add up. Scores are compared as the
    scheduler gets them (after guidance), in the form in which they are held, and where the pipe
    draws: what it overwrites after every step (inpainting) does not count. Cost: N keyframes,
    about N * max_gap * len(masks) reduced evaluations, and five calls for the gains.
    Raises: MeasurementError when the model gives NaN; ModelError for a pipe that ends early, or
        changes its batch or its branches on the way.
    """
    parts = batches(seeds, batch)
    found: list[Calibration] = []

    def on_key(done: int, total: int) -> None:
        if on_step:
            on_step(len(found) * total + done, len(parts) * total)

    for part in parts:
        found.append(_calibrate(pipe, part, steps, masks, max_gap, on_key))
    return _together(found)


def _together(parts: Sequence[Calibration]) -> Calibration:
    """Add up what was measured on parts of the seeds; gains are their geometric mean."""
    from scipy.stats import gmean

    first = parts[0]
    return Calibration(
        masks=first.masks,
        teacher=sum(part.teacher for part in parts),  # type: ignore[arg-type]
        cross=sum(part.cross for part in parts),  # type: ignore[arg-type]
        own=sum(part.own for part in parts),  # type: ignore[arg-type]
        gain=gmean([part.gain for part in parts], axis=0),
        norm=sum(part.norm for part in parts),
        switch=first.switch,
        first=first.first,
        stages=first.stages,
        branch=sum(part.branch for part in parts),  # type: ignore[arg-type]
    )


def _calibrate(
    pipe: Pipe,
    seeds: Sequence[int],
    steps: int,
    masks: Masks,
    max_gap: int,
    on_key: Callable[[int, int], None],
) -> Calibration:
    """Calibrate on one batch."""
    with record(pipe, calls=True) as tape:
        draw(pipe, seeds, steps)
    guidance.check_plannable(pipe, tape)
    drawn = tape.drawn()
    teacher = _Teacher(tape, len(seeds), drawn)
    n, m = teacher.steps, len(masks)
    scores = torch.stack([teacher.score(i) for i in range(n)])
    if not bool(scores.isfinite().all()):
        raise MeasurementError("the model returned NaN or infinity during calibration")
    cross, own = np.full((m, n, max_gap, n), np.nan), np.full((m, n, max_gap), np.nan)
    points = discover(find_denoiser(pipe)) | halves.POINTS
    patch = Patch(pipe, [[points[name] for name in mask] for mask in masks.values()])
    within = [index for index, name in enumerate(masks) if name != GUIDANCE]
    with patch:
        for key in range(n - 1):
            teacher.run(key, patch.keyframe)
            for gap in range(1, min(max_gap, teacher.last_of(key) - key) + 1):
                for index in within:
                    step = key + gap
                    outputs = teacher.run(step, partial(patch.reduced, index + 1))
                    reduced = teacher.score(step, outputs)
                    cross[index, step, gap - 1] = (scores @ reduced).cpu().numpy()
                    own[index, step, gap - 1] = float(reduced @ reduced)
            on_key(key + 1, n - 1)
    products = (scores @ scores.T).cpu().numpy()
    final = teacher.drawn(tape.latents[-1][: len(seeds)].double().flatten())
    alone = gains.by_scheduler(tape, drawn)
    gain = gains.through_network(pipe, seeds, tape, alone, drawn) / teacher.slopes
    norm = float(final.square().sum())
    stages = max([1, *(tape.ran.count(step) for step in {*tape.ran} - {tape.ran[0]})])
    branch, half = no_branch(), halves.branch_of(masks.get(GUIDANCE, ()))
    if half is not None:
        halved = torch.stack([teacher.score(i, teacher.alone(i, half)) for i in range(n)])
        branch = torch.stack([scores @ halved.T, halved @ halved.T]).cpu().numpy()
    return Calibration(
        tuple(masks),
        products,
        cross,
        own,
        gain,
        norm,
        teacher.switch,
        teacher.first,
        stages,
        branch,
    )


class _Teacher:
    """The first pass of every step that a recorded run ran: its calls, how they make a score."""

    def __init__(self, tape: Tape, samples: int, drawn: torch.Tensor | None) -> None:
        by_pass = tape.passes()
        self.first = tape.steps[tape.begin]
        first = [
            tape.steps.index(step, tape.begin) for step in range(self.first, tape.steps[-1] + 1)
        ]
        held = forms(tape.scheduler)
        self._calls = [by_pass[k] for k in first]
        self._forms = [held[k] if held else None for k in first]
        self._guides = [
            guidance.fit([call.output for call in by_pass[k]], tape.scores[k - tape.begin], samples)
            for k in first
        ]
        self._kept = None if drawn is None else drawn[:samples].flatten()
        worst = max(guide.residual for guide in self._guides)
        if worst > guidance.LINEAR:
            _log.warning(
                "what the scheduler gets is not linear in what the denoiser returns (up to %.0f %%"
                " off; a rescaled guidance?): plans for this pipe are approximate",
                100 * worst,
            )
        self.steps = len(first)
        modules = [calls[0].module for calls in self._calls]
        changed = (i for i, module in enumerate(modules) if module is not modules[0])
        self.switch = next(changed, 0)
        self.slopes = np.array([abs(form.q) if form else 1.0 for form in self._forms])

    def run(self, step: int, mode: Callable[..., Any]) -> list[Any]:
        """Call the denoiser as at a step, every guidance branch in its mode `mode(branch=...)`."""
        outputs = []
        for branch, call in enumerate(self._calls[step]):
            args, kwargs = call.given
            with mode(branch=(0, branch)):
                outputs.append(call.module(*args, **kwargs)[0])
        return outputs

    def alone(self, step: int, branch: int) -> list[torch.Tensor]:
        """What one guidance branch alone says of a step, in the place of both."""
        return [halves.spread(call.output.chunk(2)[branch]) for call in self._calls[step]]

    def last_of(self, key: int) -> int:
        """The last step that a keyframe serves: the end, or the denoiser's last."""
        return self.switch - 1 if key < self.switch else self.steps - 1

    def score(self, step: int, outputs: Sequence[Any] | None = None) -> torch.Tensor:
        """The step's score (of these outputs, or the teacher's), as it is held: flat, float64."""
        calls, guide, form = self._calls[step], self._guides[step], self._forms[step]
        score = guide([call.output for call in calls] if outputs is None else outputs)
        samples = guide.samples(calls) if form else None
        if form is None or samples is None:
            return self.drawn(score)
        return self.drawn(form.noise(samples, score))

    def drawn(self, flat: torch.Tensor) -> torch.Tensor:
        """Nothing but what the pipe goes on with, where the rest is overwritten."""
        fits = self._kept is not None and self._kept.shape == flat.shape
        return flat * self._kept if fits else flat
