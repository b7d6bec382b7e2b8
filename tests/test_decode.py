"""Laws of decoding: what becomes of any parameters of any space."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.errors import BudgetError
from autofr.measure.calibration import Calibration
from autofr.measure.costs import Costs
from autofr.memory import Memory
from autofr.mix import Constant, Sigmoid, Step, Table
from autofr.plan import planner
from autofr.search import decode as decoding
from autofr.search.decode import Frame, decode, family, fastest_seconds, guesses, mix_name
from autofr.search.space import SHIPPED, Planned, load_space

laws = settings(deadline=None, max_examples=30, derandomize=True, database=None)

MASKS = {
    "attn": ("up_blocks.0.attentions.0#attn",),
    "frdiff": ("up_blocks.0.resnets.0#conv", "up_blocks.0.attentions.0#attn"),
    "branches": ("up_blocks.0.resnets.0#branch", "up_blocks.0.attentions.0#attn"),
    "cut0": ("mid_block#stage",),
    "cut1": ("up_blocks.0#stage",),
}
COSTS = Costs(1.0, 0.02, 0.5, dict(attn=0.8, frdiff=0.5, branches=0.45, cut0=0.7, cut1=0.3))
POINTS = {
    "up_blocks.0.resnets.0#conv": 0.25, "up_blocks.0.resnets.0#branch": 0.35,
    "up_blocks.0.attentions.0#attn": 0.2, "mid_block.resnets.0#conv": 0.1,
    "mid_block.resnets.0#branch": 0.15, "mid_block#stage": 0.3,
}  # fmt: skip


class Fixed:
    """A trial whose parameters are given; it checks that they are in range, and notes the names."""

    def __init__(self, params):
        self.params, self.ranges = params, {}

    def suggest_float(self, name, low, high):
        assert low <= self.params[name] <= high
        self.ranges[name] = (low, high)
        return float(self.params[name])

    def suggest_int(self, name, low, high):
        assert isinstance(self.params[name], int)
        return self.suggest_float(name, low, high) and self.params[name]

    def suggest_categorical(self, name, choices):
        assert self.params[name] in choices
        self.ranges[name] = tuple(choices)
        return self.params[name]


class Drawn:
    """A trial whose parameters hypothesis chooses; it notes them."""

    def __init__(self, draw):
        self.draw, self.params = draw, {}

    def _note(self, name, strategy):
        if name not in self.params:
            self.params[name] = self.draw(strategy)
        return self.params[name]

    def suggest_float(self, name, low, high):
        return self._note(name, st.floats(low, high))

    def suggest_int(self, name, low, high):
        return self._note(name, st.integers(low, high))

    def suggest_categorical(self, name, choices):
        return self._note(name, st.sampled_from(choices))


def calibration(steps, gaps=8):
    """Random scores that drift, in the masks' order."""
    rng = np.random.default_rng(steps)
    teacher = rng.normal(size=16) + 0.2 * rng.normal(size=(steps, 16)).cumsum(0)
    reduced = np.full((len(MASKS), steps, gaps, 16), np.nan)
    for i in range(steps):
        for gap in range(1, min(gaps, i) + 1):
            noise = rng.normal(size=(len(MASKS), 16))
            reduced[:, i, gap - 1] = teacher[i] + 0.05 * gap * noise
    cross = np.einsum("migd,jd->migj", reduced, teacher)
    own = (reduced**2).sum(-1)
    return Calibration(tuple(MASKS), teacher @ teacher.T, cross, own, np.ones(steps), 10.0)


TABLES = {steps: calibration(steps) for steps in range(2, 13)}


def frame(speedup=1.5, steps=12, **changes):
    """A teacher of 12 steps and a budget."""
    fields = dict(
        steps=steps,
        seconds=COSTS.teacher(steps) / speedup,
        costs=COSTS,
        masks=MASKS,
        calibration=TABLES.__getitem__,
        point_seconds=POINTS,
        memory=Memory(dict.fromkeys([*POINTS, *(p for m in MASKS.values() for p in m)], 100), 10),
    )
    return Frame(**fields | changes)


# -- decoding ------------------------------------------------------------------------------------


