"""The only code that replaces a forward: leaf hooks and one root hook.

Leaf hooks sit on sub-modules and keep, put back or skip. The root hook on the denoiser decides
what a call does; the step comes from the clock on the scheduler.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from autofr.clock import Clock
from autofr.errors import PolicyError
from autofr.points import Pipe, Point, find_denoiser

HOOK = "autofr"
COMPUTE = 0  # index of the empty mask: a keyframe
HOLD = -1  # a jump: the denoiser is not called

Row = tuple[int, tuple[float, ...]]
"""One step of a compiled policy: mask index and mix weights."""


Refit = Callable[
    [int, torch.Tensor, torch.Tensor | None, Sequence[torch.Tensor]], tuple[float, ...]
]
"""(step, denoiser input, reduced score or None at a jump, kept scores) -> mix weights."""


@dataclass
class Kept:
    """What one guidance branch holds: point tensors, keyframe scores (newest first), and shape."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: list[torch.Tensor] = field(default_factory=list)
    step: int = -1
    signature: tuple[Any, ...] = ()
    as_tuple: bool = False
    output_class: type | None = None


class Run:
    """State that all hooks of one patch share."""

    def __init__(self) -> None:
        self.mask = COMPUTE
        self.keep = False
        self.kept = Kept()
        self.branches: dict[int, Kept] = {}
        self.peak_bytes = 0

    def clear(self) -> None:
        """Free every kept tensor."""
        self.mask, self.keep, self.kept = COMPUTE, False, Kept()
        self.branches.clear()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


