"""A run's folder and its ledger: one Optuna study on SQLite, owned by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from autofr import files
from autofr.errors import RunFolderError
from autofr.measure.latency import Budget
from autofr.policy import AS_IS, Keep
from autofr.runtime.families import discover
from autofr.runtime.points import Pipe, dtype_of, find_denoiser, fingerprint, weights_hash
from autofr.runtime.sampler import scheduler_config
from autofr.search.space import Space

STUDY = "autofr"
STATE = "study"  # folder inside a run's: what it needs to resume
RETRIES = 3
PURPOSES = ("calibration", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Which seeds draw the images of a purpose; those of the three purposes are disjoint.

    `inputs_count` is how many rows a task's inputs have (0: images are drawn from noise alone);
    seed s draws row s modulo that.
    """

    seed: int = 0
    calibration_seeds: int = 8
    validation_seeds: int = 40
    test_seeds: int = 96
    inputs_count: int = 0

    def seeds(self, purpose: str) -> list[int]:
        """Seeds of "calibration", "validation" or "test".

        They draw other inputs than the purposes before them, as long as there are enough rows.
        """
        place = PURPOSES.index(purpose)
        start = self.seed * 1_000_000 + place * 100_000
        if self.inputs_count:
            before = sum(getattr(self, f"{name}_seeds") for name in PURPOSES[:place])
            start += (before - start) % self.inputs_count
        return list(range(start, start + getattr(self, f"{purpose}_seeds")))

    def seen(self) -> int:
        """How many of the test seeds draw an input that an earlier purpose has drawn."""
        if not self.inputs_count:
            return 0
        drawn = [{s % self.inputs_count for s in self.seeds(name)} for name in PURPOSES[:2]]
        return sum(s % self.inputs_count in set.union(*drawn) for s in self.seeds("test"))


@dataclass(frozen=True, kw_only=True)
class Settings(Seeds):
    """What the user asked for.

    `inputs` is the digest of a task's inputs. `max_memory` limits the bytes kept on the device. No
    trial starts `time_limit` seconds after the first, nor after the moment `deadline` of
    `time.monotonic()`.
    """

    name: str
    budget: Budget
    space: Space
    steps: int = 50
    batch: int = 8
    trials: int = 20
    time_limit: float | None = None
    deadline: float | None = None
    trial_seeds: int = 16
    inputs: str = ""
    keep: Keep = AS_IS
    max_memory: int | None = None
    command: str = ""


