"""Laws of a run's folder and of its ledger."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from test_search import SPACE, settings, tiny_pipe

from autofr.errors import RunFolderError
from autofr.measure.costs import parse_budget
from autofr.search.folder import PURPOSES, STATE, Spec, run_folder, spec_of
from autofr.search.ledger import RETRIES, Ledger
from autofr.search.trial import Outcome

SPEC = Spec(
    model="tiny",
    denoiser="UNet2DModel",
    fingerprint="0" * 16,
    weights="1" * 16,
    scheduler="DDIMScheduler",
    budget="1.5x",
    steps=6,
    batch=2,
    space="default",
    space_digest="2" * 12,
    seed=0,
    device="cpu",
    dtype="float32",
    threads=1,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a run has it."""
    return enter(tmp_path / "run")


def enter(folder: Path, spec: Spec = SPEC) -> Path:
    """Own a folder for a moment."""
    with run_folder(folder, spec) as owned:
        return owned


def ledger(folder: Path) -> Ledger:
    """The ledger of a run, as a new process opens it."""
    return Ledger(folder, 0, "default")


def propose(book: Ledger) -> tuple[optuna.Trial, tuple[float, ...]]:
    """Start a trial and read its parameters, as a decoder does."""
    trial = book.ask()
    return trial, (trial.suggest_float("tau", 0, 60), trial.suggest_float("bias", 0, 1))


def states(folder: Path) -> list[str]:
    """The state of every trial, read by another reader than the ledger's."""
    path = folder / STATE / "study.db"
    study = optuna.load_study(study_name="autofr", storage=f"sqlite:///{path}")
    return [trial.state.name for trial in study.trials]


# -- seeds ----------------------------------------------------------------------------------------


def test_seeds_of_all_purposes_and_runs_are_disjoint() -> None:
    """No seed serves two purposes, whatever the run's own seed is."""
    runs = [settings(seed=seed, test_seeds=5_000) for seed in (0, 1, 7)]
    drawn = [set(run.seeds(purpose)) for run in runs for purpose in PURPOSES]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("rows", [144, 145, 200, 1000, 99_999, 250_000])
@pytest.mark.parametrize("seed", [0, 3])
def test_inputs_are_held_out_too(rows: int, seed: int) -> None:
    """With enough prompts, no purpose draws a prompt that another draws; seeds stay disjoint."""
    asked = settings(
        seed=seed,
        calibration_seeds=8,
        validation_seeds=40,
        test_seeds=96,
        inputs_count=rows,
    )
    drawn = [{seed % rows for seed in asked.seeds(purpose)} for purpose in PURPOSES]
    assert [len(one) for one in drawn] == [8, 40, 96]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(drawn, 2))
    assert asked.seen() == 0


def test_few_inputs_are_counted() -> None:
    """Rows that calibration or validation has drawn are counted for every test seed."""
    sizes = {"calibration_seeds": 8, "validation_seeds": 40, "test_seeds": 96}
    few = settings(inputs_count=16, **sizes)
    assert few.seen() == 96
    some = settings(inputs_count=100, **sizes)
    assert some.seen() == 96 - (100 - 48)
    seeds = {purpose: set(few.seeds(purpose)) for purpose in PURPOSES}
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(seeds.values(), 2))


def test_without_inputs_the_seeds_start_at_round_numbers() -> None:
    """Runs of older versions go on with the seeds that they began with."""
    starts = [settings(seed=2).seeds(purpose)[0] for purpose in PURPOSES]
    assert starts == [2_000_000, 2_100_000, 2_200_000] and settings().seen() == 0


# -- the folder -----------------------------------------------------------------------------------


