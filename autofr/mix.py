"""λ(t) and fitted tables: how the scores of a step are mixed."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

KEY, JUMP = "key", "jump"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MAX_WEIGHT = 1000.0
"""Of a fitted weight, either way: the ridges of our fits keep them below some hundreds, and half
precision leaves nothing of a score that is the difference of two so many times as large."""
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
Row = Annotated[tuple[Weight, ...], FailFast(), Field(max_length=17)]  # 16 scores are held


class Value(BaseModel):
    """A strict, frozen value of the policy file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Sigmoid(Value):
    """λ = σ(τ(r - b)), r = step / steps: the paper's schedule (section "score mixing")."""

    kind: Literal["sigmoid"] = "sigmoid"
    tau: Positive = 30.0
    bias: Finite = 0.5

    def weight(self, r: float) -> float:
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.tau * (r - self.bias)))))


class HardSigmoid(Value):
    """λ = clip((τ(r - b) + 2) / 4, 0, 1): the schedule of FRDiff's released code."""

    kind: Literal["hard_sigmoid"] = "hard_sigmoid"
    tau: Positive = 30.0
    bias: Finite = 0.5

    def weight(self, r: float) -> float:
        return min(1.0, max(0.0, (self.tau * (r - self.bias) + 2) / 4))


class Linear(Value):
    """λ rises in a straight line from 0 at r = start to 1 at r = end."""

    kind: Literal["linear"] = "linear"
    start: Finite = 0.0
    end: Finite = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Linear:
        if self.end <= self.start:
            raise ValueError(f"end must be above start, got start={self.start} end={self.end}")
        return self

    def weight(self, r: float) -> float:
        return min(1.0, max(0.0, (r - self.start) / (self.end - self.start)))


class Cosine(Value):
    """λ = (1 - cos πr) / 2."""

    kind: Literal["cosine"] = "cosine"

    def weight(self, r: float) -> float:
        return (1 - math.cos(math.pi * r)) / 2


class Step(Value):
    """λ = 0 before r = bias, 1 from there on."""

    kind: Literal["step"] = "step"
    bias: Finite = 0.5

    def weight(self, r: float) -> float:
        return float(r >= self.bias)


class Constant(Value):
    """The same λ at every step; 1 is pure feature reuse, 0 is pure Jump."""

    kind: Literal["constant"] = "constant"
    value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0

    def weight(self, r: float) -> float:
        return self.value


class Table(Value):
    """Fitted weights, one row per step: [reduced score, last keyframe's, the one's before, ...].

    The first entry of a jump's row is 0. The row of a keyframe is empty, or it mixes too, its own
    full score in the reduced one's place: what it knows now makes up for the steps before it, as
    the corrector UniC does (arXiv 2302.04867, section 3). What it keeps is its own score alone.
    """

    kind: Literal["table"] = "table"
    weights: Annotated[tuple[Row, ...], FailFast()]


Family = Sigmoid | HardSigmoid | Linear | Cosine | Step | Constant
Mix = Annotated[Family | Table, Field(discriminator="kind")]


def mix_row(step: str, mix: Mix, index: int, steps: int) -> tuple[float, ...]:
    """Weights of [reduced score, last keyframe's, the one's before, ...] at step `index`.

    Empty at keyframes that do not mix; first entry 0 at jumps, also where λ ≤ 0 turns a mask into
    one.
    """
    if isinstance(mix, Table):
        return mix.weights[index]
    if step == KEY:
        return ()
    share = 0.0 if step == JUMP else mix.weight(index / steps)
    return (1.0,) if share >= 1 else (share, 1 - share) if share > 0 else (0.0, 1.0)


def executed(step: str, row: tuple[float, ...]) -> str:
    """What runs at a step with these weights: a mask that weighs nothing is a jump."""
    return JUMP if row and row[0] == 0 else step
