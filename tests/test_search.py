"""Laws of the whole search, on a tiny pipe and a clock that follows the network's arithmetic."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from conftest import ddim, tiny_vae

from autofr.errors import BudgetError, MeasurementError, ModelError, RunFolderError
from autofr.measure import calibration, latency, profiling
from autofr.measure.costs import parse_budget
from autofr.mix import Constant
from autofr.plan import baselines, correction
from autofr.policy import Interval, Policy
from autofr.policy_file import load
from autofr.runtime import guidance
from autofr.runtime.sampler import compose, reuse
from autofr.search import choose, evaluate, search, trials, verify
from autofr.search.compare import AS_FAST, held_out, remarks, rivals, speed
from autofr.search.evaluate import Evaluator
from autofr.search.folder import PURPOSES, STATE, Settings, run_folder, spec_of
from autofr.search.ledger import Ledger, Record
from autofr.search.result import Result, Row
from autofr.search.search import Search
from autofr.search.space import (
    Direct,
    DirectAxes,
    Planned,
    PlannedAxes,
    Space,
    Uniform,
    UniformAxes,
)
from autofr.search.table import SAFETY
from autofr.search.trial import dump
from autofr.search.verify import Verdict

ROOT = Path(__file__).parents[1]
STEPS = 6
AXES = {"max_gap": (2, 3), "mix": ("fit2", "fit1"), "masks": ("all", "jump"), "rollouts": (1, 1)}
SPACE = Planned(name="tiny", kind="planned", axes=PlannedAxes(phase=(-1.0, 1.0), **AXES))
ONE = PlannedAxes(max_gap=(3, 3), mix=("fit1",), masks=("jump",))
SINGLE = Planned(name="single", kind="planned", axes=ONE)  # holds one policy only


# -- a tiny pipe, and time that passes with its work ----------------------------------------------


def tiny_unet() -> diffusers.UNet2DModel:
    """Two levels with one ResNet block each, attention on the lower one."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return unet.eval().requires_grad_(False)


def tiny_pipe(kind: str = "ddim") -> diffusers.DiffusionPipeline:
    """The smallest pipes that have every kind of point: ddim, or ldm with an autoencoder."""
    if kind == "ldm":
        pipe = diffusers.LDMPipeline(unet=tiny_unet(), vqvae=tiny_vae(), scheduler=ddim())
    else:
        pipe = diffusers.DDIMPipeline(unet=tiny_unet(), scheduler=ddim())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(**changes: Any) -> Settings:
    """A search of seconds; 1.3x lets four of the six steps through."""
    few = Settings(
        name="tiny",
        budget=parse_budget("1.3x"),
        space=SPACE,
        steps=STEPS,
        batch=2,
        trials=5,
        calibration_seeds=2,
        trial_seeds=4,
        validation_seeds=4,
        test_seeds=4,
        command="autofr search --model tiny",
    )
    return replace(few, **changes)


