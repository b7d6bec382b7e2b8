"""How far an error of the score at each step moves the final latents.

By the scheduler alone, and then through the network, which draws what it is given to where it
belongs: an early error fades.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from autofr.runtime.clock import bare_scheduler
from autofr.runtime.patch import Patch
from autofr.runtime.points import Pipe
from autofr.runtime.recording import Tape, record
from autofr.runtime.root import FULL, JUMPED
from autofr.runtime.sampler import draw

PLACES = 10  # of a call, at which errors are drawn on through the network
LEAST = 1e-3  # what is left of an error at least, so that logarithms are finite


@torch.inference_mode()
def through_network(
    pipe: Pipe,
    seeds: Sequence[int],
    tape: Tape,
    alone: np.ndarray,
    drawn: torch.Tensor | None = None,
) -> np.ndarray:
    """Measure gains (steps,) with the network in the loop, from a recorded run of these seeds.

    At a few places the score gets an error such as a plan makes, what the scores around it do not
    explain of it, and the pipe draws on; until there it is given what it had, so that nothing is
    computed. What is left of the error, relative to what the gains of the scheduler `alone` say, is
    the geometric mean over samples, smoothed over neighbouring places; in between, its logarithm
    runs in straight lines. Costs about half a call for each place. With `drawn`, errors are those
    where it is true.
    """
    ran = tape.ran
    steps = ran[-1] - ran[0] + 1
    places = np.unique(np.linspace(min(1, steps - 1), steps - 1, PLACES).round().astype(int))
    left = []
    for place in places.tolist():
        step = ran[0] + place
        error = _missed(tape.scores, ran.index(step))
        final = _drawn_on(pipe, seeds, tape, step, error)
        moved = _norms(final - tape.latents[-1], drawn, len(seeds))
        size = _norms(error, drawn, len(seeds))
        expected = alone[place] * size
        known = expected > 1e-9 * expected.max()  # no error, or one that the solver drops
        shares = np.maximum(moved[known] / expected[known], LEAST)
        left.append(np.log(shares).mean() if known.any() else 0.0)
    smooth = np.convolve(np.pad(left, 1, "edge"), [0.25, 0.5, 0.25], "valid")
    found: np.ndarray = alone * np.exp(np.interp(np.arange(steps), places, smooth))
    return found


def _missed(scores: Sequence[torch.Tensor], at: int) -> torch.Tensor:
    """What the scores of up to two passes before and one after do not explain of a score.

    It is made as large as it must be to stand out of what is rounded off.
    """
    score = scores[at]
    around = [scores[i] for i in (at - 2, at - 1, at + 1) if 0 <= i < len(scores)]
    wanted = score.double().flatten().cpu()
    error = torch.zeros_like(wanted)
    if around:
        basis = torch.stack([other.double().flatten().cpu() for other in around], 1)
        error = wanted - basis @ torch.linalg.lstsq(basis, wanted[:, None], driver="gelsd")[0][:, 0]
    least = torch.finfo(score.dtype).eps ** 0.5 * float(wanted.norm())
    way = error if error.any() else wanted
    size = max(float(error.norm()), least)
    found = way * (size / max(float(way.norm()), torch.finfo(way.dtype).tiny))
    return found.view(score.shape).to(score)


def _drawn_on(
    pipe: Pipe, seeds: Sequence[int], tape: Tape, step: int, error: torch.Tensor
) -> torch.Tensor:
    """The final latents of the recorded run, with an error of the score at one step."""

    def revise(score: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        now = len(again.scores)
        if tape.ran[now] > step:
            return score
        return tape.scores[now] + error if tape.ran[now] == step else tape.scores[now]

    steps = range(tape.steps[-1] + 1)  # those that do not run too
    plan = [JUMPED if at <= step else FULL for at in steps]
    with Patch(pipe, [], plan), record(pipe, revise=revise) as again:
        draw(pipe, seeds, len(plan))
    return again.latents[-1]


def _norms(batch: torch.Tensor, drawn: torch.Tensor | None, samples: int) -> np.ndarray:
    """The norm of each sample where the pipe draws; of both guidance branches, the first one's."""
    kept = batch if drawn is None else batch * drawn
    found: np.ndarray = kept[:samples].double().flatten(1).norm(dim=1).cpu().numpy()
    return found


@torch.inference_mode()
def by_scheduler(tape: Tape, drawn: torch.Tensor | None = None) -> np.ndarray:
    """Measure how far an error of the score at each step moves the final latents, by the
    scheduler alone: it is run on the stored scores with one of them perturbed (no network calls).

    With `drawn`, errors are those where it is true (see `Tape.drawn`).
    Exact for solvers that are linear in the scores (DDIM, Euler, multistep without clipping), and
    under inpainting: they take every element for itself, so that none is moved by what is
    overwritten elsewhere.
    """
    scores, ran = tape.scores, tape.ran
    # The noise of a replay comes from one seed instead, the same in all of them.
    fixed = {name: value for name, value in tape.others.items() if name != "generator"}

    def replay(changed: int | None = None) -> torch.Tensor:
        scheduler = bare_scheduler(tape.scheduler)
        latents = tape.first_latents
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for index, score in enumerate(scores):
                if ran[index] == changed:
                    score = score + nudge
                time = scheduler.timesteps[tape.begin + index]
                latents = scheduler.step(score, time, latents, **fixed)[0]
        return latents

    nudge = 1e-2 * torch.randn(
        scores[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(scores[0])
    if drawn is not None:
        nudge = nudge * drawn
    base = replay()
    size = float(nudge.double().norm())
    steps = range(ran[0], ran[-1] + 1)
    return np.array([float((replay(i) - base).double().norm()) / size for i in steps])
