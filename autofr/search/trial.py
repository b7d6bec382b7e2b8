"""What a trial costs: from a policy as it was proposed to its score, wherever that is worked out.

Proposals and outcomes travel: to children of the driver, and through a database to other machines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel

from autofr.errors import BudgetError, MeasurementError
from autofr.measure.quality import trimmed_mean
from autofr.plan import correction
from autofr.policy import Policy
from autofr.runtime.points import Pipe
from autofr.search.evaluate import Candidate, Evaluator, Score
from autofr.search.folder import Settings

Recipe = Callable[[], tuple[Pipe, Settings]]
"""Makes the pipe and the settings of a search again in another process; it can be pickled."""


@dataclass(frozen=True)
class Proposal:
    """A policy as it was planned, and how many rollouts are to correct its mix."""

    candidate: Candidate
    rollouts: int = 0

    @property
    def key(self) -> str:
        """Proposals with the same key have the same score."""
        return f"{self.candidate.policy.digest}+{self.rollouts}"

    def dump(self) -> dict[str, Any]:
        """Write it as plain JSON data."""
        return notes_of(self.candidate) | {"rollouts": self.rollouts, "key": self.key}

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Proposal:
        """Read what `dump` wrote."""
        return cls(candidate_of(data), data["rollouts"])


@dataclass(frozen=True)
class Outcome:
    """How a trial went: its error and what is noted with it; without an error, the reason."""

    value: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


class Scorer:
    """Corrects and scores policies of one search, on the seeds that all its trials share."""

    def __init__(self, pipe: Pipe, settings: Settings, evaluator: Evaluator) -> None:
        self.pipe, self.settings, self.evaluator = pipe, settings, evaluator
        self._path: correction.Trajectory | None = None

    @classmethod
    def alone(cls, pipe: Pipe, settings: Settings) -> Scorer:
        """Draw what trials alone are compared with: no fine reference, and nothing is timed."""
        seeds = settings.seeds("validation")[: settings.trial_seeds]
        return cls(
            pipe, settings, Evaluator(pipe, seeds, settings.steps, settings.batch, rows=False)
        )

    def correct(self, proposal: Proposal) -> Candidate:
        """The candidate, its mix refitted along its own path."""
        found, settings = proposal.candidate, self.settings
        if not proposal.rollouts or len(found.policy.steps) != settings.steps:
            return found
        self._path = self._path or correction.trajectory(
            self.pipe, settings.seeds("calibration"), settings.steps, settings.batch
        )
        policy = correction.correct(self.pipe, found.policy, self._path, proposal.rollouts)
        return Candidate(found.name, found.group, policy, found.seconds)

    def value(self, score: Score) -> float:
        """What trials are compared by: the typical error of the first validation seeds.

        Raises: MeasurementError when one of these errors is no number.
        """
        errors = score.errors[: self.settings.trial_seeds]
        if not np.isfinite(errors).all():
            raise MeasurementError(f"the error to the unaccelerated pipe is {errors.max()}")
        return trimmed_mean(errors)

    def outcome(self, proposal: Proposal) -> Outcome:
        """Correct and score; what this trial alone is to blame for is its outcome too."""
        try:
            found = self.correct(proposal)
            score = self.evaluator.score(found.policy, self.settings.trial_seeds)
            value = self.value(score)
        except (BudgetError, MeasurementError) as error:
            return Outcome(notes={"proposal": proposal.key}, reason=str(error))
        return Outcome(value, notes_of(found) | {"proposal": proposal.key})


# -- as plain data --------------------------------------------------------------------------------


def notes_of(found: Candidate) -> dict[str, Any]:
    """A candidate as JSON data, for a trial's notes."""
    return {
        "label": found.name,
        "group": found.group,
        "digest": found.policy.digest,
        "policy": dump(found.policy),
        "seconds": found.seconds,
    }


def candidate_of(notes: Mapping[str, Any]) -> Candidate:
    """The candidate that was noted."""
    policy = Policy.model_validate(notes["policy"], strict=False)
    return Candidate(notes["label"], notes["group"], policy, notes["seconds"])


def dump(value: BaseModel) -> Any:
    """A pydantic value as plain JSON data."""
    return json.loads(value.model_dump_json())
