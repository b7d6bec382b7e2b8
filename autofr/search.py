"""Search a policy for a budget: profile, calibrate, try, choose, verify on held-out seeds."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autofr import baselines, correction
from autofr.calibration import Calibration, calibrate, candidate_masks, worth_calibrating
from autofr.compare import policy_row, remarks, solver_row
from autofr.errors import BudgetError
from autofr.evaluate import Evaluator, Result, Row, other_solvers
from autofr.planner import out_of_reach
from autofr.points import Pipe, discover, find_denoiser
from autofr.policy import Policy, Provenance
from autofr.profiling import Profile, device_name, profile, versions
from autofr.quality import Features
from autofr.sampler import Samples, compose, draw
from autofr.space import Decoded, Frame, decode, fastest_seconds, guesses, largest_gap
from autofr.study import PURPOSES, Ledger, Record, Settings, dump, fixed
from autofr.verify import Verdict, finalists, test, within_budget

OnProgress = Callable[[str, int, int], None]
SAFETY = 0.985  # plan this much below the budget: prediction and measurement differ a little
FRONT = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


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
        self._tables: dict[int, Calibration] = {}
        self._paths: dict[int, correction.Trajectory] = {}
        self._latent_shape: tuple[int, ...] = ()

    def run(self) -> Outcome:
        """Search, choose, verify and test.

        Raises: BudgetError when the budget cannot be met; MeasurementError when the model gives
            NaN or latency does not settle.
        """
        profile = self._timed("profile", self.profile)
        target = self.settings.budget.seconds_of(profile.costs.teacher(self.settings.steps))
        frame = self._frame(profile, SAFETY * target)
        fastest = fastest_seconds(self.settings.space, frame)
        if fastest > target:
            raise BudgetError(out_of_reach(frame.costs, self.settings.steps, target, fastest))
        if largest_gap(self.settings.space) > 1:
            self._timed("calibrate", lambda: self._calibration(self.settings.steps))
        evaluator = self._timed("teacher", self._evaluator)
        ledger = Ledger(self.folder, self.settings.seed, self.settings.space.name)
        self._timed("trials", lambda: self._trials(ledger, frame, evaluator, target))
        ledger.write_csv(self.folder / "trials.csv")
        verdict = self._timed("choose", lambda: self._choose(ledger, frame, evaluator, target))
        rows = self._timed("table", lambda: self._rows(ledger, frame, evaluator, verdict, target))
        measured, samples = self._timed("test", lambda: self._test(verdict))
        result = self._result(ledger, profile, verdict.policy, rows)
        policy = self._sign(verdict.policy, measured, result)
        result = result.model_copy(update={"policy": policy})
        return Outcome(result, profile, *samples)

    # -- stages ----------------------------------------------------------------------------------

    def profile(self) -> Profile:
        """Profile the pipe, or read the profile that is in the folder."""
        path = self.folder / "profile.json"
        if path.exists():
            return Profile.model_validate_json(path.read_text(encoding="utf-8"))
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

    def _frame(self, profile: Profile, seconds: float) -> Frame:
        return Frame(
            steps=self.settings.steps,
            seconds=seconds,
            costs=profile.costs,
            masks=worth_calibrating(profile.masks, profile.costs),
            calibration=self._calibration,
            point_seconds={p.name: p.skippable_seconds for p in profile.points},
        )

    def _calibration(self, steps: int) -> Calibration:
        """The table of a step count: from memory, from the folder, or measured now."""
        if steps in self._tables:
            return self._tables[steps]
        path = self.folder / f"calibration-{steps}.npz"
        if path.exists():
            self._tables[steps] = Calibration.load(path)
            return self._tables[steps]
        measured = self.profile()
        self._tables[steps] = calibrate(
            self.pipe,
            lambda: self._draw_calibration(steps),
            worth_calibrating(measured.masks, measured.costs),
            max_gap=largest_gap(self.settings.space),
            on_step=lambda done, total: self.on_progress("calibrate", done, total),
        )
        self._tables[steps].save(path)
        return self._tables[steps]

    def _draw_calibration(self, steps: int) -> Samples:
        return draw(self.pipe, self.settings.seeds("calibration"), steps)

    def _evaluator(self) -> Evaluator:
        found = Evaluator(
            self.pipe,
            self.settings.seeds("validation"),
            self.settings.steps,
            self.settings.batch,
            self.features,
            fine_seeds=self.settings.trial_seeds,
            on_progress=lambda done, total: self.on_progress("teacher", done, total),
        )
        found._on_progress = None
        self._latent_shape = tuple(found.teacher.latents.shape[1:])
        return found

    def policy(self, decoded: Decoded) -> Policy:
        """Write a decoded draft as a policy of this pipe, its mix corrected by rollouts."""
        draft = decoded.draft
        found = compose(
            self.pipe,
            self.settings.name,
            draft.steps,
            decoded.masks,
            draft.mix,
            replaces=self.settings.steps,
            latent_shape=self._latent_shape,
        )
        steps = len(draft.steps)
        if decoded.rollouts and steps == self.settings.steps:
            run = lambda: self._draw_calibration(steps)  # noqa: E731
            if steps not in self._paths:
                self._paths[steps] = correction.trajectory(self.pipe, run)
            found = correction.correct(self.pipe, found, self._paths[steps], run, decoded.rollouts)
        return found

    def _trials(self, ledger: Ledger, frame: Frame, evaluator: Evaluator, target: float) -> None:
        drafts = baselines.published(self.profile().masks, frame.costs, frame.steps, target)
        rows = {draft.name: draft for draft in drafts}
        ledger.enqueue_rows([*rows])
        for params in guesses(self.settings.space):
            ledger.enqueue(params)
        scored = {r.notes["digest"]: r for r in ledger.records() if "digest" in r.notes}
        began = time.monotonic()
        while ledger.waiting() or ledger.proposed() < self.settings.trials:
            done = len(scored)
            self.on_progress("trials", done, max(done + 1, len(rows) + self.settings.trials))
            late = self.settings.time_limit and time.monotonic() - began > self.settings.time_limit
            if late:
                break
            trial = ledger.ask()
            try:
                name = trial.user_attrs.get("row")
                if name is not None:
                    decoded = Decoded(rows[name], self.profile().masks)
                else:
                    decoded = decode(self.settings.space, trial, frame)
                self._score(ledger, trial, decoded, frame, evaluator, scored)
            except BudgetError as error:
                ledger.give_up(trial, str(error))
            except KeyError as error:
                ledger.give_up(trial, f"no longer known: {error}")
            except BaseException as error:
                ledger.give_up(trial, f"{type(error).__name__}: {error}", failed=True)
                raise

    def _score(
        self,
        ledger: Ledger,
        trial: Any,
        decoded: Decoded,
        frame: Frame,
        evaluator: Evaluator,
        scored: dict[str, Record],
    ) -> None:
        """Score one trial by rollouts; a policy that was scored before is not run again."""
        policy = self.policy(decoded)
        notes: dict[str, Any] = {"label": decoded.draft.name, "digest": policy.digest}
        twin = scored.get(policy.digest)
        if twin is not None:
            ledger.tell(trial, twin.value, notes | {"duplicate_of": twin.number})
            return
        row = "row" in trial.user_attrs
        score = evaluator.score(policy, None if row else self.settings.trial_seeds)
        value = float(score.errors[: self.settings.trial_seeds].mean())
        notes |= {"group": decoded.draft.group, "policy": dump(policy)}
        notes["seconds"] = decoded.draft.seconds(frame.costs) if row else frame.seconds
        if row:
            group = decoded.draft.group
            line = policy_row(decoded.draft.name, group, policy, score, evaluator, frame.costs)
            notes["line"] = dump(line)
        ledger.tell(trial, value, notes)
        scored[policy.digest] = Record(trial.number, trial.params, value, notes)

    # -- choosing ----------------------------------------------------------------------------------

    def _choose(self, ledger: Ledger, frame: Frame, evaluator: Evaluator, target: float) -> Verdict:
        """Winner by FID among the finalists, held to the budget by measurement."""
        best = finalists(ledger.records(), target)
        if not best:
            raise BudgetError(
                f"no trial met the budget {self.settings.budget.text}: raise --trials or the budget"
            )
        scored = []
        for done, record in enumerate(best):
            self.on_progress("choose", done, len(best) + 1)
            policy = Policy.model_validate(record.notes["policy"], strict=False)
            score = evaluator.score(policy)
            fid = evaluator.fid(score)
            scored.append((fid if fid is not None else score.error.value, record, policy))
        scored.sort(key=lambda item: item[0])
        return within_budget(
            self.pipe,
            self.settings,
            [(record, policy) for _, record, policy in scored],
            lambda record, seconds: self._again(record, frame, seconds),
            frame.costs,
            lambda pairs, width: self.on_progress("measure", pairs, pairs + 1),
        )

    def _again(self, record: Record, frame: Frame, seconds: float) -> Policy | None:
        """The next policy on the front: the same parameters at a tighter time."""
        if "row" in record.notes:
            return None
        tighter = replace(frame, seconds=seconds)
        return self.policy(decode(self.settings.space, fixed(record.params), tighter))

    def _rows(
        self,
        ledger: Ledger,
        frame: Frame,
        evaluator: Evaluator,
        verdict: Verdict,
        target: float,
    ) -> list[Row]:
        """All rows: teacher, published, the planned front, the choice, other solvers."""
        n, costs = self.settings.steps, frame.costs
        teacher = self.policy(Decoded(baselines.fewer_steps(n), {}))
        taught = evaluator.teacher_score()
        rows = [policy_row("teacher", "teacher", teacher, taught, evaluator, costs)]
        lines = [r.notes["line"] for r in ledger.records() if "line" in r.notes]
        rows += [Row.model_validate(line) for line in lines]
        for speedup in self._front(verdict, costs.teacher(n) / target):
            self.on_progress("table", len(rows), len(rows) + 6)
            policy = self._again(verdict.record, frame, SAFETY * costs.teacher(n) / speedup)
            if policy is not None:
                score = evaluator.score(policy)
                name = f"planned {speedup:g}x"
                rows.append(policy_row(name, "planned", policy, score, evaluator, costs))
        score = evaluator.score(verdict.policy)
        row = policy_row("chosen", "chosen", verdict.policy, score, evaluator, costs)
        rows.append(row.model_copy(update={"speedup": verdict.timing.ratio}))
        affordable = max(2, int((target - costs.fixed) / costs.key))
        for name, scheduler in other_solvers(self.pipe).items():
            for steps in sorted({affordable, max(2, affordable // 2)}, reverse=True):
                self.on_progress("table", len(rows), len(rows) + 3)
                score = evaluator.score_solver(scheduler, steps)
                rows.append(solver_row(name, steps, score, evaluator, costs))
        return rows

    def _front(self, verdict: Verdict, asked: float) -> list[float]:
        """Speed-ups at which the front is shown: none where the choice has no front."""
        if "row" in verdict.record.notes:
            return []
        fastest = fastest_seconds(self.settings.space, self._frame(self.profile(), 0.0))
        most = SAFETY * self.profile().costs.teacher(self.settings.steps) / fastest
        return [s for s in FRONT if abs(s / asked - 1) > 0.05 and s < most]

    def _test(self, verdict: Verdict) -> Any:
        return test(
            self.pipe,
            verdict.policy,
            verdict.timing,
            verdict.predicted_speedup,
            seeds=self.settings.seeds("test"),
            steps=self.settings.steps,
            batch=self.settings.batch,
            features=self.features,
            on_progress=lambda done, total: self.on_progress("test", done, total),
        )

    def _result(
        self,
        ledger: Ledger,
        profile: Profile,
        policy: Policy,
        rows: list[Row],
    ) -> Result:
        records = ledger.records()
        seeds = {purpose: self.settings.seeds(purpose) for purpose in PURPOSES}
        return Result(
            model=self.settings.name,
            pipeline=type(self.pipe).__name__,
            budget=self.settings.budget.text,
            command=self.settings.command,
            date=time.strftime("%Y-%m-%d"),
            steps=self.settings.steps,
            batch=self.settings.batch,
            device=device_name(self.pipe),
            dtype=profile.dtype,
            threads=profile.threads,
            versions=versions(),
            seeds={p: f"{s[0]} to {s[-1]}" for p, s in seeds.items()},
            features=self.features.name if self.features else None,
            reference=f"{self.settings.steps * 5} steps of the same solver",
            rows=rows,
            chosen="chosen",
            trials=len(records),
            duplicates=sum("duplicate_of" in r.notes for r in records),
            stage_seconds={k: round(v, 1) for k, v in self.stage_seconds.items()},
            remarks=remarks(rows),
            policy=policy,
        )

    def _sign(self, policy: Policy, measured: Any, result: Result) -> Policy:
        """Write into the policy what was measured and where it comes from."""
        provenance = Provenance(
            autofr=importlib.metadata.version("autofr"),
            command=result.command,
            space=self.settings.space.name,
            study=str(self.folder.name),
            trials=result.trials,
            seconds=round(sum(result.stage_seconds.values()), 1),
            date=result.date,
        )
        return policy.model_copy(update={"measured": measured, "provenance": provenance})

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        self.on_progress(stage, 0, 1)
        found = work()
        self.stage_seconds[stage] = time.monotonic() - began
        self.on_progress(stage, 1, 1)
        return found
