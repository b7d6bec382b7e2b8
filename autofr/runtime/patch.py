"""What hooks do to a pipe: one root hook per denoiser, and leaf hooks below it.

The root hook on a denoiser decides what a call does; the step comes from the clock on the
scheduler. Leaf hooks sit on sub-modules and keep, put back or skip.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from autofr.errors import PolicyError
from autofr.runtime import bar, halves
from autofr.runtime.clock import Clock, Listener, solver_steps
from autofr.runtime.held import Form, forms
from autofr.runtime.hooks import Hook, Leaf, restore
from autofr.runtime.points import Given, Pipe, Point, experts
from autofr.runtime.root import Direct, OnMix, Root, Row, uses_graphs
from autofr.runtime.store import COMPUTE, Branch, Packing, Run


class Patch(Listener):
    """Hooks on one pipe. `masks` are lists of points; mask 0 is the empty one.

    With a `plan` (one row per solver step) the root hook follows the scheduler; without one the
    caller sets the mode of direct denoiser calls by `keyframe()` and `reduced(mask)`.
    `replaces` is the step count that a call may ask for instead of the plan's; `packing` says how
    kept tensors are stored. As a context it is on the pipe inside the block.
    """

    def __init__(
        self,
        pipe: Pipe,
        masks: Sequence[Sequence[Point]],
        plan: Sequence[Row] | None = None,
        replaces: int | None = None,
        order: int = 1,
        packing: Packing | None = None,
    ) -> None:
        self.pipe, self.experts = pipe, experts(pipe)
        self.masks, self.plan = masks, plan
        self.run, self.counts = Run(packing), Counter[str]()
        self.on_mix: OnMix | None = None
        self.graphs = False
        self._forms: list[Form] | None = None
        self._prepares = [
            [point.prepare for point in mask if point.prepare] for mask in ((), *masks)
        ]
        self.halves = [halves.branch_of([point.name for point in mask]) for mask in ((), *masks)]
        self.halves.append(None)  # of a jump
        self._order = order
        self._hooks: list[tuple[nn.Module, nn.Module, str, Hook]] = []
        self._bar = False
        self.clock: Clock | None = None
        if plan is not None:
            same = replaces is None or replaces == len(plan)
            self.clock = Clock(
                pipe.scheduler,
                self,
                substitute=None if same else (replaces, len(plan)),  # type: ignore[arg-type]
            )

    @property
    def form(self) -> Form | None:
        """How scores are held at this pass of the loop."""
        return self._forms[self.clock.index] if self._forms and self.clock else None

    def check_scheduler(self) -> None:
        """Refuse to run past a scheduler that the clock does not follow.

        Raises: PolicyError.
        """
        if self.clock and self.pipe.scheduler is not self.clock.scheduler:
            raise PolicyError("the pipe's scheduler was replaced: call autofr.apply again")

    def install(self) -> Patch:
        """Put the hooks on; returns itself."""
        for denoiser in self.experts:
            for path, leaf in self._leaves().items():
                self._register(denoiser, path, leaf)
            root: Hook = Direct(self)
            if self.clock is not None and self.plan is not None:
                root = Root(self, self.clock, self.plan, self._order)
            self._register(denoiser, "", root)
        if self.clock is not None:
            self.clock.install()
            self._bar = bar.watch(self.pipe, self.clock.stop)
        return self

    def remove(self) -> None:
        """Take the hooks off and free what they kept."""
        if self.clock is not None:
            self.clock.remove()
            if self._bar:
                bar.unwatch(self.pipe)
        for _, module, _, hook in reversed(self._hooks):
            hook.take_off(module)
        self._hooks.clear()
        self.run.clear()

    def __enter__(self) -> Patch:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def keyframe(self, branch: Branch = (0, 0)) -> Iterator[None]:
        """Direct denoiser calls inside compute everything and keep, for a guidance branch."""
        self.run.select(branch)
        self.run.keep = True
        try:
            yield
        finally:
            self.run.keep = False

    @contextmanager
    def reduced(self, mask: int, branch: Branch = (0, 0)) -> Iterator[None]:
        """Direct denoiser calls inside reuse the points of `masks[mask - 1]`."""
        self.run.select(branch)
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
        half = self.halves[mask]
        return (args, kwargs) if half is None else halves.halve((args, kwargs), half)

    def _leaves(self) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}

        def leaf(path: str) -> Leaf:
            return leaves.setdefault(path, Leaf(self.run, len(self.masks)))

        for index, mask in enumerate(self.masks, start=1):
            inner = [point for point in mask if point.kind != "guidance"]
            for point in inner:
                slot = self.run.slot(point.name)
                keeper = leaf(point.keep_at)
                if point not in [kept for kept, _ in keeper.keeps]:
                    keeper.keeps.append((point, slot))
                    if point.enter_at is not None:
                        leaf(point.enter_at).enters.append(slot)
                back = functools.partial(restore, point, slot, self.halves[index])
                leaf(point.restore_at).actions[index] = back
            for point in inner:  # skips win: an outer point makes the inner ones irrelevant
                for path, skip in point.skips.items():
                    leaf(path).actions[index] = skip
        return leaves

    def _register(self, denoiser: nn.Module, path: str, hook: Hook) -> None:
        module = denoiser.get_submodule(path)
        hook.put_on(module)
        self._hooks.append((denoiser, module, path, hook))

    def _follow_replaced(self) -> None:
        """Put hooks back on: LoRA wraps some of their modules, offloading drops some hooks."""
        for index, (denoiser, module, path, hook) in enumerate(self._hooks):
            now = denoiser.get_submodule(path)
            if now is not module or not hook.is_on(module):
                hook.take_off(module)
                hook.put_on(now)
                self._hooks[index] = denoiser, now, path, hook

    def started(self, steps: int) -> None:
        """A run begins: check its length, and start from nothing.

        Raises: PolicyError on another step count than the plan's.
        """
        assert self.plan is not None
        if steps != len(self.plan):
            raise PolicyError(
                f"this policy has {len(self.plan)} steps, the call asked for {steps}: call the"
                f" pipe with num_inference_steps={len(self.plan)}, retime the policy"
                f" (policy.retime({steps})), or search again with --steps {steps}"
            )
        self._check_stages()
        self.counts.clear()
        self._forms = forms(self.pipe.scheduler)
        self.graphs = uses_graphs(self.pipe)
        self._follow_replaced()

    def _check_stages(self) -> None:
        """Refuse to mix at a keyframe that the solver evaluates more than once.

        Raises: PolicyError.
        """
        assert self.plan is not None
        passes = Counter(solver_steps(self.pipe.scheduler))
        for step, (mask, weights) in enumerate(self.plan):
            if mask == COMPUTE and weights and passes[step] > 1:
                raise PolicyError(
                    f"this policy mixes at keyframe {step}, which {passes[step]} calls of"
                    f" {type(self.pipe.scheduler).__name__} make up: take a solver of one call per"
                    " step, or search again with this one"
                )

    def stopped(self) -> None:
        """A run is over: free what it kept."""
        self.run.peak_bytes = max(self.run.peak_bytes, self.run.kept_bytes)
        self.run.clear()
