"""Choose one of the trials: by error, then FID; held to the budget, no worse than a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from autofr.errors import BudgetError, MeasurementError
from autofr.runtime.points import Pipe
from autofr.search.evaluate import Candidate, Evaluator, Score
from autofr.search.folder import Settings
from autofr.search.ledger import Ledger, Record
from autofr.search.trial import candidate_of
from autofr.search.verify import Choice, Verdict, different, finalists, within_budget

FEW = 3  # trials whose parameters are planned anew for another time per call
NEAR = 1.05  # on all validation seeds, errors at most this many times the least count as equal


class Finalist(NamedTuple):
    """A trial's choice, with its typical error and FID on all validation seeds."""

    choice: Choice
    error: float
    fid: float | None


def ranked(found: Sequence[Finalist]) -> list[Choice]:
    """The best first: of those whose error is nearly the least, that of the lowest FID."""
    bound = NEAR * min(one.error for one in found)

    def place(one: Finalist) -> tuple[bool, float]:
        near = one.error <= bound
        return not near, one.fid if near and one.fid is not None else one.error

    return [one.choice for one in sorted(found, key=place)]


@dataclass
class Chooser:
    """Chooses among the trials that take at most `target` seconds per call.

    `again(record, seconds)` plans a trial's parameters anew for another time per call, or gives
    None where there is no front; `refine` corrects the mix of a choice once more, which all trials
    together would take too long for.
    """

    pipe: Pipe
    settings: Settings
    evaluator: Evaluator
    target: float
    again: Callable[[Record, float], Candidate | None]
    refine: Callable[[Choice], Choice]
    on_progress: Callable[[str, int, int], None]
    scores: dict[str, Score] = field(default_factory=dict)  # by digest
    _best: list[Record] = field(default_factory=list, init=False)

    def choose(self, ledger: Ledger) -> Verdict:
        """Winner among the finalists, held to the budget by measurement.

        Raises: BudgetError when no trial met the budget, or none keeps it.
        """
        records = ledger.records()
        best = finalists(records, self.target)
        if not best:
            raise BudgetError(self._nothing(ledger))
        self._best = different([r for r in records if "row" not in r.notes])[:FEW]
        scored = []
        for done, record in enumerate(best):
            self.on_progress("choose", done, len(best))
            choice = self.refine((record, candidate_of(record.notes)))
            score = self.score(choice[1])
            scored.append(Finalist(choice, score.typical, self.evaluator.fid(score)))
        return self._never_worse(self._hold(ranked(scored)), records)

    def score(self, found: Candidate) -> Score:
        """A candidate's score on all validation seeds; drawn once."""
        digest = found.policy.digest
        if digest not in self.scores:
            self.scores[digest] = self.evaluator.score(found.policy)
        return self.scores[digest]

    def _nothing(self, ledger: Ledger) -> str:
        """Say why nothing can be chosen: what most trials were given up for, and the way out."""
        said, over = "", ledger.finished()
        for reason, count in ledger.reasons().most_common(1):
            said = f" ({count} of {over} trials were given up: {reason})"
        more = "--trials or --time-limit" if self.settings.time_limit else "--trials"
        return (
            f"no trial met the budget {self.settings.budget.text}{said}: raise {more}, or ask for a"
            " smaller speed-up"
        )

    def _never_worse(self, verdict: Verdict, records: Sequence[Record]) -> Verdict:
        """Take a published row instead, if it is nearer to the teacher and keeps the budget too.

        Held to the budget by measurement, the choice may have become faster and worse than it was
        among the trials.
        """
        error = self.score(verdict.found).error.value
        rows = [r for r in records if "line" in r.notes and r.notes["seconds"] <= self.target]
        nearer = [r for r in rows if r.notes["line"]["error"]["value"] < error]
        nearer.sort(key=lambda r: r.notes["line"]["error"]["value"])
        try:
            return self._hold([(r, candidate_of(r.notes)) for r in nearer]) if nearer else verdict
        except BudgetError:  # none of them, when measured
            return verdict

    def _hold(self, choices: Sequence[Choice]) -> Verdict:
        def on_pair(pairs: int, width: float) -> None:
            self.on_progress("measure", pairs, pairs + 1)

        return within_budget(self.pipe, self.settings, choices, self._planned, on_pair)

    def _planned(self, record: Record, seconds: float) -> Choice | None:
        """The best policy for another time per call that these or the best parameters give.

        Parameters were the best of many for the time that they were tried with: for another one
        others may be.
        """
        if "row" in record.notes:
            return None
        found: dict[str, Choice] = {}
        for one in {r.number: r for r in (record, *self._best)}.values():
            candidate = self.again(one, seconds)
            if candidate is None or candidate.policy.digest in found:
                continue
            with suppress(MeasurementError):  # it draws NaN
                score = self.evaluator.score(candidate.policy, self.settings.trial_seeds)
                found[candidate.policy.digest] = replace(one, value=score.typical), candidate
        best = min(found.values(), key=lambda choice: choice[0].value, default=None)
        return best and self.refine(best)