def wide(**axes):
    """A planned space with every family of mix and mask, and two step counts."""
    fields = dict(
        steps=(1.0, 0.6),
        max_gap=(1, 8),
        masks=("all", "jump", "cuts", "jump+cuts", "jump+branches", "jump+frdiff", "frdiff"),
        tilt=(0.0, 3.0),
        phase=(-2.0, 2.0),
        first=(1, 4),
        last=(0, 3),
        rollouts=(0, 3),
        mix=("fit1", "fit2", "sigmoid", "hard_sigmoid", "linear", "cosine", "step", "constant"),
    )
    return Planned.model_validate(
        {"name": "wide", "kind": "planned", "axes": fields | axes}, strict=False
    )


SPACES = {"wide": wide(), **{name: load_space(name) for name in SHIPPED}}


@pytest.mark.parametrize("name", SPACES)
@laws
@given(data=st.data(), speedup=st.floats(1.01, 4), limit=st.none() | st.integers(10, 1500))
def test_whatever_is_decoded_meets_the_budget(name, data, speedup, limit):
    """Any parameters give a draft within time and memory and with its masks, or a BudgetError."""
    space, here = SPACES[name], frame(speedup)
    here = replace(here, memory=replace(here.memory, limit=limit))
    trial = Drawn(data.draw)
    try:
        found = decode(space, trial, here)
    except BudgetError:
        return
    draft = found.draft
    named = {*draft.steps} - {"key", "jump"}
    assert here.memory.fits(draft.steps, found.masks, draft.mix)
    assert draft.steps[0] == "key" and named <= set(found.masks)
    assert all(found.masks[step] for step in named)
    costs = COSTS
    if "chosen" in named:
        saved = sum(POINTS[p] for p in found.masks["chosen"])
        costs = Costs(1.0, 0.02, 0.5, {"chosen": max(0.02, 1 - saved)})
        assert draft.seconds(costs) <= here.seconds * (1 + 1e-9) or _overlap(found.masks["chosen"])
    else:
        assert draft.seconds(costs) <= here.seconds * (1 + 1e-9)
    if found.rollouts:
        assert isinstance(draft.mix, Table)
    again = decode(space, Fixed(trial.params), here)
    assert again == found


def _overlap(points):
    """Whether a first convolution is reused inside a branch that is reused: it saves nothing."""
    return any(p.endswith("#conv") and p[:-4] + "branch" in points for p in points)


def planned_params(**changes):
    """Parameters of the wide space."""
    return dict(
        steps=1.0, masks="all", mix="fit2", max_gap=4, first=1, last=0, agreement=1.0, rollouts=1,
        tilt=0.0, **{f"phase{at}": 0.0 for at in range(7)},
    ) | changes  # fmt: skip


def test_a_tilt_is_a_phase_that_rises():
    """It takes from the start of a call what it gives to its end; phases add to it."""
    ends = {"phase0": -1.5, "phase1": -1.0, "phase2": -0.5, "phase4": 0.5, "phase5": 1.0}
    phases = ends | {"phase6": 1.5}
    tilted, phased, both = (
        decode(wide(), Fixed(planned_params(**params)), frame(2.0)).draft
        for params in (
            {"tilt": 1.5},
            phases,
            {"tilt": 1.5} | {name: -value for name, value in phases.items()},
        )
    )
    assert tilted == phased
    assert both == decode(wide(), Fixed(planned_params()), frame(2.0)).draft
    assert tilted != both


def test_settings_of_the_planner_are_kept():
    """Forced keyframes, gaps, masks and step count of a planned draft are those proposed."""
    params = planned_params(masks="jump+cuts", first=3, last=2, max_gap=3, steps=0.6)
    found = decode(wide(), Fixed(params), frame(2.0))
    steps = found.draft.steps
    assert len(steps) == round(12 * 0.6)
    assert {*steps[:3], *steps[-2:]} == {"key"}
    assert {*steps} <= {"key", "jump", "cut0", "cut1"}
    assert found.rollouts == 1 and found.masks is MASKS
    plain = decode(wide(), Fixed(planned_params(mix="constant")), frame(2.0))
    assert plain.draft.mix == Constant() and plain.rollouts == 0  # a λ(t) is not corrected


