"""Correct a policy's mix by rollouts of the policy itself.

Planning measures errors at the teacher's inputs; in use they pile up. Here the policy is run on
calibration seeds, and at every reduced or held step the mix is fitted anew, so that the step
lands as near as possible to the latents that the teacher had there, every sample by its own
measure. Keyframes get a mix too: their full score says what the steps before them should have been,
and makes up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from autofr.mix import KEY, MAX_WEIGHT, Table
from autofr.policy import Policy
from autofr.runtime import guidance
from autofr.runtime.clock import bare_scheduler
from autofr.runtime.held import Form
from autofr.runtime.points import Pipe, experts
from autofr.runtime.recording import Tape, again, record
from autofr.runtime.sampler import batches, draw, reuse

RIDGE = 1e-5
EXACT = 1e-8  # a sample that misses less of its score's square than this is left alone


class _Path(NamedTuple):
    """A batch's seeds, its latents after each pass, and where they are drawn (see `Tape.drawn`)."""

    seeds: tuple[int, ...]
    latents: tuple[torch.Tensor, ...]
    drawn: torch.Tensor | None


@dataclass(frozen=True)
class Trajectory:
    """The teacher's latents after every pass that ran, on batches of calibration seeds.

    `steps` maps each of these passes to its solver step; at `switch` a second denoiser takes over
    (0 where there is one only), which has nothing of what the first one kept.
    """

    steps: tuple[int, ...]
    parts: tuple[_Path, ...]
    switch: int = 0

    def fits(self, policy: Policy) -> bool:
        """Whether the policy has the same steps, and reuses only at those of one pass."""
        if max(self.steps) + 1 != len(policy.steps):
            return False
        reused = (i for i, step in enumerate(policy.steps) if step != KEY)
        return all(self.steps.count(step) <= 1 for step in reused)


def trajectory(
    pipe: Pipe, seeds: Sequence[int], steps: int, batch: int | None = None
) -> Trajectory:
    """Run the teacher once and keep its path (a few hundred kilobytes for latent models)."""
    parts, calls = [], len(experts(pipe)) > 1
    for some in batches(seeds, batch):
        with record(pipe, calls=calls) as tape:
            draw(pipe, some, steps)
        parts.append(_Path(tuple(some), tuple(tape.latents), tape.drawn()))
    later = (tape.steps[call.at] for call in tape.calls if call.module is not tape.calls[0].module)
    return Trajectory(tuple(tape.ran), tuple(parts), next(later, 0))


def _free(row: tuple[float, ...], jump: bool) -> tuple[float, ...]:
    """The weights of a row that are fitted: a jump has no reduced score."""
    return row[1:] if jump else row


class _Mixed(NamedTuple):
    """What one guidance branch had to mix at a step, in the form in which scores are held."""

    form: Form | None
    sample: Any
    reduced: Any
    scores: tuple[Any, ...]


@torch.inference_mode()
def correct(pipe: Pipe, policy: Policy, teacher: Trajectory, rounds: int = 1) -> Policy:
    """Refit the mix table along the policy's own path, on the teacher's seeds.

    Keyframes after a reduced or held step mix their score with as many kept ones as other steps do,
    so that nothing more is kept. Each batch goes on with the fit of its own; the table gets the fit
    of all together. A policy without a fitted table, with another number of steps than the teacher,
    or that reuses at steps with several stages, is returned as it is; so are keyframes with several
    stages. Exact for solvers whose step is linear in the score.
    """
    if not isinstance(policy.mix, Table) or not teacher.fits(policy):
        return policy
    for _ in range(rounds):
        rows = _opened(policy, teacher)
        policy = policy.model_copy(update={"mix": Table(weights=tuple(rows))})
        sums: dict[int, list[_Normal]] = {}
        for path in teacher.parts:
            for step, normal in _along(pipe, policy, path, teacher.steps).items():
                sums.setdefault(step, []).append(normal)
        for step, normals in sums.items():
            rows[step] = _Normal.together(normals).solve(rows[step])
        for step in policy.keyframes:
            rows[step] = rows[step] if step in sums and rows[step][0] else ()
        policy = policy.model_copy(update={"mix": Table(weights=tuple(rows))})
    return policy


def _opened(policy: Policy, teacher: Trajectory) -> list[tuple[float, ...]]:
    """The rows of a table, those of keyframes ready to be fitted: full weight on the own score."""
    rows = [policy.weights(i) for i in range(len(policy.steps))]
    kept = max([1, *(len(row) - 1 for row in rows)])
    keys, reused = [step for step in policy.keyframes if step in teacher.steps], False
    for number, step in enumerate(keys):
        reused = reused or step != keys[0] + number  # all that ran before are keyframes else
        known = sum((key >= teacher.switch) == (step >= teacher.switch) for key in keys[:number])
        if reused and known and teacher.steps.count(step) == 1:
            rows[step] = rows[step] or (1.0, *[0.0] * min(kept, known))
    return rows


