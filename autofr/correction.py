"""Correct a policy's mix by rollouts of the policy itself.

Planning measures errors at the teacher's inputs; in use they pile up. Here the policy is run on
calibration seeds, and at every reduced or held step the mix is fitted anew, so that the step
lands as near as possible to the latents that the teacher had there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autofr.clock import bare_scheduler
from autofr.mix import Table
from autofr.points import Pipe
from autofr.policy import Policy
from autofr.recording import record
from autofr.sampler import reuse

RIDGE = 1e-3


@dataclass(frozen=True)
class Trajectory:
    """The teacher's latents after every pass of the loop, on calibration seeds."""

    latents: tuple[torch.Tensor, ...]


def trajectory(pipe: Pipe, run: Callable[[], object]) -> Trajectory:
    """Run the teacher once and keep its path (a few hundred kilobytes for latent models)."""
    with record(pipe) as tape:
        run()
    return Trajectory(tuple(tape.latents))


@torch.inference_mode()
def correct(
    pipe: Pipe, policy: Policy, teacher: Trajectory, run: Callable[[], object], rounds: int = 1
) -> Policy:
    """Refit the mix table along the policy's own path; `run` calls the pipe on the same seeds.

    A policy without a fitted table, or with another number of steps than the teacher, is returned
    as it is. Exact for solvers whose step is linear in the score.
    """
    if not isinstance(policy.mix, Table) or len(policy.steps) != len(teacher.latents):
        return policy
    rows = list(policy.mix.weights)

    def refit(
        step: int,
        given: torch.Tensor,
        reduced: torch.Tensor | None,
        scores: Sequence[torch.Tensor],
    ) -> tuple[float, ...]:
        # Not `given`: some schedulers scale the latents before the denoiser gets them.
        wanted = _wanted_score(pipe, step, tape.latents[-1], scores[0], teacher.latents[step])
        if wanted is not None:
            rows[step] = _fit(rows[step], wanted, reduced, scores)
        return rows[step]

    for _ in range(rounds):
        with reuse(pipe, policy) as patch, record(pipe) as tape:
            patch.refit_mix(refit)
            run()
        policy = policy.model_copy(update={"mix": Table(weights=tuple(rows))})
    return policy


def _wanted_score(
    pipe: Pipe, step: int, sample: torch.Tensor, score: torch.Tensor, target: torch.Tensor
) -> torch.Tensor | None:
    """The score with which this solver step, from where the policy is, reaches the target.

    None where the step does not depend on its score (DDIM's last without `set_alpha_to_one`).
    """
    time = pipe.scheduler.timesteps[step]
    sample, score = sample.float(), score.float()
    zero, one = (
        bare_scheduler(pipe.scheduler).step(s, time, sample)[0].double()
        for s in (torch.zeros_like(score), score)
    )
    moved = one - zero
    if float(moved.norm()) <= 1e-5 * float(zero.norm()):
        return None
    slope = float((moved * score.double()).sum() / score.double().square().sum())
    return (target.double() - zero) / slope


def _fit(
    old: tuple[float, ...],
    wanted: torch.Tensor,
    reduced: torch.Tensor | None,
    scores: Sequence[torch.Tensor],
) -> tuple[float, ...]:
    """Least squares on the same scores as before, with a ridge towards the old weights."""
    parts = ([] if reduced is None else [reduced]) + list(scores[: len(old) - 1])
    features = torch.stack([part.double().flatten() for part in parts]).cpu().numpy()
    start = np.array(old if reduced is not None else old[1:])
    gram = features @ features.T
    right = features @ wanted.flatten().cpu().numpy() - gram @ start
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = start + np.linalg.solve(gram + ridge, right)
    found = tuple(round(float(w), 6) for w in weights)
    return found if reduced is not None else (0.0, *found)