def test_planning_knows_what_is_corrected(monkeypatch):
    """Errors that keyframes make up for are planned so only where rollouts will correct the mix."""
    seen = []

    def noted(calibration, costs, rule, seconds):
        seen.append(rule.corrected)
        return planner.plan(calibration, costs, rule, seconds)

    monkeypatch.setattr(decoding, "plan", noted)
    tables = {steps: replace(table, stages=2) for steps, table in TABLES.items()}
    for changes, fields in (
        ({}, {}),
        ({"rollouts": 0}, {}),
        ({"mix": "constant"}, {}),
        ({"steps": 0.6}, {}),
        ({}, {"calibration": tables.__getitem__}),
    ):
        decode(wide(), Fixed(planned_params(**changes)), frame(1.5, **fields))
    assert seen == [True, False, False, False, False]


def test_mask_families():
    """Each family names its masks; absent masks may be named, the planner leaves them out."""
    assert family("all", MASKS) == (*MASKS, "jump")
    assert family("jump", MASKS) == ("jump",)
    assert family("cuts", MASKS) == ("cut0", "cut1")
    assert family("jump+cuts", MASKS) == ("jump", "cut0", "cut1")
    assert family("jump+branches", MASKS) == ("jump", "branches")
    assert family("frdiff", MASKS) == ("frdiff",)


@pytest.mark.parametrize("masks", ["cuts", "frdiff"])
def test_a_family_without_masks_meets_no_budget(masks):
    """Where the profile left no mask of a family, a trial of it is given up, not an error."""
    few = {"attn": MASKS["attn"]}
    table = TABLES[12]
    some = Calibration(
        ("attn",), table.teacher, table.cross[:1], table.own[:1], table.gain, table.norm
    )
    here = frame(masks=few, calibration=lambda steps: some)
    with pytest.raises(BudgetError):
        decode(wide(), Fixed(planned_params(masks=masks)), here)
    with pytest.raises(BudgetError):
        decode(load_space("frdiff"), Fixed(dict(mix="constant", interval=3)), here)


def test_the_interval_is_widened_until_the_budget_is_met():
    """FRDiff keeps the proposed interval where it is fast enough, and takes the next one if not."""
    space = load_space("frdiff")

    def interval(asked, speedup, steps=12):
        params = Fixed(dict(mix="constant", interval=asked))
        row = decode(space, params, frame(speedup, steps)).draft.steps
        return (*row, "key").index("key", 1)

    assert interval(2, 1.2) == 2 and interval(5, 1.2) == 5
    assert interval(2, 1.5) == 4  # (0.5 + 12) / 1.5 = 8.33 s; M = 3 takes 8.5, M = 4 takes 8.0
    assert interval(12, 1.5, steps=6) == 6  # one keyframe, however few steps there are
    with pytest.raises(BudgetError, match="no interval"):
        interval(2, 3.0)


def direct_params(reuse=(), **keys):
    """Parameters of the direct space: bits of some groups, random keys of some steps."""
    groups = [
        f"{k} {b}" for k, b in (("attn", "up_blocks.0"), ("branch", "mid_block"),
        ("branch", "up_blocks.0"), ("conv", "mid_block"), ("conv", "up_blocks.0"))
    ]  # fmt: skip
    bits = {f"reuse {group}": group in reuse for group in groups}
    return bits | {f"key{i}": keys.get(f"key{i}", 0.0) for i in range(1, 12)} | {"mix": "constant"}


def test_the_largest_keys_are_the_keyframes():
    """Direct decoding takes as many keyframes as the budget allows, largest numbers first."""
    space = load_space("direct")
    params = direct_params(("conv up_blocks.0",), key7=0.9, key3=0.8, key10=0.7, key1=0.6)
    trial = Fixed(params)
    found = decode(space, trial, frame(1.2))
    assert found.masks == {"chosen": ("up_blocks.0.resnets.0#conv",)}
    keys = [i for i, step in enumerate(found.draft.steps) if step == "key"]
    # 0.5 + k + (12 - k) * 0.75 <= 12.5 / 1.2 = 10.42 s allows 3
    assert keys == [0, 3, 7]
    assert set(trial.ranges) == set(params)
    held = decode(space, Fixed(direct_params(key7=0.9)), frame(5.0))
    assert held.masks == {} and {*held.draft.steps} == {"key", "jump"}
    with pytest.raises(BudgetError, match="save too little"):
        decode(space, Fixed(direct_params(("conv mid_block",))), frame(1.5))


