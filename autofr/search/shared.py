"""A ledger that many processes share: one Optuna study on PostgreSQL, with heartbeats.

The driver alone proposes, queues and tries again; workers take what is queued and score it. So the
count of trials is exact, and no two processes propose the same. Who scores a trial keeps its
heart beating; a trial whose heart has stopped is closed, and queued again by the driver.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from autofr.errors import StorageError
from autofr.search.address import checked, redacted
from autofr.search.ledger import FOUND, OVER, RETRIES, Ledger, algorithm, retry_of
from autofr.search.trial import Outcome, Proposal, Scorer

PATIENCE = 600.0  # seconds that a database may be away
QUEUED = 4  # trials that wait for workers, at least
_SCHEMA = "autofr schema"
_CONNECT = {
    "connect_timeout": 10,
    # Server and client each notice within a minute that the other has lost its power.
    "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # ms
}
_SILENT = (
    "SELECT t.number FROM trials t JOIN studies s USING (study_id)"
    " LEFT JOIN trial_heartbeats h USING (trial_id)"
    " WHERE s.study_name = %s AND t.state = 'RUNNING' AND h.trial_id IS NULL"
)
_log = logging.getLogger("autofr")


@dataclass(frozen=True)
class Share:
    """Where a search shares its trials; `request` is how workers can make its pipe.

    `heartbeat` is how often a running trial says so, and after how long without that it is given
    to another, both in seconds.
    """

    address: str
    study: str | None = None
    request: Mapping[str, Any] | None = None
    heartbeat: tuple[int, int] = (60, 300)


# -- the database ---------------------------------------------------------------------------------


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError:
        raise StorageError(
            "--storage: the driver for PostgreSQL is not installed; pip install 'autofr[postgres]'"
        ) from None
    return psycopg


def _opened(address: str) -> Any:
    """A connection in UTC, by which Optuna compares heartbeats as times of day."""
    url = checked(address).replace("+psycopg", "", 1)
    connection = _psycopg().connect(url, **_CONNECT)
    connection.execute("SET timezone TO 'UTC'")
    connection.commit()
    return connection


def _connect(address: str) -> Any:
    """A connection of our own, for locks."""
    try:
        connection = _opened(address)
    except _psycopg().Error as error:
        raise _refusal(address, error) from None
    connection.autocommit = True
    return connection


def _refusal(address: str, error: BaseException) -> StorageError:
    cause = redacted(" ".join(str(error).split()))
    return StorageError(f"--storage {redacted(address)}: cannot be used ({cause})")


def _key(name: str) -> int:
    """The number of an advisory lock."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def _away(error: BaseException) -> bool:
    """Whether an error says that the database cannot be reached, or does not work just now."""
    psycopg = _psycopg()
    said = getattr(error.__cause__, "orig", error)
    return isinstance(said, psycopg.OperationalError | psycopg.InterfaceError)


class Storage(optuna.storages.RDBStorage):
    """Optuna's storage, which waits for a database that is away instead of failing."""

    lost: float | None = None  # since when the database is away

    def miss(self, error: Exception) -> None:
        """Note that it is away; the first to do so says it.

        Raises: StorageError when it has been away for too long.
        """
        now = time.monotonic()
        if self.lost is None:
            self.lost = now
            said = redacted(str(getattr(error.__cause__, "orig", error))).partition("\n")[0]
            _log.warning("the database is away (%s); waiting for it", said)
        if now - self.lost > PATIENCE:
            address = self.url.replace("+psycopg", "", 1)
            raise _refusal(address, getattr(error.__cause__, "orig", error)) from None

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(Exception):  # else the thread ends, and with it the trial
            super().record_heartbeat(trial_id)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        return self._create_new_trial(study_id, template_trial)._trial_id

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        if self.lost is not None and template_trial is not None:  # its answer may be what was lost
            for one in self._get_trials(study_id, None, set(), -1):
                if (one.user_attrs, one.params) == (
                    template_trial.user_attrs,
                    template_trial.params,
                ):
                    return one
        return super()._create_new_trial(study_id, template_trial)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, tried again while the database is away."""

    @functools.wraps(method)
    def call(self: Storage, *args: Any, **kwargs: Any) -> Any:
        pause = 0.5
        while True:
            try:
                found = method(self, *args, **kwargs)
                self.lost = None
                return found
            except StorageInternalError as error:
                if not _away(error):
                    raise
                self.miss(error)
            time.sleep(pause)
            pause = min(10.0, 2 * pause)

    return call


for _name in (
    *("get_all_studies", "get_study_id_from_name", "get_study_user_attrs"),
    "set_study_user_attr",
    *("_create_new_trial", "set_trial_state_values", "set_trial_user_attr", "set_trial_param"),
    *("get_trial", "_get_trials", "_get_stale_trial_ids"),
):
    setattr(Storage, _name, _patient(getattr(Storage, _name)))


def open_storage(address: str, heartbeat: tuple[int, int] = (60, 300)) -> Storage:
    """Open a database; what is missing in a new one is made by one process at a time.

    Raises: StorageError when it cannot be reached or used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    interval, grace = heartbeat
    with _connect(address) as lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        lock.execute("SELECT pg_advisory_lock(%s)", [_key(_SCHEMA)])
        try:
            return Storage(
                checked(address),
                {"pool_pre_ping": True, "creator": functools.partial(_opened, address)},
                heartbeat_interval=interval,
                grace_period=grace,
            )
        except Exception as error:  # SQLAlchemy's tree is not ours to import
            raise _refusal(address, error) from None