class WorkClock:
    """A clock on which a multiplication takes a nanosecond and nothing else takes any time."""

    def __init__(self) -> None:
        self.work = 0

    def perf_counter(self) -> float:
        return self.work * 1e-9

    process_time = perf_counter

    def counted(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The function, with its multiplications counted."""

        def call(given: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = function(given, weight, *args, **kwargs)
            self.work += found.numel() * weight[0].numel()
            return found

        return call


@contextmanager
def work_clock() -> Iterator[WorkClock]:
    """Let everything that autofr times pass on a `WorkClock`: exact, and the same everywhere.

    What is exact needs no repetition.
    """
    clock = WorkClock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(latency.paired.__kwdefaults__, "min_pairs", 2)
        patch.setitem(latency.measure_costs.__kwdefaults__, "rounds", 3)
        for name in ("conv2d", "linear"):
            counted = clock.counted(getattr(torch.nn.functional, name))
            patch.setattr(torch.nn.functional, name, counted)
        for module in (latency, profiling, evaluate):
            patch.setattr(module, "time", clock)
        yield clock


@contextmanager
def few_rows() -> Iterator[None]:
    """Publish two schedules only, where the rows are not what a law is about."""

    def published(masks: Any, costs: Any, steps: int, seconds: float) -> list[baselines.Draft]:
        return [baselines.fewer_steps(4), baselines.frdiff(steps, 2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "published", published)
        yield


@dataclass
class Log:
    """What a run did: (stage, digest) of every score, (stage, seeds, steps) of every draw."""

    stage: str
    scores: list[tuple[str, str]]
    draws: list[tuple[str, tuple[int, ...], int]]

    def scored(self, stage: str) -> list[str]:
        """Digests of the policies that were rolled out in a stage."""
        return [digest for there, digest in self.scores if there == stage]


@contextmanager
def logged() -> Iterator[Log]:
    """Write down every score and every draw inside the block."""
    log = Log("", [], [])
    stage, score = Search._timed, Evaluator.score

    def timed(self: Search, name: str, work: Callable[[], Any]) -> Any:
        log.stage = name
        return stage(self, name, work)

    def scored(self: Evaluator, policy: Policy, seeds: int | None = None) -> Any:
        log.scores.append((log.stage, policy.digest))
        return score(self, policy, seeds)

    def spy(draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(pipe: Any, seeds: Any, steps: int) -> Any:
            log.draws.append((log.stage, tuple(seeds), steps))
            return draw(pipe, seeds, steps)

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_timed", timed)
        patch.setattr(Evaluator, "score", scored)
        for module in (calibration, correction, guidance, evaluate, verify, profiling):
            patch.setattr(module, "draw", spy(module.draw))
        yield log


def stop_at(stage: str) -> Callable[[str, int, int], None]:
    """Progress that ends the run where a stage begins."""

    def on_progress(name: str, done: int, total: int) -> None:
        if name == stage:
            raise StopIteration(stage)

    return on_progress


def trials_of(folder: Path) -> Ledger:
    """Open the ledger of a run that has stopped."""
    return Ledger(folder, 0, "tiny")


def run_in(folder: Path, asked: Settings) -> search.Finding:
    """Run a search as the command line does: as the folder's owner."""
    pipe = tiny_pipe()
    with work_clock(), few_rows(), run_folder(folder, spec_of(pipe, asked)):
        return Search(pipe, asked, folder).run()


# -- a finished search ----------------------------------------------------------------------------


@dataclass
class Finished:
    """A search that has ended, with everything that it left."""

    pipe: diffusers.DiffusionPipeline
    settings: Settings
    folder: Path
    outcome: search.Finding
    log: Log

    @property
    def chosen(self) -> Row:
        """The row of the chosen policy."""
        return next(row for row in self.outcome.result.rows if row.group == "chosen")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A search over all published rows, run once."""
    pipe, asked, folder = tiny_pipe("ldm"), settings(), tmp_path_factory.mktemp("run")
    with work_clock(), logged() as log:
        outcome = Search(pipe, asked, folder).run()
    return Finished(pipe, asked, folder, outcome, log)


def test_the_policy_that_is_found_loads_and_applies(finished: Finished, tmp_path: Path) -> None:
    """What a search ends with is a file that a stock pipe can follow."""
    found = finished.outcome.result.policy
    found.save(tmp_path / "policy.json")
    again = load(tmp_path / "policy.json")
    assert again == found
    pipe = tiny_pipe("ldm")
    with reuse(pipe, again) as patch:
        images = pipe(batch_size=1, num_inference_steps=STEPS, output_type="np").images
        assert patch.counts["key"] == len(found.keyframes)
    assert images.shape == (1, 32, 32, 3)


def test_the_policy_says_what_was_measured_and_where_it_comes_from(finished: Finished) -> None:
    """Numbers travel with their protocol."""
    found = finished.outcome.result.policy
    assert found.measured is not None and found.provenance is not None
    assert found.measured.samples == 4 and found.measured.batch == 2
    assert found.provenance.command == finished.settings.command
    assert found.provenance.trials == finished.outcome.result.trials


def test_the_budget_is_kept_by_measurement(finished: Finished) -> None:
    """The lower end of the measured speed-up is at least what was asked."""
    measured = finished.outcome.result.policy.measured
    assert measured is not None and measured.speedup.low >= 1.3


def test_the_prediction_is_what_is_measured(finished: Finished) -> None:
    """Where time is arithmetic alone, the cost model's speed-up is the real one."""
    measured = finished.outcome.result.policy.measured
    assert measured is not None
    assert measured.predicted_speedup == pytest.approx(measured.speedup.value, rel=0.03)


def test_every_planned_trial_meets_the_budget_by_construction(finished: Finished) -> None:
    """Whatever the algorithm proposes, the prediction stays below the budget."""
    costs = finished.outcome.profile.costs
    limit = SAFETY * costs.teacher(STEPS) / 1.3
    planned = [r for r in trials_of(finished.folder).records() if "row" not in r.notes]
    kept = [r for r in planned if "duplicate_of" not in r.notes]
    assert len(planned) >= finished.settings.trials and kept
    for record in kept:
        policy = Policy.model_validate(record.notes["policy"], strict=False)
        spent = costs.of_call(verify.policy_steps(policy))
        assert record.notes["seconds"] == pytest.approx(spent)
        assert spent <= limit * (1 + 1e-9)


def test_no_row_of_the_table_beats_the_choice(finished: Finished) -> None:
    """The rows are candidates, so no row as fast as the budget is nearer to the teacher."""
    rows = [r for r in finished.outcome.result.rows if r.candidate and r.predicted_speedup >= 1.3]
    groups = {row.group for row in rows}
    assert {"fewer steps", "frdiff", "deepcache", "chosen"} <= groups
    assert min(row.error.value for row in rows) >= finished.chosen.error.value


def test_every_published_schedule_is_in_the_table_once(finished: Finished) -> None:
    """The comparison is whole, and no row stands twice."""
    profile = finished.outcome.profile
    target = profile.costs.teacher(STEPS) / 1.3
    drafts = baselines.published(profile.masks, profile.costs, STEPS, target)
    names = Counter(row.name for row in finished.outcome.result.rows)
    assert {draft.name for draft in drafts} <= names.keys()
    assert set(names.values()) == {1}


def test_the_teacher_has_no_error(finished: Finished) -> None:
    """The table's first row is the unaccelerated pipe, compared with itself."""
    teacher = finished.outcome.result.rows[0]
    assert teacher.group == "teacher"
    assert teacher.error.value == 0 and teacher.predicted_speedup == pytest.approx(1)


def test_other_solvers_are_shown_and_never_chosen(finished: Finished) -> None:
    """Rows that change the solver are for comparison only, at the steps that cost the same."""
    others = [row for row in finished.outcome.result.rows if row.group == "other solver"]
    assert {row.solver for row in others} == {"DPM-Solver++ 2M Karras", "UniPC"}
    assert not any(row.candidate for row in others)
    assert max(row.steps for row in others) == 4


def test_choosing_never_sees_the_seeds_of_the_test(finished: Finished) -> None:
    """Calibration, validation and test draw from disjoint seeds, and each in its own stage."""
    drawn: dict[str, set[int]] = {}
    for stage, seeds, _ in finished.log.draws:
        drawn.setdefault(stage, set()).update(seeds)
    own = {purpose: set(finished.settings.seeds(purpose)) for purpose in PURPOSES}
    assert drawn["test"] == own["test"]
    last = ("test", "rivals")
    assert own["test"].isdisjoint(
        set.union(*(drawn[stage] for stage in drawn if stage not in last))
    )
    assert own["validation"].isdisjoint(drawn["profile"] | drawn["calibrate"])
    assert own["calibration"].isdisjoint(own["validation"])


def test_the_reference_is_as_fine_as_the_result_says(finished: Finished) -> None:
    """The reference that errors are measured to has the steps that the report names."""
    finest = max(steps for stage, _, steps in finished.log.draws if stage == "teacher")
    assert int(finished.outcome.result.reference.split()[0]) == finest > STEPS


def test_the_result_survives_its_file(finished: Finished) -> None:
    """`result.json` gives back the value that it was written from."""
    result = finished.outcome.result
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_a_finished_search_runs_no_trial_again(finished: Finished) -> None:
    """The same command in a finished folder only chooses and reports, and chooses the same."""
    before = trials_of(finished.folder).records()
    profile = (finished.folder / STATE / "profile.json").read_bytes()
    with work_clock(), logged() as log:
        again = Search(finished.pipe, finished.settings, finished.folder).run()
    assert log.scored("trials") == []
    assert trials_of(finished.folder).records() == before
    assert (finished.folder / STATE / "profile.json").read_bytes() == profile
    assert again.result.policy.digest == finished.outcome.result.policy.digest
    assert {row.name for row in again.result.rows} == {r.name for r in finished.outcome.result.rows}


# -- other spaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        Uniform(
            name="frdiff", kind="uniform", axes=UniformAxes(interval=(2, 4), mix=("constant",))
        ),
        Direct(name="direct", kind="direct", axes=DirectAxes(mix=("constant",))),
    ],
    ids=["frdiff", "direct"],
)
def test_spaces_without_the_planner_end_too(space: Space, tmp_path: Path, monkeypatch: Any) -> None:
    """A policy that a space made of its own masks is timed, chosen and shown like any other."""
    finalists = choose.finalists

    def own(records: Any, seconds: float) -> Any:
        return finalists([r for r in records if "row" not in r.notes], seconds)

    monkeypatch.setattr(choose, "finalists", own)
    asked = settings(space=space, budget=parse_budget("1.2x"), trials=4)
    outcome = run_in(tmp_path / "run", asked)
    measured = outcome.result.policy.measured
    assert measured is not None and measured.speedup.low >= 1.2


