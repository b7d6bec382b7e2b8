"""Where a call starts: pipes that start from a picture leave out the first steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autofr.runtime.clock import Clock, Listener
from autofr.runtime.points import Pipe, experts
from autofr.runtime.sampler import draw


class Starts:
    """Says how many solver steps a call of so many leaves out; each count is tried at most once.

    A try is a call of one sample, as far as its first step: with a `strength` below 1 the pipe
    itself decides where that is. Calls of fewer steps than one that leaves out none leave out none.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._found: dict[int, int] = {}

    def __call__(self, steps: int) -> int:
        """How many of the first steps are left out: all of them where none runs."""
        if steps not in self._found:
            whole = any(not first for count, first in self._found.items() if count > steps)
            self._found[steps] = 0 if whole else first_step(self._pipe, steps)
        return self._found[steps]

    def runs(self, steps: int) -> int:
        """How many steps run."""
        return steps - self(steps)

    def short(self, count: int, steps: int) -> int:
        """The steps of a short call of which `count` or a few more run, told from one of `steps`.

        As many as are asked for where none runs at all.
        """
        if not self(steps) or not self.runs(steps):
            return count
        found = -(-count * steps // self.runs(steps))
        while self.runs(found) < count:
            found += 1
        return found


class _BegunError(Exception):
    """A run has come to its first step."""


class _Stop(Listener):
    clock: Clock
    begun = called = False

    def started(self, steps: int) -> None:
        self.begun = True

    def stepping(
        self, score: torch.Tensor, sample: torch.Tensor, others: Mapping[str, Any]
    ) -> torch.Tensor:
        raise _BegunError(self.clock.step)


def first_step(pipe: Pipe, steps: int) -> int:
    """The first solver step that a call of so many runs; `steps` where it runs none."""
    listener = _Stop()
    clock = listener.clock = Clock(pipe.scheduler, listener)

    def note(*_: object) -> None:
        listener.called = True

    clock.install()
    handles = [module.register_forward_pre_hook(note) for module in experts(pipe)]
    try:
        draw(pipe, [0], steps)
    except _BegunError as begun:
        return int(begun.args[0])
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError):  # pipes stumble where there is nothing to draw
        if listener.called or not listener.begun:
            raise
    finally:
        clock.remove()
        for handle in handles:
            handle.remove()
    return steps