class Spec(BaseModel):
    """What a run's results depend on; a folder holds one spec.

    Folders of older versions do not say how the scheduler was set: there it is not compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    denoiser: str
    fingerprint: str
    weights: str
    scheduler: str
    scheduler_config: dict[str, Any] | None = None
    budget: str
    steps: int
    batch: int
    space: str
    space_digest: str
    seed: int
    device: str
    dtype: str
    threads: int
    inputs: str = ""
    inputs_count: int = 0
    keep: Keep = Keep()
    max_memory: int | None = None


def spec_of(pipe: Pipe, settings: Settings) -> Spec:
    """What a run of this pipe depends on."""
    denoiser = find_denoiser(pipe)
    text = settings.space.model_dump_json()
    return Spec(
        model=settings.name,
        denoiser=type(denoiser).__name__,
        fingerprint=fingerprint(denoiser, discover(denoiser)),
        weights=weights_hash(denoiser),
        scheduler=type(pipe.scheduler).__name__,
        scheduler_config=json.loads(json.dumps(scheduler_config(pipe), default=str)),
        budget=settings.budget.text,
        steps=settings.steps,
        batch=settings.batch,
        space=settings.space.name,
        space_digest=hashlib.sha256(text.encode()).hexdigest()[:12],
        seed=settings.seed,
        device=str(denoiser.device),
        dtype=dtype_of(pipe),
        threads=torch.get_num_threads(),
        inputs=settings.inputs,
        inputs_count=settings.inputs_count,
        keep=settings.keep,
        max_memory=settings.max_memory,
    )


@contextmanager
def run_folder(folder: Path, spec: Spec) -> Iterator[Path]:
    """Own a results folder: create it, lock it, and hold it to one spec.

    What a run needs to resume lies in `study/` inside; results without it (a reference run from a
    repository, say) are replaced when the run ends.
    Raises: RunFolderError when it cannot be written, is in use, or holds another run.
    """
    _check_foreign(folder)
    state = folder / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot write there ({error.strerror}); give another folder with --out"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"{folder}: another autofr process is working there; wait for it, or give another"
                " folder with --out"
            ) from None
        _check_spec(folder, state / "spec.json", spec)
        yield folder
    finally:
        os.close(lock)


def _check_foreign(folder: Path) -> None:
    if not folder.is_dir() or (folder / STATE).is_dir() or (folder / "result.json").is_file():
        return
    if any(folder.iterdir()):
        raise RunFolderError(
            f"{folder}: holds other files and no run of autofr; give an empty or new folder with"
            " --out"
        )


def _check_spec(folder: Path, path: Path, spec: Spec) -> None:
    if not path.exists():
        files.write(path, spec.model_dump_json(indent=1) + "\n")
        return
    try:
        there = Spec.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        raise RunFolderError(
            f"{path} is damaged or of another version; give another folder with --out"
        ) from None
    different = _differences(there, spec)
    if different:
        raise RunFolderError(
            f"{folder} holds another run ({'; '.join(different)}); give another folder with --out,"
            " or ask for the same run to resume it"
        )


def _differences(there: Spec, asked: Spec) -> list[str]:
    """Every field of two specs that differs, with both values; of the scheduler, every setting."""
    old, new = there.model_dump(), asked.model_dump()
    before, after = old.pop("scheduler_config"), new.pop("scheduler_config")
    if before is not None and after is not None and there.scheduler == asked.scheduler:
        old |= {f"scheduler's {name}": before.get(name) for name in before | after}
        new |= {f"scheduler's {name}": after.get(name) for name in before | after}
    return [f"{k}: {old[k]} there, {new[k]} asked" for k in new if old[k] != new[k]]


@dataclass(frozen=True)
class Record:
    """One finished trial: its number, parameters, value (error) and what was noted with it."""

    number: int
    params: Mapping[str, Any]
    value: float
    notes: Mapping[str, Any]


class Ledger:
    """The study: proposes parameters, keeps every trial; survives kill -9 at any moment."""

    def __init__(self, folder: Path, seed: int, space: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = (folder / STATE / "study.db").resolve()
        try:
            self._study = optuna.create_study(
                study_name=STUDY, storage=f"sqlite:///{path}", load_if_exists=True
            )
            self._reap()
            trials = len(self._study.trials)
        except Exception as error:  # SQLAlchemy's tree is not ours to import
            cause = str(error).partition("\n")[0]
            raise RunFolderError(
                f"{path}: the study cannot be opened ({type(error).__name__}: {cause}); move the"
                " file away to start afresh"
            ) from None
        # A resumed algorithm with the same seed would propose the same trials again.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=seed * 100_003 + trials, multivariate=True, n_startup_trials=8
        )
        self._study.set_user_attr("space", space)

    def _reap(self) -> None:
        """As the sole owner, fail trials that a killed process left running; run them again.

        One that was cut off more than `RETRIES` times may be what kills the process: it stays
        failed. Published rows are queued again by `enqueue_rows`.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            retry = trial.user_attrs.get("retry", 0) + 1
            if "row" in trial.user_attrs or retry > RETRIES:
                continue
            asked = trial.system_attrs.get("fixed_params", {})  # it may not have read them all yet
            attrs = {"retry_of": trial.number, "retry": retry}
            self._study.enqueue_trial(asked | trial.params, user_attrs=attrs)

    def enqueue_rows(self, names: Sequence[str]) -> None:
        """Queue the published schedules by name: each once, and again where it was cut off."""
        trials = self._study.get_trials(deepcopy=False)
        for name in names:
            mine = [t for t in trials if t.user_attrs.get("row") == name]
            if any(t.state != TrialState.FAIL for t in mine) or len(mine) > RETRIES:
                continue
            again = {"retry_of": mine[-1].number} if mine else {}
            self._study.enqueue_trial({}, user_attrs={"row": name} | again)

    def enqueue(self, params: Mapping[str, Any]) -> None:
        """Queue parameters that are worth trying first, once."""
        self._study.enqueue_trial(dict(params), skip_if_exists=True)

    def ask(self) -> optuna.Trial:
        """Start the next trial: a queued one, or the algorithm's proposal."""
        return self._study.ask()

    def tell(self, trial: optuna.Trial, value: float, notes: Mapping[str, Any]) -> None:
        """Finish a trial; the notes are written first, so that no value is without them."""
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        self._study.tell(trial, float(value))

    def give_up(self, trial: optuna.Trial, reason: str, failed: bool = False) -> None:
        """Close a trial without a value, with the reason."""
        trial.set_user_attr("reason", reason)
        self._study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def records(self) -> list[Record]:
        """All finished trials in order."""
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [Record(t.number, t.params, float(t.value), t.user_attrs) for t in done]  # type: ignore[arg-type]

    def reasons(self) -> Counter[str]:
        """Why trials were closed without a value, and how many for each reason."""
        pruned = self._study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        return Counter(str(t.user_attrs.get("reason", "")) for t in pruned)

    def proposed(self) -> int:
        """How many trials the algorithm (or its queue) has had, published rows aside."""
        over = (TrialState.COMPLETE, TrialState.PRUNED)
        return sum("row" not in t.user_attrs for t in self._study.get_trials(states=over))

    def finished(self) -> int:
        """How many trials are over, the published rows among them."""
        over = (TrialState.COMPLETE, TrialState.PRUNED)
        return len(self._study.get_trials(deepcopy=False, states=over))

    def waiting(self) -> int:
        """How many queued trials have not run yet."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def write_csv(self, path: Path) -> None:
        """All trials as a table: number, state, error, label, parameters, reason."""
        import csv

        trials = self._study.get_trials(deepcopy=False)
        names = sorted({name for trial in trials for name in trial.params})
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = ["trial", "state", "error", "label", "digest", "duplicate_of", "seconds"]
            writer.writerow([*columns, *names, "reason"])
            for t in trials:
                notes = t.user_attrs
                spent = round(t.duration.total_seconds(), 2) if t.duration else ""
                value = "" if t.value is None else t.value
                middle = [notes.get(k, "") for k in ("label", "digest", "duplicate_of")]
                params = [t.params.get(name, "") for name in names]
                row = [t.number, t.state.name, value, *middle, spent, *params]
                writer.writerow([*row, notes.get("reason", "")])
        part.replace(path)


def fixed(params: Mapping[str, Any]) -> optuna.trial.FixedTrial:
    """A trial that hands the given parameters to `decode` again."""
    return optuna.trial.FixedTrial(dict(params))


def dump(value: BaseModel) -> Any:
    """A pydantic value as plain JSON data, for a trial's notes."""
    return json.loads(value.model_dump_json())
