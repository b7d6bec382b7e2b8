"""A ledger that many processes share: one Optuna study on PostgreSQL, with heartbeats.

The driver alone proposes, queues and tries again; workers take what is queued and score it. So the
count of trials is exact, and no two processes propose the same. Who scores a trial keeps its
heart beating; a trial whose heart has stopped is closed, and queued again by the driver.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from autofr.errors import StorageError
from autofr.search.address import check_name
from autofr.search.database import Ownership, open_storage
from autofr.search.ledger import OVER, RETRIES, Ledger, algorithm, retry_of
from autofr.search.queue import Queue, pause
from autofr.search.trial import Outcome, Proposal, Scorer

QUEUED = 4  # trials that wait for workers, at least
LOOK = 0.2  # seconds between two looks of the driver at all trials, at least


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


class SharedLedger(Ledger):
    """The driver's side: it proposes, queues, and tries again what was cut off."""

    def __init__(self, share: Share, name: str, seed: int, space: str) -> None:
        check_name(name)
        self.name, self._grace = name, share.heartbeat[1]
        self._depth, self._dry = QUEUED, False  # how long a queue should be; whether it ran dry
        self._silent: dict[int, float] = {}  # running without a heartbeat: since when
        self._open: dict[str, int] = {}  # chain -> number of the proposer's trial
        self._keys: dict[str, str] = {}  # chain that is not over -> key of its proposal
        with ExitStack() as held:
            storage = open_storage(share.address, share.heartbeat)
            held.callback(storage.engine.dispose)
            self._owner = Ownership(share.address, name)
            held.callback(self._owner.release)
            optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
            self._study = Queue(name, storage)
            trials = self._trials()
            if trials and self.published is None:
                raise StorageError(
                    f"study {name!r} has trials and is none of autofr's; give another name with"
                    " --study"
                )
            self._proposer = optuna.create_study(sampler=algorithm(seed, len(trials)))
            for trial in trials:
                if trial.state in OVER and trial.params and "chain" not in trial.user_attrs:
                    self._proposer.add_trial(trial)  # was over as soon as it was proposed
            self._follow(trials)
            self._study.set_user_attr("space", space)
            self._held = held.pop_all()

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
        self._held.close()

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        self._read = super()._trials()  # takes milliseconds: a look makes do with two
        return [one for one in self._read if not states or one.state in states]

    def finished(self) -> int:
        """As of the last reading: this is asked for at every look, for nothing but to be said."""
        return sum(one.state in OVER for one in self._read)

    # -- proposing --------------------------------------------------------------------------------

    def guess(self, params: Mapping[str, Any]) -> None:
        self._proposer.enqueue_trial(dict(params), skip_if_exists=True)

    def ask(self) -> optuna.Trial:
        self._follow(self._trials())
        return super().ask()

    def more(self, trials: int) -> bool:
        guesses = self._proposer.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return bool(guesses) or self.proposed() < trials

    def proposed(self) -> int:
        """As on SQLite; what waits for its twin is known to the proposer alone."""
        begun = self._proposer.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        unqueued = {trial.number for trial in begun} - {*self._open.values()}
        return super().proposed() + len(unqueued)

    def tell(self, trial: optuna.Trial, value: float, notes: Mapping[str, Any]) -> None:
        self._add(trial, TrialState.COMPLETE, {**notes}, float(value))
        self._proposer.tell(trial, float(value))

    def give_up(
        self, trial: optuna.Trial, reason: str, failed: bool = False, notes: Mapping[str, Any] = {}
    ) -> None:
        if not failed:  # else it was in nobody's hands yet: another is proposed in its place
            self._add(trial, TrialState.PRUNED, {**notes, "reason": reason})
        self._proposer.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def at_work(self, proposal: Proposal) -> bool:
        """Whether an equal proposal is queued, by whichever driver, and not over."""
        return proposal.key in self._keys.values()

    def hand_over(self, trial: optuna.Trial, proposal: Proposal) -> None:
        """Queue a proposal for whoever takes it first."""
        chain = uuid.uuid4().hex[:12]
        self._add(trial, TrialState.WAITING, {"chain": chain, "proposal": proposal.dump()})
        self._open[chain], self._keys[chain] = trial.number, proposal.key

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
        found = self._study.take(work, "driver") != "none"
        self._dry = found and not self.waiting()
        self._follow(self._read)
        return found

    def room(self, twins: int = 0) -> bool:
        """Whether the queue is shorter than what workers may take until the next look."""
        if self._dry and not twins:  # workers may have had nothing to do meanwhile
            self._depth *= 2
        states = [one.state for one in self._trials(TrialState.WAITING, TrialState.RUNNING)]
        self._depth, self._dry = max(self._depth, 2 * states.count(TrialState.RUNNING)), False
        return states.count(TrialState.WAITING) + twins < self._depth

    def watch(self) -> bool:
        """Close trials whose process is gone and queue them again; whether some are not over.

        Raises: StorageError when another driver has taken the study.
        """
        self._owner.hold()
        self._close_silent()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        again = [trial for trial in self._cut_off() if "chain" in trial.user_attrs]
        for trial in again:
            notes = {name: trial.user_attrs[name] for name in ("chain", "proposal")}
            self._add(trial, TrialState.WAITING, notes | retry_of(trial))
        self._follow(self._read)
        return bool(again) or not all(trial.state.is_finished() for trial in self._read)

    def _close_silent(self) -> None:
        """Close what was taken by a process that ended before its first heartbeat."""
        now = time.monotonic()
        self._silent = {one: self._silent.get(one, now) for one in self._owner.silent()}
        for number, since in self._silent.items():
            if now - since > self._grace:
                with suppress(ValueError, UpdateFinishedTrialError):  # it is over after all
                    self._study.tell(number, state=TrialState.FAIL)

    def _follow(self, trials: list[FrozenTrial]) -> None:
        """Let the proposer know of all these."""
        for trial in trials:
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
                self._keys[chain] = notes["proposal"].get("key", "")  # other versions note none
            if chain in self._keys and (trial.state in OVER or lost):
                value = trial.value if trial.state == TrialState.COMPLETE else None
                state = None if value is not None else trial.state
                self._proposer.tell(self._open[chain], value, state=state)
                del self._keys[chain]


class Helped:
    """The driver among its workers: it queues, and works on what nobody has taken."""

    away = True

    def __init__(self, ledger: SharedLedger, scorer: Scorer) -> None:
        self._ledger, self._scorer, self._since = ledger, scorer, time.monotonic()

    def free(self, twins: int) -> bool:
        return self._ledger.room(twins)

    def at_work(self, proposal: Proposal) -> bool:
        return self._ledger.at_work(proposal)

    def begin(self, trial: Any, proposal: Proposal) -> None:
        self._ledger.hand_over(trial, proposal)
        self._since = time.monotonic()

    def busy(self) -> bool:
        return self._ledger.watch()

    def over(self) -> list[tuple[Any, Outcome | None]]:
        if self._ledger.take(self._scorer.outcome):
            self._since = time.monotonic()
        else:
            time.sleep(max(LOOK, pause(self._since)))
        return []
