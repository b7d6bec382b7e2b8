"""Laws of the planner, against brute force over every plan of a few steps."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.errors import BudgetError
from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.mix import MAX_WEIGHT, Constant, HardSigmoid, Linear, Table, mix_row
from autofr.plan.choices import RIDGE, Choices, Rule, choices
from autofr.plan.intervals import intervals
from autofr.plan.planner import UNITS, plan
from autofr.runtime import sampler

laws = settings(deadline=None, max_examples=40, derandomize=True, database=None)

GAPS = 3  # as far as the calibration reaches
NAMES = ("cheap", "good")
COSTS = Costs(key=1.0, jump=0.05, fixed=0.3, masks={"cheap": 0.3, "good": 0.6})
MIXES = ("fit1", "fit2", Constant(), HardSigmoid(tau=10.0, bias=0.3), Linear(start=-0.2, end=1.2))


class World:
    """Random scores of a teacher and of two masks, and the calibration that they give.

    At `switch` a second denoiser takes over, which no keyframe of the first one serves.
    """

    def __init__(self, seed=0, steps=6, size=12, switch=0):
        self.switch, self.fillings = switch, {}
        rng = np.random.default_rng(seed)
        drift = rng.normal(size=(steps, size)) * rng.uniform(0.05, 0.5)
        self.teacher = rng.normal(size=size) + drift.cumsum(0)
        self.reduced = np.full((len(NAMES), steps, GAPS, size), np.nan)
        for m, noise in enumerate((0.5, 0.1)):
            for i in range(steps):
                for g in range(1, min(GAPS, i) + 1):
                    if i - g < switch <= i:
                        continue
                    wrong = (self.teacher[i - g] - self.teacher[i]) * noise * rng.uniform(0.5, 2)
                    wrong = wrong + noise * 0.1 * rng.normal(size=size)
                    self.reduced[m, i, g - 1] = self.teacher[i] + wrong
        # Some steps do not matter: DDIM's last one is the identity without `set_alpha_to_one`.
        self.gain = rng.uniform(0.1, 2, steps) * (rng.random(steps) > 0.2)
        self.calibration = Calibration(
            masks=NAMES,
            teacher=self.teacher @ self.teacher.T,
            cross=np.einsum("migd,jd->migj", self.reduced, self.teacher),
            own=(self.reduced**2).sum(-1),
            gain=self.gain,
            norm=7.0,
            switch=switch,
        )

    def serves(self, one, other):
        """Whether the same denoiser runs both steps."""
        return (one < self.switch) == (other < self.switch)

    def around(self, rule, step, gap, before, after):
        """The gaps before and after the keyframe that count: those to the denoiser's own ones."""
        corrected = rule.corrected and isinstance(rule.mix, str)
        key = step - gap
        before = before if self.serves(key, key - before) else 0
        return before, after if corrected and self.serves(key, key + after) else 0

    def parts(self, name, step, gap, before, after=0):
        """The reduced score (zeros at a jump), the last keyframe's, the one's before (zeros), and,
        where the step is corrected at one, the next keyframe's.
        """
        jump = name == "jump"
        zero = np.zeros(self.teacher.shape[1])
        reduced = zero if jump else self.reduced[NAMES.index(name), step, gap - 1]
        older = self.teacher[step - gap - before] if before else zero
        later = [self.teacher[step - gap + after]] if after else []
        return np.stack([reduced, self.teacher[step - gap], older, *later])

    def weights(self, mix, name, step, gap, before, after=0):
        """The mix of one choice, found on the scores themselves."""
        jump = name == "jump"
        if not isinstance(mix, str):
            share = 0.0 if jump else mix.weight(step / len(self.teacher))
            return np.array([share, 1 - share, 0.0])
        free = [1] if jump else [0, 1]
        if mix == "fit2" and before:
            free.append(2)
        start = np.array([0.0, 1.0, 0.0] if jump else [1.0, 0.0, 0.0])
        if after:
            free.append(3)
            start = np.append(start, 0.0)
        parts, wanted = self.parts(name, step, gap, before, after), self.teacher[step]
        ridge = np.sqrt(RIDGE * (wanted @ wanted))
        matrix = np.vstack([parts[free].T, ridge * np.eye(len(free))])
        right = np.concatenate([wanted - start @ parts, np.zeros(len(free))])
        start[free] += np.linalg.lstsq(matrix, right, rcond=None)[0]
        return start

    def missed(self, rule, name, step, gap, before, after):
        """What a choice misses, and how far a part of it moves the final latents."""
        choice = (name, step, gap, *self.around(rule, step, gap, before, after))
        missed = self.weights(rule.mix, *choice) @ self.parts(*choice) - self.teacher[step]
        place = step / (len(self.teacher) - 1) * (len(rule.phase) - 1)
        left = min(int(place), max(len(rule.phase) - 2, 0))
        share = place - left
        ends = rule.phase[left], rule.phase[min(left + 1, len(rule.phase) - 1)]
        weight = np.exp((1 - share) * ends[0] + share * ends[1])
        return missed, np.sqrt(weight / 7.0) * self.gain[step]

    def error(self, rule, name, step, gap, before, after):
        """Weighted squared error of one choice, from the scores themselves."""
        if not self.serves(step, step - gap):
            return np.inf
        missed, scale = self.missed(rule, name, step, gap, before, after)
        return scale**2 * (missed**2).sum()

    def agreement(self, rule, key, before, after, count):
        """Cosines of what the `count` steps after a keyframe miss that hold its score."""
        if not count:
            return np.zeros((0, 0))
        gaps = range(1, count + 1)
        far = np.array([self.missed(rule, "jump", key + g, g, before, after)[0] for g in gaps])
        far /= np.linalg.norm(far, axis=1, keepdims=True)
        return far @ far.T

    def interval(self, rule, key, before, after, names):
        """Error of the steps between two keyframes (the last one and the end) that are `names`."""
        place = (rule, key, before, after, names)
        if place not in self.fillings:
            steps = [(name, key + g, g, before, after) for g, name in enumerate(names, 1)]
            size = np.sqrt([self.error(rule, *choice) for choice in steps])
            found = np.inf
            if np.isfinite(size).all():
                agreement = self.agreement(rule, key, before, after, len(names))
                found = size @ agreement @ size if len(names) else 0.0
            self.fillings[place] = float(found)
        return self.fillings[place]