def test_the_same_spec_is_let_in_again(folder: Path) -> None:
    """The same command resumes in its folder."""
    assert enter(folder) == folder


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "2x"},
        {"steps": 50},
        {"seed": 3},
        {"weights": "f" * 16},
        {"space": "frdiff", "space_digest": "3" * 12},
        {"threads": 8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_spec_is_refused_with_the_difference(folder: Path, change: dict) -> None:
    """A folder holds one run; what differs is named, with both values, and nothing else."""
    with pytest.raises(RunFolderError, match="holds another run") as refusal:
        enter(folder, SPEC.model_copy(update=change))
    said = str(refusal.value)
    for name, value in change.items():
        assert f"{name}: {getattr(SPEC, name)} there, {value} asked" in said
    assert said.count(" there, ") == len(change)
    assert "--out" in said
    enter(folder)  # the refusal changed nothing and let the lock go


def test_a_scheduler_that_was_set_otherwise_is_refused(tmp_path: Path) -> None:
    """A calibration is of one setting; what differs is named, with both values."""
    pipe = tiny_pipe()
    enter(tmp_path / "run", spec_of(pipe, settings()))
    enter(tmp_path / "run", spec_of(pipe, settings()))  # and comes back from its file as it was
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler = other
    with pytest.raises(RunFolderError) as refusal:
        enter(tmp_path / "run", spec_of(pipe, settings()))
    said = str(refusal.value)
    assert "scheduler's timestep_spacing: leading there, trailing asked" in said
    assert said.count(" there, ") == 1


def test_another_pipeline_over_the_same_denoiser_is_refused(tmp_path: Path) -> None:
    """Text to image and image to image share all else that a spec holds."""
    asked = spec_of(tiny_pipe(), settings())
    enter(tmp_path / "run", asked)
    with pytest.raises(RunFolderError) as refusal:
        enter(tmp_path / "run", asked.model_copy(update={"pipeline": "OtherPipeline"}))
    assert f"pipeline: {type(tiny_pipe()).__name__} there, OtherPipeline asked" in str(
        refusal.value
    )


def test_a_folder_of_an_older_version_is_let_in(tmp_path: Path) -> None:
    """A spec that says nothing of the scheduler's settings is compared in all the rest."""
    asked = spec_of(tiny_pipe(), settings())
    enter(tmp_path / "run", asked)
    path = tmp_path / "run" / STATE / "spec.json"
    old = json.loads(path.read_text())
    del old["scheduler_config"], old["inputs_count"], old["pipeline"]
    path.write_text(json.dumps(old))
    enter(tmp_path / "run", asked)
    with pytest.raises(RunFolderError, match="steps: 6 there, 7 asked"):
        enter(tmp_path / "run", asked.model_copy(update={"steps": 7}))
    with pytest.raises(RunFolderError, match="inputs_count: 0 there, 16 asked"):  # other seeds
        enter(tmp_path / "run", asked.model_copy(update={"inputs_count": 16}))


def test_everything_that_decides_a_run_is_in_its_spec() -> None:
    """Budget, steps, batch, seed and space tell runs apart; the number of trials does not."""
    pipe = tiny_pipe()
    base = spec_of(pipe, settings())
    one = SPACE.model_copy(update={"axes": SPACE.axes.model_copy(update={"phase": (0.0, 0.0)})})
    changes = [
        {"budget": parse_budget("2x")},
        {"steps": 7},
        {"batch": 3},
        {"seed": 1},
        {"inputs_count": 7},
        {"space": one},
    ]
    assert all(spec_of(pipe, settings(**change)) != base for change in changes)
    assert spec_of(pipe, settings(trials=99, time_limit=60, command="again")) == base
    pipe.unet.conv_in.weight += 1
    assert spec_of(pipe, settings()) != base


def test_two_owners_at_once_are_refused(folder: Path) -> None:
    """While a run is on, nobody else works in its folder; afterwards it is free again."""
    with run_folder(folder, SPEC), pytest.raises(RunFolderError, match="another autofr process"):
        enter(folder)
    enter(folder)


def test_an_error_lets_the_folder_go(folder: Path) -> None:
    """A run that fails does not keep the lock."""
    with pytest.raises(ZeroDivisionError), run_folder(folder, SPEC):
        raise ZeroDivisionError
    enter(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": "tiny"}', "\x00\x01"])
def test_a_damaged_spec_is_refused(folder: Path, text: str) -> None:
    """A spec that cannot be read is named, never overwritten."""
    path = folder / STATE / "spec.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=r"spec\.json is damaged"):
        enter(folder)
    assert path.read_text() == text


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    """A run never mixes its files with somebody else's."""
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="holds other files"):
        enter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_result_without_its_study_is_searched_anew(folder: Path) -> None:
    """Results that came without their state, such as those of a repository, are no obstacle."""
    (folder.parent / "reference").mkdir()
    (folder.parent / "reference" / "result.json").write_text("{}")
    assert enter(folder.parent / "reference").is_dir()


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, inside: str) -> None:
    """Where no folder can be made, the message says where and how to give another."""
    (tmp_path / "way").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write there .*--out"):
        enter(tmp_path / "way" / inside)


# -- the ledger -----------------------------------------------------------------------------------


def test_a_finished_trial_keeps_its_value_and_notes(folder: Path) -> None:
    """What was told is there after reopening: parameters, value, notes."""
    book = ledger(folder)
    assert book.records() == []
    trial, params = propose(book)
    book.tell(trial, 0.25, {"label": "one", "seconds": 1.5})
    (record,) = ledger(folder).records()
    assert tuple(record.params.values()) == params
    assert record.value == 0.25
    assert record.notes["label"] == "one" and record.notes["seconds"] == 1.5


