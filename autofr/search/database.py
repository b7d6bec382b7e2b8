"""A PostgreSQL database that holds studies: connections, what waits while it is away, locks."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from autofr.errors import StorageError, redacted
from autofr.search.address import checked

PATIENCE = 600.0  # seconds that a database may be away
_SCHEMA = "autofr schema"
_CONNECT = {
    "connect_timeout": 10,
    # Server and client each notice within a minute that the other has lost its power, and within
    # seconds that a process is paused in the middle of a transaction, in whose way others stand.
    "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
    " -c idle_in_transaction_session_timeout=15000",
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


# -- connections ----------------------------------------------------------------------------------


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
    cause = redacted(" ".join(str(error).split()), address)
    return StorageError(f"--storage {redacted(address)}: cannot be used ({cause})")


def _said(error: BaseException) -> BaseException:
    """What the driver said, where Optuna and SQLAlchemy pass it on.

    Where it said so of a list of trials, Optuna asks again at once, and SQLAlchemy refuses that.
    """
    passed = error.__cause__
    for one in (passed, getattr(passed, "__context__", None)):
        if said := getattr(one, "orig", None):
            return said
    return error


# -- Optuna's storage -----------------------------------------------------------------------------


class _AgainError(Exception):
    """Optuna tries once more to make a trial: the answer to its first attempt was lost."""


def _away(error: BaseException) -> bool:
    """Whether an error says that the database cannot be reached, or does not work just now."""
    psycopg = _psycopg()
    paused = psycopg.errors.IdleInTransactionSessionTimeout
    known = (_AgainError, psycopg.OperationalError, psycopg.InterfaceError, paused)
    return isinstance(_said(error), known)


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
            except (StorageInternalError, _AgainError) as error:
                if not _away(error):
                    raise
                self.miss(error)
            time.sleep(pause)
            pause = min(10.0, 2 * pause)

    return call


class Storage(RDBStorage):
    """Optuna's storage, which waits for a database that is away instead of failing."""

    lost: float | None = None  # since when the database is away
    _sent: FrozenTrial | None = None  # the last that was to be added

    get_all_studies = _patient(RDBStorage.get_all_studies)
    get_study_id_from_name = _patient(RDBStorage.get_study_id_from_name)
    get_study_directions = _patient(RDBStorage.get_study_directions)
    get_study_user_attrs = _patient(RDBStorage.get_study_user_attrs)
    set_study_user_attr = _patient(RDBStorage.set_study_user_attr)
    set_trial_state_values = _patient(RDBStorage.set_trial_state_values)
    set_trial_user_attr = _patient(RDBStorage.set_trial_user_attr)
    get_trial = _patient(RDBStorage.get_trial)
    _get_trials = _patient(RDBStorage._get_trials)
    _get_stale_trial_ids = _patient(RDBStorage._get_stale_trial_ids)

    def miss(self, error: Exception) -> None:
        """Note that it is away; the first to do so says it.

        Raises: StorageError when it has been away for too long.
        """
        now = time.monotonic()
        if self.lost is None:
            self.lost = now
            said = redacted(str(_said(error))).partition("\n")[0]
            _log.warning("the database is away (%s); waiting for it", said)
        if now - self.lost > PATIENCE:
            raise _refusal(self.url.replace("+psycopg", "", 1), _said(error)) from None

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(Exception):  # else the thread ends, and with it the trial
            super().record_heartbeat(trial_id)

    @_patient
    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        """As Optuna's, but what is there although its answer was lost is not added again."""
        if self.lost is not None and template_trial is not None:
            wanted = template_trial.user_attrs, template_trial.params
            for one in self._get_trials(study_id, None, set(), -1):
                if (one.user_attrs, one.params) == wanted:
                    return one
        self._sent = None
        return super()._create_new_trial(study_id, template_trial)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Any
    ) -> Any:
        """As Optuna's, but only at the first of the attempts that it makes by itself."""
        if template_trial is not None and template_trial is self._sent:
            raise _AgainError("the answer to a new trial was lost")
        self._sent = template_trial
        return super()._get_prepared_new_trial(study_id, template_trial, session)


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


# -- locks ----------------------------------------------------------------------------------------


def _key(name: str) -> int:
    """The number of an advisory lock."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


class Ownership:
    """An advisory lock on a study: the database lets it go when its holder's connection ends.

    Raises: StorageError when another process has it.
    """

    def __init__(self, address: str, study: str) -> None:
        self._address, self._study = address, study
        self._connection = self._taken()

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
            self._connection.execute("SELECT 1")
            return
        self._connection.close()
        until = time.monotonic() + PATIENCE
        while self._connection.closed:
            try:
                self._connection = self._taken()
            except StorageError:  # away, or it has not noticed yet that our connection is lost
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)

    def silent(self) -> list[int]:
        """Numbers of the trials that were taken and whose heart has not beaten once."""
        try:
            rows = self._connection.execute(_SILENT, [self._study]).fetchall()
        except _psycopg().Error:  # the database has just gone away: at the next look
            return []
        return [number for (number,) in rows]

    def release(self) -> None:
        """Let the study go."""
        self._connection.close()
