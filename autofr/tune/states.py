"""How the jobs of a file are: a small state file each, and the lock of who runs them.

Only the process that holds the lock of a file's jobs writes them; anyone may read them: a job that
is `running` where nobody holds the lock has been stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autofr import files, policy_file, reading
from autofr.errors import AutofrError, JobsError
from autofr.policy import Interval
from autofr.tune.jobs import Job, Plan

Name = Literal["waiting", "running", "finished", "short", "failed", "stopped"]
PATIENCE = 2.0  # seconds that a lock is waited for: who asks for the status holds it for a moment


class State(BaseModel):
    """How a job is, as its file says; `asked` is the hash of what it was asked for.

    `short` is a job that has its policy but ran out of time before all of its trials.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Name
    asked: str
    began: float
    seconds: float = 0.0
    stage: str = ""
    reason: str = ""


class Line(BaseModel):
    """What is known of a job: its state, and the numbers of its policy where it has one."""

    model_config = ConfigDict(frozen=True)

    job: str
    state: Name
    folder: str
    budget: str
    seconds: float = 0.0
    stage: str = ""
    reason: str = ""
    speedup: Interval | None = None
    error: float | None = None
    samples: int | None = None


def status(plan: Plan) -> list[Line]:
    """Say how all jobs are; also while another process runs them, or after it was killed."""
    at_work = _at_work(plan)
    return [_line(plan, job, at_work) for job in plan.jobs]


def exit_code(lines: Sequence[Line]) -> int:
    """0 when all jobs are finished, 1 when some are not."""
    return int(any(line.state != "finished" for line in lines))


def _line(plan: Plan, job: Job, at_work: bool) -> Line:
    found = Line(job=job.name, state="waiting", folder=str(job.folder), budget=job.request.budget)
    state = _read(plan, job)
    if state is None:
        return found
    known: dict[str, Any] = state.model_dump(include={"state", "seconds", "stage", "reason"})
    if state.state == "running":
        known["seconds"] = time.time() - state.began if at_work else state.seconds
        known |= {} if at_work else {"state": "stopped", "reason": "its process is gone"}
    if state.state in ("finished", "short"):
        known |= _numbers(job.folder)
    return found.model_copy(update=known)


def _numbers(folder: Path) -> dict[str, Any]:
    """What was measured of the policy in a folder; without it, the job is not finished."""
    try:
        measured = policy_file.load(folder / "policy.json").measured
    except AutofrError as lost:
        return {"state": "stopped", "reason": f"its policy is gone ({lost})"}
    if measured is None:
        return {}
    error = measured.trajectory_error.value
    return {"speedup": measured.speedup, "error": error, "samples": measured.samples}


def _read(plan: Plan, job: Job) -> State | None:
    """The state of a job; None where there is none of what is asked for now."""
    try:
        found = State.model_validate_json(reading.content(place(plan, job, "json"), reading.OWN))
    except (OSError, ValidationError):
        return None
    return found if found.asked == job.asked else None


def place(plan: Plan, job: Job, kind: str) -> Path:
    """The file of a job: its state (json), or what it said (log)."""
    return plan.home / f"{job.name}.{kind}"


def save(plan: Plan, job: Job, state: State) -> State:
    """Write a state, atomically."""
    files.write(place(plan, job, "json"), state.model_dump_json() + "\n")
    return state


@contextmanager
def sole(plan: Plan) -> Iterator[None]:
    """Be the only process that runs these jobs.

    Raises: JobsError when another one does, or nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            plan.home.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(files.locked(plan.home / "lock", PATIENCE))
        except OSError as error:
            raise JobsError(
                f"{plan.out}: cannot write there ({error.strerror}); give another folder with --out"
            ) from None
        if not free:
            raise JobsError(
                f"{plan.path}: another autofr process runs these jobs; `autofr tune {plan.path}"
                " --status` says how far it is"
            )
        yield


def _at_work(plan: Plan) -> bool:
    """Whether some process runs these jobs now."""
    try:
        with files.locked(plan.home / "lock", look=True) as free:
            return not free
    except OSError:
        return False
