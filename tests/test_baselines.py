"""Laws of the published schedules: where their keyframes are and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.measure.costs import Costs, whole
from autofr.measure.masks import candidate_masks
from autofr.mix import Constant, HardSigmoid, Linear, Sigmoid, Step, Table
from autofr.plan.baselines import (
    Draft,
    cuts,
    deepcache,
    deepcache_cuts,
    fewer_steps,
    frdiff,
    published,
    uniform,
)
from autofr.runtime import sampler
from autofr.runtime.families import discover

laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)

RELEASED = HardSigmoid(tau=30.0, bias=0.5)


def masks_of(pipe):
    return candidate_masks(discover(pipe.unet))


def costs_of(masks):
    """Every mask costs 0.4 of a keyframe, a jump 0.01."""
    return Costs(1.0, 0.01, 0.5, {name: 0.4 for name in masks})


@laws
@given(st.integers(1, 100), st.integers(1, 20))
def test_keyframes_are_the_multiples_of_the_interval(steps, interval):
    """Step 0, M, 2M, ... are computed, and one mask is reused in between."""
    for draft in (
        uniform("u", "g", steps, interval, "m"),
        frdiff(steps, interval),
        frdiff(steps, interval, RELEASED),
        deepcache(steps, interval, "m", "mid_block"),
    ):
        assert len(draft.steps) == steps
        keys = [i for i, step in enumerate(draft.steps) if step == "key"]
        assert keys == [*range(0, steps, interval)]
        assert len({*draft.steps} - {"key"}) <= 1
    assert fewer_steps(steps).steps == ("key",) * steps


def test_frdiff_without_lambda_reuses_as_it_is():
    """Without mixing every reduced score is taken whole; with it, the released λ counts."""
    assert frdiff(8, 2).mix == Constant(value=1.0)
    assert frdiff(8, 2, RELEASED).mix == RELEASED
    assert frdiff(8, 2, RELEASED).name == "FRDiff M=2, official λ"


TABLE = Table(weights=((), (1.0,), (0.0, 1.0), (), (0.5, 0.5), (0.0, 1.0)))
MIXES = [
    RELEASED, Sigmoid(), Linear(start=0.3, end=0.6), Step(bias=0.7), Constant(value=0.0),
    Constant(value=1.0), TABLE,
]  # fmt: skip


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_predicted_seconds_are_those_of_the_calls_made(pipe, mix):
    """Masks that λ ≤ 0 turns into jumps cost a jump: prediction and a real run count alike."""
    masks = masks_of(pipe)
    draft = Draft("d", "g", ("key", "frdiff", "jump", "key", "frdiff", "frdiff"), mix)
    policy = sampler.compose(
        pipe, "tiny", draft.steps, masks, mix, replaces=6, latent_shape=(3, 8, 8)
    )
    with sampler.reuse(pipe, policy) as patch:
        sampler.draw(pipe, [0], 6)
    made = patch.counts
    costs = costs_of(masks)
    spent = costs.fixed + made["key"] * 1.0 + made["jump"] * 0.01 + made["mask"] * 0.4
    assert made.total() == 6
    assert draft.seconds(costs) == pytest.approx(spent)


def test_cuts_are_the_single_stage_masks(pipe):
    """Every stage point is a cut with its place; DeepCache's are the block borders and the last."""
    masks = masks_of(pipe)
    stages = [name for name, point in discover(pipe.unet).items() if point.kind == "stage"]
    assert [f"{place}#stage" for place in cuts(masks).values()] == stages
    assert deepcache_cuts(masks) == {
        "cut3": "up_blocks.0", "cut6": "up_blocks.1", "cut8": "up_blocks.2.resnets.1",
    }  # fmt: skip
    assert deepcache_cuts({"frdiff": ("a#conv",)}) == {}


