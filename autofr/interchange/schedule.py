"""What all kinds of schedules share: what they are read for, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from autofr.errors import InterchangeError, brief
from autofr.mix import JUMP, KEY, executed
from autofr.policy import Policy
from autofr.runtime.points import Point

Plan = tuple[list[str], dict[str, tuple[str, ...]]]
"""What each step is ("key" or a mask's name), and the masks by name."""


@dataclass(frozen=True)
class Target:
    """What a schedule is for: a denoiser with its points, a step count.

    `nearest`: what cannot be expressed is approximated instead of refused.
    """

    denoiser: nn.Module
    points: Mapping[str, Point]
    steps: int
    nearest: bool = False

    @property
    def name(self) -> str:
        """The denoiser's class."""
        return type(self.denoiser).__name__

    def lacks(self, what: str) -> NoReturn:
        """Refuse, and say what the denoiser has instead.

        Raises: InterchangeError.
        """
        kinds = ", ".join(dict.fromkeys(point.kind for point in self.points.values()))
        raise InterchangeError(f"this {self.name} has no {what}; it has points of kind {kinds}")


def numbers(value: Any, shape: str) -> list[int]:
    """Read whole numbers from 0 on, out of a list or of what was typed.

    Raises: InterchangeError with the shape that was expected.
    """
    if isinstance(value, str):
        with suppress(ValueError):  # thousands of digits
            value = [int(word) for word in re.findall(r"[0-9]+", value)]
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise InterchangeError(f"expected {shape}, got {brief(value)}")
    return value


def bits(value: Any, steps: int, what: str) -> list[bool]:
    """Read a 0 or 1 for each step, out of a list or of what was typed.

    Raises: InterchangeError for anything else, and for another number of steps.
    """
    if isinstance(value, str) and re.fullmatch(r"[01\s,]+", value):
        value = [int(digit) for digit in value if digit in "01"]
    known = isinstance(value, list) and all(type(n) in (int, bool) for n in value)
    if not known or not set(value) <= {0, 1}:
        raise InterchangeError(
            f"{what}: expected a list of 1 (compute) and 0 (reuse), got {brief(value)}"
        )
    check_count(len(value), steps, what)
    return [bool(n) for n in value]


def check_count(found: int, steps: int, what: str) -> None:
    """Refuse a schedule that was made for another number of steps.

    Raises: InterchangeError.
    """
    if found != steps:
        raise InterchangeError(
            f"{what}: made for {found} steps, asked for {steps}: read it for {found} steps, then"
            " retime the policy"
        )


def alternating(computed: Sequence[bool], name: str, mask: tuple[str, ...]) -> Plan:
    """Keyframes where a step is computed, one mask elsewhere.

    Raises: InterchangeError when the first step is not computed.
    """
    if not computed[0]:
        raise InterchangeError("step 0 is reused, but nothing is kept before it")
    return [KEY if now else name for now in computed], {name: mask}


def reused(tool: str, policy: Policy) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Each step with the points that it reuses, none at keyframes.

    Raises: InterchangeError where something happens that only autofr does: jumps and mixing.
    """
    for step, name in enumerate(policy.steps):
        weights = policy.weights(step)
        runs = executed(name, weights)
        if runs == JUMP:
            raise InterchangeError(f"step {step} is a jump, but {tool} always runs the network")
        if weights and (weights[0] != 1 or any(weights[1:])):
            raise InterchangeError(f"step {step} mixes in older scores, but {tool} does not mix")
        yield step, () if runs == KEY else policy.masks[runs]


def shown(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
