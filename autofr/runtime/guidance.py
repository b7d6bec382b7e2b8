"""How a pipeline makes the scheduler's score out of what the denoiser returns.

Classifier-free guidance, its perturbed-attention cousins and cuts of learned variances are linear
in the denoiser's outputs. So the map of a step can be fitted to one recorded step, whatever the
pipeline calls it, for batched and for split guidance alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from autofr.errors import ModelError
from autofr.policy import Guidance
from autofr.runtime import halves
from autofr.runtime.points import Pipe, name_of, sample_of
from autofr.runtime.recording import Call, Tape, record
from autofr.runtime.sampler import draw
from autofr.runtime.store import tensors_in

SAME = 0.01  # relative difference of two runs of one seed that is put down to rounding
LINEAR = 0.02  # relative error above which a step is not called linear


class Branches(NamedTuple):
    """How a step calls its branches, and which half of the batch can be computed alone, if one."""

    kind: Guidance
    alone: int | None = None


def of(pipe: Pipe, steps: int = 3) -> Branches:
    """Tell from a short run how many branches a step has, and whether they share a call.

    Args: steps, of a call that runs a few of them.
    Raises: ModelError for a pipe that nothing can be planned for; see `check_plannable`.
    """
    with record(pipe, calls=True) as tape:
        once = draw(pipe, [0], steps).latents
    check_plannable(pipe, tape)
    calls = tape.passes()[tape.begin]
    branch = _heavier(calls, tape.scores[0])
    with halves.tried(calls[0].module, branch) as separable:
        again = draw(pipe, [0], steps).latents
    if float((again - once).norm() / once.norm()) > SAME:
        raise ModelError(
            f"{name_of(pipe)} draws noise that no seed decides, so that no two runs can be compared"
            f" (it gives {type(pipe.scheduler).__name__} no generator): take a solver that draws"
            " none, or eta=0"
        )
    if len(calls) > 1:
        return Branches("split")
    if len(calls[0].output) == 1:
        return Branches("none")
    return Branches("batched", branch if any(separable) else None)


def _heavier(calls: Sequence[Call], score: torch.Tensor) -> int | None:
    """The branch of more weight, of two in one call for one sample; None: there are not two."""
    weights = fit([calls[0].output], score, 1).weights if len(calls) == 1 else None
    if weights is None or len(weights) != 2:
        return None
    return int(weights.reshape(2, -1).mean(1).argmax())


def check_plannable(pipe: Pipe, tape: Tape) -> None:
    """Refuse what planning does not know: policies can be applied to it all the same.

    Raises: ModelError for a run that ends early, or changes its batch or its branches.
    """
    if tape.begin + len(tape.scores) != len(tape.steps):
        raise ModelError(
            f"{name_of(pipe)} ends before its last step, so that nothing can be planned for all of"
            " them: search with whole runs, and apply the policy to the part"
        )
    shapes = [
        [[tensor.shape for tensor in tensors_in(call.given)] for call in calls]
        for calls in tape.passes().values()
    ]
    if any(others != shapes[0] for others in shapes):
        raise changing(pipe)


def changing(pipe: Pipe) -> ModelError:
    """Say that a run changes its batch or branches on the way, which planning does not know."""
    return ModelError(
        f"{name_of(pipe)} changes its batch or its guidance during a run: search without that, and"
        " apply the policy to runs with it (a changed batch is computed anew)"
    )


@dataclass(frozen=True)
class Guide:
    """The linear map of one step: `score = sum of weights * pieces of the outputs`.

    A piece is what one guidance branch predicts, (samples, ...), cut to the score's shape. There is
    a weight per branch, or (branches, frames) where each frame of a video is guided with a strength
    of its own. Where no such map is found (`weights` is None) the outputs themselves count as the
    score.
    """

    weights: torch.Tensor | None
    shape: tuple[int, ...]
    residual: float = 0.0

    def __call__(self, outputs: Sequence[Any]) -> torch.Tensor:
        """The score that these outputs make, as a flat float64 vector."""
        if self.weights is None:
            return torch.cat([stacked(output).double().flatten() for output in outputs])
        pieces = _pieces(outputs, self.shape)
        assert pieces is not None
        return _weighted(self.weights.to(pieces.device), pieces)

    def samples(self, calls: Sequence[Call]) -> torch.Tensor | None:
        """The denoisers' noisy samples under the same map; None where they do not fit."""
        return None if self.weights is None else self([sample_of(call.given) for call in calls])


def fit(outputs: Sequence[Any], score: torch.Tensor, samples: int) -> Guide:
    """Fit the map from one step's outputs to the score that the scheduler got, (n, ...).

    Pipelines that carry both branches' latents along (DiT) give the scheduler more rows than
    there are samples; the first ones count.
    """
    target = score[:samples]
    shape = tuple(target.shape)
    pieces = _pieces(outputs, shape)
    if pieces is None:
        return Guide(None, shape)
    wanted = target.double()
    weights, residual = _solve(pieces, wanted, 1)
    if residual > LINEAR and len(shape) == 5:  # a video: SVD guides later frames more
        each, left = _solve(pieces, wanted, shape[1])
        if left <= LINEAR:
            return Guide(each, shape, left)
    return Guide(weights[:, 0], shape, residual)


def _solve(pieces: torch.Tensor, wanted: torch.Tensor, frames: int) -> tuple[torch.Tensor, float]:
    """Least squares: weights (branches, frames), and the relative error that they leave."""
    branches, samples = pieces.shape[:2]
    flat = pieces.reshape(branches, samples, frames, -1).movedim(2, 0).flatten(2)
    goal = wanted.reshape(samples, frames, -1).transpose(0, 1).flatten(1)
    gram = flat @ flat.mT
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(branches).to(gram)
    weights = torch.linalg.solve(gram + ridge, flat @ goal[..., None])[..., 0].T
    error = (_weighted(weights, pieces) - wanted.flatten()).norm()
    return weights, float(error / wanted.norm().clamp_min(1e-12))


def _weighted(weights: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
    """Sum of weights * pieces over the branches, flat."""
    each = weights.reshape(len(pieces), -1)
    by_frame = pieces.reshape(len(pieces), pieces.shape[1], each.shape[1], -1)
    return torch.einsum("kf,knfx->nfx", each, by_frame).flatten()


def stacked(output: Any) -> torch.Tensor:
    """A denoiser's output as one tensor; some give a list with one per sample."""
    return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output


def _pieces(outputs: Sequence[Any], shape: tuple[int, ...]) -> torch.Tensor | None:
    """Every branch's prediction, (branches, samples, ...); None where the shapes do not fit."""
    found = []
    for output in outputs:
        rows = stacked(output).double()
        if len(rows) % shape[0]:
            return None
        for piece in rows.split(shape[0]):
            if piece.numel() == shape[0] * torch.Size(shape[1:]).numel():
                piece = piece.reshape(shape)
            elif piece.dim() != len(shape) or any(
                have < want for have, want in zip(piece.shape, shape, strict=True)
            ):
                return None
            found.append(piece[tuple(slice(size) for size in shape)])
    return torch.stack(found)
