"""Laws of whole jobs: what a search leaves in its folder, that it resumes, what others leave."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_search import (
    STEPS,
    few_rows,
    logged,
    settings,
    tiny_pipe,
    trials_of,
    work_clock,
)

from autofr import job
from autofr.errors import BudgetError, ModelError, PolicyError, RunFolderError
from autofr.measure.costs import parse_budget
from autofr.policy_file import load
from autofr.report.report import load_profile, load_result
from autofr.search.folder import STATE, run_folder, spec_of
from autofr.search.result import Result


@dataclass(frozen=True)
class Done:
    """A job that has ended: its folder, its result and the stages that it told of."""

    folder: Path
    result: Result
    stages: list[str]


def search_in(folder: Path) -> Done:
    """Run a search as a job."""
    told: list[str] = []
    with work_clock(), few_rows():
        result = job.run(
            tiny_pipe("ldm"),
            settings(),
            folder,
            on_progress=lambda stage, done, total: told.append(stage),
        )
    return Done(folder, result, list(dict.fromkeys(told)))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A search that has ended, run once."""
    return search_in(tmp_path_factory.mktemp("results") / "run")


# -- search ---------------------------------------------------------------------------------------


def test_a_search_leaves_everything_in_its_folder(done: Done) -> None:
    """Policy, profile, result, report and trials lie there, whole, and belong together."""
    names = {path.name for path in done.folder.iterdir()}
    assert names >= {"policy.json", "profile.json", "result.json", "report.md", "trials.csv"}
    assert names >= {"report.html", "before.png", "after.png"}
    assert not any(name.endswith(".part") for name in names)
    assert load(done.folder / "policy.json") == done.result.policy
    assert load_result(done.folder) == done.result
    kept = load_profile(done.folder / STATE)
    assert load_profile(done.folder) == kept is not None


def test_a_search_tells_of_its_report_last(done: Done) -> None:
    """Who watches sees the stages of the search, and then that the report is written."""
    assert done.stages[0] == "profile" and done.stages[-1] == "report"


def test_the_same_search_again_resumes(done: Done) -> None:
    """A finished job runs no new trial, and ends with the same policy."""
    before, table = trials_of(done.folder).records(), (done.folder / "trials.csv").read_bytes()
    with logged() as log:
        again = search_in(done.folder)
    assert again.result.policy.digest == done.result.policy.digest
    assert log.scored("trials") == []
    assert trials_of(done.folder).records() == before
    assert (done.folder / "trials.csv").read_bytes() == table


def test_a_folder_has_one_job_at_a_time(tmp_path: Path) -> None:
    """Where another job is working the second is refused, and writes nothing."""
    pipe, asked = tiny_pipe("ldm"), settings()
    with run_folder(tmp_path, spec_of(pipe, asked)):
        there = sorted(tmp_path.rglob("*"))
        with pytest.raises(RunFolderError, match="another autofr process"):
            job.run(pipe, asked, tmp_path)
        assert sorted(tmp_path.rglob("*")) == there


# -- estimate -------------------------------------------------------------------------------------


def test_an_estimate_writes_nothing(tmp_path: Path) -> None:
    """It says budget, folder and time, and leaves no trace on disk."""
    with work_clock():
        said = job.estimate(tiny_pipe("ldm"), settings(), tmp_path / "run")
    assert all(text in said for text in ("tiny", "1.3x", str(tmp_path / "run")))
    assert re.search(r"\nexpected time: about (1 minute|[2-9] minutes|\d\d+ minutes)$", said)
    assert list(tmp_path.iterdir()) == []


