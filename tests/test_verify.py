"""Laws of the choice: finalists, the budget held by measurement, the test on its own seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import CHANNELS, PROMPTS, SIZE, WIDTH, sd
from test_search import STEPS, settings, tiny_pipe, work_clock

from autofr.errors import BudgetError, MeasurementError
from autofr.measure.alignment import NOBODY, Judge, load_judge, save_alignment
from autofr.measure.costs import parse_budget
from autofr.measure.latency import Paired
from autofr.measure.quality import Encoder, Features, Reference, save_features
from autofr.mix import Constant, Table
from autofr.policy import Interval, Policy
from autofr.runtime.sampler import compose
from autofr.search import verify
from autofr.search.choose import NEAR, Chooser, Finalist, ranked
from autofr.search.evaluate import Candidate
from autofr.search.ledger import Record
from autofr.search.verify import ROUGHLY, Choice, finalists, within_budget
from autofr.task import Task


def record(number: int, value: float, seconds: float, **notes: Any) -> Record:
    """A finished trial."""
    notes = {"digest": f"d{number}", "seconds": seconds} | notes
    return Record(number, {"tau": float(number)}, value, notes)


def policy(steps: Sequence[str] = ("key", "jump") * 3, mix: Constant | None = None) -> Policy:
    """A policy of a tiny pipe."""
    return compose(
        tiny_pipe(), "tiny", steps, {}, mix or Constant(), replaces=STEPS, latent_shape=(3, 8, 8)
    )


POLICY = policy()


def candidate(name: str, seconds: float) -> Candidate:
    """A candidate with a prediction; what it does is of no account here."""
    return Candidate(name, "planned", POLICY, seconds)


# -- finalists ------------------------------------------------------------------------------------


def test_finalists_meet_the_time_and_are_near_the_best() -> None:
    """Only trials that are fast enough, and nearly as good as the best of those, come on."""
    records = [
        record(0, 0.0100, 1.1),  # the least error, too slow
        record(1, 0.0200, 0.9),
        record(2, 0.0200 * ROUGHLY, 1.0),
        record(3, 0.0200 * ROUGHLY + 1e-6, 0.5),
    ]
    assert [r.number for r in finalists(records, 1.0)] == [1, 2]


def test_finalists_are_few_different_and_sorted() -> None:
    """At most three, the best first, and no policy twice."""
    records = [record(i, 0.02 - i * 1e-4, 1.0) for i in range(5)]
    records.append(record(5, 0.0196, 1.0, digest="d4"))
    assert [r.number for r in finalists(records, 1.0)] == [4, 3, 2]


def test_errors_on_all_seeds_decide_and_fid_among_equals() -> None:
    """A lower FID is worth no larger error; without FID the least error wins."""

    def order(*found: tuple[float, float | None]) -> list[int]:
        choices = [(record(i, 0.02, 1.0), candidate(str(i), 1.0)) for i in range(len(found))]
        named = [Finalist(choice, *one) for choice, one in zip(choices, found, strict=True)]
        return [chosen.number for chosen, _ in ranked(named)]

    near, far = 0.01 * NEAR, 0.01 * NEAR + 1e-6
    assert order((0.01, 2.0), (near, 1.0), (far, 0.5)) == [1, 0, 2]
    assert order((far, None), (near, None), (0.01, None)) == [2, 1, 0]


def test_nobody_may_be_fast_enough() -> None:
    """Without a trial that meets the time there is no finalist."""
    assert finalists([record(0, 0.1, 2.0)], 1.0) == []
    assert finalists([], 1.0) == []


# -- held to the budget ---------------------------------------------------------------------------


class Bench:
    """Stands in for timing: each candidate is as fast as its name says; notes what was timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lows: Sequence[float]) -> None:
        self.lows, self.asked = iter(lows), []
        self.given: list[dict[str, Any]] = []
        self.pairs = 6
        monkeypatch.setattr(verify, "time_policy", self.time_policy)

    @property
    def timed(self) -> int:
        return len(self.given)

    def time_policy(self, *_: Any, **given: Any) -> Paired:
        low = next(self.lows)
        self.given.append(given)
        ratio = Interval(value=low + 0.02, low=low, high=low + 0.04)
        return Paired(ratio, 1.0, 1 / ratio.value, self.pairs, ratio.value)

    def again(self, found: Record, seconds: float) -> Choice | None:
        self.asked.append((found.number, seconds))
        value = found.value * (seconds / 0.66) ** -1  # less time, more error
        new = candidate(f"tighter {len(self.asked)}", seconds)
        return dataclasses.replace(found, value=value), new

    def choose(self, ranked: Sequence[tuple[Record, Candidate]], budget: str, again: Any) -> Any:
        asked = settings(budget=parse_budget(budget))
        return within_budget(None, asked, ranked, again, lambda pairs, width: None)


