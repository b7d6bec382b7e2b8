"""What is held between steps, for each guidance branch, and how held scores are mixed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autofr.points import Given

COMPUTE = 0  # index of the empty mask: a keyframe
Branch = tuple[int, int | str]
"""Which denoiser of the pipe, and which guidance branch: its place in the step or its name."""


@dataclass(frozen=True)
class Packing:
    """How kept tensors are stored: in another dtype, on the host, or (by default) as they are."""

    dtype: torch.dtype | None = None
    host: bool = False

    def __bool__(self) -> bool:
        return self.host or self.dtype is not None

    def pack(self, value: Any) -> Any:
        """Convert every floating tensor of a kept value, remembering what it was."""
        return map_tensors(self._pack, value)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point():
            return tensor
        stored = tensor.to(device="cpu" if self.host else None, dtype=self.dtype or tensor.dtype)
        return _Packed(stored, tensor.device, tensor.dtype)


@dataclass(frozen=True)
class _Packed:
    """A stored tensor with the device and dtype that it goes back to."""

    stored: torch.Tensor
    device: torch.device
    dtype: torch.dtype


def unpack(value: Any) -> Any:
    """Undo `Packing.pack`; other values come back as they are."""
    if isinstance(value, _Packed):
        return value.stored.to(device=value.device, dtype=value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(unpack(item) for item in value)
    return value


def map_tensors(change: Any, value: Any) -> Any:
    """The same nesting of lists and tuples with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(change, item) for item in value)
    return value


@dataclass
class Kept:
    """What one guidance branch of one denoiser holds.

    `tensors`: what points keep, by name (and time, for a module that runs several times in one
    call); `entered`: arguments at the start of a run of modules, until its end is kept; `scores`:
    keyframe scores, newest first, in the form in which they are held. `signature` is that of the
    denoiser's arguments; `anchors` are those arguments themselves, as long as they live.
    """

    tensors: dict[Any, Any] = field(default_factory=dict)
    entered: dict[str, Given] = field(default_factory=dict)
    scores: list[Any] = field(default_factory=list)
    step: int = -1
    signature: tuple[Any, ...] = ()
    output_class: type = tuple
    anchors: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop everything that was kept."""
        self.tensors.clear()
        self.entered.clear()
        self.scores.clear()

    def knows(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """Which of these very tensors were arguments at the last keyframe."""
        living = {id(t) for ref in self.anchors if (t := ref()) is not None}
        return living & {id(t) for t in tensors}


class Run:
    """State that all hooks of one patch share; `call` counts the denoiser's calls."""

    def __init__(self, packing: Packing | None = None) -> None:
        self.packing = packing or Packing()
        self.mask = COMPUTE
        self.keep = False
        self.call = 0
        self.kept = Kept()
        self.branches: dict[Branch, Kept] = {}
        self.peak_bytes = 0

    def clear(self) -> None:
        """Free everything that was kept."""
        self.mask, self.keep, self.kept = COMPUTE, False, Kept()
        self.branches.clear()

    def select(self, branch: Branch) -> Kept:
        """Make a branch's store the one that the hooks use."""
        kept = self.branches.get(branch)
        if kept is None:
            kept = self.branches[branch] = Kept()
        self.kept = kept
        return kept

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
    elif isinstance(value, _Packed):
        yield value.stored
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