class _Leaf(ModelHook):
    """Keep, put back or skip at one module; `actions[mask]` is None where the module runs."""

    def __init__(self, run: Run, masks: int) -> None:
        super().__init__()
        self.run = run
        self.keeps: list[Point] = []
        self.actions: list[Callable[[nn.Module, Any, Kept], Any] | None] = [None] * (masks + 1)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        action = self.actions[run.mask]
        if action is not None:
            return action(module, _first(args, kwargs), run.kept)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if run.keep:
            for point in self.keeps:
                given = _first(args, kwargs)
                run.kept.tensors[point.name] = point.keep(module, given, output)
        return output


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor given to the denoiser."""
    values = (*args, *kwargs.values())
    return tuple((v.shape, v.dtype, v.device) for v in values if isinstance(v, torch.Tensor))


class _Root(ModelHook):
    """Decide per call: compute everything, run reduced, or hold; then mix."""

    def __init__(
        self,
        pipe: Pipe,
        run: Run,
        clock: Clock,
        plan: Sequence[Row],
        order: int,
        counts: Counter[str],
    ) -> None:
        super().__init__()
        self.pipe, self.run, self.clock, self.plan = pipe, run, clock, plan
        self.order, self.counts = order, counts
        self.refit: Refit | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = self.clock.step
        if step is None:
            if self.pipe.scheduler is not self.clock.scheduler:
                raise PolicyError("the pipe's scheduler was replaced: call autofr.apply again")
            return self.fn_ref.original_forward(*args, **kwargs)
        branch = self.clock.branch
        self.clock.branch = branch + 1
        try:
            return self._call(step, branch, args, kwargs)
        except BaseException:
            self.clock.stop()
            raise

    def _call(self, step: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.run
        kept = run.branches.get(branch)
        if kept is None:
            kept = run.branches[branch] = Kept()
        run.kept = kept
        mask, weights = self.plan[step]
        signature = _signature(args, kwargs)
        if mask == COMPUTE or kept.signature != signature or len(kept.scores) < len(weights) - 1:
            return self._compute(kept, step, signature, args, kwargs)
        if mask == HOLD:
            self.counts["jump"] += 1
            if self.refit:
                weights = self.refit(step, _first(args, kwargs), None, kept.scores)
            return self._wrap(kept, _mix(None, kept.scores, weights))
        self.counts["mask"] += 1
        run.mask = mask
        output = self.fn_ref.original_forward(*args, **kwargs)
        run.mask = COMPUTE
        if self.refit:
            weights = self.refit(step, _first(args, kwargs), output[0], kept.scores)
        if len(weights) == 1 and weights[0] == 1:
            return output
        return self._wrap(kept, _mix(output[0], kept.scores, weights))

    def _compute(
        self,
        kept: Kept,
        step: int,
        signature: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.counts["key"] += 1
        if kept.signature != signature:
            kept.tensors.clear()
            kept.scores.clear()
            kept.signature = signature
        self.run.mask, self.run.keep = COMPUTE, True
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.run.keep = False
        kept.as_tuple = isinstance(output, tuple)
        kept.output_class = type(output)
        # A second stage of the same solver step replaces the first one's score.
        older = kept.scores[1:] if kept.step == step else kept.scores
        kept.scores = [output[0], *older][: self.order]
        kept.step = step
        return output

    def _wrap(self, kept: Kept, score: torch.Tensor) -> Any:
        return (score,) if kept.as_tuple else kept.output_class(sample=score)  # type: ignore[misc]


def _mix(
    reduced: torch.Tensor | None, scores: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """Weighted sum of the reduced score and the kept ones; always a fresh tensor."""
    if reduced is None:
        mixed = scores[0] * weights[1]
    else:
        mixed = reduced * weights[0]
        if len(weights) > 1:
            mixed.add_(scores[0], alpha=weights[1])
    for score, weight in zip(scores[1:], weights[2:], strict=False):
        mixed.add_(score, alpha=weight)
    return mixed


class Patch:
    """Hooks on one pipe. `masks` are lists of points; mask 0 is the empty one.

    With a `plan` (one row per solver step) the root hook follows the scheduler; without one the
    caller sets the mode of direct denoiser calls by `keyframe()` and `reduced(mask)`.
    """

    def __init__(
        self,
        pipe: Pipe,
        masks: Sequence[Sequence[Point]],
        plan: Sequence[Row] | None = None,
        replaces: int | None = None,
        order: int = 1,
    ) -> None:
        self.denoiser = find_denoiser(pipe)
        self.masks, self.plan = masks, plan
        self.run, self.counts = Run(), Counter[str]()
        self._installed: list[nn.Module] = []
        self._root: _Root | None = None
        self.clock: Clock | None = None
        if plan is not None:
            same = replaces is None or replaces == len(plan)
            self.clock = Clock(
                pipe.scheduler,
                self._start,
                self._stop,
                substitute=None if same else (replaces, len(plan)),  # type: ignore[arg-type]
            )
            self._root = _Root(pipe, self.run, self.clock, plan, order, self.counts)

    def refit_mix(self, refit: Refit | None) -> None:
        """Ask `refit` for the weights of every reduced or held step, instead of the plan."""
        if self._root is not None:
            self._root.refit = refit

    def install(self) -> Patch:
        """Put the hooks on; returns itself."""
        for path, leaf in self._leaves().items():
            self._register(self.denoiser.get_submodule(path), leaf)
        if self._root is not None and self.clock is not None:
            self._register(self.denoiser, self._root)
            self.clock.install()
        return self

    def remove(self) -> None:
        """Take the hooks off and free what they kept."""
        if self.clock is not None:
            self.clock.remove()
        for module in reversed(self._installed):
            _unregister(module)
        self._installed.clear()
        self.run.clear()

    @contextmanager
    def keyframe(self) -> Iterator[None]:
        """Direct denoiser calls inside compute everything and keep."""
        self.run.keep = True
        try:
            yield
        finally:
            self.run.keep = False

    @contextmanager
    def reduced(self, mask: int) -> Iterator[None]:
        """Direct denoiser calls inside reuse the points of `masks[mask - 1]`."""
        self.run.mask = mask
        try:
            yield
        finally:
            self.run.mask = COMPUTE

    @property
    def kept_bytes(self) -> int:
        """Bytes held now: point tensors and scores of all branches (shared storage once)."""
        stores = {id(k): k for k in (*self.run.branches.values(), self.run.kept)}.values()
        tensors = [t for kept in stores for t in (*kept.tensors.values(), *kept.scores)]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    def _leaves(self) -> dict[str, _Leaf]:
        leaves: dict[str, _Leaf] = {}

        def leaf(path: str) -> _Leaf:
            return leaves.setdefault(path, _Leaf(self.run, len(self.masks)))

        for index, mask in enumerate(self.masks, start=1):
            for point in mask:
                keeper = leaf(point.keep_at)
                if point not in keeper.keeps:
                    keeper.keeps.append(point)
                leaf(point.restore_at).actions[index] = functools.partial(_restore, point)
            for point in mask:  # skips win: an outer point makes the inner ones irrelevant
                for path, skip in point.skips.items():
                    leaf(path).actions[index] = functools.partial(_skip, skip)
        return leaves

    def _register(self, module: nn.Module, hook: ModelHook) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
        self._installed.append(module)

    def _start(self, steps: int) -> None:
        assert self.plan is not None
        if steps != len(self.plan):
            raise PolicyError(
                f"this policy has {len(self.plan)} steps, the call asked for {steps}: call the"
                f" pipe with num_inference_steps={len(self.plan)}, or search again with"
                f" --steps {steps}"
            )
        self.counts.clear()

    def _stop(self) -> None:
        self.run.peak_bytes = max(self.run.peak_bytes, self.kept_bytes)
        self.run.clear()


def _restore(point: Point, module: nn.Module, given: torch.Tensor, kept: Kept) -> Any:
    return point.restore(module, given, kept.tensors[point.name])


def _skip(skip: Callable[..., Any], module: nn.Module, given: torch.Tensor, kept: Kept) -> Any:
    return skip(module, given)


def _unregister(module: nn.Module) -> None:
    """Remove our hook, and diffusers' traces of it where no other hook is left."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(HOOK, recurse=False)
    if not registry.hooks:
        vars(module).pop("forward", None)
        del module._diffusers_hook
