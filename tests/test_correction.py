"""Laws of correcting a mix by rollouts: nearer to the teacher, and the same policy otherwise."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from conftest import ddim, make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.measure.masks import candidate_masks
from autofr.mix import HardSigmoid, Table
from autofr.plan import correction
from autofr.plan.correction import Trajectory, _Basis, correct, trajectory
from autofr.policy import Policy
from autofr.runtime import sampler
from autofr.runtime.families import discover
from autofr.runtime.recording import record
from autofr.task import Task

laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)

N, SEEDS = 6, [0, 1]
SOLVERS = {
    "ddim": ddim,
    "euler": lambda: diffusers.EulerDiscreteScheduler.from_config(ddim().config),
    "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler.from_config(ddim().config),
}
PLANS = [
    ("key", "branches", "jump", "key", "cut6", "jump"),
    ("key", "key", "branches", "jump", "jump", "cut6"),
    ("key", "jump", "key", "frdiff", "key", "jump"),
]


def table(steps):
    """Plain reuse and holding, written as a table with room for two keyframes' scores."""
    rows: list[tuple[float, ...]] = []
    keys = 0
    for step in steps:
        keys += step == "key"
        room = (0.0,) * (min(keys, 2) - 1)
        rows.append(() if step == "key" else ((0.0, 1.0) if step == "jump" else (1.0, 0.0)) + room)
    return Table(weights=tuple(rows))


def policy(pipe, steps, mix=None):
    """A policy of this pipe with the candidate masks."""
    masks = candidate_masks(discover(pipe.unet))
    return sampler.compose(
        pipe, "tiny", steps, masks, mix or table(steps), replaces=N, latent_shape=(3, 8, 8)
    )


def drawer(pipe, seeds=SEEDS):
    """What calls the pipe on the calibration seeds."""
    return lambda: sampler.draw(pipe, seeds, N)


def distances(pipe, one, teacher):
    """Distance of the policy's latents from the teacher's after every step."""
    with sampler.reuse(pipe, one), record(pipe) as tape:
        sampler.draw(pipe, SEEDS, N)
    pairs = zip(tape.latents, teacher.parts[0][1], strict=True)
    return np.array([float((a - b).double().norm()) for a, b in pairs])