def test_a_trial_that_was_running_is_run_again_once(folder: Path) -> None:
    """What a killed process left behind is closed, and its parameters wait, once."""
    book = ledger(folder)
    done, _ = propose(book)
    book.tell(done, 1.0, {"label": "done"})
    _, lost = propose(book)  # killed here
    again = ledger(folder)
    assert states(folder) == ["COMPLETE", "FAIL", "WAITING"]
    assert [record.number for record in again.records()] == [0]
    assert ledger(folder).waiting() == 1  # looking again queues nothing more
    trial, params = propose(again)
    assert params == lost
    assert trial.user_attrs["retry_of"] == 1
    again.tell(trial, 2.0, {"label": "retried"})
    assert ledger(folder).waiting() == 0
    assert [record.value for record in ledger(folder).records()] == [1.0, 2.0]


def test_a_queued_trial_is_not_lost_before_it_reads_its_parameters(folder: Path) -> None:
    """Killed between being taken and being decoded, a queued trial keeps what it was to try."""
    book = ledger(folder)
    book.guess({"tau": 30.0, "bias": 0.5})
    book.ask()
    _, params = propose(ledger(folder))
    assert params == (30.0, 0.5)


def row(book: Ledger, name: str, outcome: Outcome | None = None) -> bool:
    """Score a published schedule, if it is to be scored."""
    began = book.begin_row(name)
    if began and outcome:
        book.add_row(name, outcome, datetime.datetime.now())
    return began


def test_a_row_is_scored_once(folder: Path) -> None:
    """However often a run resumes, a published schedule that is over is not scored again."""
    assert row(ledger(folder), "4 steps", Outcome(0.5, {"label": "4 steps"}))
    assert row(ledger(folder), "3 steps", Outcome(reason="it would keep too much"))
    book = ledger(folder)
    assert not row(book, "4 steps") and not row(book, "3 steps")
    (record,) = book.records()
    assert record.notes == {"row": "4 steps", "label": "4 steps"} and record.value == 0.5
    assert book.reasons() == {"it would keep too much": 1}


def test_what_always_kills_its_process_is_given_up(folder: Path) -> None:
    """After a few retries what cut the process off stays failed, and the rest goes on."""
    ledger(folder).guess({"tau": 30.0, "bias": 0.5})
    for _ in range(RETRIES + 1):
        book = ledger(folder)
        assert book.waiting() == 1
        book.ask()  # killed here
        assert row(book, "4 steps")  # or here
    book = ledger(folder)
    assert book.waiting() == 0 and not row(book, "4 steps")
    assert states(folder) == ["FAIL"] * (RETRIES + 1)


def test_guesses_are_queued_once(folder: Path) -> None:
    """However often a run resumes, no guess runs twice."""
    for _ in range(3):
        book = ledger(folder)
        book.guess({"tau": 30.0, "bias": 0.5})
        assert book.waiting() == 1
    trial, _ = propose(book)
    book.tell(trial, 1.0, {})
    book = ledger(folder)
    book.guess({"tau": 30.0, "bias": 0.5})
    assert book.waiting() == 0 and len(book.records()) == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_a_failed_trial_is_tried_again(folder: Path, at_once: bool) -> None:
    """What an interrupt or the death of a child cut short keeps its parameters and its place."""
    book = ledger(folder)
    trial, params = propose(book)
    if at_once:
        book.try_again(trial, "its process ended")
    else:
        book.give_up(trial, "KeyboardInterrupt", failed=True)
        book = ledger(folder)
    again, same = propose(book)
    assert same == params and again.user_attrs == {"retry_of": 0, "retry": 1}
    assert book.proposed() == 1


@pytest.mark.parametrize("failed", [False, True], ids=["refused", "failed"])
def test_a_refusal_is_taken_over_and_a_failure_is_not(folder: Path, failed: bool) -> None:
    """What was cut off says nothing of its proposal: an equal one is scored, whenever it comes."""
    book = ledger(folder)
    book.give_up(propose(book)[0], "NaN", failed=failed, notes={"proposal": "d+1"})
    book = ledger(folder)
    trial, _ = propose(book)
    assert not book.told(trial, SimpleNamespace(key="d+2"))
    assert book.told(trial, SimpleNamespace(key="d+1")) != failed
    assert book.reasons() == ({} if failed else {"NaN": 2})
    path = folder / "trials.csv"
    book.write_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        twin = [*csv.DictReader(file)][1]
    assert (twin["duplicate_of"], twin["reason"]) == (("", "") if failed else ("0", "NaN"))