def _along(pipe: Pipe, policy: Policy, path: _Path, steps: Sequence[int]) -> dict[int, _Normal]:
    """Run the policy on one batch, refitting as it goes; the normal equations of each step."""
    found: dict[int, _Normal] = {}
    parts: dict[int, list[_Mixed]] = {}

    def note(
        step: int, form: Form | None, sample: Any, reduced: Any, scores: Sequence[Any]
    ) -> None:
        held = tuple(map(guidance.stacked, scores))
        reduced = None if reduced is None else guidance.stacked(reduced)
        parts.setdefault(step, []).append(_Mixed(form, sample, reduced, held))

    def revise(score: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        index = len(tape.latents)
        branches = parts.pop(steps[index], None)
        if not branches:
            return score
        row = policy.weights(steps[index])
        wanted = _wanted_score(pipe, tape, score, sample, path.latents[index])
        basis = _Basis.of(branches, row, score, len(path.seeds))
        if wanted is None or basis is None:
            return score
        normal = found[steps[index]] = basis.normal(wanted, row, path.drawn)
        return basis.score(normal.solve(row)).to(score)

    with reuse(pipe, policy) as patch, record(pipe, revise=revise) as tape:
        patch.on_mix = note
        draw(pipe, path.seeds, len(policy.steps))
    return found


def _wanted_score(
    pipe: Pipe, tape: Tape, score: torch.Tensor, sample: torch.Tensor, target: torch.Tensor
) -> torch.Tensor | None:
    """The score with which this solver step, from where the policy is, reaches the target.

    None where the step does not depend on its score (DDIM's last without `set_alpha_to_one`).
    """
    time = pipe.scheduler.timesteps[tape.begin + len(tape.latents)]
    sample, score = sample.float(), score.float()
    zero, one = (
        bare_scheduler(pipe.scheduler).step(s, time, sample, **again(tape.others))[0].double()
        for s in (torch.zeros_like(score), score)
    )
    moved = one - zero
    if float(moved.norm()) <= 1e-5 * float(zero.norm()):
        return None
    slope = float((moved * score.double()).sum() / score.double().square().sum())
    return (target.double() - zero) / slope


@dataclass(frozen=True)
class _Normal:
    """Normal equations of a step's mix: `gram @ weights = right`; a jump has no reduced score."""

    gram: np.ndarray
    right: np.ndarray
    jump: bool

    @classmethod
    def together(cls, parts: Sequence[_Normal]) -> _Normal:
        """The equations of all batches."""
        grams, rights = [part.gram for part in parts], [part.right for part in parts]
        return cls(np.sum(grams, axis=0), np.sum(rights, axis=0), parts[0].jump)

    def solve(self, old: tuple[float, ...]) -> tuple[float, ...]:
        """Least squares on the same scores as before, with a ridge towards the old weights.

        The old weights where there is nothing to fit, or the run has left all bounds.
        """
        start, size = np.array(_free(old, self.jump)), np.trace(self.gram)
        if not 0 < size < np.inf:
            return old
        ridge = RIDGE * size / len(self.gram) * np.eye(len(self.gram))
        weights = start + np.linalg.solve(self.gram + ridge, self.right - self.gram @ start)
        if not np.abs(weights).max() <= MAX_WEIGHT:  # the step hardly depends on its score
            return old
        found = tuple(round(float(w), 6) for w in weights)
        return (0.0, *found) if self.jump else found


@dataclass(frozen=True)
class _Basis:
    """What a step mixes, as the scheduler gets it: one row per weight, and what is added to all."""

    features: torch.Tensor
    offset: torch.Tensor | float
    slope: float
    jump: bool
    samples: int
    like: torch.Tensor

    @classmethod
    def of(
        cls, branches: Sequence[_Mixed], row: tuple[float, ...], score: torch.Tensor, samples: int
    ) -> _Basis | None:
        """Put the branches of a step together as the pipeline did; None where that is not linear.

        The pipeline's map is fitted to what came of the old weights.
        """
        jump, form = branches[0].reduced is None, branches[0].form
        count = len(row) - 1
        columns = [] if jump else [[branch.reduced for branch in branches]]
        columns += [[branch.scores[k] for branch in branches] for k in range(count)]
        given = [branch.sample for branch in branches]
        weights = _free(row, jump)
        mixed = [
            sum(weight * column[b] for weight, column in zip(weights, columns, strict=True))
            for b in range(len(branches))
        ]
        if form is not None:
            mixed = [form.score(x, value) for x, value in zip(given, mixed, strict=True)]
        guide = guidance.fit(mixed, score, samples)
        if guide.weights is None or guide.residual > guidance.LINEAR:
            return None
        if any(not torch.equal(some, score[:samples]) for some in score.split(samples)):
            return None  # more rows than samples, and not copies of them
        features = torch.stack([guide(column) for column in columns])
        offset = -form.p / form.q * guide(given) if form else 0.0
        return cls(features, offset, form.q if form else 1.0, jump, samples, score)

    def normal(
        self, wanted: torch.Tensor, old: tuple[float, ...], drawn: torch.Tensor | None = None
    ) -> _Normal:
        """The normal equations of the mix that comes nearest to a wanted score where it counts.

        Each sample counts relative to the square of what the old weights leave of it: the few
        whose path has gone elsewhere would decide for all.
        """
        target = (wanted[: self.samples].flatten() - self.offset) * self.slope
        parts = torch.cat([self.features, target[None]])
        if drawn is not None:
            parts = parts * drawn[: self.samples].flatten()
        samples = parts.view(len(parts), self.samples, -1).cpu().numpy()
        left = np.tensordot((*_free(old, self.jump), -1.0), samples, 1)
        missed = (left**2).sum(-1) + EXACT * (samples[-1] ** 2).sum(-1)
        samples = samples / np.sqrt(np.maximum(missed, np.finfo(float).tiny))[:, None]
        flat = samples.reshape(len(samples), -1)
        products = flat @ flat.T
        return _Normal(products[:-1, :-1], products[:-1, -1], self.jump)

    def score(self, row: tuple[float, ...]) -> torch.Tensor:
        """What the scheduler gets with these weights."""
        weights = torch.tensor(_free(row, self.jump)).to(self.features)
        found = weights @ self.features / self.slope + self.offset
        copies = len(self.like) // self.samples
        return torch.cat([found.view(self.like[: self.samples].shape)] * copies)
