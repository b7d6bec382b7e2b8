"""The step clock: the only code that wraps a scheduler's methods.

`set_timesteps` starts a run, `step` advances it; timesteps are never compared.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch


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


class Clock:
    """Follows one scheduler: which solver step is running, or None between runs."""

    def __init__(
        self,
        scheduler: Any,
        on_start: Callable[[int], None],
        on_stop: Callable[[], None],
        on_step: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        substitute: tuple[int, int] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.step: int | None = None
        self.branch = 0
        self._pass = 0
        self._of_pass: list[int] = []
        self._on_start, self._on_stop, self._on_step = on_start, on_stop, on_step
        self._substitute = substitute
        self._before: dict[str, Any] = {}

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
        self._on_stop()

    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.stop()
        if self._substitute:
            asked, given = self._substitute
            if args and args[0] == asked:
                args = (given, *args[1:])
            elif kwargs.get("num_inference_steps") == asked:
                kwargs["num_inference_steps"] = given
        result = original(*args, **kwargs)
        self._of_pass = solver_steps(self.scheduler)
        self._on_start(self._of_pass[-1] + 1)
        self._pass = self.branch = 0
        self.step = 0
        return result

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(*args, **kwargs)
        except BaseException:
            self.stop()
            raise
        if self._on_step:
            before = args[2] if len(args) > 2 else kwargs["sample"]
            self._on_step(before, result[0] if isinstance(result, tuple) else result.prev_sample)
        if self.step is not None:
            self._pass += 1
            self.branch = 0
            if self._pass < len(self._of_pass):
                self.step = self._of_pass[self._pass]
            else:
                self.stop()
        return result