def estimate_of(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """The estimate of a search whose steps take ten seconds each."""
    # 12 steps and 2 steps, with half a second around them; what else runs disturbs some
    times = iter([300.0, 120.5, 121.0, 20.5, 90.0, 20.5])
    monkeypatch.setattr(job, "seconds", lambda *_: next(times))
    return job.estimate(tiny_pipe("ldm"), settings(**changes), Path("run"))


def test_an_estimate_says_what_the_budget_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a call follows from its steps, and the budget's from the time of a call."""
    said = estimate_of(monkeypatch, budget=parse_budget("1.5x"))
    assert STEPS == 6 and "60000 ms per call here" in said
    assert "at most 40000 ms per call" in said


def test_more_trials_are_expected_to_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial costs its rollouts, each faster than the teacher's by the budget."""
    few, many = (int(estimate_of(monkeypatch, trials=trials).split()[-2]) for trials in (1, 14))
    assert many - few == pytest.approx(13 * (4 / 2 + 2) / 1.3, abs=1)


def test_a_budget_that_is_met_already_is_refused_by_the_estimate(tmp_path: Path) -> None:
    """There is nothing to foresee where the pipe is fast enough."""
    asked = settings(budget=parse_budget("90s"))
    with work_clock(), pytest.raises(BudgetError, match="already takes only"):
        job.estimate(tiny_pipe("ldm"), asked, tmp_path)


# -- profile --------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """What a job leaves in a folder is what it returned; its pictures are named."""
    drawn = [tmp_path / "latency.png"]
    monkeypatch.setattr("autofr.report.profile_pictures.profile_pictures", lambda *_: drawn)
    with work_clock():
        found, paths = job.profile(tiny_pipe("ldm"), tmp_path, STEPS, 2, range(2))
    assert load_profile(tmp_path) == found
    assert paths == drawn


def test_a_damaged_profile_is_named_with_the_way_out(done: Done, tmp_path: Path) -> None:
    """Half of a file is never taken for none; no file is none."""
    assert load_profile(tmp_path) is None
    whole = (done.folder / "profile.json").read_bytes()
    (tmp_path / "profile.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match="delete it") as refusal:
        load_profile(tmp_path)
    assert str(tmp_path / "profile.json") in str(refusal.value)
    assert "validation error" not in str(refusal.value)


# -- evaluate -------------------------------------------------------------------------------------


def test_a_policy_is_measured_again_on_other_seeds(done: Done) -> None:
    """The numbers of a policy are those of the seeds that were given; its prediction is kept."""
    policy = done.result.policy
    with work_clock():
        found = job.evaluate(tiny_pipe("ldm"), policy, range(70, 74), 2)
    assert policy.measured is not None
    assert found.seeds == "70 to 73" and found.samples == 4
    assert found.predicted_speedup == policy.measured.predicted_speedup
    assert found.speedup.value == pytest.approx(policy.measured.speedup.value)


@pytest.mark.parametrize(
    "change",
    [{"batch": 3}, {"device": "another"}, {"dtype": "float16"}, {"skipped_steps": 1}],
    ids=str,
)
def test_a_prediction_for_other_conditions_is_not_repeated(
    done: Done, monkeypatch: Any, change: dict[str, Any]
) -> None:
    """Predicted speed-up and memory are of one device, batch and type of number."""
    policy = done.result.policy
    assert policy.measured is not None
    there = policy.measured.model_copy(update=change)
    other = policy.model_copy(update={"measured": there})
    with work_clock():
        found = job.evaluate(tiny_pipe("ldm"), other, range(70, 72), 2)
    assert found.predicted_speedup is None and found.predicted_bytes is None


def test_a_prediction_for_another_call_is_not_repeated(done: Done) -> None:
    """A strength or a guidance that was not the search's has another price."""
    policy = done.result.policy
    assert policy.provenance is not None and policy.provenance.call == {}
    made = policy.provenance.model_copy(update={"call": {"strength": 0.4}})
    with work_clock():
        found = job.evaluate(
            tiny_pipe("ldm"), policy.model_copy(update={"provenance": made}), range(70, 72), 2
        )
    assert found.predicted_speedup is None and found.predicted_bytes is None


def test_steps_that_a_scheduler_does_not_take_are_refused_by_the_estimate(tmp_path: Path) -> None:
    """A dry run says so too, before it times anything."""
    with work_clock(), pytest.raises(ModelError, match="cannot take 1001 steps"):
        job.estimate(tiny_pipe("ldm"), settings(steps=1001), tmp_path)


def test_a_policy_of_another_pipe_is_not_timed(done: Done, monkeypatch: Any) -> None:
    """A policy that does not fit is refused before any work."""
    monkeypatch.setattr(
        "autofr.search.verify.time_policy", lambda *_, **__: pytest.fail("it was timed")
    )
    model = done.result.policy.model
    other = model.model_copy(update={"fingerprint": "0" * len(model.fingerprint)})
    policy = done.result.policy.model_copy(update={"model": other})
    with pytest.raises(PolicyError):
        job.evaluate(tiny_pipe("ldm"), policy, range(2), 2)