RANKED = [
    (record(0, 0.01, 0.66), candidate("first", 0.66)),
    (record(1, 0.02, 0.66), candidate("second", 0.66)),
]


def test_the_first_that_keeps_the_budget_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best candidate is measured once, and taken if the lower end of its interval holds."""
    bench = Bench(monkeypatch, [1.5])
    verdict = bench.choose(RANKED, "1.5x", bench.again)
    assert verdict.found.name == "first" and verdict.record.number == 0
    assert verdict.timing.ratio.low == 1.5
    assert bench.asked == []


def test_the_lower_end_counts_not_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A speed-up that may be below the budget misses it; the next on its front is taken."""
    bench = Bench(monkeypatch, [1.49, 1.51])  # the middle of the first is 1.51
    verdict = bench.choose(RANKED, "1.5x", bench.again)
    assert verdict.found.name == "tighter 1" and verdict.record.number == 0
    ((number, seconds),) = bench.asked
    assert number == 0 and seconds < 0.66


def test_a_miss_tightens_by_as_much_as_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further plan is asked for less time, in the measure of what was lacking."""
    bench = Bench(monkeypatch, [1.2, 1.4999, 1.5])
    bench.choose(RANKED, "1.5x", bench.again)
    times = [0.66, *(seconds for _, seconds in bench.asked)]
    assert times[1] == pytest.approx(0.66 * 1.2 / 1.5)
    assert times[2] <= 0.995 * times[1]


def test_time_to_spare_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is faster than asked is replanned with more time, and the slower one taken."""
    bench = Bench(monkeypatch, [1.6, 1.505])
    verdict = bench.choose(RANKED, "1.5x", bench.again)
    assert verdict.found.name == "tighter 1" and verdict.timing.ratio.low == 1.505
    ((_, seconds),) = bench.asked
    assert 0.66 < seconds < 0.66 * 1.6 / 1.5


def test_what_kept_the_budget_is_not_lost_to_a_slower_one_that_misses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the replanned policy misses, the one that kept the budget is taken."""
    bench = Bench(monkeypatch, [1.6, 1.45])
    verdict = bench.choose(RANKED, "1.5x", bench.again)
    assert verdict.found.name == "first" and bench.timed == 2


def test_time_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replanned policy with time to spare is not replanned again: that takes minutes."""
    bench = Bench(monkeypatch, [1.7, 1.6])
    bench.choose(RANKED, "1.5x", bench.again)
    assert bench.timed == 2


def test_a_slow_device_gets_as_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effort is counted in pairs of calls, and every policy is measured by some."""
    bench = Bench(monkeypatch, [1.2, 1.3, 1.4, 1.45, 1.5])
    bench.pairs = 20
    assert bench.choose(RANKED, "1.5x", bench.again).timing.ratio.low == 1.5
    assert [given["max_pairs"] for given in bench.given] == [30, 30, 20, 12, 12]
    assert all(given["max_seconds"] == math.inf for given in bench.given)


def test_time_that_is_given_back_is_taken_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two policies that keep the budget the nearer one is taken, though it be the faster."""
    bench = Bench(monkeypatch, [1.6, 1.505])

    def worse(found: Record, seconds: float) -> Choice:
        return dataclasses.replace(found, value=2 * found.value), candidate("slower", seconds)

    assert bench.choose(RANKED, "1.5x", worse).found.name == "first"


