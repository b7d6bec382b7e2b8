"""The only code that replaces a forward: leaf hooks and one root hook per denoiser.

Leaf hooks sit on sub-modules and keep, put back or skip. The root hook on a denoiser decides what
a call does; the step comes from the clock on the scheduler.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import nn

from autofr.clock import Clock, Listener
from autofr.errors import PolicyError
from autofr.held import Form, forms
from autofr.points import Given, Pipe, Point, experts, sample_of, timestep_of
from autofr.store import COMPUTE, Branch, Kept, Packing, Run, mix, signature, tensors_in, unpack

HOOK = "autofr"
HOLD = -1  # a jump: the denoiser is not called
MISSING = object()  # a leaf has nothing to put back: its module runs

Row = tuple[int, tuple[float, ...]]
"""One step of a compiled policy: mask index and mix weights."""

OnMix = Callable[[int, Form | None, Any, Any, Sequence[Any]], None]
"""(step, form, sample, reduced score or None at a jump, held scores), called before they are mixed;
scores are in the form in which they are held."""

Action = Callable[[nn.Module, Given, Kept, int], Any]
"""(module, its arguments, what is kept, how often it ran in this call) -> its output."""


class _Hook(ModelHook):
    """A hook of a patch; whoever copies or pickles a module with one is refused."""

    installed: Any = None  # the forward that calls this hook

    def put_on(self, module: nn.Module) -> None:
        """Register on a module, outside of what is on it."""
        HookRegistry.check_if_exists_or_initialize(module).register_hook(self, HOOK)
        self.installed = module.forward

    def is_on(self, module: nn.Module) -> bool:
        """Whether calling the module calls this hook: offloading drops what came after its own."""
        forward = module.forward
        while forward is not None and forward is not self.installed:
            forward = getattr(forward, "__wrapped__", None)
        return forward is not None

    def take_off(self, module: nn.Module) -> None:
        """Remove from a module, with diffusers' traces where no other hook is left."""
        outer, registry = module.forward, HookRegistry.check_if_exists_or_initialize(module)
        registry.remove_hook(HOOK, recurse=False)
        if outer is not self.installed:  # offloading has come later, and calls this by its name
            if vars(module).get("_old_forward") is self.installed:
                module._old_forward = module.forward
            module.forward = outer
        if not registry.hooks:
            if getattr(module.forward, "__func__", None) is type(module).forward:
                vars(module).pop("forward", None)
            del module._diffusers_hook

    def __reduce__(self) -> NoReturn:
        """Refuse: a copy would share its clock with the original.

        Raises: PolicyError.
        """
        raise PolicyError(
            "a pipe with a policy cannot be copied or pickled: call autofr.remove(pipe), copy it,"
            " and apply the policy to each"
        )


class _Leaf(_Hook):
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
            value = point.keep(module, given, output)
            if run.packing:
                value = run.packing.pack(value)
            run.kept.tensors[_slot(point, self._time)] = value
        return output


def _slot(point: Point, time: int) -> Any:
    return (point.name, time) if time else point.name


def _restore(point: Point, module: nn.Module, given: Given, kept: Kept, time: int) -> Any:
    held = kept.tensors.get(_slot(point, time), MISSING)
    return MISSING if held is MISSING else point.restore(module, given, unpack(held))


def _skip(skip: Callable[..., Any], module: nn.Module, given: Given, kept: Kept, time: int) -> Any:
    return skip(module, given)