# -- duplicates -----------------------------------------------------------------------------------


def test_a_duplicate_takes_its_twins_value_and_is_not_run(tmp_path: Path) -> None:
    """A policy that was scored before costs nothing, and is no second finalist."""
    asked = settings(space=SINGLE, trials=4)
    with work_clock(), few_rows(), logged() as log, pytest.raises(StopIteration):
        Search(tiny_pipe(), asked, tmp_path, on_progress=stop_at("choose")).run()
    records = trials_of(tmp_path).records()
    own = [record for record in records if "row" not in record.notes]
    assert len(own) == 4 and len({record.notes["digest"] for record in own}) == 1
    first, *twins = own
    assert [twin.value for twin in twins] == [first.value] * 3
    assert {twin.notes["duplicate_of"] for twin in twins} == {first.number}
    assert Counter(log.scored("trials")) == Counter({r.notes["digest"]: 1 for r in records})
    assert len(verify.finalists(own, float("inf"))) == 1


def test_a_duplicate_takes_a_refusal_over_and_is_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    """A policy that draws NaN is drawn once, also where the same run goes on later."""
    score, calls = Evaluator.score, []

    def sick(self: Evaluator, policy: Policy, seeds: int | None = None) -> Any:
        if seeds is None:  # a row
            return score(self, policy, seeds)
        calls.append(policy.digest)
        raise MeasurementError("the model drew NaN")

    monkeypatch.setattr(Evaluator, "score", sick)
    for count in (2, 4):
        run = Search(
            tiny_pipe(),
            settings(space=SINGLE, trials=count),
            tmp_path,
            on_progress=stop_at("choose"),
        )
        with work_clock(), few_rows(), pytest.raises(StopIteration):
            run.run()
        assert trials_of(tmp_path).reasons() == {"the model drew NaN": count}
    assert len(calls) == 1


