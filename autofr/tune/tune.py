"""Run the jobs of a file, each in a process of its own, or say how long that will take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autofr.tune.jobs import Job, Plan
from autofr.tune.processes import CHILD, death, events, process, stoppable
from autofr.tune.states import Line, State, place, save, sole, status

Tell = Callable[[Job, str, int, int], None]
EVERY = 2.0  # seconds between two notes of how far a job is


def run(
    plan: Plan,
    seconds: float | None = None,
    tell: Tell = lambda job, stage, done, total: None,
    child: Sequence[str] = CHILD,
) -> list[Line]:
    """Run what is not finished, in order; a job that fails does not stop the others.

    After `seconds` no job starts and the running one starts no trial. SIGTERM and Ctrl-C stop the
    running job nicely. `child` is the command of a job's process.
    Raises: JobsError when results cannot be written or another process runs these jobs;
        KeyboardInterrupt when it was stopped.
    """
    ends = None if seconds is None else time.monotonic() + seconds
    with sole(plan), stoppable():
        for job, line in zip(plan.jobs, status(plan), strict=True):
            left = None if ends is None else ends - time.monotonic()
            if left is not None and left <= 0:
                break
            if line.state != "finished":
                _run(plan, job, left, tell, child)
    return status(plan)


def _run(plan: Plan, job: Job, left: float | None, tell: Tell, child: Sequence[str]) -> None:
    """Run one job to whatever end, and note it."""
    now = save(plan, job, State(state="running", asked=job.asked, began=time.time()))
    end = final = {"state": "stopped", "reason": ""}
    order = {"do": "search", "seconds": left, "shelf": str(plan.shelf)}
    try:
        with place(plan, job, "log").open("ab") as log, process(child, order, [job], log) as born:
            for event in events(born):
                if "state" in event:
                    final = event
                    continue
                stage, done, total = event["stage"], event["done"], event["total"]
                tell(job, stage, done, total)
                now = _progress(plan, job, now, f"{stage} {done}/{total}")
            died = {"state": "failed", "reason": death(born.wait(), log.name)}
            end = died if born.returncode else final
    except OSError as error:
        end = {"state": "failed", "reason": f"its process cannot run ({error})"}
    finally:
        last = now.model_copy(update=end | {"seconds": time.time() - now.began})
        save(plan, job, last)


def _progress(plan: Plan, job: Job, now: State, stage: str) -> State:
    """Note how far a job is: at a new stage, and from time to time."""
    seconds = time.time() - now.began
    if stage.split()[0] == now.stage.partition(" ")[0] and seconds - now.seconds < EVERY:
        return now
    return save(plan, job, now.model_copy(update={"stage": stage, "seconds": seconds}))


# -- expected time --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """How long a job is expected to take in seconds; None, and why, where that is unknown."""

    job: Job
    seconds: float | None
    reason: str = ""


def foresee(plan: Plan, child: Sequence[str] = CHILD) -> list[Expected]:
    """Time a few calls for every pipe, and say how long what is not finished will take.

    Writes nothing. Searches that differ in budget, space and trials only are timed once.
    """
    found = {line.job: Expected(job, 0.0, "finished") for job, line in _finished(plan)}
    groups: dict[str, list[Job]] = {}
    for job in plan.jobs:
        if job.name not in found:
            same = job.request.model_copy(
                update={"budget": "", "space": "", "time_limit": None, "trials": 1, "out": None}
            )
            groups.setdefault(same.model_dump_json(), []).append(job)
    with stoppable():
        for jobs in groups.values():
            found |= {one.job.name: one for one in _foreseen(jobs, child)}
    return [found[job.name] for job in plan.jobs]


def _finished(plan: Plan) -> list[tuple[Job, Line]]:
    lines = zip(plan.jobs, status(plan), strict=True)
    return [(job, line) for job, line in lines if line.state == "finished"]


def _foreseen(jobs: Sequence[Job], child: Sequence[str]) -> list[Expected]:
    """What one process says of jobs that share a pipe."""
    said: dict[str, dict[str, Any]] = {}
    with open(os.devnull, "ab") as log, process(child, {"do": "estimate"}, jobs, log) as born:
        said = {event["job"]: event for event in events(born) if "job" in event}
    gone = {"unknown": "its process ended before it could say"}
    found = [(job, said.get(job.name, gone)) for job in jobs]
    return [Expected(job, one.get("seconds"), one.get("unknown", "")) for job, one in found]
