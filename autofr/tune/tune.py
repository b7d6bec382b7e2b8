"""Run the jobs of a file one after another, each in a process of its own, and say how they are.

Every job has a small state file. Only the process that holds the lock of a file's jobs writes them;
anyone may read them: a job that is `running` where nobody holds the lock has been stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autofr import files, policy_file, reading
from autofr.errors import AutofrError, JobsError
from autofr.policy import Interval
from autofr.tune.jobs import Job, Plan

Name = Literal["waiting", "running", "finished", "short", "failed", "stopped"]
Tell = Callable[[Job, str, int, int], None]
CHILD = (sys.executable, "-P", "-m", "autofr.tune.child")
GRACE = 30.0  # seconds that a job has to stop
PATIENCE = 2.0  # seconds that a lock is waited for: who asks for the status holds it for a moment
EVERY = 2.0  # seconds between two notes of how far a job is


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


# -- status ---------------------------------------------------------------------------------------


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
        found = State.model_validate_json(reading.content(_place(plan, job, "json"), reading.OWN))
    except (OSError, ValidationError):
        return None
    return found if found.asked == job.asked else None


def _place(plan: Plan, job: Job, kind: str) -> Path:
    return plan.home / f"{job.name}.{kind}"


def _save(plan: Plan, job: Job, state: State) -> State:
    """Write a state, atomically."""
    files.write(_place(plan, job, "json"), state.model_dump_json() + "\n")
    return state


# -- running --------------------------------------------------------------------------------------


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
    with _sole(plan), _stoppable():
        for job, line in zip(plan.jobs, status(plan), strict=True):
            left = None if ends is None else ends - time.monotonic()
            if left is not None and left <= 0:
                break
            if line.state != "finished":
                _run(plan, job, left, tell, child)
    return status(plan)


def _run(plan: Plan, job: Job, left: float | None, tell: Tell, child: Sequence[str]) -> None:
    """Run one job to whatever end, and note it."""
    now = _save(plan, job, State(state="running", asked=job.asked, began=time.time()))
    end = final = {"state": "stopped", "reason": ""}
    order = {"do": "search", "seconds": left, "shelf": str(plan.shelf)}
    try:
        with _place(plan, job, "log").open("ab") as log, _process(child, order, [job], log) as born:
            for event in _events(born):
                if "state" in event:
                    final = event
                    continue
                stage, done, total = event["stage"], event["done"], event["total"]
                tell(job, stage, done, total)
                now = _progress(plan, job, now, f"{stage} {done}/{total}")
            died = {"state": "failed", "reason": _death(born.wait(), log.name)}
            end = died if born.returncode else final
    except OSError as error:
        end = {"state": "failed", "reason": f"its process cannot run ({error})"}
    finally:
        last = now.model_copy(update=end | {"seconds": time.time() - now.began})
        _save(plan, job, last)


def _progress(plan: Plan, job: Job, now: State, stage: str) -> State:
    """Note how far a job is: at a new stage, and from time to time."""
    seconds = time.time() - now.began
    if stage.split()[0] == now.stage.partition(" ")[0] and seconds - now.seconds < EVERY:
        return now
    return _save(plan, job, now.model_copy(update={"stage": stage, "seconds": seconds}))


def _death(code: int, log: str) -> str:
    """Why a process ended that did not say so itself."""
    if code < 0:
        name = {one.value: one.name for one in signal.Signals}.get(-code, f"signal {-code}")
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}; see {log}"
    return f"its process ended with exit code {code}; see {log}"


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
    with _stoppable():
        for jobs in groups.values():
            found |= {one.job.name: one for one in _foreseen(jobs, child)}
    return [found[job.name] for job in plan.jobs]


def _finished(plan: Plan) -> list[tuple[Job, Line]]:
    lines = zip(plan.jobs, status(plan), strict=True)
    return [(job, line) for job, line in lines if line.state == "finished"]


def _foreseen(jobs: Sequence[Job], child: Sequence[str]) -> list[Expected]:
    """What one process says of jobs that share a pipe."""
    said: dict[str, dict[str, Any]] = {}
    with open(os.devnull, "ab") as log, _process(child, {"do": "estimate"}, jobs, log) as born:
        said = {event["job"]: event for event in _events(born) if "job" in event}
    gone = {"unknown": "its process ended before it could say"}
    events = [(job, said.get(job.name, gone)) for job in jobs]
    return [Expected(job, e.get("seconds"), e.get("unknown", "")) for job, e in events]


# -- processes ------------------------------------------------------------------------------------


@contextmanager
def _process(
    child: Sequence[str], order: dict[str, Any], jobs: Sequence[Job], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A job's process with its order; it is gone when the block is left, however that happens."""
    parent = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    born = subprocess.Popen(
        child,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,  # Ctrl-C comes to the driver alone
    )
    assert born.stdin and born.stdout
    requests = {job.name: job.request.model_dump(mode="json") for job in jobs}
    try:
        with suppress(BrokenPipeError):  # it ended already; its exit code says why
            born.stdin.write(json.dumps(order | {"requests": requests}).encode() + b"\n")
            born.stdin.flush()
        yield born
    finally:
        _end(born)


def _end(born: subprocess.Popen[bytes]) -> None:
    """Ask a process to stop, and stop it when it does not, or at a second Ctrl-C."""
    assert born.stdin and born.stdout
    try:
        if born.poll() is None:
            born.terminate()
            born.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        born.kill()
    finally:
        born.wait()
        born.stdout.close()
        with suppress(OSError):
            born.stdin.close()


def _events(born: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What a process tells, line by line, to its end."""
    assert born.stdout
    for line in born.stdout:
        with suppress(ValueError):  # half a line of a process that was killed
            yield json.loads(line)


# -- one driver -----------------------------------------------------------------------------------


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM stop what Ctrl-C stops."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _sole(plan: Plan) -> Iterator[None]:
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
