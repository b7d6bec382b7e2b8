"""What a finished search found, as one value: `result.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from autofr.plan.baselines import Group
from autofr.policy import Interval, Policy


class Row(BaseModel):
    """One line of the comparison table.

    Errors are relative L2 of the final latents, mean over validation seeds with a 95 % interval:
    `error` to the teacher, `reference_error` to the finely solved reference. Speed-ups are of the
    whole call; `speedup` is measured in pairs, `predicted_speedup` comes from the cost model.
    The choice and its nearest rivals have a `test_error` too, on seeds that nothing was chosen by,
    and rivals say how many times the choice's error that is (paired).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    group: Group
    solver: str
    steps: int
    network_calls: float
    predicted_speedup: float
    speedup: Interval | None = None
    error: Interval
    reference_error: Interval
    test_error: Interval | None = None
    times_chosen: Interval | None = None
    fid: float | None = None
    candidate: bool = True
    digest: str | None = None


class Result(BaseModel):
    """Everything that a finished search found, with the protocol: `result.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    autofr_result: Literal[1] = 1
    model: str
    pipeline: str
    budget: str
    command: str
    date: str
    steps: int
    batch: int
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    seeds: dict[str, str]
    features: str | None
    reference: str
    rows: list[Row]
    chosen: str
    trials: int
    duplicates: int
    stage_seconds: dict[str, float]
    remarks: list[str]
    policy: Policy
