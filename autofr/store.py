"""What is held between steps, for each guidance branch, and how held scores are mixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autofr.points import Given

COMPUTE = 0  # index of the empty mask: a keyframe


@dataclass
class Kept:
    """What one guidance branch holds.

    `tensors`: what points keep, by name (and time, for a module that runs several times in one
    call); `entered`: arguments at the start of a run of modules, until its end is kept; `scores`:
    keyframe scores, newest first. `signature` is that of the denoiser's arguments.
    """

    tensors: dict[Any, Any] = field(default_factory=dict)
    entered: dict[str, Given] = field(default_factory=dict)
    scores: list[Any] = field(default_factory=list)
    step: int = -1
    signature: tuple[Any, ...] = ()
    output_class: type = tuple

    def forget(self) -> None:
        """Drop everything that was kept."""
        self.tensors.clear()
        self.entered.clear()
        self.scores.clear()


class Run:
    """State that all hooks of one patch share; `call` counts the denoiser's calls."""

    def __init__(self) -> None:
        self.mask = COMPUTE
        self.keep = False
        self.call = 0
        self.kept = Kept()
        self.branches: dict[int, Kept] = {}
        self.peak_bytes = 0

    def clear(self) -> None:
        """Free everything that was kept."""
        self.mask, self.keep, self.kept = COMPUTE, False, Kept()
        self.branches.clear()

    @property
    def kept_bytes(self) -> int:
        """Bytes held now by all branches, shared storage counted once."""
        stores = {id(kept): kept for kept in (*self.branches.values(), self.kept)}.values()
        held = (t for kept in stores for t in tensors_in([*kept.tensors.values(), kept.scores]))
        return sum({t.data_ptr(): t.nbytes for t in held}.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def signature(given: Given) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor in a call's arguments."""
    return tuple((t.shape, t.dtype, t.device) for t in tensors_in(given))


def mix(reduced: Any, scores: Sequence[Any], weights: Sequence[float]) -> Any:
    """Weighted sum of the reduced score (None at a jump) and the kept ones, newest first.

    Scores are tensors, or lists of them; the result is always fresh, since solvers with memory
    hold on to what they are given.
    """
    if isinstance(scores[0], (list, tuple)):
        parts = [None] * len(scores[0]) if reduced is None else reduced
        older = zip(*scores, strict=True)
        return type(scores[0])(
            mix(part, some, weights) for part, some in zip(parts, older, strict=True)
        )
    mixed = scores[0] * weights[1] if reduced is None else reduced * weights[0]
    rest = list(zip(scores, weights[1:], strict=False))
    for score, weight in rest[1:] if reduced is None else rest:
        mixed.add_(score, alpha=weight)
    return mixed