class _Ownership:
    """An advisory lock: the database lets it go when its holder's connection ends."""

    def __init__(self, address: str, study: str) -> None:
        self._address, self._study = address, study
        self.connection = self._taken()

    def _taken(self) -> Any:
        connection = _connect(self._address)
        row = connection.execute("SELECT pg_try_advisory_lock(%s)", [_key(self._study)]).fetchone()
        if not row[0]:
            connection.close()
            raise StorageError(
                f"study {self._study!r}: another autofr search drives it; wait for it, help it with"
                " `autofr worker`, or give another name with --study"
            )
        return connection

    def hold(self) -> None:
        """Make sure of it; take it again after the database was away.

        Raises: StorageError when another process has it now.
        """
        with suppress(_psycopg().Error):
            self.connection.execute("SELECT 1")
            return
        self.connection.close()
        until = time.monotonic() + PATIENCE
        while self.connection.closed:
            try:
                self.connection = self._taken()
            except StorageError:  # away, or it has not noticed yet that our connection is lost
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)


# -- the driver -----------------------------------------------------------------------------------


class SharedLedger(Ledger):
    """The driver's side: it proposes, queues, and tries again what was cut off."""

    def __init__(self, share: Share, name: str, seed: int, space: str) -> None:
        self._storage = open_storage(share.address, share.heartbeat)
        self._owner = _Ownership(share.address, name)
        self._grace = share.heartbeat[1]
        self._silent: dict[int, float] = {}  # running without a heartbeat: since when
        self.name = name
        optuna.create_study(study_name=name, storage=self._storage, load_if_exists=True)
        self._study = self._queue = Queue(name, self._storage)
        if self._trials() and self.published is None:
            self.release()
            raise StorageError(
                f"study {name!r} has trials and is none of autofr's; give another name with --study"
            )
        self._proposer = optuna.create_study(sampler=algorithm(seed, len(self._trials())))
        self._open: dict[str, int] = {}  # chain -> number of the proposer's trial
        for trial in self._trials(*OVER):
            if trial.params and "chain" not in trial.user_attrs:
                self._proposer.add_trial(trial)  # was over as soon as it was proposed
        self._follow()
        self._study.set_user_attr("space", space)
        self._running = 0

    @property
    def published(self) -> dict[str, Any] | None:
        """What was published of the study before; None for a new one."""
        return self._study.user_attrs.get("facts")

    def publish(self, facts: Mapping[str, Any]) -> None:
        """Say what workers have to know, and let them in."""
        self._study.set_user_attr("facts", {**facts})
        self._study.set_user_attr("state", "open")

    def dismiss(self) -> None:
        """Send the workers home: no trial is left for them."""
        self._study.set_user_attr("state", "over")

    def release(self) -> None:
        """Let the study go; where workers were not dismissed, they wait for the next driver."""
        self._owner.connection.close()
        self._storage.engine.dispose()

    # -- proposing --------------------------------------------------------------------------------

    def guess(self, params: Mapping[str, Any]) -> None:
        self._proposer.enqueue_trial(dict(params), skip_if_exists=True)

    def more(self, trials: int) -> bool:
        guesses = self._proposer.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return bool(guesses) or self.proposed() < trials

    def ask(self) -> optuna.Trial:
        return self._proposer.ask()

    def tell(self, trial: optuna.Trial, value: float, notes: Mapping[str, Any]) -> None:
        self._add(trial, TrialState.COMPLETE, {**notes}, float(value))
        self._proposer.tell(trial, float(value))

    def give_up(self, trial: optuna.Trial, reason: str, failed: bool = False) -> None:
        state = TrialState.FAIL if failed else TrialState.PRUNED
        self._add(trial, state, {"reason": reason})
        self._proposer.tell(trial, state=state)

    def hand_over(self, trial: optuna.Trial, proposal: Proposal) -> None:
        """Queue a proposal for whoever takes it first."""
        chain = uuid.uuid4().hex[:12]
        self._add(trial, TrialState.WAITING, {"chain": chain, "proposal": proposal.dump()})
        self._open[chain] = trial.number

    def _add(
        self, trial: Any, state: TrialState, notes: dict[str, Any], value: float | None = None
    ) -> None:
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=notes,
            )
        )

    # -- watching ---------------------------------------------------------------------------------

    def take(self, work: Callable[[Proposal], Outcome]) -> bool:
        """Score a queued trial here; False where there is none."""
        return self._queue.take(work, "driver") != "none"

    def room(self) -> bool:
        """Whether the queue is shorter than what workers may take until the next look."""
        self._running = max(self._running, len(self._trials(TrialState.RUNNING)))
        return self.waiting() < max(QUEUED, 2 * self._running)

    def watch(self) -> bool:
        """Close trials whose process is gone and queue them again; whether some are not over.

        Raises: StorageError when another driver has taken the study.
        """
        self._owner.hold()
        self._close_silent()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        for trial in self._cut_off():
            if "chain" in trial.user_attrs:
                notes = {name: trial.user_attrs[name] for name in ("chain", "proposal")}
                self._add(trial, TrialState.WAITING, notes | retry_of(trial))
        self._follow()
        return bool(self._trials(TrialState.WAITING, TrialState.RUNNING))

    def _close_silent(self) -> None:
        """Close what was taken by a process that ended before its first heartbeat."""
        try:
            rows = self._owner.connection.execute(_SILENT, [self.name]).fetchall()
        except _psycopg().Error:  # the database has just gone away: at the next look
            return
        now = time.monotonic()
        self._silent = {number: self._silent.get(number, now) for (number,) in rows}
        for number, since in self._silent.items():
            if now - since > self._grace:
                with suppress(ValueError):  # it is over after all
                    self._study.tell(number, state=TrialState.FAIL)

    def _follow(self) -> None:
        """Let the proposer know of everything that is known here."""
        for trial in self._trials():
            chain, notes = trial.user_attrs.get("chain"), trial.user_attrs
            lost = trial.state == TrialState.FAIL and notes.get("retry", 0) >= RETRIES
            if chain is None:
                continue
            if chain not in self._open:
                begun = optuna.trial.create_trial(
                    state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions
                )
                self._proposer.add_trial(begun)
                self._open[chain] = len(self._proposer.get_trials(deepcopy=False)) - 1
            mine = self._proposer.get_trials(deepcopy=False)[self._open[chain]]
            if (trial.state in OVER or lost) and not mine.state.is_finished():
                value = trial.value if trial.state == TrialState.COMPLETE else None
                state = None if value is not None else trial.state
                self._proposer.tell(mine.number, value, state=state)


