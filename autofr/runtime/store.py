"""What is held between steps, for each guidance branch, and how held scores are mixed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autofr.runtime.points import Given

COMPUTE = 0  # index of the empty mask: a keyframe
MISSING = object()  # a slot has nothing to put back: the module runs
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
    if isinstance(value, _Packed):
        return replace(value, stored=change(value.stored))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(change, item) for item in value)
    return value


@dataclass
class Kept:
    """What one guidance branch of one denoiser holds.

    `tensors`: what points keep, by name, a value for each time that their module ran in one call;
    `scores`: keyframe scores, newest first, in the form in which they are held. `signature` is that
    of the denoiser's arguments; `anchors` are those arguments themselves, as long as they live;
    `guided` says whether they are two branches in a batch, once it was asked.
    """

    tensors: dict[str, list[Any]] = field(default_factory=dict)
    scores: list[Any] = field(default_factory=list)
    step: int = -1
    signature: tuple[Any, ...] = ()
    output_class: type = tuple
    anchors: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    guided: bool | None = None

    def forget(self) -> None:
        """Drop everything that was kept; slots go on using the same lists."""
        for held in self.tensors.values():
            held.clear()
        self.scores.clear()
        self.guided = None

    def own(self) -> None:
        """Copy what is held out of memory that the denoiser's next call writes to."""
        for held in self.tensors.values():
            held[:] = map_tensors(torch.clone, held)
        self.scores = map_tensors(torch.clone, self.scores)

    def knows(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """Which of these very tensors were arguments at the last keyframe."""
        living = {id(t) for ref in self.anchors if (t := ref()) is not None}
        return living & {id(t) for t in tensors}


class Slot:
    """A point's place in the selected store: leaf hooks reach it without a name or a branch.

    So they look alike from block to block, step to step and run to run, and `torch.compile` can use
    one graph for all of them. `held` are values in the order of the module's runs in one call,
    `taken` counts those that were put back, `given` are arguments at the start of a run of modules.
    """

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.taken = 0
        self.given: Given | None = None

    def take(self) -> Any:
        """The next held value, or MISSING."""
        at = self.taken
        self.taken = at + 1
        return unpack(self.held[at]) if at < len(self.held) else MISSING


class Run:
    """State that all hooks of one patch share: the mode of the call, and what is held."""

    def __init__(self, packing: Packing | None = None) -> None:
        self.packing = packing or Packing()
        self.mask = COMPUTE
        self.keep = False
        self.kept = Kept()
        self.slots: dict[str, Slot] = {}
        self.branches: dict[Branch, Kept] = {}
        self.peak_bytes = 0

    def slot(self, point: str) -> Slot:
        """The slot of a point; two experts share it, as only one of them runs at a time."""
        return self.slots.setdefault(point, Slot())

    def clear(self) -> None:
        """Free everything that was kept."""
        self.mask, self.keep = COMPUTE, False
        self.branches.clear()
        self._use(Kept())

    def select(self, branch: Branch) -> Kept:
        """Make a branch's store the one that the hooks use."""
        kept = self.branches.get(branch)
        if kept is None:
            kept = self.branches[branch] = Kept()
        if kept is not self.kept:
            self._use(kept)
        return kept

    def _use(self, kept: Kept) -> None:
        self.kept = kept
        for name, slot in self.slots.items():
            slot.held = kept.tensors.setdefault(name, [])
            slot.given = None

    def begin(self, mask: int, keep: bool) -> None:
        """Set what the leaf hooks do in a call of the denoiser; keeping starts from nothing."""
        self.mask, self.keep = mask, keep
        for slot in self.slots.values():
            slot.taken = 0
            if keep:
                slot.held.clear()

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
