"""Laws of running a job file: nothing twice, nothing lost, and anyone can see how far it is."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli import autofr, make_policy, refused
from test_search import few_rows, settings, tiny_pipe, work_clock

from autofr.errors import JobsError
from autofr.policy_file import load
from autofr.search import folder as folders
from autofr.search import search
from autofr.tune import child, job_file, states, tune
from autofr.tune.jobs import Job, Plan
from autofr.tune.processes import GRACE

# A job's process whose search is a few lines; what it does goes by the job's name.
CHILD = """
import os, shutil, sys, time
from pathlib import Path
from autofr.tune import child

def search(order, tell):
    (name, asked), = order["requests"].items()
    with open("ran.txt", "a") as file:
        print(name, os.getpid(), order["seconds"], file=file)
    if name.startswith("dies"):
        os.kill(os.getpid(), 9)
    if name.startswith("fails"):
        raise RuntimeError("this one\\nfails")
    tell(stage="trials", done=1, total=3)
    if name.startswith("waits"):
        while not Path("go").exists():
            time.sleep(0.02)
    Path(asked["out"]).mkdir(parents=True, exist_ok=True)
    shutil.copy("policy.json", asked["out"])
    tell(state="short" if name.startswith("short") else "finished", reason="")

def estimate(order, tell):
    with open("ran.txt", "a") as file:
        print("estimate", os.getpid(), 0, file=file)
    for name in [*order["requests"]][:-1]:
        tell(job=name, seconds=60.0)

child._search, child._estimate = search, estimate
child.main()
"""

DRIVER = """
import functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
from autofr.cli.app import main
from autofr.tune import job_file, tune
job_file.read_checked = job_file.read
tune.run = functools.partial(tune.run, child=[sys.executable, "-c", {child!r}])
main()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the policy that all jobs find."""
    monkeypatch.chdir(tmp_path)
    make_policy(tiny_pipe("ldm")).save(tmp_path / "policy.json")
    return tmp_path


def plan_of(*names: str) -> Plan:
    Path("jobs.toml").write_text("".join(f'[[job]]\nname = "{name}"\n' for name in names))
    return job_file.read(Path("jobs.toml"))


def run(plan: Plan, **options: Any) -> dict[str, str]:
    """Run a plan with the process above; the state of every job."""
    lines = tune.run(plan, child=[sys.executable, "-c", CHILD], **options)
    return {line.job: line.state for line in lines}


def ran() -> list[str]:
    """The jobs that were started, in order."""
    path = Path("ran.txt")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def pids() -> list[int]:
    return [int(line.split()[1]) for line in Path("ran.txt").read_text().splitlines()]


def wait(until: Callable[[], object]) -> None:
    """Wait for what has to come; fails when it does not."""
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@contextmanager
def driver(*words: str) -> Iterator[subprocess.Popen[str]]:
    """`autofr tune jobs.toml` in a process of its own."""
    code = DRIVER.format(child=CHILD)
    root = str(Path(__file__).parents[1])
    born = subprocess.Popen(
        [sys.executable, "-c", code, "tune", "jobs.toml", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    try:
        yield born
    finally:
        born.kill()
        born.communicate()


def status() -> dict[str, str]:
    return {line.job: line.state for line in states.status(job_file.read(Path("jobs.toml")))}


# -- one after another ----------------------------------------------------------------------------


def test_what_is_finished_is_skipped() -> None:
    """All jobs run in the order of the file; the same command again runs none of them."""
    plan = plan_of("b", "a", "c")
    assert set(run(plan).values()) == {"finished"}
    assert ran() == ["b", "a", "c"]
    assert states.exit_code(states.status(plan)) == 0
    run(plan)
    assert ran() == ["b", "a", "c"]


def test_a_job_that_fails_does_not_stop_the_others() -> None:
    """Errors and killed processes end one job, with their reason; the next command tries again."""
    plan = plan_of("fails", "dies", "good", "short")
    assert [*run(plan).values()] == ["failed", "failed", "finished", "short"]
    first, second, *_ = states.status(plan)
    assert first.reason == "RuntimeError: this one fails"
    assert "SIGKILL" in second.reason and "dies.log" in second.reason
    assert states.exit_code(states.status(plan)) == 1
    assert "fails\n" in (plan.home / "fails.log").read_text()  # the traceback
    run(plan)
    assert Counter(ran()) == {"fails": 2, "dies": 2, "short": 2, "good": 1}


def test_another_request_under_the_same_name_is_run() -> None:
    """A job that was changed is not finished; neither is one whose policy is gone."""
    plan = plan_of("a", "b")
    run(plan)
    Path("jobs.toml").write_text('[[job]]\nname = "a"\ntrials = 9\n[[job]]\nname = "b"\n')
    assert status() == {"a": "waiting", "b": "finished"}
    Path("results/b/policy.json").unlink()
    assert status() == {"a": "waiting", "b": "stopped"}


def test_no_job_starts_when_the_time_is_up() -> None:
    """What has not started waits; who starts is told how many seconds are left."""
    plan = plan_of("a", "b")
    assert run(plan, seconds=0) == {"a": "waiting", "b": "waiting"}
    assert ran() == [] and states.exit_code(states.status(plan)) == 1
    run(plan, seconds=1000)
    left = [float(line.split()[2]) for line in Path("ran.txt").read_text().splitlines()]
    assert 0 < left[1] < left[0] <= 1000


def test_states_are_told_from_half_files() -> None:
    """A state file that cannot be read says nothing: the job waits."""
    plan = plan_of("a")
    run(plan)
    whole = (plan.home / "a.json").read_bytes()
    (plan.home / "a.json").write_bytes(whole[:20])
    assert status() == {"a": "waiting"}


# -- stopping and watching ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_it_is_watched_and_stopped_from_outside(number: int) -> None:
    """Others see what runs, and cannot run it too; a signal stops it, and the rest comes later."""
    plan = plan_of("a", "waits", "c")
    with driver() as born:
        wait(lambda: status().get("waits") == "running" and states.status(plan)[1].stage)
        assert status() == {"a": "finished", "waits": "running", "c": "waiting"}
        assert states.status(plan)[1].stage == "trials 1/3"
        with pytest.raises(JobsError, match="another autofr process runs these jobs"):
            run(plan)
        born.send_signal(number)
        out, err = born.communicate(timeout=60 + GRACE)
    assert born.returncode == 130 and "the same command resumes" in err
    assert "stopped" in out and "Traceback" not in err
    assert status() == {"a": "finished", "waits": "stopped", "c": "waiting"}
    assert not any(map(alive, pids()))
    Path("go").touch()
    assert set(run(plan).values()) == {"finished"}
    assert Counter(ran()) == {"a": 1, "waits": 2, "c": 1}


def test_kill_9_leaves_nothing_behind_and_loses_nothing() -> None:
    """Its job's process ends too, the status says so, and the same command does the rest once."""
    plan = plan_of("a", "waits", "c")
    with driver() as born:
        wait(lambda: status().get("waits") == "running" and len(ran()) == 2)
        born.kill()
        born.wait()
        wait(lambda: not any(map(alive, pids())))
    assert status() == {"a": "finished", "waits": "stopped", "c": "waiting"}
    assert states.status(plan)[1].reason == "its process is gone"
    Path("go").touch()
    with driver() as born:
        out, _ = born.communicate(timeout=60)
    assert born.returncode == 0 and "3 finished" in out
    assert Counter(ran()) == {"a": 1, "waits": 2, "c": 1}