def test_a_convolution_inside_a_reused_branch_saves_nothing_more():
    """The time of nested points is counted once."""
    space = load_space("direct")
    both = direct_params(("conv up_blocks.0", "branch up_blocks.0"))
    alone = direct_params(("branch up_blocks.0",))
    rows = [decode(space, Fixed(params), frame(1.3)).draft.steps for params in (both, alone)]
    assert rows[0] == rows[1]


# -- guesses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [
    wide(), load_space("default"), wide(mix=("sigmoid",)), wide(mix=("step",), bias=(0.6, 0.7)),
    wide(mix=("hard_sigmoid",), tau=(40.0, 50.0)),
    wide(phase=(0.0, 0.0), rollouts=(0, 0), max_gap=(5, 5)), wide(mix=("linear",)),
    wide(phase=(1.0, 2.0), first=(2, 3), last=(1, 2)),
])  # fmt: skip
def test_guesses_lie_in_the_space(space):
    """Every guess has exactly the parameters that decoding asks for, each inside its range."""
    found = guesses(space)
    assert found and all(found.count(one) == 1 for one in found)
    for params in found:
        trial = Fixed(params)  # refuses what is out of range
        with contextlib.suppress(BudgetError):
            decode(space, trial, frame(1.1))
        assert set(trial.ranges) == set(params)


def test_spaces_without_the_planner_have_no_guesses():
    """Their parameters say nothing before they are tried."""
    assert guesses(load_space("frdiff")) == guesses(load_space("direct")) == []


@pytest.mark.parametrize("name", SPACES)
@laws
@given(data=st.data(), speedup=st.floats(2, 8))
def test_nothing_is_faster_than_the_fastest(name, data, speedup):
    """No draft of a space takes less than the bound that is checked before the search."""
    space = SPACES[name]
    try:
        steps = decode(space, Drawn(data.draw), frame(speedup)).draft.steps
    except BudgetError:
        return
    held = ["jump" if step != "key" else step for step in steps]
    assert COSTS.of_call(held) >= fastest_seconds(space, frame()) * (1 - 1e-9)


@pytest.mark.parametrize("name", ["wide", "default"])
@pytest.mark.parametrize("steps", [2, 7, 12])
def test_the_fastest_is_reached(name, steps):
    """The bound of a planned space is what jumps with the fewest steps and keyframes take."""
    space = SPACES[name]
    bound = fastest_seconds(space, frame(steps=steps))
    few = dict(masks="jump", steps=min(space.axes.steps), max_gap=space.axes.max_gap[1])
    params = Fixed(planned_params(**few))
    found = decode(space, params, frame(steps=steps, seconds=bound * (1 + 1e-9)))
    assert found.draft.seconds(COSTS) == pytest.approx(bound)
    with pytest.raises(BudgetError):
        decode(space, params, frame(steps=steps, seconds=bound * 0.99))


def test_labels_of_mixes_are_short():
    """Fitted mixes go by their name, families by their kind and parameters."""
    labels = [mix_name(mix) for mix in ("fit2", Constant(), Step(bias=0.25), Sigmoid(tau=30.0))]
    assert labels == ["fit2", "constant", "step b=0.25", "sigmoid τ=30 b=0.5"]


def test_a_memory_limit_takes_the_mask_away_that_keeps_most():
    """Where no point fits, plans hold scores; where not even those do, the limit is named."""
    trial = Fixed(guesses(SPACES["default"])[0])
    free = decode(SPACES["default"], trial, frame(1.5))
    small = replace(frame(1.5), memory=replace(frame(1.5).memory, limit=60))
    tight = decode(SPACES["default"], trial, small)
    assert not small.memory.fits(free.draft.steps, free.masks, free.draft.mix)
    assert set(tight.draft.steps) == {"key", "jump"}
    none = replace(small, memory=replace(small.memory, limit=9))
    with pytest.raises(BudgetError, match="--max-memory"):
        decode(SPACES["default"], trial, none)
