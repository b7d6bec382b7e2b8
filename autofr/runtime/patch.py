"""What hooks do to a pipe: one root hook per denoiser, and leaf hooks below it.

The root hook on a denoiser decides what a call does; the step comes from the clock on the
scheduler. Leaf hooks sit on sub-modules and keep, put back or skip.

`torch.compile` traces leaf hooks with the modules they sit on, and never looks into the root hook:
a whole denoiser has one graph for keyframes, one for each mask and one for calls outside runs, with
a break before it (so not with `fullgraph`). Blocks that are compiled one by one have these graphs
once for all blocks of one role (kept, skipped, run) and layout of their input, with `fullgraph`
too; policies with many masks need a higher `torch._dynamo.config.recompile_limit` (8).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from autofr.errors import PolicyError
from autofr.runtime import bar, halves
from autofr.runtime.clock import Clock, Listener, solver_steps
from autofr.runtime.held import Form, forms
from autofr.runtime.hooks import Hook, Leaf, StatefulHook, restore
from autofr.runtime.points import Given, Pipe, Point, experts, sample_of, timestep_of
from autofr.runtime.store import COMPUTE, Branch, Kept, Packing, Run, mix, signature, tensors_in

HOLD = -1  # a jump: the denoiser is not called
BREAK = (
    "autofr decides in Python what each call of the denoiser computes: compile without fullgraph,"
    " or the blocks alone by compile_repeated_blocks(fullgraph=True)"
)

_COUNTED = {COMPUTE: "key", HOLD: "jump"}  # else: mask
_log = logging.getLogger("autofr")

Row = tuple[int, tuple[float, ...]]
"""One step of a compiled policy: mask index and mix weights."""

OnMix = Callable[[int, Form | None, Any, Any, Sequence[Any]], None]
"""(step, form, sample, reduced score or None at a jump, held scores), called before they are mixed;
scores are in the form in which they are held."""


class _Direct(Hook):
    """The root hook of a patch without a plan: the caller has set the mode of the call."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch

    @torch.compiler.disable(recursive=False, reason=BREAK)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._begin((args, kwargs))
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._end()
        return output

    @torch.compiler.disable
    def _begin(self, given: Given) -> Given:
        run = self.patch.run
        run.begin(run.mask, run.keep)
        return self.patch.prepared(run.mask, given)

    @torch.compiler.disable
    def _end(self) -> None:
        if self.patch.run.keep and uses_graphs(self.patch.pipe):
            self.patch.run.kept.own()


class _Call(NamedTuple):
    """What one call of the denoiser does; `prepared` is what the denoiser is given."""

    step: int
    mask: int
    weights: tuple[float, ...]
    given: Given
    prepared: Given


