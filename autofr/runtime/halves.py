"""Guidance reuse: compute one branch of classifier-free guidance, and take over the difference.

Batched guidance calls the denoiser once for two branches, with and without the condition, in the
two halves of a batch. What one adds to the other changes slowly. So a call may compute one half
alone, about half the work, and take the other's difference from it from keyframes. FasterCache
reuses it at fixed steps with fixed factors (CFG-Cache, arXiv 2410.19355); here it is one more mask,
with fitted weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from autofr.runtime.points import Given, Point, sample_of

SAME = 0.02  # relative difference between a half computed alone and within its batch: rounding


def _untouched(*_: object) -> NoReturn:
    raise AssertionError("nothing is kept or put back inside the denoiser for its guidance")


POINTS = {
    point.name: point
    for point in (
        Point(f"denoiser#guidance{branch}", "guidance", "", "", "", _untouched, _untouched)
        for branch in (0, 1)
    )
}
"""By name: a mask with the point of branch b computes that half of the batch alone."""
_BRANCHES = {name: branch for branch, name in enumerate(POINTS)}


def branch_of(mask: Sequence[str]) -> int | None:
    """The half of the batch that a mask (names of points) computes; None: the whole batch."""
    return next((_BRANCHES[name] for name in mask if name in _BRANCHES), None)


def halve(given: Given, branch: int) -> Given:
    """A call's arguments for one branch: one half of every tensor that has a row per sample."""
    rows = len(sample_of(given))

    def half(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.chunk(2)[branch] if value.dim() and len(value) == rows else value
        if isinstance(value, dict):
            return {name: half(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(half, value))
        return value

    args, kwargs = given
    return half(args), half(kwargs)


def spread(score: torch.Tensor) -> torch.Tensor:
    """A branch's score, (n, ...), in the place of both: (2n, ...)."""
    return torch.cat([score, score])


def difference(score: torch.Tensor, branch: int) -> torch.Tensor:
    """What each branch of a score, (2n, ...), adds to one of them."""
    return score - spread(score.chunk(2)[branch])


def paired(given: Given, score: Any) -> bool:
    """Whether a call has two branches of the same samples: equal halves, as far as they are drawn.

    Calls without guidance have one branch, whose halves are different samples.
    """
    sample = sample_of(given)
    if not isinstance(sample, torch.Tensor) or not isinstance(score, torch.Tensor):
        return False
    if len(sample) % 2 or len(sample) != len(score) or sample.dim() != score.dim():
        return False
    drawn = sample[tuple(slice(size) for size in score.shape)]
    return torch.equal(*drawn.chunk(2))


@torch.inference_mode()
def separable(module: nn.Module, given: Given, output: Any, branch: int) -> bool:
    """Whether a half of a recorded call, computed alone, is what it was in its batch.

    Not so where branches look at each other, or where arguments are laid out in another way.
    """
    if not paired(given, output):
        return False
    args, kwargs = halve(given, branch)
    try:
        alone = module(*args, **kwargs)[0]
        wanted = output.chunk(2)[branch]
        return float((alone - wanted).norm()) <= SAME * float(wanted.norm())
    except Exception:  # whatever a model says of shapes that it does not expect
        return False


@contextmanager
def tried(module: nn.Module, branch: int | None) -> Iterator[list[bool]]:
    """Whether a half is `separable`, found at the first call inside the block; None is not.

    Inside a run: some pipelines (perturbed attention) change the denoiser for the time of a call.
    """
    found: list[bool] = []

    @torch.compiler.disable
    def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        handle.remove()
        found.append(branch is not None and separable(module, (args, kwargs), output[0], branch))

    handle = module.register_forward_hook(listen, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