def stretches(steps):
    """(key, gap before, gap after, names between) of every interval of a plan."""
    keys = [i for i, name in enumerate(steps) if name == "key"]
    gaps = [0, *(b - a for a, b in itertools.pairwise(keys)), 0]
    for key, (before, after) in zip(keys, itertools.pairwise(gaps), strict=True):
        yield key, before, after, steps[key + 1 : key + after if after else None]


def walk(steps):
    """(step, name, gap, gap before, gap after) of every reduced or held step."""
    for key, before, after, names in stretches(steps):
        for gap, name in enumerate(names, 1):
            yield key + gap, name, gap, before, after


def allowed(steps, rule):
    """Whether a plan keeps the rule: gaps to the keyframe, between keyframes, forced keyframes."""
    keys = [i for i, name in enumerate(steps) if name == "key"]
    most = min(rule.max_gap, GAPS)
    near = all(gap <= most for _, _, gap, *_ in walk(steps))
    near = near and all(b - a <= most for a, b in itertools.pairwise(keys))
    forced = [*range(rule.first), *range(len(steps) - rule.last, len(steps))]
    return near and set(forced) <= set(keys)


def every_plan(world, rule, costs=COSTS):
    """(error, seconds, steps) of all plans that keep the rule, by enumeration."""
    n, found = len(world.teacher), []
    for rest in itertools.product(("key", *rule.masks), repeat=n - 1):
        steps = ("key", *rest)
        if allowed(steps, rule):
            error = sum(world.interval(rule, *one) for one in stretches(steps))
            if np.isfinite(error):
                found.append((error, costs.of_call(steps), steps))
    return found