def test_another_time_is_planned_with_the_best_parameters_for_it() -> None:
    """Of what the best trials' parameters give there the nearest is taken, and never NaN."""
    errors = {0: 0.3, 1: math.nan, 2: 0.2}
    rows = [("key", "jump") * 3, ("key", "key", "jump") * 2, ("key",) * 5 + ("jump",)]
    policies = dict(enumerate(map(policy, rows)))

    def again(found: Record, seconds: float) -> Candidate | None:
        tried = policies.get(found.number)
        return None if tried is None else Candidate("planned", "planned", tried, seconds)

    def score(tried: Policy, seeds: int) -> SimpleNamespace:
        error = next(errors[number] for number, known in policies.items() if known == tried)
        if math.isnan(error):
            raise MeasurementError("NaN")
        return SimpleNamespace(typical=error)

    def refine(choice: Choice) -> Choice:
        assert choice[0].number == 2
        return choice[0], dataclasses.replace(choice[1], name="refined")

    evaluator: Any = SimpleNamespace(score=score)
    one = Chooser(None, settings(), evaluator, 1.0, again, refine, lambda *_: None)
    one._best = [record(number, 0.01, 0.6) for number in range(4)]
    choice = one._planned(one._best[0], 0.5)
    assert choice is not None and (choice[0].number, choice[0].value) == (2, 0.2)
    assert choice[1].policy == policies[2] and choice[1].seconds == 0.5
    assert choice[1].name == "refined"
    assert one._planned(record(2, 0.01, 0.6, row="20 steps"), 0.5) is None


def test_giving_time_back_stays_below_what_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is not given the time again with which another missed."""
    bench = Bench(monkeypatch, [1.4, 1.6, 1.5])
    bench.choose(RANKED, "1.5x", bench.again)
    assert bench.asked[-1][1] < 0.66


def test_a_candidate_without_a_front_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no tighter plan, the next finalist is measured."""
    bench = Bench(monkeypatch, [1.4, 1.6])
    verdict = bench.choose(RANKED, "1.5x", lambda found, seconds: None)
    assert verdict.found.name == "second" and verdict.record.number == 1


def test_nobody_keeps_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal says what was asked, and the closest that was measured."""
    bench = Bench(monkeypatch, [1.31, 1.42, *[1.3] * 98])
    with pytest.raises(BudgetError, match=r"1\.5x.*1\.42x"):
        bench.choose(RANKED, "1.5x", bench.again)
    assert bench.timed == 2 * verify.ATTEMPTS  # and it ends


def test_a_time_budget_is_held_against_the_measured_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a time per call is asked, the measured teacher (1 s here) says which speed-up it is."""
    bench = Bench(monkeypatch, [1.9, 2.0])
    verdict = bench.choose(RANKED, "500ms", bench.again)
    assert verdict.timing.ratio.low == 2.0


def test_a_policy_is_timed_as_whole_calls_and_taken_off_again() -> None:
    """Half of the steps held is twice as fast where time is arithmetic; nothing stays behind."""
    pipe = tiny_pipe()
    before = sorted(vars(pipe.unet))
    with work_clock():
        timing = verify.time_policy(pipe, POLICY, STEPS, 2)
    assert timing.ratio.value == pytest.approx(2) == timing.ratio.low
    assert sorted(vars(pipe.unet)) == before


def test_masks_without_weight_cost_a_jump() -> None:
    """A mask that λ gives no weight is not run, so it is counted as a jump."""
    masked = POLICY.model_copy(
        update={"masks": {"m": ("x#conv",)}, "steps": ("key", "m") * 3, "mix": Constant(value=0.0)}
    )
    assert verify.policy_steps(masked) == ["key", "jump"] * 3
    kept = masked.model_copy(update={"mix": Constant(value=0.5)})
    assert verify.policy_steps(kept) == ["key", "m"] * 3


# -- the test -------------------------------------------------------------------------------------


def try_out(
    pipe: Any, found: Policy, seeds: Sequence[int] = (7, 8, 9), judge: Judge = NOBODY
) -> Any:
    """Run the test stage on a few seeds."""
    ratio = Interval(value=2.0, low=1.9, high=2.1)
    return verify.test(
        pipe,
        found,
        Paired(ratio, 1.0, 0.5, 6, 2.0),
        2.0,
        seeds=seeds,
        steps=STEPS,
        batch=2,
        judge=judge,
        on_progress=lambda done, total: None,
    )


def test_no_reuse_costs_nothing_in_the_images() -> None:
    """A policy of keyframes alone has no error at all, and keeps nothing."""
    measured, (teacher, found) = try_out(tiny_pipe(), policy(["key"] * STEPS))
    assert torch.equal(teacher.images, found.images)
    assert measured.trajectory_error.value == measured.low_frequency_error == 0
    assert measured.samples == 3 and measured.seeds == "7 to 9"


