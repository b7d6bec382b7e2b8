"""A run's ledger: one Optuna study on SQLite, owned by one process at a time."""

from __future__ import annotations

import csv
import datetime
import io
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autofr import files
from autofr.errors import RunFolderError
from autofr.search.folder import STATE
from autofr.search.trial import Outcome, Proposal

STUDY = "autofr"
RETRIES = 3
OVER = (TrialState.COMPLETE, TrialState.PRUNED)
FOUND = "found"  # the note that holds all notes of who has scored a trial
TAKEN_OVER = ("label", "digest", "proposal")  # by a trial whose twin is over already
_log = logging.getLogger("autofr")


@dataclass(frozen=True)
class Record:
    """One finished trial: its number, parameters, value (error) and what was noted with it."""

    number: int
    params: Mapping[str, Any]
    value: float
    notes: Mapping[str, Any]


def algorithm(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """What proposes parameters; resumed with the seed alone, it would repeat its first trials."""
    return optuna.samplers.TPESampler(
        seed=(seed * 100_003 + trials) % 2**32, multivariate=True, n_startup_trials=8
    )


class _Proposer(optuna.Study):
    """A study as the algorithm sees it: without what is over and has no parameters.

    Published rows have none. With them no parameter is common to all trials, and the algorithm
    proposes each by itself.
    """

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        found = super()._get_trials(*args, **kwargs)
        return [trial for trial in found if trial.params or not trial.state.is_finished()]


def notes_of(trial: FrozenTrial) -> dict[str, Any]:
    """What is noted with a trial."""
    attrs = trial.user_attrs
    return {name: note for name, note in attrs.items() if name != FOUND} | attrs.get(FOUND, {})


def retry_of(trial: FrozenTrial) -> dict[str, int]:
    """What is noted with a trial that tries another again; it is said, too."""
    reason = notes_of(trial).get("reason", "its process ended, or could not be reached")
    _log.warning("trial %d is tried again (%s)", trial.number, reason)
    return {"retry_of": trial.number, "retry": trial.user_attrs.get("retry", 0) + 1}


class Ledger:
    """The study: proposes parameters, keeps every trial; survives kill -9 at any moment."""

    def __init__(self, folder: Path, seed: int, space: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = (folder / STATE / "study.db").resolve()
        try:
            self._study = optuna.create_study(
                study_name=STUDY, storage=f"sqlite:///{path}", load_if_exists=True
            )
            self._reap()
            sampler = algorithm(seed, len(self._trials()))
            self._proposer = _Proposer(STUDY, self._study._storage, sampler)
        except Exception as error:  # SQLAlchemy's tree is not ours to import
            cause = str(error).partition("\n")[0]
            raise RunFolderError(
                f"{path}: the study cannot be opened ({type(error).__name__}: {cause}); move the"
                " file away to start afresh"
            ) from None
        self._study.set_user_attr("space", space)

    def _reap(self) -> None:
        """As the sole owner, fail trials that a killed process left running; run them again.

        Older versions queued published rows, which are no trials now: these are closed too.
        """
        for trial in self._trials(TrialState.RUNNING, TrialState.WAITING):
            if trial.state == TrialState.RUNNING or "row" in trial.user_attrs:
                self._study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        self._requeue()

    def _requeue(self) -> None:
        for trial in self._cut_off():
            asked = trial.system_attrs.get("fixed_params", {})  # it may not have read them all yet
            self._study.enqueue_trial(asked | trial.params, user_attrs=retry_of(trial))

    def _cut_off(self) -> list[FrozenTrial]:
        """Trials that failed and were not tried again.

        One that was cut off more than `RETRIES` times may be what kills the process: it stays
        failed.
        """
        trials = self._trials()
        followed = {trial.user_attrs.get("retry_of") for trial in trials}
        return [
            trial
            for trial in trials
            if trial.state == TrialState.FAIL and trial.number not in followed
            if trial.user_attrs.get("retry", 0) < RETRIES and "row" not in trial.user_attrs
        ]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    # -- published schedules ----------------------------------------------------------------------

    def begin_row(self, name: str) -> bool:
        """Note that a published schedule is about to be scored.

        False where it is over, or has cut off its process more than `RETRIES` times.
        """
        attempts = self._study.user_attrs.get(f"row {name}", 0)
        over = {trial.user_attrs.get("row") for trial in self._trials(*OVER)}
        if name in over or attempts > RETRIES:
            return False
        self._study.set_user_attr(f"row {name}", attempts + 1)
        return True

    def add_row(self, name: str, outcome: Outcome, began: datetime.datetime) -> None:
        """Keep how a published schedule went, value and notes at once."""
        lost = outcome.value is None
        notes = {"reason": outcome.reason} if lost else outcome.notes
        row = optuna.trial.create_trial(
            state=TrialState.PRUNED if lost else TrialState.COMPLETE,
            value=outcome.value,
            user_attrs={"row": name, **notes},
        )
        row.datetime_start = began
        self._study.add_trial(row)

    # -- trials -----------------------------------------------------------------------------------

    def guess(self, params: Mapping[str, Any]) -> None:
        """Queue parameters that are worth trying first, once."""
        self._study.enqueue_trial(dict(params), skip_if_exists=True)

    def ask(self) -> optuna.Trial:
        """Start the next trial: a queued one, or the algorithm's proposal."""
        return self._proposer.ask()

    def tell(self, trial: optuna.Trial, value: float, notes: Mapping[str, Any]) -> None:
        """Finish a trial; the notes are written first, so that no value is without them."""
        trial.set_user_attr(FOUND, {**notes})
        self._study.tell(trial, float(value))

    def give_up(
        self, trial: optuna.Trial, reason: str, failed: bool = False, notes: Mapping[str, Any] = {}
    ) -> None:
        """Close a trial without a value, with the reason; one that failed is tried again."""
        trial.set_user_attr(FOUND, {**notes, "reason": reason})
        self._study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def try_again(self, trial: optuna.Trial, reason: str) -> None:
        """Close a trial that was cut off, and queue its parameters unless that happens always."""
        self.give_up(trial, reason, failed=True)
        self._requeue()

    def told(self, trial: optuna.Trial, proposal: Proposal) -> bool:
        """Whether a proposal was scored or refused before; then its trial ends as its twin did.

        What failed is no such twin: cut off by a killed process, too little memory or a lost
        connection, it says nothing of the proposal.
        """
        over = self._trials(*OVER)
        twin = next((one for one in over if notes_of(one).get("proposal") == proposal.key), None)
        if twin is None:
            return False
        found = notes_of(twin)
        notes = {name: note for name, note in found.items() if name in TAKEN_OVER}
        notes["duplicate_of"] = twin.number
        if twin.value is None:
            self.give_up(trial, found["reason"], notes=notes)
        else:
            self.tell(trial, twin.value, notes)
        return True

    def more(self, trials: int) -> bool:
        """Whether another trial is to be asked for, where `trials` are wanted besides the rows."""
        return bool(self.waiting()) or self.proposed() < trials

    def dismiss(self) -> None:
        """Send home who helps with the trials: none is left."""

    # -- what there is ----------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """All finished trials in order."""
        done = self._trials(TrialState.COMPLETE)
        return [Record(t.number, t.params, float(t.value), notes_of(t)) for t in done]  # type: ignore[arg-type]

    def reasons(self) -> Counter[str]:
        """Why trials were closed without a value, and how many for each reason."""
        given_up = self._trials(TrialState.PRUNED)
        return Counter(str(notes_of(trial).get("reason", "")) for trial in given_up)

    def proposed(self) -> int:
        """How many parameters were to be tried, however often; published rows aside."""
        aside = ("row", "retry_of")
        return sum(not any(name in t.user_attrs for name in aside) for t in self._trials())

    def finished(self) -> int:
        """How many trials are over, the published rows among them."""
        return len(self._trials(*OVER))

    def waiting(self) -> int:
        """How many queued trials have not run yet."""
        return len(self._trials(TrialState.WAITING))

    def write_csv(self, path: Path) -> None:
        """All trials as a table: number, state, error, label, parameters, reason."""
        trials = self._trials()
        names = sorted({name for trial in trials for name in trial.params})
        noted = ("label", "digest", "duplicate_of")
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["trial", "state", "error", *noted, "seconds", *names, "worker", "reason"])
        for t in trials:
            spent = round(t.duration.total_seconds(), 2) if t.duration else ""
            row = [t.number, t.state.name, "" if t.value is None else t.value]
            notes = notes_of(t)
            row += [notes.get(name, "") for name in noted]
            row += [spent, *(t.params.get(name, "") for name in names)]
            writer.writerow([*row, *(notes.get(k, "") for k in ("worker", "reason"))])
        files.write(path, table.getvalue())


def fixed(params: Mapping[str, Any]) -> optuna.trial.FixedTrial:
    """A trial that hands the given parameters to `decode` again."""
    return optuna.trial.FixedTrial(dict(params))
