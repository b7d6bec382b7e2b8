"""The root hook of a denoiser: what each call computes, and what the scheduler gets of it.

`torch.compile` traces leaf hooks with the modules they sit on, and never looks into the root hook:
a whole denoiser has one graph for keyframes, one for each mask and one for calls outside runs, with
a break before it (so not with `fullgraph`). Blocks that are compiled one by one have these graphs
once for all blocks of one role (kept, skipped, run) and layout of their input, with `fullgraph`
too; policies with many masks need a higher `torch._dynamo.config.recompile_limit` (8).
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from autofr.runtime import halves
from autofr.runtime.clock import Clock
from autofr.runtime.held import Form
from autofr.runtime.hooks import Hook, StatefulHook
from autofr.runtime.points import Given, Pipe, sample_of, timestep_of
from autofr.runtime.store import COMPUTE, Branch, Kept, Run, mix, signature, tensors_in

HOLD = -1  # a jump: the denoiser is not called
BREAK = (
    "autofr decides in Python what each call of the denoiser computes: compile without fullgraph,"
    " or the blocks alone by compile_repeated_blocks(fullgraph=True)"
)

_COUNTED = {COMPUTE: "key", HOLD: "jump"}  # else: mask
_log = logging.getLogger("autofr")

Row = tuple[int, tuple[float, ...]]
"""One step of a compiled policy: mask index and mix weights."""
FULL: Row = (COMPUTE, ())
JUMPED: Row = (HOLD, (0.0, 1.0))

OnMix = Callable[[int, Form | None, Any, Any, Sequence[Any]], None]
"""(step, form, sample, reduced score or None at a jump, held scores), called before they are mixed;
scores are in the form in which they are held."""


class Patched(Protocol):
    """What a root hook needs of its patch; `halves` are the guidance branches of its masks."""

    pipe: Pipe
    run: Run
    counts: Counter[str]
    halves: list[int | None]
    on_mix: OnMix | None
    graphs: bool

    @property
    def form(self) -> Form | None: ...
    def prepared(self, mask: int, given: Given) -> Given: ...
    def check_scheduler(self) -> None: ...


class Direct(Hook):
    """The root hook of a patch without a plan: the caller has set the mode of the call."""

    def __init__(self, patch: Patched) -> None:
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


class Root(StatefulHook):
    """Decide per call of one denoiser: compute everything, run reduced, or hold; then mix.

    `torch.compile` sees nothing but the denoiser's own forward between `_begin` and `_end`.
    """

    def __init__(self, patch: Patched, clock: Clock, plan: Sequence[Row], order: int) -> None:
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

    def _guided(self, kept: Kept, given: Given) -> bool:
        """Whether a call has the two branches of which a mask computes one; told where not.

        Branches of perturbed attention (PAG) know each other by their place in the batch.
        """
        if kept.guided is None:
            perturbed = getattr(self.patch.pipe, "do_perturbed_attention_guidance", False)
            kept.guided = not perturbed and halves.paired(given, kept.scores[0])
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
