"""The trials of a search: published schedules first, then proposals, until there are enough."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from autofr.errors import BudgetError, MeasurementError
from autofr.search.folder import Settings
from autofr.search.ledger import Ledger
from autofr.search.trial import Outcome, Proposal, Scorer

CUT_OFF = "its process ended"


class Hands(Protocol):
    """Who works proposals out; `away` are those that go on with them when the time is up."""

    away: bool

    def free(self, twins: int) -> bool:
        """Whether another proposal can be begun, where so many wait for an equal one."""
        ...

    def at_work(self, proposal: Proposal) -> bool:
        """Whether an equal proposal was begun and is not over."""
        ...

    def begin(self, trial: Any, proposal: Proposal) -> None:
        """Take a trial."""
        ...

    def busy(self) -> bool:
        """Whether some trial that was taken is not over."""
        ...

    def over(self) -> list[tuple[Any, Outcome | None]]:
        """Wait a while; trials that are over now. None is the outcome of one that was cut off."""
        ...


class Own:
    """The search's own process: works out a proposal as soon as it takes it."""

    away = False

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._found: list[tuple[Any, Outcome | None]] = []

    def free(self, twins: int) -> bool:
        return not self._found

    def at_work(self, proposal: Proposal) -> bool:
        return False  # it has all that it began

    def begin(self, trial: Any, proposal: Proposal) -> None:
        self._found.append((trial, self._scorer.outcome(proposal)))

    def busy(self) -> bool:
        return bool(self._found)

    def over(self) -> list[tuple[Any, Outcome | None]]:
        found, self._found = self._found, []
        return found


@dataclass
class Trials:
    """Runs the trials of one search.

    `rows` score published schedules, by name; `propose(trial)` makes a proposal of parameters. What
    these raise as BudgetError or MeasurementError ends that trial, not the search.
    """

    ledger: Ledger
    settings: Settings
    hands: Hands
    rows: Mapping[str, Callable[[], Outcome]]
    guesses: Sequence[Mapping[str, Any]]
    propose: Callable[[Any], Proposal]
    on_progress: Callable[[str, int, int], None]
    _twins: list[tuple[Any, Proposal]] = field(default_factory=list, init=False)

    def run(self) -> None:
        """Run queued trials and the algorithm's, until there are enough or time is up."""
        self._began = time.monotonic()
        if not self.hands.away:
            self._rows()
        for params in self.guesses:
            self.ledger.guess(params)
        if self.hands.away:
            self._rows()
        self._fill()
        while self._unfinished():
            for trial, outcome in self.hands.over():
                self._close(trial, outcome)
            self._fill()

    def _unfinished(self) -> bool:
        """Whether a trial is to be waited for, or to be begun: who is away may be done already."""
        if self.hands.away and self._late():
            return False
        at_work = self.hands.busy() or bool(self._twins)
        return at_work or (self.ledger.more(self.settings.trials) and not self._late())

    def _late(self) -> bool:
        """Say how far the trials are; whether no other may start."""
        self.on_progress("trials", self.ledger.finished(), len(self.rows) + self.settings.trials)
        now, settings = time.monotonic(), self.settings
        if settings.time_limit and now - self._began > settings.time_limit:
            return True
        return settings.deadline is not None and now > settings.deadline

    def _rows(self) -> None:
        """Score the published schedules here, where they are timed; who is away goes on."""
        for name, row in self.rows.items():
            if self.hands.away:
                self._fill()
            if self._late():
                return
            if not self.ledger.begin_row(name):
                continue
            began = datetime.datetime.now()
            try:
                outcome = row()
            except (BudgetError, MeasurementError) as error:
                outcome = Outcome(reason=str(error))
            self.ledger.add_row(name, outcome, began)

    def _fill(self) -> None:
        """Begin as many trials as the hands take."""
        twins, self._twins = self._twins, []
        for twin in twins:
            self._begin(*twin)
        while self._wanted():
            trial = self.ledger.ask()
            try:
                self._begin(trial, self.propose(trial))
            except (BudgetError, MeasurementError) as error:
                self.ledger.give_up(trial, str(error))
            except BaseException as error:
                self.ledger.give_up(trial, f"{type(error).__name__}: {error}", failed=True)
                raise

    def _wanted(self) -> bool:
        free = self.hands.free(len(self._twins))
        return free and self.ledger.more(self.settings.trials) and not self._late()

    def _begin(self, trial: Any, proposal: Proposal) -> None:
        """Have a proposal scored, unless an equal one was: it waits for one that is at work."""
        if self.hands.at_work(proposal):
            self._twins.append((trial, proposal))
        elif not self.ledger.told(trial, proposal):
            self.hands.begin(trial, proposal)

    def _close(self, trial: Any, outcome: Outcome | None) -> None:
        """Keep how a trial went."""
        if outcome is None:
            self.ledger.try_again(trial, CUT_OFF)
        elif outcome.value is None:
            self.ledger.give_up(trial, outcome.reason, notes=outcome.notes)
        else:
            self.ledger.tell(trial, outcome.value, outcome.notes)