@pytest.mark.parametrize("steps", PLANS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_correcting_brings_the_policy_nearer(pipe, solver, steps):
    """On the seeds it was corrected on, the path is nowhere further from the teacher's."""
    pipe.scheduler = SOLVERS[solver]()
    teacher = trajectory(pipe, SEEDS, N)
    before = policy(pipe, steps)
    after = correct(pipe, before, teacher)
    old, new = (distances(pipe, one, teacher) for one in (before, after))
    assert (new <= old * (1 + 1e-3)).all()
    assert new[-1] < 0.95 * old[-1]


def test_more_rounds_do_not_hurt(pipe):
    """A second round starts from the first one's table and stays about as near."""
    teacher = trajectory(pipe, SEEDS, N)
    before = policy(pipe, PLANS[0])
    once, twice = (correct(pipe, before, teacher, rounds) for rounds in (1, 2))
    assert once.mix != twice.mix
    ends = [distances(pipe, one, teacher)[-1] for one in (before, once, twice)]
    assert ends[2] <= 1.01 * ends[1] < ends[0]
    assert correct(pipe, before, teacher, rounds=0) == before


@pytest.mark.parametrize("steps", PLANS)
def test_only_the_weights_change(pipe, steps):
    """Rows keep their shape, leading 0 at jumps, but for keyframes after other steps: these get one
    as long as those have, so that nothing more is kept. The rest is as it was.
    """
    before = policy(pipe, steps)
    after = correct(pipe, before, trajectory(pipe, SEEDS, N))
    assert after.model_copy(update={"mix": before.mix}) == before
    assert Policy.model_validate(after.model_dump()) == after
    kept = max(map(len, before.mix.weights))
    for i, (step, new) in enumerate(zip(steps, after.mix.weights, strict=True)):
        corrects = step == "key" and {*steps[:i]} > {"key"}
        room = min(kept, steps[:i].count("key") + 1) if corrects else len(before.mix.weights[i])
        assert len(new) == room and np.isfinite(new).all()
        if step == "jump":
            assert new[0] == 0
        assert (before.mix.weights[i] == new) == (step == "key" and not corrects)


def test_keyframes_make_up_for_what_came_before(pipe):
    """After the correction at a keyframe the path is nearer than the same path without it."""
    steps = ("key", "key", "jump", "jump", "key", "key")
    teacher = trajectory(pipe, SEEDS, N)
    after = correct(pipe, policy(pipe, steps), teacher)
    rows = tuple(() if step == "key" else after.weights(i) for i, step in enumerate(steps))
    without = after.model_copy(update={"mix": Table(weights=rows)})
    found, plain = (distances(pipe, one, teacher) for one in (after, without))
    assert np.array_equal(found[:4], plain[:4]) and (found[4:] < 0.8 * plain[4:]).all()


def test_a_keyframe_asks_for_no_more_scores_than_have_run(pipe):
    """Keyframes before the beginning of a call that begins in the middle hold nothing."""
    plan = policy(pipe, ("key", "key", "key", "jump", "key", "jump"))

    def opened(first, stop):
        return correction._opened(plan, Trajectory(tuple(range(first, stop)), ()))

    assert [len(row) for row in opened(0, 6)] == [0, 0, 0, 3, 3, 3]
    assert [len(row) for row in opened(2, 6)] == [0, 0, 0, 3, 2, 3]


def test_a_mask_that_is_held_stays_held(pipe):
    """A table row that starts with 0 at a mask is no network call, before and after."""
    steps = ("key", "branches", "key", "branches", "jump", "key")
    rows = ((), (0.0, 1.0), (), (1.0, 0.0, 0.0), (0.0, 1.0), ())
    before = policy(pipe, steps, Table(weights=rows))
    after = correct(pipe, before, trajectory(pipe, SEEDS, N))
    assert after.mix.weights[1][0] == 0
    with sampler.reuse(pipe, after) as patch:
        drawer(pipe)()
    assert patch.counts == {"key": 3, "jump": 2, "mask": 1}


def test_what_has_no_fitted_table_is_returned_as_it_is(pipe, monkeypatch):
    """A λ(t) family and another number of steps are left alone, without a run."""
    teacher = trajectory(pipe, SEEDS, N)

    def never(*args):
        raise AssertionError("no run was needed")

    monkeypatch.setattr(correction, "draw", never)
    family = policy(pipe, PLANS[0], HardSigmoid())
    assert correct(pipe, family, teacher) is family
    short = policy(pipe, ("key", "jump", "key"))
    assert correct(pipe, short, teacher) is short


def test_solvers_with_stages_are_left_alone(pipe):
    """Heun calls twice per step, so that a step has no one score: the policy stays."""
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim().config)
    teacher = trajectory(pipe, SEEDS, N)
    assert len(teacher.steps) == 2 * N - 1
    before = policy(pipe, PLANS[0])
    assert correct(pipe, before, teacher) is before


