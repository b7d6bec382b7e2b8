"""Record what a run of a pipe does: denoiser calls, scores and latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from autofr.clock import Clock, Listener, bare_scheduler, solver_steps
from autofr.points import Given, Pipe, experts, timestep_of

Revise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(score that the scheduler is about to get, its sample) -> the score that it gets instead."""


class Call(NamedTuple):
    """One call of a denoiser: at which pass of the loop, with what, and what came out."""

    module: nn.Module
    at: int
    given: Given
    output: Any


@dataclass
class Tape:
    """What a recorded run did.

    `steps` maps each pass of the loop to its solver step; `scores` and `latents` are what the
    scheduler got and gave at each pass, `first_latents` what it began with; `scheduler` is a copy
    of it as it stood then, `others` the further arguments of its last step.
    """

    calls: list[Call] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    first_latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[int] = field(default_factory=list)
    scheduler: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def passes(self) -> dict[int, list[Call]]:
        """The calls of each pass of the loop: several where guidance branches are split."""
        found: dict[int, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.at, []).append(call)
        return found


class _Recorder(Listener):
    def __init__(self, pipe: Pipe, revise: Revise | None) -> None:
        self.tape = Tape()
        self._pipe, self._revise = pipe, revise

    def started(self, steps: int) -> None:
        self.tape.__init__(steps=solver_steps(self._pipe.scheduler))  # type: ignore[misc]

    def stepping(
        self, score: torch.Tensor, sample: torch.Tensor, others: Mapping[str, Any]
    ) -> torch.Tensor:
        self.tape.others = others
        if not self.tape.latents:
            self.tape.first_latents = sample
            self.tape.scheduler = bare_scheduler(self._pipe.scheduler)
        if self._revise:
            score = self._revise(score, sample)
        self.tape.scores.append(score)
        return score

    def stepped(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self.tape.latents.append(after)


def again(others: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a step for a rehearsal of it: generators are copied, so that none moves on."""
    return {name: _copied(value) for name, value in others.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        copy = torch.Generator(value.device)
        copy.set_state(value.get_state())
        return copy
    return [_copied(item) for item in value] if isinstance(value, list) else value


@contextmanager
def record(
    pipe: Pipe,
    calls: bool = False,
    on_score: Callable[[int, torch.Tensor], None] | None = None,
    revise: Revise | None = None,
) -> Iterator[Tape]:
    """Record latents (and, if asked, denoiser calls) of the runs of a pipe inside the block.

    `on_score(step, score)` is called after every denoiser call; `revise` may replace what the
    scheduler gets.
    """
    recorder = _Recorder(pipe, revise)
    tape = recorder.tape
    clock = Clock(pipe.scheduler, recorder)

    def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if clock.step is None:
            return
        clock.count_call(timestep_of((args, kwargs)))
        if calls:
            tape.calls.append(Call(module, clock.index, (args, kwargs), output[0]))
        if on_score:
            on_score(clock.step, output[0])

    clock.install()
    modules: Sequence[nn.Module] = experts(pipe) if calls or on_score else ()
    handles = [module.register_forward_hook(listen, with_kwargs=True) for module in modules]
    try:
        yield tape
    finally:
        clock.remove()
        for handle in handles:
            handle.remove()