class _Root(StatefulHook):
    """Decide per call of one denoiser: compute everything, run reduced, or hold; then mix.

    `torch.compile` sees nothing but the denoiser's own forward between `_begin` and `_end`.
    """

    def __init__(self, patch: Patch, clock: Clock, plan: Sequence[Row], order: int) -> None:
        super().__init__()
        self.patch, self.run, self.clock = patch, patch.run, clock
        self.plan, self.order, self.counts = plan, order, patch.counts

    def reset_state(self, module: nn.Module) -> None:
        """A pipeline that ends its caches ends the run."""
        self.clock.stop()

    @torch.compiler.disable(recursive=False, reason=BREAK)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            call = self._begin(module, (args, kwargs))
            if call is None:
                return self.fn_ref.original_forward(*args, **kwargs)
            output = None
            if call.mask != HOLD:
                args, kwargs = call.prepared
                output = self.fn_ref.original_forward(*args, **kwargs)
            return self._end(call, output)
        except BaseException:
            self.clock.stop()
            raise

    @torch.compiler.disable
    def _begin(self, module: nn.Module, given: Given) -> _Call | None:
        """Choose the mode of a call and set it; None outside runs."""
        if self.clock.step is None:
            self.patch.check_scheduler()
            return None
        order, step = self.clock.count_call(timestep_of(given))
        kept = self.run.select(self._branch(module, order, given))
        mask, weights = self.plan[step]
        now = signature(given)
        if kept.signature != now:
            kept.forget()
            kept.signature = now
        if len(kept.scores) < max(int(mask != COMPUTE), len(weights) - 1):
            mask, weights = COMPUTE, ()
        if self.patch.halves[mask] is not None and not self._guided(kept, given):
            mask, weights = COMPUTE, ()
        if mask == COMPUTE:
            kept.anchors = [weakref.ref(tensor) for tensor in tensors_in(given)]
        self.counts[_COUNTED.get(mask, "mask")] += 1
        if mask == HOLD:
            return _Call(step, mask, weights, given, given)
        self.run.begin(mask, keep=mask == COMPUTE)
        return _Call(step, mask, weights, given, self.patch.prepared(mask, given))

    @torch.compiler.disable
    def _end(self, call: _Call, output: Any) -> Any:
        """Mix with what is held; then hold a keyframe's own score. Returns the call's output."""
        self.run.mask, self.run.keep = COMPUTE, False
        plain = call.weights == () or (call.weights == (1.0,) and not self.patch.on_mix)
        plain = plain and self.patch.halves[call.mask] is None
        mixed = None if plain else self._mixed(call, None if output is None else output[0])
        if call.mask == COMPUTE:
            self._hold(call, output)
        if mixed is None:
            return output
        kept = self.run.kept
        return (mixed,) if kept.output_class is tuple else kept.output_class(sample=mixed)

    def _branch(self, module: nn.Module, order: int, given: Given) -> Branch:
        """Which guidance branch a call belongs to.

        Its name where the pipeline says one, else its place among the calls of the step; but where
        arguments are the very tensors of one branch's keyframe alone, it is that branch: pipelines
        that stop guiding leave the first call out.
        """
        if self.context is not None:
            return id(module), self.context
        branches = {key: kept for key, kept in self.run.branches.items() if key[0] == id(module)}
        if len(branches) > 1:
            tensors = list(tensors_in(given))
            known = {key: kept.knows(tensors) for key, kept in branches.items()}
            shared = set.intersection(*known.values())
            own = [key for key, found in known.items() if found - shared]
            if len(own) == 1:
                return own[0]
        return id(module), order

    @staticmethod
    def _guided(kept: Kept, given: Given) -> bool:
        """Whether a call has the two branches of which a mask computes one; told where not."""
        if kept.guided is None:
            kept.guided = halves.paired(given, kept.scores[0])
            if not kept.guided:
                _log.warning(
                    "this call has no classifier-free guidance with two branches in one batch (is"
                    " the guidance scale 1?): steps of the policy that reuse a branch are computed"
                )
        return kept.guided

    def _hold(self, call: _Call, output: Any) -> None:
        kept, form = self.run.kept, self.patch.form
        kept.output_class = type(output)
        held = output[0] if form is None else form.noise(sample_of(call.given), output[0])
        # A second stage of the same solver step replaces the first one's score.
        older = kept.scores[1:] if kept.step == call.step else kept.scores
        kept.scores = [held, *older][: self.order]
        kept.step = call.step
        if self.patch.graphs:
            kept.own()

    def _mixed(self, call: _Call, reduced: Any) -> Any:
        form, scores = self.patch.form, self.run.kept.scores
        sample, weights = sample_of(call.given), call.weights
        half = self.patch.halves[call.mask]
        if half is not None:
            reduced, scores = halves.spread(reduced), [halves.difference(s, half) for s in scores]
            weights = weights if len(weights) > 1 else (1.0, 1.0)
        if form is not None and reduced is not None:
            reduced = form.noise(sample, reduced)
        if self.patch.on_mix:
            self.patch.on_mix(call.step, form, sample, reduced, scores)
        mixed = mix(reduced, scores, weights)
        return mixed if form is None else form.score(sample, mixed)


class Patch(Listener):
    """Hooks on one pipe. `masks` are lists of points; mask 0 is the empty one.

    With a `plan` (one row per solver step) the root hook follows the scheduler; without one the
    caller sets the mode of direct denoiser calls by `keyframe()` and `reduced(mask)`.
    `replaces` is the step count that a call may ask for instead of the plan's; `packing` says how
    kept tensors are stored.
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
            root: Hook = _Direct(self)
            if self.clock is not None and self.plan is not None:
                root = _Root(self, self.clock, self.plan, self._order)
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


def uses_graphs(pipe: Any) -> bool:
    """Whether a compiled denoiser runs as CUDA graphs (`mode="reduce-overhead"`).

    Each call then writes its outputs to the same memory.
    """
    modules = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    for compiled in (*modules, *(getattr(m, "_compiled_call_impl", None) for m in modules)):
        config: Any = getattr(compiled, "get_compiler_config", dict)()
        if config and config.get("triton.cudagraphs"):
            return True
    return False