def test_the_error_is_that_of_the_same_seeds() -> None:
    """Teacher and policy are drawn with the same seeds, and each seed by itself."""
    pipe = tiny_pipe()
    measured, (teacher, found) = try_out(pipe, POLICY)
    errors = (found.latents - teacher.latents).flatten(1).norm(dim=1)
    errors /= teacher.latents.flatten(1).norm(dim=1)
    assert measured.trajectory_error.value == pytest.approx(float(errors.mean()), rel=1e-5)
    assert 0 < measured.trajectory_error.low <= measured.trajectory_error.high
    _, (alone, _) = try_out(pipe, POLICY, seeds=[8])
    torch.testing.assert_close(alone.latents[0], teacher.latents[1])


def test_the_type_of_number_is_that_of_the_pipe() -> None:
    """What is recorded is what was measured, whatever the policy was made with."""
    pipe = tiny_pipe()
    assert POLICY.sampler.dtype == "float32"
    assert try_out(pipe, POLICY)[0].dtype == "float32"
    pipe.unet.to(torch.float64)
    assert try_out(pipe, POLICY)[0].dtype == "float64"


def test_without_a_judge_there_is_no_fid_and_no_alignment() -> None:
    """A model without a feature extractor gets no made-up FID, nor one without towers a score."""
    measured, _ = try_out(tiny_pipe(), POLICY)
    assert measured.fid is None and measured.alignment is None


def prompted(judged: Path, inputs: Sequence[dict[str, Any]] = PROMPTS) -> tuple[Task, Judge]:
    """A tiny Stable Diffusion with prompts, and random towers and features for it."""
    pipe = sd()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    save_alignment(judged, Encoder(6).eval(), -torch.randn(6, WIDTH))
    save_features(judged, Features(Encoder(4).eval(), Reference.of(torch.randn(9, 4)), "unnamed"))
    task = Task(pipe, inputs, {"guidance_scale": 3.0})
    return task, load_judge(judged, task)


def jumps(pipe: Any) -> Policy:
    """Every other step held, for a pipe with prompts."""
    shape = (CHANNELS, SIZE, SIZE)
    return compose(
        pipe, "tiny", ("key", "jump") * 3, {}, Constant(), replaces=STEPS, latent_shape=shape,
        guidance="batched",
    )  # fmt: skip


def test_each_image_is_aligned_with_the_prompt_of_its_seed(tmp_path: Path) -> None:
    """Teacher's and policy's mean scores, and the mean of what differs seed by seed."""
    pipe, judge = prompted(tmp_path)
    measured, drawn = try_out(pipe, jumps(pipe), judge=judge)
    prompts = [PROMPTS[seed % 2]["prompt"] for seed in (7, 8, 9)]
    teacher, ours = (judge.alignment(one.images, prompts) for one in drawn)
    found = measured.alignment
    assert found.towers == f"bundled {tmp_path.name} towers"
    assert found.teacher == pytest.approx(teacher.mean()) and teacher.min() > 0
    assert found.policy == pytest.approx(ours.mean())
    change = found.difference
    assert change.value == pytest.approx((ours - teacher).mean(), abs=1e-9) and change.value != 0
    assert (ours - teacher).min() <= change.low <= change.value <= change.high
    assert measured.fid.features == f"bundled {tmp_path.name} features"


def test_no_reuse_changes_no_alignment(tmp_path: Path) -> None:
    """Equal images are aligned alike: the difference is 0 with an interval of no width."""
    pipe, judge = prompted(tmp_path)
    same = jumps(pipe).model_copy(update={"steps": ("key",) * STEPS})
    change = try_out(pipe, same, judge=judge)[0].alignment.difference
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_without_prompts_there_is_no_alignment(tmp_path: Path) -> None:
    """Towers alone score nothing: some seed's prompt is empty here."""
    pipe, judge = prompted(tmp_path, [{"prompt": ""}, {"prompt": "a cat"}])
    assert judge.alignment is not None
    assert try_out(pipe, jumps(pipe), judge=judge)[0].alignment is None


def test_a_policy_that_ruins_the_images_is_no_policy() -> None:
    """Latents that have nothing to do with the teacher's are a failure, not a result."""
    wild = Table(weights=((), (0.0, 999.0)) * 3)
    with pytest.raises(MeasurementError, match="no usable policy"):
        try_out(tiny_pipe(), POLICY.model_copy(update={"mix": wild}))


def test_nan_on_the_test_seeds_is_a_failure() -> None:
    """NaN is never averaged into a number."""
    pipe = tiny_pipe()
    pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(MeasurementError, match="NaN"):
        try_out(pipe, POLICY)
