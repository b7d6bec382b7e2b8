"""Record what a run of a pipe does: denoiser calls, scores and latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from autofr.runtime.clock import Clock, Listener, bare_scheduler, solver_steps
from autofr.runtime.points import Given, Pipe, experts, timestep_of

STEADY = 0.01  # share of elements that may be overwritten at one of two steps alone
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

    `steps` maps each pass of the loop to its solver step; `begin` is the pass that ran first: a
    later one in pipes that start from a picture. `scores` and `latents` are what the scheduler got
    and gave at each pass that ran, `first_latents` what it began with; `scheduler` is a copy of it
    as it stood then, `others` the further arguments of its last step. `changed` are the first and
    the last latents that were not what the scheduler had given, as (given, made of it).
    """

    calls: list[Call] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    first_latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[int] = field(default_factory=list)
    scheduler: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)
    begin: int = 0
    changed: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def ran(self) -> list[int]:
        """The solver step of each pass that ran."""
        return self.steps[self.begin : self.begin + len(self.scores)]

    def drawn(self) -> torch.Tensor | None:
        """Where the pipe goes on with what the scheduler gave, (n, ...) of bools; None: everywhere.

        Inpainting puts the picture's own latents, noised, over all else after every step: what the
        network says there is lost. Only what is overwritten at the same places in the first and in
        the last step counts; a blend that takes a part of both is taken for overwritten.
        """
        if not self.changed or any(given.shape != made.shape for given, made in self.changed):
            return None
        first, last = (
            given.to(made.dtype) == made for given, made in (self.changed[0], self.changed[-1])
        )
        kept = first & last
        steady = float((first != last).float().mean()) <= STEADY
        return kept if steady and bool(kept.any()) and not bool(kept.all()) else None

    def passes(self) -> dict[int, list[Call]]:
        """The calls of each pass of the loop: several where guidance branches are split."""
        found: dict[int, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.at, []).append(call)
        return found


class _Recorder(Listener):
    clock: Clock

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
            self.tape.begin = self.clock.index
            self.tape.first_latents = sample
            self.tape.scheduler = bare_scheduler(self._pipe.scheduler)
        elif sample is not self.tape.latents[-1]:
            self.tape.changed[1:] = [(self.tape.latents[-1], sample)]
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
    clock = recorder.clock = Clock(pipe.scheduler, recorder)

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
