"""Budgets, and what a call costs in parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autofr.errors import BudgetError
from autofr.mix import JUMP, KEY

_BUDGET = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*(x|ms|s)\s*$")


@dataclass(frozen=True)
class Budget:
    """A latency target: a speed-up of the whole `pipe(...)` call, or seconds per call."""

    text: str
    speedup: float | None = None
    seconds: float | None = None

    def seconds_of(self, teacher_seconds: float) -> float:
        """Seconds per call that meet the budget.

        Raises: BudgetError when the teacher already meets it.
        """
        if self.speedup is not None:
            return teacher_seconds / self.speedup
        assert self.seconds is not None
        if self.seconds >= teacher_seconds:
            raise BudgetError(
                f"budget {self.text}: the unaccelerated pipe already takes only"
                f" {1000 * teacher_seconds:.0f} ms per call here; give a smaller budget"
            )
        return self.seconds

    def speedup_over(self, teacher_seconds: float) -> float:
        """The speed-up that meets the budget."""
        return teacher_seconds / self.seconds_of(teacher_seconds)


def parse_budget(text: str) -> Budget:
    """Read `1.5x` (speed-up of the whole call) or `180ms` / `0.18s` (time per call).

    Raises: BudgetError saying what was expected.
    """
    match = _BUDGET.match(text)
    if not match:
        hint = f"; did you mean {text.strip()}x?" if re.fullmatch(r"\s*[\d.]+\s*", text) else ""
        raise BudgetError(
            f"budget {text!r}: expected a speed-up such as 1.5x, or a time per call such as"
            f" 180ms{hint}"
        )
    value, unit = float(match[1]), match[2]
    if unit == "x":
        if not 1 < value < 1000:
            raise BudgetError(
                f"budget {text!r}: a speed-up must be above 1x (and below 1000x); 1.5x means that"
                " a call takes two thirds of its time"
            )
        return Budget(text.strip(), speedup=value)
    if value <= 0:
        raise BudgetError(f"budget {text!r}: a time must be above 0")
    return Budget(text.strip(), seconds=value / 1000 if unit == "ms" else value)


def whole(steps: int) -> int:
    """How many of the first steps a call leaves out that runs them all."""
    return 0


@dataclass(frozen=True)
class Costs:
    """Seconds of one pipe call in parts: `fixed + sum of steps`.

    `key`, `jump` and `masks[name]` are seconds per step, scheduler included; `fixed` is the rest
    of the call (latents, decoding). `jump` is a step without the network. Of a call's steps the
    first `first(steps)` do not run, and cost nothing (see `start`).
    """

    key: float
    jump: float
    fixed: float
    masks: dict[str, float]
    first: Callable[[int], int] = whole

    def of_step(self, step: str) -> float:
        """Seconds of a step by its name in the policy."""
        return self.key if step == KEY else self.jump if step == JUMP else self.masks[step]

    def of_call(self, steps: Sequence[str]) -> float:
        """Predicted seconds of a whole call."""
        return self.fixed + sum(self.of_step(step) for step in steps[self.first(len(steps)) :])

    def runs(self, steps: int) -> int:
        """How many steps of a call run."""
        return steps - self.first(steps)

    def teacher(self, steps: int) -> float:
        """Predicted seconds of the unaccelerated call."""
        return self.fixed + self.runs(steps) * self.key

    def affordable(self, seconds: float, steps: int) -> int:
        """The most steps of an unaccelerated call in so many seconds, told from one of `steps`."""
        running = max(0, int((seconds - self.fixed) / self.key))
        if not self.first(steps):
            return running
        found = running * steps // max(1, self.runs(steps))
        while found and self.runs(found) > running:
            found -= 1
        while found < steps and self.runs(found + 1) <= running:
            found += 1
        return found