# -- the search of a job --------------------------------------------------------------------------


def order_of(job: Job, plan: Plan, seconds: float | None = None) -> dict[str, Any]:
    requests = {job.name: job.request.model_dump(mode="json")}
    return {"requests": requests, "seconds": seconds, "shelf": str(plan.shelf)}


@contextmanager
def small() -> Iterator[Counter[str]]:
    """Searches of seconds; counts what is measured."""
    few, count = settings(), Counter[str]()
    names = [f"{purpose}_seeds" for purpose in ("calibration", "trial", "validation", "test")]

    def counted(name: str) -> Callable[..., Any]:
        measure = getattr(search, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return measure(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, work_clock(), few_rows():
        kind = functools.partial(folders.Settings, **{name: getattr(few, name) for name in names})
        patch.setattr(folders, "Settings", kind)
        patch.setattr("autofr.report.report.write", lambda *_: [])
        for name in ("profile", "calibrate"):
            patch.setattr(search, name, counted(name))
        yield count


def tiny_file(budget: str, trials: int = 1) -> str:
    """A table of one tiny model."""
    tiny_pipe("ldm").save_pretrained("tiny")
    return (
        f'[[job]]\nname = "n{trials}"\nmodel = "./tiny"\nsteps = 6\nbatch = 2\nthreads = 1\n'
        f"trials = {trials}\nbudget = {budget}\n"
    )


def tiny_plan() -> Plan:
    """Two budgets of one tiny model."""
    Path("jobs.toml").write_text(tiny_file('["1.3x", "1.5x"]'))
    return job_file.read(Path("jobs.toml"))


def test_jobs_of_one_pipe_are_measured_once() -> None:
    """Profile and calibration are shared by budgets; a job whose time is up stops before trials."""
    plan, told = tiny_plan(), []
    first, second = plan.jobs

    def stop(**event: Any) -> None:
        if event.get("stage") == "teacher":
            raise StopIteration

    with small() as count:
        with pytest.raises(StopIteration):
            child._search(order_of(first, plan), stop)
        assert count == {"profile": 1, "calibrate": 1}
        with pytest.raises(child.TimeUpError):
            child._search(order_of(second, plan, 0.0), lambda **event: None)
        child._search(order_of(second, plan), lambda **event: told.append(event))
        assert told[-1]["state"] == "finished"
        assert count == {"profile": 1, "calibrate": 1}
    kept = [job.folder / "study/profile.json" for job in plan.jobs]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    made = load(second.folder / "policy.json").provenance
    assert made and made.command == second.request.command


@pytest.mark.parametrize(
    ("moments", "state"),
    [([1, 2, 3, 4], "finished"), ([1, 2, 30, 40], "short"), ([1, 2, 3, 40], "finished")],
    ids=["in time", "trials cut", "late test"],
)
def test_a_job_says_that_its_trials_were_cut(
    moments: list[float], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran out of time among its trials has a policy, and is not finished."""
    plan, now, told = tiny_plan(), [0.0], []
    ready = types.SimpleNamespace(pipe=None, settings=settings(), folder=Path(), judge=None)

    def job_run(*args: Any) -> None:
        deadline, on_progress = args[1].deadline, args[4]
        assert deadline == 10.0
        for now[0], stage in zip(moments, ("teacher", "trials", "trials", "test"), strict=True):
            on_progress(stage, 0, 1)

    monkeypatch.setattr(child, "prepare", lambda request, command: ready)
    monkeypatch.setattr("autofr.job.run", job_run)
    monkeypatch.setattr(child, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    child._search(order_of(plan.jobs[0], plan, 10.0), lambda **event: told.append(event))
    assert told[-1]["state"] == state


def test_what_is_expected_says_what_is_unknown() -> None:
    """A job whose budget is met already has no time; the others have, and more trials take more."""
    Path("jobs.toml").write_text(tiny_file('["1.3x", "90s"]') + tiny_file('"1.3x"', 50))
    told: list[dict[str, Any]] = []
    plan = job_file.read(Path("jobs.toml"))
    requests = {job.name: job.request.model_dump(mode="json") for job in plan.jobs}
    with small():
        child._estimate({"requests": requests}, lambda **event: told.append(event))
    few, met, many = told
    assert 0 < few["seconds"] < many["seconds"]
    assert "already takes only" in met["unknown"]
    assert not Path("results").exists()


def test_jobs_of_one_pipe_are_timed_once() -> None:
    """A dry run starts a process per pipe, says what a process did not, and writes nothing."""
    Path("jobs.toml").write_text('[[job]]\nbatch = [1, 2]\nbudget = ["2x", "3x"]\n')
    plan = job_file.read(Path("jobs.toml"))
    found = tune.foresee(plan, child=[sys.executable, "-c", CHILD])
    assert [one.job for one in found] == [*plan.jobs]
    assert [one.seconds for one in found] == [60.0, None, 60.0, None]
    assert "before it could say" in found[1].reason
    assert ran() == ["estimate", "estimate"]
    assert not Path("results").exists()
    run(plan)
    before = ran()
    assert {one.seconds for one in tune.foresee(plan)} == {0.0}
    assert ran() == before


# -- the command line -----------------------------------------------------------------------------


def test_the_status_is_a_table_and_an_exit_code() -> None:
    """It runs nothing; the same numbers come as JSON."""
    run(plan_of("a", "fails"))
    ran_before = ran()
    found = autofr("tune", "jobs.toml", "--status")
    assert found.code == 1 and "1 finished, 1 failed" in found.out
    assert "RuntimeError: this one fails" in found.out
    facts = json.loads(autofr("tune", "jobs.toml", "--status", "--json").out)
    assert [one["state"] for one in facts] == ["finished", "failed"]
    assert ran() == ran_before
    plan_of("a")
    assert autofr("tune", "jobs.toml", "--status").code == 0


def test_what_cannot_be_started_is_refused_before_anything_is() -> None:
    """Exit code 2, all problems in one message, and no folder of results."""
    Path("jobs.toml").write_text('[[job]]\nmodel = "ldm5"\n[[job]]\nbudget = "0.5x"\n')
    refused(autofr("tune", "jobs.toml"), "2 things are wrong", "ldm5", "above 1x")
    assert not Path("results").exists()
    refused(autofr("tune", "none.toml"), "none.toml", "cannot be read")
    plan_of("a")
    refused(autofr("tune", "jobs.toml", "--status", "--dry-run"), "--status")
    Path("results").write_text("in the way")
    refused(autofr("tune", "jobs.toml"), "cannot write there", "--out")