# -- stopping and resuming ------------------------------------------------------------------------

DIE = """
import os, signal, sys
from pathlib import Path
from autofr.search.evaluate import Evaluator
import test_search

score, calls = Evaluator.score, []

def deadly(self, policy, seeds=None):
    calls.append(policy.digest)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(self, policy, seeds)

Evaluator.score = deadly
test_search.run_in(Path(sys.argv[1]), test_search.settings())
"""


def test_kill_9_loses_one_trial_and_nothing_else(tmp_path: Path) -> None:
    """After `kill -9` the same run resumes, repeats no finished trial and counts none twice."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", DIE, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = tmp_path / "run"
    left = (folder / STATE / "study.db").read_bytes()
    before = trials_of(folder).records()
    assert len([r for r in before if "duplicate_of" not in r.notes]) == 2
    (folder / STATE / "study.db").write_bytes(left)  # looking changed it
    with logged() as log:
        outcome = run_in(folder, settings())
    after = trials_of(folder).records()
    assert after[: len(before)] == before
    evaluated = Counter(log.scored("trials"))
    assert evaluated.keys().isdisjoint({record.notes["digest"] for record in before})
    assert max(evaluated.values()) == 1
    rows = Counter(record.notes["row"] for record in after if "row" in record.notes)
    assert set(rows.values()) == {1} and len(rows) == 2
    assert len([r for r in after if "row" not in r.notes]) == settings().trials
    assert len([r for r in after if "retry_of" in r.notes]) == 1
    assert outcome.result.trials == len(after)
    with (folder / "trials.csv").open() as file:
        assert sum("FAIL" in line for line in file) == 1


def test_ctrl_c_loses_one_trial_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    """An interrupt passes through, and leaves a folder in which the same run goes on."""
    score, calls = Evaluator.score, []

    def interrupted(self: Evaluator, policy: Policy, seeds: int | None = None) -> Any:
        calls.append(policy.digest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, policy, seeds)

    monkeypatch.setattr(Evaluator, "score", interrupted)
    pipe, asked = tiny_pipe(), settings()
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, asked)
    before = trials_of(tmp_path).records()
    assert len(before) >= 2
    again = Search(pipe, asked, tmp_path, on_progress=stop_at("choose"))
    owned = run_folder(tmp_path, spec_of(pipe, asked))  # the lock is free
    with work_clock(), few_rows(), owned, pytest.raises(StopIteration):
        again.run()
    after = trials_of(tmp_path).records()
    assert after[: len(before)] == before
    assert trials_of(tmp_path).proposed() == asked.trials
    assert set(calls[3:]).isdisjoint(record.notes["digest"] for record in before)


@pytest.mark.parametrize("limit", [{"time_limit": 20}, {"deadline": 30}], ids=str)
def test_out_of_time_no_new_trial_starts(
    limit: dict[str, float], tmp_path: Path, monkeypatch: Any
) -> None:
    """After the time limit, or the deadline, the search ends with what it has."""
    now = iter(range(0, 10**6, 7))
    clock = types.SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr(trials, "time", clock)
    asked = settings(**limit)  # a few looks at the clock
    with work_clock(), few_rows(), pytest.raises(StopIteration):
        Search(tiny_pipe(), asked, tmp_path, on_progress=stop_at("choose")).run()
    assert 0 < len(trials_of(tmp_path).records()) < 5


# -- refusals -------------------------------------------------------------------------------------


def test_a_model_that_gives_nan_is_a_failure(tmp_path: Path) -> None:
    """NaN from the denoiser ends the search at once, and says so."""
    pipe = tiny_pipe()
    pipe.unet.conv_out.bias.fill_(float("nan"))
    with work_clock(), pytest.raises(MeasurementError, match="NaN"):
        Search(pipe, settings(), tmp_path).run()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_policy_that_gives_nan_loses_its_trial_only(tmp_path: Path, monkeypatch: Any) -> None:
    """A trial without a usable number is closed with its reason, as are the equal ones only."""
    score, calls = Evaluator.score, []

    def sick(self: Evaluator, policy: Policy, seeds: int | None = None) -> Any:
        calls.append(policy.digest)
        if len(calls) == 3:
            raise MeasurementError("the model drew NaN")
        return score(self, policy, seeds)

    monkeypatch.setattr(Evaluator, "score", sick)
    outcome = run_in(tmp_path / "run", settings())
    with (tmp_path / "run" / "trials.csv").open(newline="", encoding="utf-8") as file:
        lost = [line for line in csv.DictReader(file) if line["reason"] == "the model drew NaN"]
    first, *twins = lost
    assert {line["state"] for line in lost} == {"PRUNED"} and first["duplicate_of"] == ""
    assert {line["duplicate_of"] for line in twins} <= {first["trial"]}
    assert outcome.result.policy.measured is not None


@pytest.mark.parametrize("name", ["profile.json", f"calibration-{STEPS}.npz"])
@pytest.mark.parametrize("left", [b"", b"{}", b"PK\x03\x04 half"])
def test_a_damaged_file_of_the_run_is_named(
    name: str, left: bytes, finished: Finished, tmp_path: Path
) -> None:
    """What a run resumes from is whole or refused, with the file and the way out."""
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / STATE / name).write_bytes(left)
    with pytest.raises(RunFolderError, match=rf"{name}: damaged.*delete it"):
        run_in(tmp_path / "run", finished.settings)


def refused(budget: str, finished: Finished, folder: Path, space: Space = SPACE) -> str:
    """What a search for a budget is refused with; the profile is that of another search."""
    left = (finished.folder / STATE / "profile.json").read_bytes()
    (folder / STATE).mkdir()
    (folder / STATE / "profile.json").write_bytes(left)
    asked = settings(budget=parse_budget(budget), space=space)
    with work_clock(), pytest.raises(BudgetError) as refusal:
        Search(tiny_pipe("ldm"), asked, folder).run()
    return str(refusal.value)


@pytest.mark.parametrize("gap", [2, 3])
def test_a_budget_out_of_reach_names_the_largest_that_is_not(
    finished: Finished, tmp_path: Path, gap: int
) -> None:
    """The speed-up that the refusal names is one that the same search meets."""
    space = SPACE.model_copy(update={"axes": PlannedAxes(**AXES | {"max_gap": (gap, gap)})})
    said = refused("900x", finished, tmp_path, space)
    assert "900.00x" in said and "cannot be met" in said
    named = re.search(r"the largest that can .* is ([0-9.]+x)", said)
    assert named, said
    asked = settings(budget=parse_budget(named[1]), space=space, trials=1)
    stop = stop_at("choose")
    with work_clock(), few_rows(), pytest.raises(StopIteration):
        Search(tiny_pipe("ldm"), asked, tmp_path, on_progress=stop).run()
    assert any("row" not in record.notes for record in trials_of(tmp_path).records())


def test_a_time_that_the_teacher_meets_is_refused(finished: Finished, tmp_path: Path) -> None:
    """There is nothing to search where the pipe is fast enough already."""
    assert "already takes only" in refused("90s", finished, tmp_path)


@pytest.mark.parametrize("limit", [1, None])
def test_a_memory_limit_that_nothing_keeps_is_refused_at_once(
    finished: Finished, tmp_path: Path, limit: int | None
) -> None:
    """Right after the profile the refusal names the least that could work; so much is let in."""
    score = finished.outcome.profile.score_bytes
    (tmp_path / STATE).mkdir()
    shutil.copy(finished.folder / STATE / "profile.json", tmp_path / STATE)
    asked, stop = settings(max_memory=limit or score), stop_at("teacher")
    kind = BudgetError if limit else StopIteration
    with work_clock(), pytest.raises(kind) as refusal:
        Search(tiny_pipe("ldm"), asked, tmp_path, on_progress=stop).run()
    there = {path.name for path in (tmp_path / STATE).iterdir()}
    if limit:
        assert "--max-memory" in str(refusal.value) and f"{score}B" in str(refusal.value)
        assert there == {"profile.json"}  # nothing was calibrated


@pytest.mark.parametrize("limit", [None, 60.0])
def test_where_nothing_can_be_chosen_the_trials_say_why(
    tmp_path: Path, limit: float | None
) -> None:
    """The refusal quotes what most trials were given up for, and names what can be raised."""
    (tmp_path / STATE).mkdir()
    book = trials_of(tmp_path)
    for reason in ("it would keep too much", "no plan", "it would keep too much"):
        book.give_up(book.ask(), reason)
    one = choose.Chooser(None, settings(time_limit=limit), None, 1.0, None, None, None)
    with pytest.raises(BudgetError, match=r"1\.3x \(2 of 3 .* it would keep too much\)") as refusal:
        one.choose(book)
    assert ("--time-limit" in str(refusal.value)) == (limit is not None)


def test_steps_that_the_scheduler_does_not_take_are_refused_at_once(tmp_path: Path) -> None:
    """What `set_timesteps` refuses is said before any work, with the way out."""
    pipe = tiny_pipe()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(ddim().config, num_train_timesteps=20)
    with work_clock(), pytest.raises(ModelError, match=r"cannot take 30 steps: .*--steps"):
        Search(pipe, settings(steps=30), tmp_path, on_progress=stop_at("profile")).run()


def test_a_solver_of_few_timesteps_has_no_finer_reference_than_those() -> None:
    """LCM takes at most the steps that it was distilled for; nobody else is refused."""
    pipe = tiny_pipe("ldm")
    assert evaluate.fine_steps(pipe, 50) == 250
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert [evaluate.fine_steps(pipe, steps) for steps in (5, 12, 50)] == [25, 50, 50]
    before = sorted(vars(pipe.scheduler))
    evaluate.check_steps(pipe, 50)
    assert sorted(vars(pipe.scheduler)) == before  # set_timesteps and step are its own again
    with pytest.raises(ModelError, match="cannot take 60 steps"):
        evaluate.check_steps(pipe, 60)


# -- measured speed-ups ---------------------------------------------------------------------------


def half() -> Policy:
    """Every second step held: twice as fast, where time is arithmetic alone."""
    return compose(
        tiny_pipe(),
        "tiny",
        ("key", "jump") * 3,
        {},
        Constant(),
        replaces=STEPS,
        latent_shape=(3, 8, 8),
    )


@pytest.mark.parametrize(("seeds", "batch"), [(4, 4), (5, 4), (9, 4), (3, 4)])
def test_a_smaller_last_batch_changes_no_speed_up(seeds: int, batch: int) -> None:
    """Full calls alone are compared; where none is full, all are of one size."""
    with work_clock():
        evaluator = Evaluator(tiny_pipe(), range(seeds), STEPS, batch, fine_seeds=1)
        found = evaluator.score(half()).speedup
        assert found is not None and found.value == pytest.approx(2, rel=0.02)
        assert evaluator.teacher_speedup.value == pytest.approx(1, rel=0.02)
        assert evaluator.score(half(), 2).speedup is None  # no call of the teacher's batch


def test_a_score_that_fails_leaves_no_times_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed-up of the next policy is its own."""
    with work_clock():
        evaluator = Evaluator(tiny_pipe(), range(2), STEPS, 2)
        with monkeypatch.context() as patch:
            patch.setattr(evaluate.Samples, "join", lambda parts: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                evaluator.score(half())
        solo = evaluator.score_solver(evaluator.pipe.scheduler, STEPS).speedup
    assert solo is not None and solo.high == pytest.approx(1, rel=0.02)


# -- rows that fail -------------------------------------------------------------------------------


def test_a_solver_that_breaks_in_any_way_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that asks a solver for what it does not have has one row less, and no error."""

    def broken(self: Any, *_: Any, **__: Any) -> None:
        raise AttributeError("scale_noise")

    monkeypatch.setattr(diffusers.UniPCMultistepScheduler, "set_timesteps", broken)
    pipe = tiny_pipe("ldm")
    own = pipe.scheduler
    assert set(evaluate.other_solvers(pipe)) == {"DPM-Solver++ 2M Karras"}
    assert pipe.scheduler is own


def test_rows_for_comparison_that_fail_cost_no_policy(tmp_path: Path, monkeypatch: Any) -> None:
    """NaN from another solver, or from a plan for another speed-up, ends in a remark."""
    score = Evaluator.score

    def sick(self: Evaluator, *_: Any) -> Any:
        raise MeasurementError("the model drew NaN")

    def planned(self: Evaluator, policy: Policy, seeds: int | None = None) -> Any:
        if log.stage == "table":
            raise IndexError("deep inside")
        return score(self, policy, seeds)

    monkeypatch.setattr(Evaluator, "score_solver", sick)
    monkeypatch.setattr(Evaluator, "score", planned)
    with work_clock(), few_rows(), logged() as log:
        outcome = Search(tiny_pipe("ldm"), settings(inputs_count=8), tmp_path).run()
    result = outcome.result
    assert result.policy.measured is not None
    assert {row.group for row in result.rows}.isdisjoint({"other solver"})
    for said in (
        "UniPC, 4 steps is not shown: the model drew NaN",
        "not shown: IndexError: deep",
        "2 drew inputs",
    ):
        assert any(said in line for line in result.remarks)


def test_other_solvers_are_tried_before_the_trials(finished: Finished) -> None:
    """What a pipe cannot drive is found out before hours of work, and not again after them."""
    probes = [stage for stage, seeds, steps in finished.log.draws if (seeds, steps) == ((0,), 2)]
    assert probes and not {"trials", "choose", "table"} & set(probes)


# -- remarks --------------------------------------------------------------------------------------


def exact(value: float) -> Interval:
    """An interval of no width."""
    return Interval(value=value, low=value, high=value)


def row(name: str, group: str, gain: float, error: float, reference: float) -> Row:
    """A row of the table with the numbers that remarks compare."""
    return Row(
        name=name,
        group=group,
        solver=name,
        steps=STEPS,
        network_calls=STEPS / gain,
        predicted_speedup=gain,
        error=exact(error),
        reference_error=exact(reference),
        candidate=group != "other solver",
    )


CHOSEN = row("chosen", "chosen", 1.5, 0.02, 0.05)


def test_a_better_solver_is_remarked_on() -> None:
    """Where another solver is nearer to the fine solution at this time, the search says so."""
    lines = remarks([CHOSEN, row("UniPC, 4 steps", "other solver", 1.5, 0.3, 0.04)])
    assert any("Another solver" in line and "UniPC, 4 steps" in line for line in lines)


@pytest.mark.parametrize(("gain", "reference"), [(1.5, 0.06), (1.5 * AS_FAST - 0.01, 0.04)])
def test_a_worse_or_slower_solver_is_not_remarked_on(gain: float, reference: float) -> None:
    """A solver that is farther from the fine solution, or takes longer, is no better one."""
    lines = remarks([CHOSEN, row("UniPC, 4 steps", "other solver", gain, 0.3, reference)])
    assert not any("Another solver" in line for line in lines)


def test_a_better_row_is_remarked_on() -> None:
    """A published row that is as fast and nearer to the teacher is never passed over in silence."""
    lines = remarks([CHOSEN, row("FRDiff M=2", "frdiff", 1.6, 0.01, 0.05)])
    assert any("FRDiff M=2 is as fast and nearer" in line for line in lines)
    lines = remarks([CHOSEN, row("FRDiff M=2", "frdiff", 1.6, 0.03, 0.05)])
    assert not any("nearer to the teacher" in line for line in lines)


def test_a_table_without_other_solvers_says_why() -> None:
    """Solvers that a pipe cannot drive are left out, and not in silence."""
    assert any("No other solver" in line for line in remarks([CHOSEN]))
    assert evaluate.other_solvers(tiny_pipe("ddim")) == {}


def test_a_pulse_between_two_calls_serves_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of one draw share the pulses between them; another draw begins with its own."""
    taken: list[float] = []

    def beat(pulse: Any) -> float:
        taken.append(1.0 + len(taken))
        return taken[-1]

    monkeypatch.setattr(evaluate.Pulse, "beat", beat)
    found = evaluate.Evaluator(tiny_pipe("ddim"), range(3), 2, 1, fine_seeds=2)
    assert len(taken) == (3 + 1) + (2 + 1)
    assert [pulse for pulse, _ in found.pulse.taken] == [5.5, 6.5]


def test_the_nearest_row_is_told_by_the_test_seeds() -> None:
    """What is said of rivals is said of seeds that nothing was chosen by; without any, nothing."""
    chosen = CHOSEN.model_copy(update={"test_error": exact(0.03)})
    floor = row("4 steps", "fewer steps", 1.5, 0.06, 0.05)
    tested = {"test_error": exact(0.12), "times_chosen": Interval(value=4, low=3.2, high=5.1)}
    (line,) = [x for x in remarks([chosen, floor.model_copy(update=tested)]) if "4 steps" in x]
    assert "error 0.1200, 4.0 times (3.2 to 5.1) the policy's 0.0300" in line
    assert not any("4 steps" in x for x in remarks([chosen, floor]))


def test_rivals_are_the_nearest_of_each_kind_that_is_as_fast() -> None:
    """Slower rows, other solvers and rows of our own are no rivals."""
    rows = [
        CHOSEN,
        row("far", "frdiff", 1.6, 0.3, 0.1),
        row("near", "frdiff", 1.5 * AS_FAST, 0.2, 0.1),
        row("slow", "frdiff", 1.5 * AS_FAST - 0.01, 0.1, 0.1),
        row("planned 2x", "planned", 2.0, 0.1, 0.1),
        row("UniPC", "other solver", 1.6, 0.1, 0.1),
        row("cut", "deepcache", 2.0, 0.25, 0.1),
    ]
    assert [one.name for one in rivals(rows)] == ["near", "cut"]


def test_the_choice_and_its_rivals_are_tested_together(finished: Finished) -> None:
    """The result has their errors on the test seeds, and no others'; times are of these means."""
    result = finished.outcome.result
    tested = {row.name: row for row in result.rows if row.test_error}
    assert set(tested) == {"chosen", *(row.name for row in rivals(result.rows))}
    measured = result.policy.measured
    assert measured is not None
    assert tested.pop("chosen").test_error == measured.trajectory_error
    for row in tested.values():
        assert row.test_error is not None and row.times_chosen is not None
        times = row.test_error.value / measured.trajectory_error.value
        assert row.times_chosen.value == pytest.approx(times)
        assert row.times_chosen.low <= times <= row.times_chosen.high


def test_inputs_that_were_seen_before_the_test_are_remarked_on() -> None:
    """Where there are fewer rows than seeds, the result says how many were not new."""
    asked = settings(inputs_count=10)  # 2 to calibrate, 4 to validate, 4 to test
    assert held_out(asked) == [] == held_out(settings())
    (line,) = held_out(replace(asked, inputs_count=8))
    assert line.startswith("Of the 4 test samples, 2 drew inputs")


def test_a_measured_speed_counts_before_a_predicted_one() -> None:
    """Rows are compared by what was measured, where anything was."""
    measured = CHOSEN.model_copy(update={"speedup": exact(1.7)})
    assert speed(measured) == 1.7 and speed(CHOSEN) == 1.5


@pytest.mark.parametrize(
    ("errors", "kept", "expected"),
    [
        ({"5 steps": 0.3}, {"5 steps"}, "planned"),  # no row is nearer
        ({"5 steps": 0.1, "7 steps": 0.05}, {"5 steps"}, "5 steps"),  # the nearest is too slow
        ({"5 steps": 0.1}, set(), "planned"),  # nearer, but misses the budget when measured
    ],
)
def test_a_choice_that_was_made_faster_gives_way_to_a_nearer_row(errors, kept, expected):
    """After measuring, no published row that keeps the budget is nearer than what is chosen."""
    interval = Interval(value=0.2, low=0.1, high=0.3)
    one = choose.Chooser(None, settings(), None, 1.0, None, None, None)
    one.score = lambda found: SimpleNamespace(error=interval)
    policy = dump(load(ROOT / "results" / "ldm4-1.5x" / "policy.json"))

    def record(name, error):
        notes = {"line": {"error": {"value": error}}, "seconds": 2.0 if name == "7 steps" else 0.9}
        return Record(
            0, {}, error, notes | {"label": name, "group": "fewer steps", "policy": policy}
        )

    def hold(ranked):
        for record, found in ranked:
            if found.name in kept:
                return Verdict(record, found, None)
        raise BudgetError("none")

    one._hold = hold
    chosen = Verdict(None, SimpleNamespace(name="planned"), None)
    records = [record(name, error) for name, error in errors.items()]
    assert one._never_worse(chosen, records).found.name == expected
