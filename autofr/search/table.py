"""The comparison table of a search: its rows on validation seeds, then rivals on test seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from autofr.errors import AutofrError
from autofr.measure import confidence
from autofr.measure.costs import Costs
from autofr.policy import Interval
from autofr.runtime.points import Pipe
from autofr.runtime.sampler import Samples
from autofr.search.compare import policy_row, rivals, solver_row
from autofr.search.evaluate import Candidate, Evaluator, Score, latent_errors
from autofr.search.folder import Settings
from autofr.search.ledger import Record
from autofr.search.result import Row
from autofr.search.trial import candidate_of
from autofr.search.verify import Verdict, drawn_with

SAFETY = 0.985  # plan this much below the budget: prediction and measurement differ a little
FRONT = (1.25, 1.5, 2.0, 3.0)  # speed-ups at which the front is shown
_log = logging.getLogger("autofr")


@dataclass
class Table:
    """Makes the rows of one search.

    `target` is the budget in seconds per call; `published` are the trials that scored published
    schedules, each with its row; `again` plans a trial's parameters for another time per call. What
    fails is left out, with one of `notes`: the search has its policy.
    """

    pipe: Pipe
    settings: Settings
    evaluator: Evaluator
    costs: Costs
    target: float
    teacher: Candidate
    published: Sequence[Record]
    solvers: Mapping[str, object]
    score: Callable[[Candidate], Score]
    again: Callable[[Record, float], Candidate | None]
    on_progress: Callable[[str, int, int], None]
    notes: list[str] = field(default_factory=list)

    def rows(self, verdict: Verdict) -> list[Row]:
        """All rows: teacher, published, the planned front, the choice, other solvers."""
        evaluator, costs = self.evaluator, self.costs
        rows = [policy_row(self.teacher, evaluator.teacher_score(), evaluator, costs)]
        rows += [Row.model_validate(record.notes["line"]) for record in self.published]
        rows += self._front(verdict)
        chosen = replace(verdict.found, name="chosen", group="chosen")
        row = policy_row(chosen, self.score(chosen), evaluator, costs)
        rows.append(row.model_copy(update={"speedup": verdict.timing.ratio}))
        affordable = max(2, costs.affordable(self.target, self.settings.steps))
        for done, (name, scheduler) in enumerate(self.solvers.items()):
            self._tell(len(FRONT) + done)
            with self._optional(f"{name}, {affordable} steps"):
                score = evaluator.score_solver(scheduler, affordable)
                rows.append(solver_row(name, affordable, score, evaluator, costs))
        return rows

    def on_test(self, rows: Sequence[Row], samples: tuple[Samples, Samples]) -> list[Row]:
        """The rows, with errors on the test seeds for the choice and for its rivals: of each kind
        as fast, the nearest one on the validation seeds.

        The choice was made on validation seeds, where it is flattered and its rivals are not.
        `samples` are what the teacher and the choice drew with the test seeds.
        """
        teacher, chosen = samples
        base = latent_errors(chosen.latents, teacher.latents)
        seeds, batch = self.settings.seeds("test"), self.settings.batch
        policies = {r.notes["row"]: candidate_of(r.notes).policy for r in self.published}
        own = {"test_error": confidence.of_mean(base)}
        told = {row.name: own for row in rows if row.group == "chosen"}
        for number, row in enumerate(nearest := rivals(rows)):

            def on_drawn(done: int, total: int, before: int = number) -> None:
                self.on_progress("rivals", before * total + done, len(nearest) * total)

            with self._optional(f"{row.name} on the test seeds"):
                drawn, _ = drawn_with(self.pipe, policies[row.name], seeds, batch, on_drawn)
                told[row.name] = _against(latent_errors(drawn.latents, teacher.latents), base)
        return [row.model_copy(update=told.get(row.name, {})) for row in rows]

    def _front(self, verdict: Verdict) -> list[Row]:
        """The chosen parameters at other speed-ups; none where the choice has no front."""
        teacher = self.costs.teacher(self.settings.steps)
        asked = teacher / self.target
        rows = []
        for done, speedup in enumerate(FRONT):
            self._tell(done)
            if abs(speedup / asked - 1) <= 0.05:
                continue
            with self._optional(name := f"planned {speedup:g}x"):
                found = self.again(verdict.record, SAFETY * teacher / speedup)
                if found is not None:
                    found = replace(found, name=name, group="planned")
                    rows.append(policy_row(found, self.score(found), self.evaluator, self.costs))
        return rows

    def _tell(self, done: int) -> None:
        self.on_progress("table", done, len(FRONT) + len(self.solvers))

    @contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        """Leave out what fails, with a remark."""
        try:
            yield
        except Exception as error:
            _log.debug("%s is not shown", name, exc_info=True)
            kind = "" if isinstance(error, AutofrError) else f"{type(error).__name__}: "
            self.notes.append(f"{name} is not shown: {kind}{error}.")


def _against(errors: np.ndarray, base: np.ndarray) -> dict[str, Interval]:
    """What a rival's row says of the test seeds; no multiple of a choice without any error."""
    told = {"test_error": confidence.of_mean(errors)}
    if base.all():
        told["times_chosen"] = confidence.of_times(errors, base)
    return told