rules = st.builds(
    Rule,
    masks=st.sampled_from([("cheap", "good", "jump"), ("cheap", "jump"), ("good",), ("jump",)]),
    max_gap=st.integers(1, 4),
    mix=st.sampled_from(MIXES),
    phase=st.lists(st.floats(-2, 2), min_size=1, max_size=4).map(tuple),
    first=st.integers(1, 3),
    last=st.integers(0, 2),
    corrected=st.booleans(),
)
fitted = st.builds(
    Rule,
    masks=st.just(("cheap", "jump")),
    mix=st.sampled_from(["fit1", "fit2"]),
    corrected=st.booleans(),
)
seeds = st.integers(0, 10**6)
alone = st.builds(World, seed=seeds, steps=st.integers(4, 6))
experts = st.builds(World, seed=seeds, steps=st.integers(4, 6), switch=st.integers(1, 3))
worlds = alone | experts


@laws
@given(worlds, rules)
def test_a_choice_costs_its_distance_from_the_teacher(world, rule):
    """The error of every choice is |Σ w f - s|², weighted; its weights are the least squares'."""
    table = choices(world.calibration, COSTS, rule)
    gaps, n = min(rule.max_gap, GAPS), len(world.teacher)
    assert table.error.shape == (len(table.names), n, gaps, gaps + 1, gaps + 1)
    for m, i, g, before, after in np.ndindex(table.error.shape):
        name, gap = table.names[m], g + 1
        if i < gap + before or not world.serves(i, i - gap):
            assert table.error[m, i, g, before, after] == np.inf
            continue
        follows = after > gap and i - gap + after < n
        expected = world.error(rule, name, i, gap, before, after if follows else 0)
        found = table.error[m, i, g, before, after]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        before, _ = world.around(rule, i, gap, before, 0)
        weights = world.weights(rule.mix, name, i, gap, before)
        np.testing.assert_allclose(table.weights[m, i, g, before], weights, rtol=1e-5, atol=1e-6)