class _Direct(_Hook):
    """The root hook of a patch without a plan: the caller has set the mode of the call."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.patch.run
        run.call += 1
        return self.patch.prepared(run.mask, (args, kwargs))


class _Root(_Hook):
    """Decide per call of one denoiser: compute everything, run reduced, or hold; then mix."""

    _is_stateful = True  # so that pipelines tell it the name of the guidance branch

    def __init__(self, patch: Patch, clock: Clock, plan: Sequence[Row], order: int) -> None:
        super().__init__()
        self.patch, self.run, self.clock = patch, patch.run, clock
        self.plan, self.order, self.counts = plan, order, patch.counts
        self.contexts = StateManager(object)

    def reset_state(self, module: nn.Module) -> None:
        """A pipeline that ends its caches ends the run."""
        self.clock.stop()

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.clock.step is None:
            self.patch.check_scheduler()
            return self.fn_ref.original_forward(*args, **kwargs)
        given = args, kwargs
        order, step = self.clock.count_call(timestep_of(given))
        self.run.call += 1
        try:
            return self._call(step, self._branch(module, order, given), given)
        except BaseException:
            self.clock.stop()
            raise

    def _branch(self, module: nn.Module, order: int, given: Given) -> Branch:
        """Which guidance branch a call belongs to.

        Its name where the pipeline says one, else its place among the calls of the step; but where
        arguments are the very tensors of one branch's keyframe alone, it is that branch: pipelines
        that stop guiding leave the first call out.
        """
        context = self.contexts._context
        if context is not None:
            return id(module), context.name
        branches = {key: kept for key, kept in self.run.branches.items() if key[0] == id(module)}
        if len(branches) > 1:
            tensors = list(tensors_in(given))
            known = {key: kept.knows(tensors) for key, kept in branches.items()}
            shared = set.intersection(*known.values())
            own = [key for key, found in known.items() if found - shared]
            if len(own) == 1:
                return own[0]
        return id(module), order

    def _call(self, step: int, branch: Branch, given: Given) -> Any:
        run, kept = self.run, self.run.select(branch)
        mask, weights = self.plan[step]
        now = signature(given)
        if mask == COMPUTE or kept.signature != now or len(kept.scores) < len(weights) - 1:
            return self._compute(kept, step, now, given)
        if mask == HOLD:
            self.counts["jump"] += 1
            return self._wrap(kept, self._mixed(step, given, None, weights))
        self.counts["mask"] += 1
        args, kwargs = self.patch.prepared(mask, given)
        run.mask = mask
        output = self.fn_ref.original_forward(*args, **kwargs)
        run.mask = COMPUTE
        if len(weights) == 1 and weights[0] == 1 and not self.patch.on_mix:
            return output
        return self._wrap(kept, self._mixed(step, given, output[0], weights))

    def _mixed(self, step: int, given: Given, reduced: Any, weights: tuple[float, ...]) -> Any:
        form, scores = self.patch.form, self.run.kept.scores
        sample = sample_of(given)
        if form is not None and reduced is not None:
            reduced = form.noise(sample, reduced)
        if self.patch.on_mix:
            self.patch.on_mix(step, form, sample, reduced, scores)
        mixed = mix(reduced, scores, weights)
        return mixed if form is None else form.score(sample, mixed)

    def _compute(self, kept: Kept, step: int, now: tuple[Any, ...], given: Given) -> Any:
        self.counts["key"] += 1
        if kept.signature != now:
            kept.forget()
            kept.signature = now
        kept.anchors = [weakref.ref(tensor) for tensor in tensors_in(given)]
        args, kwargs = given
        self.run.mask, self.run.keep = COMPUTE, True
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.run.keep = False
        kept.output_class = type(output)
        form = self.patch.form
        held = output[0] if form is None else form.noise(sample_of(given), output[0])
        # A second stage of the same solver step replaces the first one's score.
        older = kept.scores[1:] if kept.step == step else kept.scores
        kept.scores = [held, *older][: self.order]
        kept.step = step
        return output

    def _wrap(self, kept: Kept, score: Any) -> Any:
        return (score,) if kept.output_class is tuple else kept.output_class(sample=score)


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
        self._forms: list[Form] | None = None
        self._prepares = [
            [point.prepare for point in mask if point.prepare] for mask in ((), *masks)
        ]
        self._order = order
        self._hooks: list[tuple[nn.Module, nn.Module, str, _Hook]] = []
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
            root: _Hook = _Direct(self)
            if self.clock is not None and self.plan is not None:
                root = _Root(self, self.clock, self.plan, self._order)
            self._register(denoiser, "", root)
        if self.clock is not None:
            self.clock.install()
            self._bar = _watch_bar(self.pipe, self.clock)
        return self

    def remove(self) -> None:
        """Take the hooks off and free what they kept."""
        if self.clock is not None:
            self.clock.remove()
            if self._bar:
                delattr(self.pipe, BAR)
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

    def _register(self, denoiser: nn.Module, path: str, hook: _Hook) -> None:
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
        self.counts.clear()
        self._forms = forms(self.pipe.scheduler)
        self._follow_replaced()

    def stopped(self) -> None:
        """A run is over: free what it kept."""
        self.run.peak_bytes = max(self.run.peak_bytes, self.run.kept_bytes)
        self.run.clear()


BAR = "progress_bar"


class _Bar:
    """A pipeline's progress bar that ends the run with the loop, also when the loop raises."""

    def __init__(self, bar: Any, stop: Callable[[], None]) -> None:
        self._bar, self._stop = bar, stop

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._stop()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._stop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _watch_bar(pipe: Any, clock: Clock) -> bool:
    """End the run where the pipe's sampling loop ends, however it ends; False without a bar."""
    original = getattr(pipe, BAR, None)
    if original is not None:
        setattr(pipe, BAR, lambda *args, **kwargs: _Bar(original(*args, **kwargs), clock.stop))
    return original is not None
