"""The only code that replaces a forward: leaf hooks and one root hook.

Leaf hooks sit on sub-modules and keep, put back or skip. The root hook on the denoiser decides
what a call does; the step comes from the clock on the scheduler.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from autofr.clock import Clock
from autofr.errors import PolicyError
from autofr.points import Given, Pipe, Point, find_denoiser, first
from autofr.store import COMPUTE, Kept, Run, mix, signature

HOOK = "autofr"
HOLD = -1  # a jump: the denoiser is not called
MISSING = object()  # a leaf has nothing to put back: its module runs

Row = tuple[int, tuple[float, ...]]
"""One step of a compiled policy: mask index and mix weights."""

Refit = Callable[
    [int, torch.Tensor, torch.Tensor | None, Sequence[torch.Tensor]], tuple[float, ...]
]
"""(step, denoiser input, reduced score or None at a jump, kept scores) -> mix weights."""

Action = Callable[[nn.Module, Given, Kept, int], Any]
"""(module, its arguments, what is kept, how often it ran in this call) -> its output."""


class _Leaf(ModelHook):
    """Keep, put back or skip at one module; `actions[mask]` is None where the module runs.

    A module that runs several times in one call of the denoiser keeps each time apart.
    """

    def __init__(self, run: Run, masks: int) -> None:
        super().__init__()
        self.run = run
        self.keeps: list[Point] = []
        self.enters: list[Point] = []
        self.actions: list[Action | None] = [None] * (masks + 1)
        self._call, self._time = -1, 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        self._time = self._time + 1 if self._call == run.call else 0
        self._call = run.call
        action = self.actions[run.mask]
        if action is not None:
            found = action(module, (args, kwargs), run.kept, self._time)
            if found is not MISSING:
                return found
        if not run.keep:
            return self.fn_ref.original_forward(*args, **kwargs)
        for point in self.enters:
            run.kept.entered[point.name] = (args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        for point in self.keeps:
            given = run.kept.entered.pop(point.name, (args, kwargs))
            run.kept.tensors[_slot(point, self._time)] = point.keep(module, given, output)
        return output


def _slot(point: Point, time: int) -> Any:
    return (point.name, time) if time else point.name


def _restore(point: Point, module: nn.Module, given: Given, kept: Kept, time: int) -> Any:
    held = kept.tensors.get(_slot(point, time), MISSING)
    return MISSING if held is MISSING else point.restore(module, given, held)


def _skip(skip: Callable[..., Any], module: nn.Module, given: Given, kept: Kept, time: int) -> Any:
    return skip(module, given)


class _Direct(ModelHook):
    """The root hook of a patch without a plan: the caller has set the mode of the call."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.patch.run
        run.call += 1
        return self.patch.prepared(run.mask, (args, kwargs))


class _Root(ModelHook):
    """Decide per call: compute everything, run reduced, or hold; then mix."""

    def __init__(
        self, pipe: Pipe, run: Run, clock: Clock, patch: Patch, plan: Sequence[Row], order: int
    ) -> None:
        super().__init__()
        self.pipe, self.run, self.clock, self.patch = pipe, run, clock, patch
        self.plan, self.order, self.counts = plan, order, patch.counts
        self.refit: Refit | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = self.clock.step
        if step is None:
            if self.pipe.scheduler is not self.clock.scheduler:
                raise PolicyError("the pipe's scheduler was replaced: call autofr.apply again")
            return self.fn_ref.original_forward(*args, **kwargs)
        branch = self.clock.branch
        self.clock.branch = branch + 1
        self.run.call += 1
        try:
            return self._call(step, branch, (args, kwargs))
        except BaseException:
            self.clock.stop()
            raise

    def _call(self, step: int, branch: int, given: Given) -> Any:
        run = self.run
        kept = run.branches.get(branch)
        if kept is None:
            kept = run.branches[branch] = Kept()
        run.kept = kept
        mask, weights = self.plan[step]
        now = signature(given)
        if mask == COMPUTE or kept.signature != now or len(kept.scores) < len(weights) - 1:
            return self._compute(kept, step, now, given)
        if mask == HOLD:
            self.counts["jump"] += 1
            if self.refit:
                weights = self.refit(step, first(given), None, kept.scores)
            return self._wrap(kept, mix(None, kept.scores, weights))
        self.counts["mask"] += 1
        args, kwargs = self.patch.prepared(mask, given)
        run.mask = mask
        output = self.fn_ref.original_forward(*args, **kwargs)
        run.mask = COMPUTE
        if self.refit:
            weights = self.refit(step, first(given), output[0], kept.scores)
        if len(weights) == 1 and weights[0] == 1:
            return output
        return self._wrap(kept, mix(output[0], kept.scores, weights))

    def _compute(self, kept: Kept, step: int, now: tuple[Any, ...], given: Given) -> Any:
        self.counts["key"] += 1
        if kept.signature != now:
            kept.forget()
            kept.signature = now
        args, kwargs = given
        self.run.mask, self.run.keep = COMPUTE, True
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.run.keep = False
        kept.output_class = type(output)
        # A second stage of the same solver step replaces the first one's score.
        older = kept.scores[1:] if kept.step == step else kept.scores
        kept.scores = [output[0], *older][: self.order]
        kept.step = step
        return output

    def _wrap(self, kept: Kept, score: Any) -> Any:
        return (score,) if kept.output_class is tuple else kept.output_class(sample=score)


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
        self._prepares = [
            [point.prepare for point in mask if point.prepare] for mask in ((), *masks)
        ]
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
            self._root = _Root(pipe, self.run, self.clock, self, plan, order)

    def refit_mix(self, refit: Refit | None) -> None:
        """Ask `refit` for the weights of every reduced or held step, instead of the plan."""
        if self._root is not None:
            self._root.refit = refit

    def install(self) -> Patch:
        """Put the hooks on; returns itself."""
        for path, leaf in self._leaves().items():
            self._register(self.denoiser.get_submodule(path), leaf)
        self._register(self.denoiser, self._root or _Direct(self))
        if self.clock is not None:
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

    def prepared(self, mask: int, given: Given) -> Given:
        """The denoiser's arguments as the points of a mask want them."""
        args, kwargs = given
        for prepare in self._prepares[mask]:
            kwargs = prepare(kwargs)
        return args, kwargs

    def _leaves(self) -> dict[str, _Leaf]:
        leaves: dict[str, _Leaf] = {}

        def leaf(path: str) -> _Leaf:
            return leaves.setdefault(path, _Leaf(self.run, len(self.masks)))

        for index, mask in enumerate(self.masks, start=1):
            for point in mask:
                keeper = leaf(point.keep_at)
                if point not in keeper.keeps:
                    keeper.keeps.append(point)
                    if point.enter_at is not None:
                        leaf(point.enter_at).enters.append(point)
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
        self.run.peak_bytes = max(self.run.peak_bytes, self.run.kept_bytes)
        self.run.clear()


def _unregister(module: nn.Module) -> None:
    """Remove our hook, and diffusers' traces of it where no other hook is left."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(HOOK, recurse=False)
    if not registry.hooks:
        vars(module).pop("forward", None)
        del module._diffusers_hook
