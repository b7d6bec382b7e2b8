"""The comparison table and what follows from it: rows, remarks, the result of a search."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from autofr.measure.costs import Costs
from autofr.measure.profile_file import Profile
from autofr.plan.baselines import Group
from autofr.policy import Policy
from autofr.runtime.points import Pipe, name_of
from autofr.search.evaluate import Candidate, Evaluator, Score, fine_steps
from autofr.search.folder import PURPOSES, Settings
from autofr.search.ledger import Record
from autofr.search.result import Result, Row
from autofr.task import plain

AS_FAST = 0.97  # rows at most 3 % slower than the choice are compared with it


def policy_row(found: Candidate, score: Score, evaluator: Evaluator, costs: Costs) -> Row:
    """A line from a policy's score."""
    policy = found.policy
    return Row(
        name=found.name,
        group=found.group,
        solver=policy.sampler.scheduler.removesuffix("Scheduler"),
        steps=len(policy.steps),
        network_calls=round((found.seconds - costs.fixed) / costs.key, 2),
        predicted_speedup=costs.teacher(evaluator.steps) / found.seconds,
        **_measured(score, evaluator),
        digest=policy.digest,
    )


def _measured(score: Score, evaluator: Evaluator) -> dict[str, Any]:
    """The fields of a row that come from its rollouts."""
    return {
        "speedup": score.speedup,
        "error": score.error,
        "reference_error": score.reference_error,
        "fid": evaluator.fid(score),
    }


def solver_row(name: str, steps: int, score: Score, evaluator: Evaluator, costs: Costs) -> Row:
    """A line of another solver without reuse; never a candidate."""
    return Row(
        name=f"{name}, {steps} steps",
        group="other solver",
        solver=name,
        steps=steps,
        network_calls=costs.runs(steps),
        predicted_speedup=costs.teacher(evaluator.steps) / costs.teacher(steps),
        **_measured(score, evaluator),
        candidate=False,
    )


def as_fast(rows: Sequence[Row]) -> list[Row]:
    """The rows that the choice is compared with: published ones, floors and other solvers."""
    bound = AS_FAST * speed(next(row for row in rows if row.group == "chosen"))
    ours = ("chosen", "planned", "teacher")
    return [row for row in rows if row.group not in ours and speed(row) >= bound]


def rivals(rows: Sequence[Row]) -> list[Row]:
    """Of each kind of candidates as fast as the choice, the row nearest to the teacher."""
    best: dict[Group, Row] = {}
    for row in sorted(as_fast(rows), key=lambda row: row.error.value):
        if row.candidate:
            best.setdefault(row.group, row)
    return [*best.values()]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Say plainly where a row is better than the choice at about its time."""
    chosen = next(row for row in rows if row.group == "chosen")
    lines, rows_as_fast = [], as_fast(rows)
    for row in rows_as_fast:
        if row.candidate and row.error.value < chosen.error.value:
            lines.append(
                f"{row.name} is as fast and nearer to the teacher: error {row.error.value:.4f}"
                f" against {chosen.error.value:.4f}."
            )
    lines += _better_solver(chosen, rows_as_fast)
    if all(row.group != "other solver" for row in rows):
        lines.append("No other solver is shown: this pipe cannot drive those that are compared.")
    tested = [row for row in rows if row.times_chosen]
    if tested and chosen.test_error:
        best = min(tested, key=lambda row: row.times_chosen.value)  # type: ignore[union-attr]
        times = best.times_chosen
        assert times is not None and best.test_error is not None
        lines.append(
            "On the test seeds, which nothing was chosen by, the best published schedule or floor"
            f" as fast as the policy is {best.name}: error {best.test_error.value:.4f},"
            f" {times.value:.1f} times ({times.low:.1f} to {times.high:.1f}) the policy's"
            f" {chosen.test_error.value:.4f}."
        )
    return lines


def _better_solver(chosen: Row, rows: Sequence[Row]) -> list[str]:
    """The other solver as fast that is nearest to the fine solution, if nearer than the choice."""
    nearer = [
        row
        for row in rows
        if not row.candidate and row.reference_error.value < chosen.reference_error.value
    ]
    if not nearer:
        return []
    best = min(nearer, key=lambda row: row.reference_error.value)
    return [
        f"Another solver is nearer to the fine solution at this time: {best.name} has error"
        f" {best.reference_error.value:.4f} at {speed(best):.2f}x, the policy"
        f" {chosen.reference_error.value:.4f} at {speed(chosen):.2f}x. If your images may change,"
        " change the solver first and search on top of it; the policy is for keeping the images"
        " of the solver that you have."
    ]


def held_out(settings: Settings) -> list[str]:
    """Say how many of the test inputs were also used for choosing: prompts or labels may be few."""
    seen = settings.seen()
    if not seen:
        return []
    return [
        f"Of the {settings.test_seeds} test samples, {seen} drew inputs (prompts, labels or images)"
        " that calibration or validation had drawn too: there are only"
        f" {settings.inputs_count}. Noise is new in all of them."
    ]


def part(costs: Costs, steps: int, policy: Policy) -> list[str]:
    """Say which steps of a call ran, where it starts from a picture, and how the policy is called.

    Such a pipe counts itself where it starts, so that it is asked for the policy's own steps.
    """
    if not costs.first(steps):
        return []
    lines = [
        f"Of the {steps} steps of a call {costs.runs(steps)} run here, as it starts from a picture:"
        " times, speed-ups and errors are of these, in all rows. The policy's decisions before them"
        " are keyframes that do not run."
    ]
    count = len(policy.steps)
    if count != steps:
        lines.append(f"The policy is used by calls with num_inference_steps={count}.")
    return lines


def shared(pipe: Pipe) -> list[str]:
    """Say what all calls were given, by the command or by a bundled model."""
    given = getattr(pipe, "call", {})
    if not given:
        return []
    said = ", ".join(f"{name}={given[name]}" if name in plain(pipe) else name for name in given)
    return [f"All calls were given {said}: the policy is for calls like these."]


def speed(row: Row) -> float:
    """Measured speed-up where there is one, else the predicted."""
    return row.speedup.value if row.speedup else row.predicted_speedup


def conclude(
    pipe: Pipe,
    settings: Settings,
    profile: Profile,
    records: Sequence[Record],
    rows: Sequence[Row],
    policy: Policy,
    stage_seconds: Mapping[str, float],
    notes: Sequence[str] = (),
) -> Result:
    """Put together what a search found, with its protocol; `notes` are further remarks."""
    seeds = {purpose: settings.seeds(purpose) for purpose in PURPOSES}
    return Result(
        model=settings.name,
        pipeline=name_of(pipe),
        budget=settings.budget.text,
        command=settings.command,
        date=time.strftime("%Y-%m-%d"),
        steps=settings.steps,
        batch=settings.batch,
        device=profile.device,
        dtype=profile.dtype,
        threads=profile.threads,
        versions=profile.versions,
        seeds={p: f"{s[0]} to {s[-1]}" for p, s in seeds.items()},
        features=policy.measured.fid.features if policy.measured and policy.measured.fid else None,
        reference=f"{fine_steps(pipe, settings.steps)} steps of the same solver",
        rows=list(rows),
        chosen="chosen",
        trials=len(records),
        duplicates=sum("duplicate_of" in r.notes for r in records),
        stage_seconds={stage: round(spent, 1) for stage, spent in stage_seconds.items()},
        remarks=[*remarks(rows), *held_out(settings), *notes],
        policy=policy,
    )