def test_a_step_that_ignores_its_score_keeps_its_weights(pipe):
    """Without `set_alpha_to_one` DDIM's last step is the identity: there is nothing to fit."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(ddim().config, set_alpha_to_one=False)
    teacher = trajectory(pipe, SEEDS, N)
    before = policy(pipe, PLANS[0])
    after = correct(pipe, before, teacher, rounds=2)
    assert after.mix.weights[-1] == before.mix.weights[-1]
    assert after.mix.weights[-2] != before.mix.weights[-2]
    assert np.abs(np.concatenate(after.mix.weights)).max() < 100


@pytest.mark.parametrize(
    ("gram", "right"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[np.inf, 1.0], [1.0, 1.0]], [1.0, 1.0]),
        ([[np.nan, 1.0], [1.0, 1.0]], [1.0, 1.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [np.nan, 1.0]),
        ([[1.0, 0.0], [0.0, 1e-9]], [1.0, 1.0]),
    ],
)
def test_what_cannot_be_fitted_keeps_its_weights(gram, right):
    """Nothing drawn, a run that has left all bounds, weights that no policy can hold: no error."""
    equations = correction._Normal(np.array(gram), np.array(right), jump=False)
    assert equations.solve((0.9, 0.1)) == (0.9, 0.1)


def test_correcting_leaves_the_pipe_as_it_was(pipe, monkeypatch):
    """No policy stays applied, also after an error in the middle."""
    bare = sampler.draw(pipe, SEEDS, N).latents
    teacher = trajectory(pipe, SEEDS, N)
    torch.testing.assert_close(teacher.parts[0][1][-1], bare, rtol=0, atol=0)
    correct(pipe, policy(pipe, PLANS[0]), teacher)

    def stop(*args):
        sampler.draw(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(correction, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        correct(pipe, policy(pipe, PLANS[0]), teacher)
    assert torch.equal(sampler.draw(pipe, SEEDS, N).latents, bare)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_are_corrected_together(pipe, solver):
    """Seed by seed, the fit of all comes as near as the fit of one batch."""
    pipe.scheduler = SOLVERS[solver]()
    before = policy(pipe, PLANS[0])
    teacher = trajectory(pipe, SEEDS, N)
    split = trajectory(pipe, SEEDS, N, batch=1)
    assert [path.seeds for path in split.parts] == [(seed,) for seed in SEEDS]
    old, whole, parts = (
        distances(pipe, one, teacher)[-1]
        for one in (before, correct(pipe, before, teacher), correct(pipe, before, split))
    )
    assert max(whole, parts) < 0.95 * old and parts < 1.5 * whole


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_of_the_solver_is_the_same_in_a_rehearsal(eta):
    """Under DDIM that draws noise, correction brings the policy nearer on the same draws."""
    pipe = diffusers.DDIMPipeline(make_pipe().unet, ddim())
    pipe.set_progress_bar_config(disable=True)
    task = Task(pipe, [{}], {"eta": eta})
    teacher = trajectory(task, SEEDS, N)
    before = policy(task, PLANS[0])
    after = correct(task, before, teacher)
    state = torch.random.get_rng_state()
    correct(task, before, teacher)
    assert torch.equal(torch.random.get_rng_state(), state)
    old, new = (distances(task, one, teacher)[-1] for one in (before, after))
    assert new < 0.95 * old


numbers = st.floats(-3, 3, width=32)


@laws
@given(st.integers(0, 10**6), st.integers(0, 2), st.booleans(), st.lists(numbers, min_size=4))
def test_a_fit_is_never_further_than_the_old_weights(seed, kept, held, old):
    """The fitted mix of the same scores is at least as near to what is wanted."""
    kept = max(kept, int(held))
    generator = torch.Generator().manual_seed(seed)
    reduced, *scores = torch.randn(4, 1, 2, 3, generator=generator)
    parts = [torch.zeros_like(reduced) if held else reduced, *scores[:kept]]
    wanted = sum(parts) + 0.5 * torch.randn(1, 2, 3, generator=generator)
    before = (0.0 if held else old[0], *old[1 : 1 + kept])
    features = torch.stack([part.double().flatten() for part in parts[held:]])
    basis = _Basis(features, 0.0, 1.0, held, 1, wanted)
    after = basis.normal(wanted.double(), before).solve(before)
    assert len(after) == len(before) and (after[0] == 0 or not held)

    def distance(weights):
        mixed = sum(w * part for w, part in zip(weights, parts, strict=True))
        return float((mixed - wanted).double().norm())

    assert distance(after) <= distance(before) * (1 + 1e-4) + 1e-4


def test_a_sample_that_went_elsewhere_does_not_decide():
    """One of four paths has left the teacher's: the fit is nearly that of the other three."""
    generator = torch.Generator().manual_seed(0)
    reduced, kept = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64)
    wanted = 0.7 * reduced + 0.3 * kept
    wanted += 0.01 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    wanted[3] = 5 * kept[3] - 4 * reduced[3]
    features = torch.stack([reduced.flatten(), kept.flatten()])
    basis = _Basis(features, 0.0, 1.0, False, 4, wanted)
    assert basis.normal(wanted, (1.0, 0.0)).solve((1.0, 0.0)) == pytest.approx((0.7, 0.3), abs=0.05)
    plain = np.linalg.lstsq(features.T.numpy(), wanted.flatten().numpy(), rcond=None)[0]
    assert abs(plain[0] - 0.7) > 0.5
