"""The queue of a shared study: who takes a trial keeps its heart beating while it scores it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from autofr.errors import StorageError
from autofr.search.database import Storage, open_storage
from autofr.search.ledger import FOUND
from autofr.search.trial import Outcome, Proposal

PAUSES = (0.05, 1.0)  # seconds between two looks at an empty queue, the shortest and the longest


def pause(since: float) -> float:
    """Seconds to wait before the next look, where `since` (monotonic) nothing was found.

    A tenth of that time: what comes is found soon, and a database is left alone for long idlers.
    """
    shortest, longest = PAUSES
    return min(longest, max(shortest, (time.monotonic() - since) / 10))


class _NothingError(Exception):
    """No trial waits."""


class _OwnError(Exception):
    """What went wrong is the work itself, not the storage."""


class Queue(optuna.Study):
    """A study of which queued trials are taken, and nothing is proposed."""

    def __init__(self, name: str, storage: Storage) -> None:
        super().__init__(name, storage, optuna.samplers.RandomSampler())

    def ask(self, fixed_distributions: Any = None) -> optuna.Trial:
        """Take the first queued trial.

        Raises: _NothingError when there is none.
        """
        trial_id = self._pop_waiting_trial_id()
        if trial_id is None:
            raise _NothingError
        return optuna.trial.Trial(self, trial_id)

    def take(
        self, work: Callable[[Proposal], Outcome], who: str
    ) -> Literal["scored", "lost", "none"]:
        """Score a queued trial, its heart beating meanwhile.

        "lost" is one that was taken for dead, because this process was paused, and given to
        another: what was found here is not told.
        Raises: what `work` raises; the trial is closed, to be tried again.
        """

        def objective(trial: optuna.Trial) -> float:
            try:
                outcome = work(Proposal.load(trial.user_attrs["proposal"]))
            except Exception as error:
                trial.set_user_attr("reason", f"{who}: {type(error).__name__}: {error}")
                raise _OwnError from error
            notes = {**outcome.notes, "worker": who}
            if outcome.value is None:
                notes["reason"] = outcome.reason
            trial.set_user_attr(FOUND, notes)  # all at once: each takes a transaction
            if outcome.value is None:
                raise optuna.TrialPruned
            return outcome.value

        try:
            self.optimize(objective, n_trials=1)
        except _NothingError:
            return "none"
        except _OwnError as error:
            raise error.__cause__ or error from None
        except UnboundLocalError as error:  # Optuna's own, where a result could not be told
            raise error.__context__ or error from None
        except (AssertionError, ValueError, UpdateFinishedTrialError):
            return "lost"
        return "scored"


@contextmanager
def joined(
    address: str, study: str | None, idle: float, say: Callable[[str], None]
) -> Iterator[Any]:
    """The queue of a study that has a driver, as a worker sees it; it is waited for `idle` seconds.

    Raises: StorageError when there is none by then, or several without a name.
    """
    storage = open_storage(address)
    try:
        name, until, told = None, time.monotonic() + idle, False
        while name is None:
            name = _open_study(storage, study)
            if name is None and time.monotonic() > until:
                raise StorageError(
                    f"no search has opened {f'study {study!r}' if study else 'a study'} within"
                    f" {idle:.0f} s; start `autofr search --storage ...` first"
                )
            if name is None and not told:
                say("waiting for a search to open its study")
                told = True
            if name is None:
                time.sleep(PAUSES[1])
        queue = Queue(name, storage)
        storage.heartbeat_interval, storage.grace_period = queue.user_attrs["facts"]["heartbeat"]
        yield queue
    finally:
        storage.engine.dispose()


def _open_study(storage: Storage, study: str | None) -> str | None:
    """The study to work on, if there is one.

    Raises: StorageError when there are several, and none was named.
    """
    names = optuna.get_all_study_names(storage)
    attrs = {n: Queue(n, storage).user_attrs for n in names if study in (None, n)}
    found = [name for name, said in attrs.items() if said.get("state") == "open"]
    if len(found) > 1:
        raise StorageError(f"--study: name one of the open studies: {', '.join(sorted(found))}")
    return found[0] if found else None