def test_the_published_rows(pipe):
    """Fewer steps, FRDiff M = 2, 3, 5 with and without λ, DeepCache intervals times cuts."""
    masks = masks_of(pipe)
    costs = costs_of(masks)
    drafts = published(masks, costs, 50, seconds=costs.fixed + 20.5)
    rows = {draft.name: draft for draft in drafts}
    assert len(rows) == len(drafts)
    few = [name for name, draft in rows.items() if draft.group == "fewer steps"]
    assert few == ["33 steps", "25 steps", "20 steps", "17 steps"]
    reuse = {name for name, draft in rows.items() if draft.group == "frdiff"}
    assert reuse == {f"FRDiff M={m}{mix}" for m in (2, 3, 5) for mix in ("", ", official λ")}
    deep = {name for name, draft in rows.items() if draft.group == "deepcache"}
    places = ("up_blocks.0", "up_blocks.1", "up_blocks.2.resnets.1")
    assert deep == {f"DeepCache N={n}, {place}" for n in (2, 3, 5) for place in places}
    assert {draft.mix for draft in drafts} == {Constant(value=1.0), RELEASED}
    assert all(len(draft.steps) == 50 for draft in drafts if draft.group != "fewer steps")
    assert all({*draft.steps} <= {"key", *masks} for draft in drafts)


@laws
@given(st.integers(1, 60), st.floats(1.01, 10))
def test_the_affordable_step_count_meets_the_budget(steps, speedup):
    """The most steps that fit the budget are a row, unless none or all of them fit."""
    costs = Costs(0.02, 0.0, 0.01, {})
    seconds = costs.teacher(steps) / speedup
    drafts = published({}, costs, steps, seconds)
    counts = [len(draft.steps) for draft in drafts]
    assert counts == sorted(set(counts), reverse=True)
    assert all(1 <= count < steps for count in counts)
    surely, just = (
        max((n for n in range(1, steps) if costs.teacher(n) <= seconds * (1 + slack)), default=0)
        for slack in (-1e-9, 1e-9)  # whether rounding lets one more in is left open
    )
    if surely:
        assert surely in counts or just in counts


def test_models_without_a_family_of_points_lack_its_rows():
    """Without FRDiff points or cuts only fewer steps are left."""
    drafts = published({"attn": ("a#attn",)}, Costs(1.0, 0.0, 0.0, {}), 12, 6.0)
    assert {draft.group for draft in drafts} == {"fewer steps"}


@laws
@given(st.integers(2, 60), st.floats(0.2, 1), st.integers(1, 6))
def test_schedules_begin_with_the_first_step_that_runs(steps, strength, interval):
    """Where a call leaves out steps, a schedule counts and costs the others alone."""
    costs = Costs(1.0, 0.1, 0.5, {"m": 0.4}, first=left_out(strength))
    first = costs.first(steps)
    later = uniform("u", "frdiff", steps, interval, "m", first=first)
    alone = uniform("u", "frdiff", steps - first, interval, "m")
    assert later.steps == ("key",) * first + alone.steps
    assert later.seconds(costs) == pytest.approx(alone.seconds(replace(costs, first=whole)))


@laws
@given(st.integers(2, 60), st.floats(0.2, 1), st.floats(1.01, 8))
def test_fewer_steps_are_those_of_a_call_that_starts_at_the_same_strength(steps, strength, speedup):
    """The most steps that fit are a row; every row runs something, and costs what it runs."""
    costs = Costs(0.02, 0.0, 0.01, {}, first=left_out(strength))
    seconds = costs.teacher(steps) / speedup
    drafts = published({}, costs, steps, seconds)
    for draft in drafts:
        count = len(draft.steps)
        assert draft.seconds(costs) == pytest.approx(0.01 + 0.02 * int(count * strength))
        assert int(count * strength) > 0
    fitting = [n for n in range(1, steps) if costs.teacher(n) <= seconds * (1 - 1e-9)]
    if fitting and costs.runs(max(fitting)):
        assert max(fitting) in [len(draft.steps) for draft in drafts]


def left_out(strength):
    """How many steps StableDiffusionImg2ImgPipeline leaves out."""
    return lambda steps: steps - int(steps * strength)