class Helped:
    """The driver among its workers: it queues, and works on what nobody has taken."""

    away = True

    def __init__(self, ledger: SharedLedger, scorer: Scorer, pause: float = 1.0) -> None:
        self._ledger, self._scorer, self._pause = ledger, scorer, pause

    def free(self) -> bool:
        return self._ledger.room()

    def begin(self, trial: Any, proposal: Proposal) -> None:
        self._ledger.hand_over(trial, proposal)

    def busy(self) -> bool:
        return self._ledger.watch()

    def over(self) -> list[tuple[Any, Outcome | None]]:
        if not self._ledger.take(self._scorer.outcome):
            time.sleep(self._pause)
        return []


# -- who takes trials -----------------------------------------------------------------------------


class _NothingError(Exception):
    """No trial waits."""


class _OwnError(Exception):
    """What went wrong is the work itself, not the storage."""


class Queue(optuna.Study):
    """A study of which queued trials are taken, and nothing is proposed."""

    def __init__(self, name: str, storage: Storage) -> None:
        super().__init__(name, storage, optuna.samplers.RandomSampler())

    def ask(self, fixed_distributions: Any = None) -> optuna.Trial:
        """Take the first queued trial. Raises: _NothingError when there is none."""
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
                time.sleep(1.0)
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
