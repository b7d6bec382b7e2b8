"""Search a policy for a budget: profile, calibrate, try, choose, verify on held-out seeds."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from autofr.errors import BudgetError, MeasurementError
from autofr.measure.alignment import NOBODY, Judge
from autofr.measure.calibration import Calibration, calibrate
from autofr.measure.masks import candidate_masks, worth_calibrating
from autofr.measure.profile_file import Profile
from autofr.measure.profile_file import load as load_profile
from autofr.measure.profiling import profile
from autofr.memory import size
from autofr.plan import baselines
from autofr.plan.baselines import Draft
from autofr.plan.planner import out_of_reach
from autofr.policy import Measured, Provenance
from autofr.runtime import guidance
from autofr.runtime.families import discover
from autofr.runtime.points import Pipe, find_denoiser
from autofr.runtime.sampler import Samples, compose
from autofr.runtime.start import Starts
from autofr.search.choose import Chooser
from autofr.search.compare import conclude, part, policy_row, shared
from autofr.search.crew import Crew
from autofr.search.decode import Decoded, Frame, decode, fastest_seconds, guesses
from autofr.search.evaluate import Candidate, Evaluator, check_runs, check_steps, other_solvers
from autofr.search.facts import check_study, facts_of, study_name
from autofr.search.folder import STATE, Settings
from autofr.search.ledger import Ledger, Record, fixed
from autofr.search.result import Result
from autofr.search.shared import Helped, Share, SharedLedger
from autofr.search.space import largest_gap
from autofr.search.table import SAFETY, Table
from autofr.search.trial import Outcome, Proposal, Scorer, dump, notes_of
from autofr.search.trials import Hands, Own, Trials
from autofr.search.verify import Choice, Verdict, test
from autofr.task import plain

OnProgress = Callable[[str, int, int], None]


@dataclass
class Finding:
    """A finished search: the result, and a few images of teacher and policy (same seeds)."""

    result: Result
    profile: Profile
    teacher: Samples
    chosen: Samples


@dataclass
class Search:
    """One run in one folder. Each stage keeps what it finds, so that a stop loses one trial.

    Trials are worked out here, by a `crew` of children, or with workers that `share` the study.
    """

    pipe: Pipe
    settings: Settings
    folder: Path
    judge: Judge = NOBODY
    on_progress: OnProgress = lambda stage, done, total: None
    crew: Crew | None = None
    share: Share | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        self._tables: dict[int, Calibration] = {}
        self._branches = guidance.Branches("none")
        self._study = self.folder.name

    def run(self) -> Finding:
        """Search, choose, verify and test.

        Raises: BudgetError when the budget cannot be met; MeasurementError when the model gives
            NaN or latency does not settle; ModelError for a pipe that nothing can be planned for.
        """
        if self.share is None:
            self._prepare()
        with self._ledger() as ledger:
            if isinstance(ledger, SharedLedger):  # what is in use is refused before any work
                self._prepare()
                ledger.publish(self._facts)
            return self._searched(ledger)

    def _searched(self, ledger: Ledger) -> Finding:
        settings = self.settings
        self._timed("trials", lambda: self._trials(ledger))
        ledger.dismiss()
        ledger.write_csv(self.folder / "trials.csv")
        self._choice = Chooser(
            self.pipe,
            settings,
            self._evaluator,
            self._target,
            self._again,
            self._refined,
            self.on_progress,
        )
        verdict = self._timed("choose", lambda: self._choice.choose(ledger))
        records = ledger.records()
        table = self._table([r for r in records if "line" in r.notes])
        rows = self._timed("table", lambda: table.rows(verdict))
        measured, samples = self._timed("test", lambda: self._test(verdict))
        rows = self._timed("rivals", lambda: table.on_test(rows, samples))
        policy = verdict.found.policy.model_copy(
            update={"measured": measured, "provenance": self._provenance(len(records))}
        )
        result = conclude(
            self.pipe,
            settings,
            self._profile,
            records,
            rows,
            policy,
            self.stage_seconds,
            [*part(self._costs, settings.steps, policy), *shared(self.pipe), *table.notes],
        )
        return Finding(result, self._profile, *samples)

    # -- stages ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Refuse what cannot work, and measure what all trials need."""
        steps, starts = self.settings.steps, Starts(self.pipe)
        check_steps(self.pipe, steps)
        check_runs(starts, steps)
        self._branches = guidance.of(self.pipe, starts.short(3, steps))
        self._profile = self._timed("profile", self._measure_profile)
        self._costs = replace(self._profile.costs, first=starts)
        self._target = self.settings.budget.seconds_of(self._costs.teacher(steps))
        self._frame = self._new_frame(SAFETY * self._target)
        self._check_reach()
        if largest_gap(self.settings.space) > 1:
            self._timed("calibrate", lambda: self._calibration(steps))
        self._solvers = other_solvers(self.pipe, starts.short(2, steps))
        self._evaluator = self._timed("teacher", self._new_evaluator)
        self._scorer = Scorer(self.pipe, self.settings, self._evaluator)

    def _measure_profile(self) -> Profile:
        """Profile the pipe, or read the profile that is in the folder."""
        path = self.folder / STATE / "profile.json"
        if path.exists():
            return load_profile(path)
        masks = candidate_masks(discover(find_denoiser(self.pipe)), self._branches.alone)
        found = profile(
            self.pipe,
            masks,
            steps=self.settings.steps,
            batch=self.settings.batch,
            seeds=self.settings.seeds("calibration")[:4],
            on_progress=lambda done, total: self.on_progress("profile", done, total),
        )
        found.save(path)
        return found

    def _new_frame(self, seconds: float) -> Frame:
        return Frame(
            steps=self.settings.steps,
            seconds=seconds,
            costs=self._costs,
            masks=worth_calibrating(self._profile.masks, self._costs),
            calibration=self._calibration,
            point_seconds={p.name: p.skippable_seconds for p in self._profile.points},
            memory=self._profile.memory(self.settings.keep, self.settings.max_memory),
        )

    def _check_reach(self) -> None:
        """Refuse a memory limit or a budget that no policy can keep.

        Raises: BudgetError naming what could work.
        """
        memory = self._frame.memory
        if memory.limit is not None and memory.score > memory.limit:
            raise BudgetError(
                f"--max-memory {size(memory.limit)}: every policy keeps at least the score of one"
                f" keyframe, {size(memory.score)} at batch {self.settings.batch}: allow"
                f" {memory.score}B or more, or take a smaller --batch"
            )
        fastest = fastest_seconds(self.settings.space, self._frame) / SAFETY
        if fastest > self._target:
            n = self.settings.steps
            raise BudgetError(out_of_reach(self._costs, n, self._target, fastest))

    def _calibration(self, steps: int) -> Calibration:
        """The table of a step count: from memory, from the folder, or measured now."""
        if steps in self._tables:
            return self._tables[steps]
        path = self.folder / STATE / f"calibration-{steps}.npz"
        if path.exists():
            self._tables[steps] = Calibration.load(path)
            return self._tables[steps]
        self._tables[steps] = calibrate(
            self.pipe,
            self.settings.seeds("calibration"),
            steps,
            self._frame.masks,
            max_gap=largest_gap(self.settings.space),
            batch=self.settings.batch,
            on_step=lambda done, total: self.on_progress("calibrate", done, total),
        )
        self._tables[steps].save(path)
        return self._tables[steps]

    def _new_evaluator(self) -> Evaluator:
        return Evaluator(
            self.pipe,
            self.settings.seeds("validation"),
            self.settings.steps,
            self.settings.batch,
            self.judge.features,
            fine_seeds=self.settings.trial_seeds,
            on_progress=lambda done, total: self.on_progress("teacher", done, total),
        )

    def propose(self, decoded: Decoded) -> Proposal:
        """Write a decoded draft as a policy of this pipe.

        Raises: BudgetError when it would keep too much.
        """
        draft = decoded.draft
        policy = compose(
            self.pipe,
            self.settings.name,
            draft.steps,
            decoded.masks,
            draft.mix,
            replaces=self.settings.steps,
            latent_shape=tuple(self._evaluator.teacher.latents.shape[1:]),
            guidance=self._branches.kind,
            keep=self.settings.keep,
        )
        self._frame.memory.check(policy.steps, policy.masks, policy.mix)
        return Proposal(
            Candidate(draft.name, draft.group, policy, decoded.seconds), decoded.rollouts
        )

    def candidate(self, decoded: Decoded) -> Candidate:
        """A decoded draft as a policy of this pipe, its mix corrected by rollouts."""
        return self._scorer.correct(self.propose(decoded))

    def _row(self, draft: Draft) -> Outcome:
        """Score a published schedule as the table shows it."""
        masks = self._profile.masks
        proposal = self.propose(Decoded(draft, masks, draft.seconds(self._costs)))
        found = proposal.candidate
        score = self._evaluator.score(found.policy)
        line = policy_row(found, score, self._evaluator, self._costs)
        notes = notes_of(found) | {"proposal": proposal.key, "line": dump(line)}
        return Outcome(self._scorer.value(score), notes)

    def _trials(self, ledger: Ledger) -> None:
        """Run queued trials and the algorithm's, until there are enough or time is up."""
        settings = self.settings
        masks, steps = self._profile.masks, settings.steps
        drafts = baselines.published(masks, self._costs, steps, self._target)
        with self.crew or nullcontext():  # its children are gone before anything else is timed
            Trials(
                ledger,
                settings,
                self._hands(ledger),
                {draft.name: partial(self._row, draft) for draft in drafts},
                guesses(settings.space),
                lambda trial: self.propose(decode(settings.space, trial, self._frame)),
                self.on_progress,
            ).run()

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        settings, share = self.settings, self.share
        if share is None:
            yield Ledger(self.folder, settings.seed, settings.space.name)
            return
        self._facts = facts_of(self.pipe, settings, share.request, share.heartbeat)
        name = self._study = share.study or study_name(self.folder.name, self._facts)
        ledger = SharedLedger(share, name, settings.seed, settings.space.name)
        try:
            check_study(name, ledger.published, self._facts)
            yield ledger
        finally:
            ledger.release()

    def _hands(self, ledger: Ledger) -> Hands:
        if isinstance(ledger, SharedLedger):
            return Helped(ledger, self._scorer)
        return self.crew or Own(self._scorer)

    # -- showing ---------------------------------------------------------------------------------

    def _again(self, record: Record, seconds: float) -> Candidate | None:
        """The same parameters at another time per call: the next policy on the front."""
        if "row" in record.notes:
            return None
        frame = replace(self._frame, seconds=seconds)
        try:
            return self.candidate(decode(self.settings.space, fixed(record.params), frame))
        except (BudgetError, MeasurementError):  # beyond what these parameters can reach
            return None

    def _refined(self, choice: Choice) -> Choice:
        """The choice with its mix corrected once more, where trials were corrected."""
        record, found = choice
        if not record.params.get("rollouts"):
            return choice
        return record, self._scorer.correct(Proposal(found, rollouts=1))

    def _table(self, published: Sequence[Record]) -> Table:
        n, costs = self.settings.steps, self._costs
        draft = replace(baselines.fewer_steps(n), name="teacher", group="teacher")
        return Table(
            self.pipe,
            self.settings,
            self._evaluator,
            costs,
            self._target,
            self.candidate(Decoded(draft, {}, costs.teacher(n))),
            published,
            self._solvers,
            self._choice.score,
            self._again,
            self.on_progress,
        )

    def _test(self, verdict: Verdict) -> tuple[Measured, tuple[Samples, Samples]]:
        policy = verdict.found.policy
        return test(
            self.pipe,
            policy,
            verdict.timing,
            self._costs.teacher(self.settings.steps) / verdict.found.seconds,
            seeds=self.settings.seeds("test"),
            steps=self.settings.steps,
            batch=self.settings.batch,
            judge=self.judge,
            on_progress=lambda done, total: self.on_progress("test", done, total),
            predicted_bytes=self._frame.memory.of(policy.steps, policy.masks, policy.mix),
        )

    def _provenance(self, trials: int) -> Provenance:
        return Provenance(
            autofr=importlib.metadata.version("autofr"),
            command=self.settings.command,
            call=plain(self.pipe),
            space=self.settings.space.name,
            study=self._study,
            trials=trials,
            seconds=round(sum(self.stage_seconds.values()), 1),
            date=time.strftime("%Y-%m-%d"),
        )

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        self.on_progress(stage, 0, 1)
        found = work()
        self.stage_seconds[stage] = time.monotonic() - began
        self.on_progress(stage, 1, 1)
        return found
