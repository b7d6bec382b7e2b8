"""The step clock: the only code that wraps a scheduler's methods.

`set_timesteps` starts a run, `step` advances it. Timesteps are compared once per run at most, to
find where a run begins that starts in the middle (img2img), and never to tell steps apart.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from autofr.errors import ModelError, PolicyError

FLOW = ("model_output", "timestep", "sample", "return_dict")  # what every step is given


def solver_steps(scheduler: Any) -> list[int]:
    """Map each pass of the sampling loop to its solver step; the stages of one step share it.

    Second-order solvers visit `2N - 1` timesteps for N steps, PNDM `N + 1` (`N + 9` with its
    Runge-Kutta start).
    """
    passes = len(scheduler.timesteps)
    if type(scheduler).__name__ == "PNDMScheduler":
        warm_up = len(scheduler.prk_timesteps)
        if warm_up:
            return [k // 4 if k < warm_up else warm_up // 4 + k - warm_up for k in range(passes)]
        return [max(0, k - 1) for k in range(passes)]
    order = getattr(scheduler, "order", 1)
    return [k // order for k in range(passes)]


def bare_scheduler(scheduler: Any) -> Any:
    """Copy a scheduler with its state, without any wrapper of its methods."""
    bare = copy.copy(scheduler)
    state = {k: v for k, v in vars(scheduler).items() if k not in ("set_timesteps", "step")}
    vars(bare).clear()
    vars(bare).update(copy.deepcopy(state))
    return bare


class Listener:
    """What a clock tells of a run; every method may be overridden."""

    def started(self, steps: int) -> None:
        """`set_timesteps` was called: a run of this many solver steps begins."""

    def stopped(self) -> None:
        """The run is over, or was given up."""

    def stepping(
        self, score: torch.Tensor, sample: torch.Tensor, others: Mapping[str, Any]
    ) -> torch.Tensor:
        """The scheduler is about to step; returns the score that it gets.

        `others` are the step's further arguments by name (eta, generator, ...).
        """
        return score

    def stepped(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """The scheduler has stepped from one sample to the next."""


class Clock:
    """Follows one scheduler: which pass and solver step is running, or None between runs."""

    def __init__(
        self, scheduler: Any, listener: Listener, substitute: tuple[int, int] | None = None
    ) -> None:
        self.scheduler = scheduler
        self.step: int | None = None
        self.index = 0
        self.calls = 0
        self._again: Any = None  # the timestep that the second pass must have, where that is known
        self._of_pass: list[int] = []
        self._listener = listener
        self._substitute = substitute
        self._replaced = False
        self._before: dict[str, Any] = {}
        self._order = inspect.signature(scheduler.step)

    def install(self) -> None:
        """Wrap `set_timesteps` and `step` of this scheduler instance."""
        for name, wrapper in (("set_timesteps", self._set_timesteps), ("step", self._step)):
            if name in vars(self.scheduler):
                self._before[name] = vars(self.scheduler)[name]
            original = getattr(self.scheduler, name)
            bound = functools.partial(wrapper, original)
            # `wraps`, since pipelines look for parameters like `eta` in the signature.
            setattr(self.scheduler, name, functools.wraps(original)(bound))

    def remove(self) -> None:
        """Put the scheduler's own methods back."""
        for name in ("set_timesteps", "step"):
            if name in self._before:
                setattr(self.scheduler, name, self._before[name])
            else:
                vars(self.scheduler).pop(name, None)
        self.stop()

    def stop(self) -> None:
        """End the run, if one is on."""
        self.step = None
        self._listener.stopped()

    def count_call(self, timestep: Any) -> tuple[int, int]:
        """Note a denoiser call of a run; returns how many came before it in this pass, and the
        solver step.

        At a run's first call the clock is set to where the run begins: pipelines that start in the
        middle (img2img, inpainting with a strength) tell the scheduler, or use a later timestep.
        """
        if self.calls == 0:
            self._place(timestep)
        self.calls += 1
        assert self.step is not None
        return self.calls - 1, self.step

    def __deepcopy__(self, memo: Any) -> Clock:
        """A copied scheduler (pipelines make some) is not followed, and needs no second clock."""
        return self

    def _stop_at_end(self) -> None:
        if self.step is None:
            self.stop()

    def _place(self, timestep: Any) -> None:
        """Set the clock at a run's first call to where it begins.

        Raises: ModelError at the next pass where that was not to be known: PNDM visits its second
            timestep twice, and a run that begins there is taken to begin with the first visit.
        """
        if self.index == 0:
            self._set(self._begin(timestep))
            self._check_begin()
            return
        expected, self._again = self._again, None
        if expected is not None and torch.as_tensor(timestep).flatten()[0].cpu() != expected:
            self.stop()
            raise ModelError(
                f"{type(self.scheduler).__name__} takes its second timestep twice, and this call"
                " begins with the second of the two, which cannot be told from the first: let it"
                " begin a step earlier or later (another strength or step count), or use another"
                " solver"
            )

    def _begin(self, timestep: Any) -> int:
        for told in ("begin_index", "step_index"):  # the second after `scale_model_input`
            index = getattr(self.scheduler, told, None)
            if index is not None:
                return index
        now = torch.as_tensor(0 if timestep is None else timestep).flatten()[:1].cpu()
        # None, or scaled to 0..1, as transformers of flows are given it; 1 may be a flow's first.
        if float(now) < 1 or (float(now) == 1 and not hasattr(self.scheduler, "alphas_cumprod")):
            return 0
        equal = (torch.as_tensor(self.scheduler.timesteps).cpu() == now).nonzero().flatten()
        if len(equal) > 1 and equal[0] > 0:
            self._again = now[0]
        return int(equal[0]) if len(equal) else 0

    def _check_begin(self) -> None:
        """Refuse to begin at a place that the pipe has counted in other steps than run.

        Raises: PolicyError.
        """
        if self._replaced and self._substitute and self.index:
            asked, given = self._substitute
            self.stop()
            raise PolicyError(
                f"this policy takes {given} steps for a call of {asked}, but a pipe that begins in"
                f" the middle counts them itself: call it with num_inference_steps={given}"
            )

    def _set(self, index: int) -> None:
        self.index = index
        self.step = self._of_pass[index] if index < len(self._of_pass) else None

    def _mine(self, original: Any) -> bool:
        """A deep copy of the scheduler carries the wrappers, but its steps are not this run's."""
        return getattr(original, "__self__", self.scheduler) is self.scheduler

    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._mine(original):
            return original(*args, **kwargs)
        self.stop()
        changed = self._substituted(*self._substitute, args, kwargs) if self._substitute else None
        self._replaced = changed is not None
        args, kwargs = changed or (args, kwargs)
        result = original(*args, **kwargs)
        self._of_pass = solver_steps(self.scheduler)
        self._listener.started(self._of_pass[-1] + 1)
        self.calls = 0
        self._again = None
        self._set(0)
        return result

    @staticmethod
    def _substituted(asked: int, given: int, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Ask for other steps where so many are asked for, by their number or their noise levels.

        Flow-matching pipelines give a grid of levels whose last step ends at 0. None where other
        steps are asked for.
        """
        if args and args[0] == asked:
            return (given, *args[1:]), kwargs
        changes: dict[str, Any] = {}
        if kwargs.get("num_inference_steps") == asked:
            changes["num_inference_steps"] = given
        sigmas = kwargs.get("sigmas")
        if sigmas is not None and len(sigmas) == asked:
            places = np.linspace(0, asked, given, endpoint=False)
            changes["sigmas"] = np.interp(places, np.arange(asked + 1), [*sigmas, 0.0]).tolist()
        return (args, kwargs | changes) if changes else None

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._mine(original):
            return original(*args, **kwargs)
        given = self._order.bind(*args, **kwargs)
        named = given.arguments
        try:
            if self.calls == 0:  # nobody counts calls here
                self._place(named["timestep"])
            others = {name: value for name, value in named.items() if name not in FLOW}
            named["model_output"] = self._listener.stepping(
                named["model_output"], named["sample"], others
            )
            result = original(*given.args, **given.kwargs)
        except BaseException:
            self.stop()
            raise
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        self._listener.stepped(named["sample"], after)
        if self.step is not None:
            self.calls = 0
            self._set(self.index + 1)
            self._stop_at_end()
        return result