@laws
@given(worlds, st.sampled_from(["fit1", "fit2"]))
def test_a_fitted_mix_is_never_worse_than_plain_reuse(world, mix):
    """Least squares beat reuse and holding as they are, and two keyframes' scores beat one's."""
    every = Rule(("cheap", "good", "jump"))
    plain = choices(world.calibration, COSTS, replace(every, mix=Constant()))
    fitted = choices(world.calibration, COSTS, replace(every, mix=mix))
    reached = np.isfinite(plain.error)
    assert (fitted.error[reached] <= plain.error[reached] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("far", [1.0, 1e3, 1e9])
def test_every_plan_is_a_table_that_a_policy_can_hold(far):
    """Scores that are nothing, and reuse that is far off and all alike: a bound, and no error."""
    world = World()
    scores, reduced = world.teacher.copy(), far * (world.teacher[0] + 1e-3 * world.reduced)
    scores[2:4] = 0.0
    table = replace(
        world.calibration,
        teacher=scores @ scores.T,
        cross=np.einsum("migd,jd->migj", reduced, scores),
        own=(reduced**2).sum(-1),
    )
    rule = Rule(("cheap", "good", "jump"), mix="fit2", corrected=True)
    assert np.abs(choices(table, COSTS, rule).weights).max() < 2 + 0.5 / RIDGE**0.5 < MAX_WEIGHT
    assert isinstance(plan(table, COSTS, rule, 4.0).mix, Table)


@laws
@given(alone, st.sampled_from(["fit1", "fit2"]))
def test_a_correction_is_never_worse(world, mix):
    """What the next keyframe makes up for only lowers errors, and only where one follows."""
    every = Rule(("cheap", "good", "jump"), mix=mix)
    plain = choices(world.calibration, COSTS, every)
    corrected = choices(world.calibration, COSTS, replace(every, corrected=True))
    reached = np.isfinite(plain.error)
    bound = plain.error[reached] * (1 + 1e-9) + 1e-4 * world.gain.max() ** 2
    assert (corrected.error[reached] <= bound).all()
    assert np.array_equal(corrected.error[..., 0], plain.error[..., 0])
    assert np.array_equal(corrected.weights, plain.weights)
    assert (corrected.error[:, 1:3, 0, 0, 2] < plain.error[:, 1:3, 0, 0, 2])[
        :, world.gain[1:3] > 0
    ].all()


@laws
@given(worlds, rules | fitted)
def test_without_agreement_errors_add_up_as_squares(world, rule):
    """At 0 every way costs the sum of its choices' errors, and in between what lies between."""
    sides = [replace(rule, agreement=share) for share in (0.0, 0.5, 1.0)]
    tables = [choices(world.calibration, COSTS, one) for one in sides]
    none, half, whole = (table.agreement for table in tables)
    assert np.array_equal(none, np.broadcast_to(np.eye(none.shape[-1]), none.shape))
    np.testing.assert_allclose(half, (none + whole) / 2)
    found = intervals(tables[0], sides[0])
    gaps, reached = tables[0].error.shape[2], 0
    for key, before, after in gaps_around(len(world.teacher), gaps):
        inner = range(1, after or min(gaps + 1, len(world.teacher) - key))
        for way in range(found.error.shape[-1]):
            if np.isfinite(found.error[key, before, after, way]):
                picks = found.picks[key, before, after, way]
                parts = [
                    tables[0].error[picks[gap - 1], key + gap, gap - 1, before, after]
                    for gap in inner
                ]
                assert found.error[key, before, after, way] == pytest.approx(sum(parts), abs=1e-12)
                reached += 1
    assert reached


@laws
@given(worlds, rules | fitted)
def test_agreement_is_the_cosine_of_what_two_steps_miss(world, rule):
    """From the products of scores alone: what the scores themselves give, whatever is corrected."""
    table, n = choices(world.calibration, COSTS, rule), len(world.teacher)
    gaps = table.error.shape[2]
    assert table.agreement.shape == (n, gaps + 1, gaps + 1, gaps, gaps)
    for key, before, after in gaps_around(n, gaps):
        count = after - 1 if after else min(gaps, n - 1 - key)
        expected = world.agreement(rule, key, before, after, count)
        served = [world.serves(key, key + g) for g in range(1, count + 1)]
        found = table.agreement[key, before, after, :count, :count]
        np.testing.assert_allclose(
            found[np.ix_(served, served)], expected[np.ix_(served, served)], atol=1e-6
        )


def gaps_around(n, gaps):
    """(key, gap before, gap after) of all intervals that a call of n steps can have."""
    for key, before, after in itertools.product(range(n), range(gaps + 1), range(gaps + 1)):
        first = before <= key and bool(before) == bool(key)
        if first and (key + after < n if after else key + gaps >= n - 1):
            yield key, before, after


@laws
@given(worlds, rules | fitted)
def test_an_interval_costs_what_its_steps_miss_together(world, rule):
    """Every way costs |Σ g m|² of its choices; with jumps alone that is the scores' own."""
    table, n = choices(world.calibration, COSTS, rule), len(world.teacher)
    ways = intervals(table, rule)
    free = range(rule.first, n - rule.last)
    for place in gaps_around(n, table.error.shape[2]):
        key, before, after = place
        steps = range(key + 1, key + after if after else n)
        if not all(step in free and world.serves(key, step) for step in steps):
            assert (ways.error[place] == np.inf).all()
            continue
        for error, seconds, picks in filled(ways, place):
            names = tuple(table.names[pick] for pick in picks[: len(steps)])
            expected = world.interval(rule, *place, names)
            assert error == pytest.approx(expected, rel=1e-5, abs=1e-8)
            assert seconds == pytest.approx(sum(map(COSTS.of_step, names)))
            if {*names} == {"jump"}:
                parts = [world.missed(rule, "jump", i, i - key, before, after) for i in steps]
                together = sum(scale * missed for missed, scale in parts)
                assert error == pytest.approx((together**2).sum(), rel=1e-5, abs=1e-8)


def filled(ways, place):
    """(error, seconds, picks) of all ways to fill an interval."""
    return zip(ways.error[place], ways.seconds[place], ways.picks[place], strict=True)


@laws
@given(worlds, rules)
def test_ways_go_from_the_cheapest_on_with_falling_error(world, rule):
    """The first way takes least time, and no later one is worse or takes less."""
    table = choices(world.calibration, COSTS, rule)
    ways = intervals(table, rule)
    for place in gaps_around(len(world.teacher), table.error.shape[2]):
        errors, seconds = ways.error[place], ways.seconds[place]
        if np.isfinite(errors[0]):
            count = place[2] - 1 if place[2] else len(world.teacher) - 1 - place[0]
            assert seconds[0] == pytest.approx(count * table.seconds.min())
            assert (np.diff(errors) <= 1e-12).all() and seconds.min() == seconds[0]


def any_table(seed, steps=6, gaps=5, choices=4, sign=-1.0):
    """A table of choices of random errors, some of them 0 or missing, and of random cosines."""
    rng = np.random.default_rng(seed)
    shape = (choices, steps, gaps, gaps + 1, gaps + 1)
    error = rng.exponential(size=shape) * (rng.random(shape) > 0.1)
    error[rng.random(shape) < 0.1] = np.inf
    far = rng.normal(size=(steps, gaps + 1, gaps + 1, gaps, 3)) + rng.uniform(0, 1)
    far = np.abs(far) if sign >= 0 else far
    far /= np.linalg.norm(far, axis=-1, keepdims=True)
    seconds = np.sort(rng.uniform(0.05, 0.9, choices))
    names = tuple(f"mask{index}" for index in range(choices))
    agreement = np.einsum("...sd,...td->...st", far, far)
    return Choices(names, error, np.zeros((*shape[:4], 3)), seconds, agreement, 0)


def fillings(table, key, before, after):
    """(error, seconds) of every filling of an interval, from magnitudes and cosines."""
    steps = np.arange(key + 1, key + after if after else table.error.shape[1])
    gaps = steps - key
    agreement = table.agreement[key, before, after][: len(steps), : len(steps)]
    size = np.sqrt(table.error[:, steps, gaps - 1, before, after])
    for picks in itertools.product(range(len(table.names)), repeat=len(steps)):
        far = size[list(picks), range(len(steps))]
        if np.isfinite(far).all():
            yield far @ agreement @ far, table.seconds[list(picks)].sum()


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_ways_are_near_the_best_fillings(sign):
    """A way is one of all fillings; for any time, or price on it, the best of them is 3 % better
    on average at most; where no errors cancel the last way is the best of all.
    """
    found, best = [], []
    for seed in range(6):
        table = any_table(seed, sign=sign)
        ways = intervals(table, Rule(table.names))
        for place in [(0, 0, 0), (0, 0, 5), (1, 1, 4), (2, 2, 3), (1, 1, 0), (3, 2, 2), (2, 1, 0)]:
            every = np.array([*fillings(table, *place)]).reshape(-1, 2)
            if not len(every):
                assert (ways.error[place] == np.inf).all()
                continue
            errors, seconds = ways.error[place], ways.seconds[place]
            assert (np.diff(errors) <= 1e-9).all()
            for one in zip(errors, seconds, strict=True):
                assert np.isclose(every, one, atol=1e-9).all(1).any()
            assert sign < 0 or errors[-1] == pytest.approx(every[:, 0].min(), abs=1e-9)
            for budget in np.linspace(seconds[0], seconds[-1], 9) + 1e-9:
                found.append(errors[seconds <= budget].min())
                best.append(every[every[:, 1] <= budget, 0].min())
            for price in np.geomspace(0.01, 100, 9):
                found.append((errors + price * seconds).min())
                best.append((every @ [1, price]).min())
    assert (np.array(found) >= np.array(best) * (1 - 1e-9)).all()
    assert sum(found) <= 1.03 * sum(best)


@laws
@given(worlds, rules, st.floats(1, 3.5))
def test_a_plan_says_what_it_costs(world, rule, speedup):
    """Error and seconds of a plan are those of its steps; it keeps the rule; its mix fits."""
    try:
        found = plan(world.calibration, COSTS, rule, COSTS.teacher(len(world.teacher)) / speedup)
    except BudgetError:
        return
    assert allowed(found.steps, rule)
    error = sum(world.interval(rule, *one) for one in stretches(found.steps))
    assert found.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert found.seconds == pytest.approx(COSTS.of_call(found.steps))
    if not isinstance(rule.mix, str):
        assert found.mix == rule.mix
        return
    assert isinstance(found.mix, Table)
    for i, name, gap, before, _ in walk(found.steps):
        row = found.mix.weights[i]
        before, _ = world.around(rule, i, gap, before, 0)
        expected = world.weights(rule.mix, name, i, gap, before)
        assert (*row, 0.0)[:3] == pytest.approx(expected, abs=1e-5)


@laws
@given(worlds, rules, st.floats(1, 3.5))
def test_a_plan_meets_the_budget_or_says_what_can_be_met(world, rule, speedup):
    """Never slower than asked; refused exactly when every plan is, with the largest speed-up."""
    teacher = COSTS.teacher(len(world.teacher))
    every = every_plan(world, rule)
    fastest = min(seconds for _, seconds, _ in every)
    try:
        found = plan(world.calibration, COSTS, rule, teacher / speedup)
    except BudgetError as error:
        assert fastest > teacher / speedup
        assert f"a budget of {speedup:.2f}x" in str(error)
        largest = np.floor(100 * teacher / fastest + 1e-6) / 100  # rounded down: it can be met
        assert f"largest that can under these settings is {largest:.2f}x" in str(error)
        return
    assert found.seconds <= teacher / speedup * (1 + 1e-9)
    fitting = [one for one in every if one[1] <= teacher / speedup * (1 + 1e-9)]
    assert found.error >= min(error for error, _, _ in fitting) - 1e-9


@laws
@given(worlds, rules, st.floats(1, 3.5))
def test_a_plan_is_as_good_as_any_that_fits(world, rule, speedup):
    """With one choice for a step, no plan has less error that takes a unit less per keyframe."""
    rule = replace(rule, masks=rule.masks[-1:])
    target = COSTS.teacher(len(world.teacher)) / speedup
    every = every_plan(world, rule)
    if min(seconds for _, seconds, _ in every) > target:
        return
    found = plan(world.calibration, COSTS, rule, target)
    unit = (target - COSTS.fixed) / UNITS
    for error, seconds, steps in every:
        if seconds <= target - unit * steps.count("key"):
            assert found.error <= error * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("corrected", [False, True])
def test_a_plan_over_masks_is_near_the_best(corrected):
    """With more choices for a step 2 % are left on average."""
    rule = Rule(("cheap", "good", "jump"), corrected=corrected)
    found, best = [], []
    for seed in range(20):
        world = World(seed)
        every = every_plan(world, rule)
        for speedup in (1.2, 1.5, 2.0, 2.5):
            target = COSTS.teacher(6) / speedup
            best.append(min(error for error, seconds, _ in every if seconds <= target))
            found.append(plan(world.calibration, COSTS, rule, target).error)
    assert sum(best) - 1e-9 <= sum(found) <= 1.02 * sum(best)


def test_no_need_to_hurry_gives_the_teacher():
    """At the teacher's own time every step is a keyframe, without error."""
    world = World()
    found = plan(world.calibration, COSTS, Rule(("cheap", "jump")), COSTS.teacher(6))
    assert found.steps == ("key",) * 6 and found.error == 0


@laws
@given(worlds, rules, st.floats(1.1, 3), st.floats(-7, 3))
def test_the_unit_of_time_does_not_matter(world, rule, speedup, log_unit):
    """A device that is faster or slower in all its parts gets the same plan."""
    unit = 10**log_unit
    masks = {name: unit * spent for name, spent in COSTS.masks.items()}
    scaled = Costs(unit * COSTS.key, unit * COSTS.jump, unit * COSTS.fixed, masks)
    target = COSTS.teacher(len(world.teacher)) / speedup
    try:
        found = plan(world.calibration, COSTS, rule, target)
    except BudgetError:
        with pytest.raises(BudgetError):
            plan(world.calibration, scaled, rule, target * unit)
        return
    again = plan(world.calibration, scaled, rule, target * unit * (1 + 1e-12))
    assert again.error == pytest.approx(found.error, rel=1e-3, abs=1e-9)


def test_masks_that_were_not_calibrated_are_left_out():
    """A rule may name more masks than there are; with none at all only keyframes are left."""
    world = World()
    target = COSTS.teacher(6) / 1.5
    more = plan(world.calibration, COSTS, Rule(("absent", "cheap")), target)
    assert more == plan(world.calibration, COSTS, Rule(("cheap",)), target)
    with pytest.raises(BudgetError, match=r"these settings is 1\.00x"):
        plan(world.calibration, COSTS, Rule(("absent",)), target)
    alone = plan(world.calibration, COSTS, Rule(()), COSTS.teacher(6))
    assert alone.steps == ("key",) * 6


def test_forced_keyframes():
    """The first and the last steps asked for are keyframes, more than there are steps too."""
    world, costs = World(), replace(COSTS, jump=0.0)
    for first, last in itertools.product((1, 2, 3), (0, 1, 2)):
        rule = Rule(("jump",), first=first, last=last)
        steps = plan(world.calibration, costs, rule, costs.teacher(6) * 0.9).steps
        assert set(steps[:first]) == {"key"} and set(steps[6 - last :]) <= {"key"}
    rule = Rule(("jump",), first=9, last=9)
    assert plan(world.calibration, costs, rule, costs.teacher(6)).steps == ("key",) * 6


def test_gaps_are_bounded():
    """However cheap a jump is, no step leans on a keyframe further away than the rule says."""
    world = World(steps=12)
    for most in (1, 2, 3):
        rule = Rule(("jump",), max_gap=most)
        keys = -(-11 // most)  # the last one serves as many steps as lie between two
        least = COSTS.fixed + keys * COSTS.key + (12 - keys) * COSTS.jump
        fastest = plan(world.calibration, COSTS, rule, least + 1e-9)
        gaps = [gap for _, _, gap, *_ in walk(fastest.steps)]
        assert max(gaps, default=0) == most


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("speedup", [1.2, 2.0, 2.5])
def test_a_plan_makes_a_policy_that_runs(pipe, mix, speedup):
    """Steps and mix of a plan make a valid policy, and the pipe computes what the plan says."""
    from autofr.runtime.families import discover

    points = {p.kind: name for name, p in discover(pipe.unet).items()}
    masks = {"cheap": (points["stage"],), "good": (points["attn"],), "unused": (points["conv"],)}
    world = World(seed=3)
    rule = Rule(("cheap", "good", "jump"), mix=mix)
    found = plan(world.calibration, COSTS, rule, COSTS.teacher(6) / speedup)
    policy = sampler.compose(
        pipe, "tiny", found.steps, masks, found.mix, replaces=6, latent_shape=(3, 8, 8)
    )
    assert policy.steps == found.steps and set(policy.masks) <= set(found.steps)
    with sampler.reuse(pipe, policy) as patch:
        sampler.draw(pipe, [0, 1], 6)
    held = [i for i in range(6) if found.steps[i] != "key" and policy.weights(i)[0] == 0]
    keys = found.steps.count("key")
    counts = {"key": keys, "jump": len(held), "mask": 6 - keys - len(held)}
    assert patch.counts == {kind: count for kind, count in counts.items() if count}


# -- calls that start later -----------------------------------------------------------------------


@laws
@given(worlds, rules, st.integers(1, 5), st.floats(1.1, 2.5))
def test_what_does_not_run_changes_no_plan(world, rule, first, speedup):
    """A call that leaves out steps is planned as the rest alone, with keyframes before it."""
    costs = replace(COSTS, first=lambda steps: first)
    later = replace(world.calibration, first=first)
    seconds = COSTS.teacher(len(world.teacher)) / speedup
    assert costs.teacher(later.asked) / speedup == seconds
    if not isinstance(rule.mix, str):  # a λ(t) is a function of the whole call's time
        rule = replace(rule, mix="fit2")
    try:
        alone = plan(world.calibration, COSTS, rule, seconds)
    except BudgetError as refusal:
        with pytest.raises(BudgetError, match=re.escape(str(refusal))):
            plan(later, costs, rule, seconds)
        return
    found = plan(later, costs, rule, seconds)
    assert found.steps == ("key",) * first + alone.steps
    assert found.mix.weights == ((),) * first + alone.mix.weights
    assert (found.error, found.seconds) == (alone.error, alone.seconds)


@laws
@given(alone, st.integers(1, 5))
def test_the_time_of_a_mix_is_that_of_the_whole_call(world, first):
    """λ(t) of a step that runs is what the policy's own mix gives there."""
    mix = Linear(start=0.2, end=0.9)
    later, n = replace(world.calibration, first=first), len(world.teacher)
    table = choices(later, COSTS, Rule(("good",), mix=mix))
    for step in range(1, n):
        weights = table.weights[0, step, 0, 0]
        assert weights[0] == pytest.approx(mix_row("good", mix, first + step, first + n)[0])
