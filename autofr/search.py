"""Search a policy for a budget: profile, calibrate, try, choose, verify on held-out seeds."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autofr import baselines, correction, guidance
from autofr.calibration import Calibration, calibrate, candidate_masks, worth_calibrating
from autofr.compare import conclude, policy_row, solver_row
from autofr.decode import Decoded, Frame, decode, fastest_seconds, guesses
from autofr.errors import BudgetError, MeasurementError
from autofr.evaluate import Candidate, Evaluator, Score, other_solvers
from autofr.families import discover
from autofr.planner import out_of_reach
from autofr.points import Pipe, find_denoiser
from autofr.policy import Guidance, Measured, Policy, Provenance
from autofr.profiling import Profile, profile
from autofr.profiling import load as load_profile
from autofr.quality import Features
from autofr.result import Result, Row
from autofr.sampler import Samples, compose
from autofr.space import largest_gap
from autofr.study import STATE, Ledger, Record, Settings, dump, fixed
from autofr.verify import Verdict, finalists, test, within_budget

OnProgress = Callable[[str, int, int], None]
SAFETY = 0.985  # plan this much below the budget: prediction and measurement differ a little
FRONT = (1.25, 1.5, 2.0, 3.0)  # speed-ups at which the front is shown


@dataclass
class Outcome:
    """A finished search: the result, and a few images of teacher and policy (same seeds)."""

    result: Result
    profile: Profile
    teacher: Samples
    chosen: Samples


@dataclass
class Search:
    """One run in one folder. Each stage keeps what it finds, so that a stop loses one trial."""

    pipe: Pipe
    settings: Settings
    folder: Path
    features: Features | None = None
    on_progress: OnProgress = lambda stage, done, total: None
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        self._tables: dict[int, Calibration] = {}
        self._path: correction.Trajectory | None = None
        self._latent_shape: tuple[int, ...] = ()
        self._guidance: Guidance = "none"
        self._scores: dict[str, Score] = {}  # of the finalists, by digest

    def run(self) -> Outcome:
        """Search, choose, verify and test.

        Raises: BudgetError when the budget cannot be met; MeasurementError when the model gives
            NaN or latency does not settle.
        """
        settings = self.settings
        self._guidance = guidance.of(self.pipe)
        self._profile = self._timed("profile", self._measure_profile)
        self._costs = self._profile.costs
        self._target = settings.budget.seconds_of(self._costs.teacher(settings.steps))
        self._frame = self._new_frame(SAFETY * self._target)
        fastest = fastest_seconds(settings.space, self._frame) / SAFETY
        if fastest > self._target:
            raise BudgetError(out_of_reach(self._costs, settings.steps, self._target, fastest))
        if largest_gap(settings.space) > 1:
            self._timed("calibrate", lambda: self._calibration(settings.steps))
        self._evaluator = self._timed("teacher", self._new_evaluator)
        ledger = Ledger(self.folder, settings.seed, settings.space.name)
        self._timed("trials", lambda: self._trials(ledger))
        ledger.write_csv(self.folder / "trials.csv")
        verdict = self._timed("choose", lambda: self._choose(ledger))
        rows = self._timed("table", lambda: self._rows(ledger, verdict))
        measured, samples = self._timed("test", lambda: self._test(verdict))
        records = ledger.records()
        policy = verdict.found.policy.model_copy(
            update={"measured": measured, "provenance": self._provenance(len(records))}
        )
        result = conclude(
            self.pipe, settings, self._profile, records, rows, policy, self.stage_seconds
        )
        return Outcome(result, self._profile, *samples)

    # -- stages ----------------------------------------------------------------------------------

    def _measure_profile(self) -> Profile:
        """Profile the pipe, or read the profile that is in the folder."""
        path = self.folder / STATE / "profile.json"
        if path.exists():
            return load_profile(path)
        masks = candidate_masks(discover(find_denoiser(self.pipe)))
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
            on_step=lambda done, total: self.on_progress("calibrate", done, total),
        )
        self._tables[steps].save(path)
        return self._tables[steps]

    def _new_evaluator(self) -> Evaluator:
        found = Evaluator(
            self.pipe,
            self.settings.seeds("validation"),
            self.settings.steps,
            self.settings.batch,
            self.features,
            fine_seeds=self.settings.trial_seeds,
            on_progress=lambda done, total: self.on_progress("teacher", done, total),
        )
        self._latent_shape = tuple(found.teacher.latents.shape[1:])
        return found

    def candidate(self, decoded: Decoded) -> Candidate:
        """Write a decoded draft as a policy of this pipe, its mix corrected by rollouts."""
        draft = decoded.draft
        policy = compose(
            self.pipe,
            self.settings.name,
            draft.steps,
            decoded.masks,
            draft.mix,
            replaces=self.settings.steps,
            latent_shape=self._latent_shape,
            guidance=self._guidance,
            keep=self.settings.keep,
        )
        steps = len(draft.steps)
        if decoded.rollouts and steps == self.settings.steps:
            seeds = self.settings.seeds("calibration")
            self._path = self._path or correction.trajectory(self.pipe, seeds, steps)
            policy = correction.correct(self.pipe, policy, self._path, decoded.rollouts)
        return Candidate(draft.name, draft.group, policy, decoded.seconds)

    def _published(self) -> dict[str, Decoded]:
        masks, steps = self._profile.masks, self.settings.steps
        drafts = baselines.published(masks, self._costs, steps, self._target)
        return {draft.name: Decoded(draft, masks, draft.seconds(self._costs)) for draft in drafts}

    def _trials(self, ledger: Ledger) -> None:
        """Run queued trials and the algorithm's, until there are enough or time is up."""
        rows, settings = self._published(), self.settings
        ledger.enqueue_rows([*rows])
        for params in guesses(settings.space):
            ledger.enqueue(params)
        scored = {r.notes["digest"]: r for r in ledger.records()}
        began = time.monotonic()
        while ledger.waiting() or ledger.proposed() < settings.trials:
            self.on_progress("trials", ledger.finished(), len(rows) + settings.trials)
            if settings.time_limit and time.monotonic() - began > settings.time_limit:
                break
            trial = ledger.ask()
            try:
                name = trial.user_attrs.get("row")
                decoded = rows[name] if name else decode(settings.space, trial, self._frame)
                self._score(ledger, trial, self.candidate(decoded), scored)
            except (BudgetError, MeasurementError) as error:  # of this trial, not of the search
                ledger.give_up(trial, str(error))
            except BaseException as error:
                ledger.give_up(trial, f"{type(error).__name__}: {error}", failed=True)
                raise

    def _score(
        self, ledger: Ledger, trial: Any, found: Candidate, scored: dict[str, Record]
    ) -> None:
        """Score one trial by rollouts; a policy that was scored before is not run again."""
        policy = found.policy
        self._frame.memory.check(policy.steps, policy.masks, policy.mix)
        digest = policy.digest
        notes: dict[str, Any] = {"label": found.name, "digest": digest}
        if twin := scored.get(digest):
            ledger.tell(trial, twin.value, notes | {"duplicate_of": twin.number})
            return
        published = "row" in trial.user_attrs
        few = self.settings.trial_seeds
        score = self._evaluator.score(found.policy, None if published else few)
        value = float(score.errors[:few].mean())
        notes |= {"group": found.group, "policy": dump(found.policy), "seconds": found.seconds}
        if published:
            notes["line"] = dump(policy_row(found, score, self._evaluator, self._costs))
        ledger.tell(trial, value, notes)
        scored[digest] = Record(trial.number, trial.params, value, notes)

    # -- choosing --------------------------------------------------------------------------------

    def _choose(self, ledger: Ledger) -> Verdict:
        """Winner by FID among the finalists, held to the budget by measurement."""
        best = finalists(ledger.records(), self._target)
        if not best:
            raise BudgetError(
                f"no trial met the budget {self.settings.budget.text}: raise --trials, or ask for"
                " a smaller speed-up"
            )
        ranked = []
        for done, record in enumerate(best):
            self.on_progress("choose", done, len(best))
            found = _candidate_of(record)
            score = self._score_of(found)
            fid = self._evaluator.fid(score)
            ranked.append((score.error.value if fid is None else fid, record, found))
        ranked.sort(key=lambda item: item[0])
        verdict = self._hold([(record, found) for _, record, found in ranked])
        return self._never_worse(verdict, ledger.records())

    def _never_worse(self, verdict: Verdict, records: list[Record]) -> Verdict:
        """Take a published row instead, if it is nearer to the teacher and keeps the budget too.

        Held to the budget by measurement, the choice may have become faster and worse than it was
        among the trials.
        """
        error = self._score_of(verdict.found).error.value
        rows = [r for r in records if "line" in r.notes and r.notes["seconds"] <= self._target]
        nearer = [r for r in rows if r.notes["line"]["error"]["value"] < error]
        nearer.sort(key=lambda r: r.notes["line"]["error"]["value"])
        try:
            return self._hold([(r, _candidate_of(r)) for r in nearer]) if nearer else verdict
        except BudgetError:  # none of them, when measured
            return verdict

    def _hold(self, ranked: list[tuple[Record, Candidate]]) -> Verdict:
        def on_pair(pairs: int, width: float) -> None:
            self.on_progress("measure", pairs, pairs + 1)

        return within_budget(self.pipe, self.settings, ranked, self._again, on_pair)

    def _score_of(self, found: Candidate) -> Score:
        """A candidate's score on all validation seeds; drawn once."""
        digest = found.policy.digest
        if digest not in self._scores:
            self._scores[digest] = self._evaluator.score(found.policy)
        return self._scores[digest]

    def _again(self, record: Record, seconds: float) -> Candidate | None:
        """The same parameters at another time per call: the next policy on the front."""
        if "row" in record.notes:
            return None
        frame = replace(self._frame, seconds=seconds)
        try:
            return self.candidate(decode(self.settings.space, fixed(record.params), frame))
        except BudgetError:  # beyond what these parameters can reach
            return None

    def _rows(self, ledger: Ledger, verdict: Verdict) -> list[Row]:
        """All rows: teacher, published, the planned front, the choice, other solvers."""
        evaluator, costs, n = self._evaluator, self._costs, self.settings.steps
        draft = replace(baselines.fewer_steps(n), name="teacher", group="teacher")
        teacher = self.candidate(Decoded(draft, {}, costs.teacher(n)))
        rows = [policy_row(teacher, evaluator.teacher_score(), evaluator, costs)]
        lines = [r.notes["line"] for r in ledger.records() if "line" in r.notes]
        rows += [Row.model_validate(line) for line in lines]
        solvers = other_solvers(self.pipe)
        affordable = max(2, int((self._target - costs.fixed) / costs.key))
        chosen = replace(verdict.found, name="chosen", group="chosen")
        planned = [*self._front(verdict), chosen]
        total = len(planned) + len(solvers)
        for done, found in enumerate(planned):
            self.on_progress("table", done, total)
            rows.append(policy_row(found, self._score_of(found), evaluator, costs))
        rows[-1] = rows[-1].model_copy(update={"speedup": verdict.timing.ratio})
        for name, scheduler in solvers.items():
            self.on_progress("table", total - 1, total)
            score = evaluator.score_solver(scheduler, affordable)
            rows.append(solver_row(name, affordable, score, evaluator, costs))
        return rows

    def _front(self, verdict: Verdict) -> list[Candidate]:
        """The chosen parameters at other speed-ups; none where the choice has no front."""
        teacher = self._costs.teacher(self.settings.steps)
        asked = teacher / self._target
        front = []
        for speedup in (s for s in FRONT if abs(s / asked - 1) > 0.05):
            found = self._again(verdict.record, SAFETY * teacher / speedup)
            if found is not None:
                front.append(replace(found, name=f"planned {speedup:g}x", group="planned"))
        return front

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
            features=self.features,
            on_progress=lambda done, total: self.on_progress("test", done, total),
            predicted_bytes=self._frame.memory.of(policy.steps, policy.masks, policy.mix),
        )

    def _provenance(self, trials: int) -> Provenance:
        return Provenance(
            autofr=importlib.metadata.version("autofr"),
            command=self.settings.command,
            space=self.settings.space.name,
            study=self.folder.name,
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


def _candidate_of(record: Record) -> Candidate:
    """The candidate that a trial has scored."""
    notes = record.notes
    policy = Policy.model_validate(notes["policy"], strict=False)
    return Candidate(notes["label"], notes["group"], policy, notes["seconds"])