def test_a_resumed_run_proposes_something_else(folder: Path) -> None:
    """A run that goes on does not propose its first trials again."""
    book = ledger(folder)
    first = []
    for _ in range(3):
        trial, params = propose(book)
        book.tell(trial, sum(params), {})
        first.append(params)
    book = ledger(folder)
    resumed = [propose(book)[1] for _ in range(3)]
    assert set(first).isdisjoint(resumed)


def test_equal_runs_propose_the_same(tmp_path: Path) -> None:
    """The algorithm is seeded: a fresh run with the same seed starts with the same trials."""
    proposals = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        enter(tmp_path / name)
        proposals.append(propose(Ledger(tmp_path / name, seed, "default"))[1])
    assert proposals[0] == proposals[1] != proposals[2]


def test_parameters_are_proposed_together(folder: Path) -> None:
    """However many published rows were scored, the algorithm knows what all proposals share."""
    book = ledger(folder)
    for number in range(8):
        row(book, f"{number} steps", Outcome(0.5, {}) if number % 2 else Outcome(reason="NaN"))
        book.tell(propose(book)[0], number / 8, {})
    for opened in (book, ledger(folder)):
        assert {*opened.ask().relative_params} == {"tau", "bias"}


@pytest.mark.parametrize("seed", [42_949, 2**32 - 1])
def test_the_algorithm_takes_every_seed(folder: Path, seed: int) -> None:
    """What the command line takes is no larger than what can be drawn with."""
    propose(Ledger(folder, seed, "default"))


def test_rows_that_an_older_version_has_queued_are_closed(folder: Path) -> None:
    """They are scored as rows are now; no proposal takes their place or their name."""
    book = ledger(folder)
    for name in ("4 steps", "3 steps"):
        book._study.enqueue_trial({}, user_attrs={"row": name})
    book._study.ask()  # killed here
    book = ledger(folder)
    assert book.waiting() == 0 and states(folder) == ["FAIL", "FAIL"]
    assert row(book, "4 steps", Outcome(0.5, {})) and row(book, "3 steps")
    assert ledger(folder).proposed() == 0 and ledger(folder).waiting() == 0


def test_only_the_algorithms_trials_count_as_proposed(folder: Path) -> None:
    """Rows and retries are extra; what was given up or is to be tried again counts once."""
    book = ledger(folder)
    row(book, "4 steps", Outcome(1.0, {}))
    book.tell(propose(book)[0], 1.0, {})
    book.give_up(propose(book)[0], "no plan meets the budget")
    book.try_again(propose(book)[0], "its process ended")
    assert book.proposed() == 3 and book.more(4) and book.more(3)  # one waits
    book.tell(propose(book)[0], 1.0, {})
    assert book.proposed() == 3 and book.more(4) and not book.more(3)
    assert len(book.records()) == 3


def test_the_table_of_trials_has_a_line_for_each(folder: Path) -> None:
    """`trials.csv` tells every trial's state, value, parameters and reason."""
    book = ledger(folder)
    row(book, "4 steps", Outcome(0.5, {"label": "4 steps", "digest": "d0"}))
    trial, params = propose(book)
    book.tell(trial, 0.25, {"label": "planned, fit2", "digest": "d1"})
    book.tell(propose(book)[0], 0.5, {"label": "again", "digest": "d0", "duplicate_of": 0})
    book.give_up(propose(book)[0], 'a budget of 3x, as "asked",\ncannot be met')
    propose(book)  # still running
    path = folder / "trials.csv"
    book.write_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["trial"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert [line["state"] for line in lines] == [*["COMPLETE"] * 3, "PRUNED", "RUNNING"]
    assert [line["error"] for line in lines] == ["0.5", "0.25", "0.5", "", ""]
    assert (float(lines[1]["tau"]), float(lines[1]["bias"])) == params
    assert lines[2]["duplicate_of"] == "0"
    assert "cannot be met" in lines[3]["reason"]


@pytest.mark.parametrize("damage", ["garbage", "truncated", "folder"])
def test_a_damaged_study_is_refused(folder: Path, damage: str) -> None:
    """A study that cannot be read is named with the way out, never overwritten."""
    book = ledger(folder)
    book.tell(propose(book)[0], 1.0, {})
    del book
    path = folder / STATE / "study.db"
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        whole = path.read_bytes()
        path.write_bytes(b"no database" * 99 if damage == "garbage" else whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match=r"study\.db: .*cannot be opened .* move the file"):
        ledger(folder)
    assert path.exists()
