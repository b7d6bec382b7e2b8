"""Record what a run of a pipe does: denoiser calls, scores and latents; nothing is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autofr.clock import Clock, solver_steps
from autofr.points import Pipe, find_denoiser


@dataclass
class Tape:
    """What a recorded run did: denoiser calls and the latents after each pass of the loop."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    first_latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[int] = field(default_factory=list)


@contextmanager
def record(
    pipe: Pipe,
    calls: bool = False,
    on_score: Callable[[int, torch.Tensor], None] | None = None,
) -> Iterator[Tape]:
    """Record latents (and, if asked, denoiser calls) of the runs of a pipe inside the block.

    `on_score(step, score)` is called after every denoiser call.
    """
    tape = Tape()
    denoiser = find_denoiser(pipe)

    def start(steps: int) -> None:
        tape.calls.clear()
        tape.latents.clear()
        tape.steps = solver_steps(pipe.scheduler)

    def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if clock.step is None:
            return
        if calls:
            tape.calls.append((args, kwargs, output[0]))
        if on_score:
            on_score(clock.step, output[0])

    def step(before: torch.Tensor, after: torch.Tensor) -> None:
        if not tape.latents:
            tape.first_latents = before
        tape.latents.append(after)

    clock = Clock(pipe.scheduler, start, lambda: None, step)
    clock.install()
    handle = denoiser.register_forward_hook(listen, with_kwargs=True) if calls or on_score else None
    try:
        yield tape
    finally:
        clock.remove()
        if handle:
            handle.remove()
