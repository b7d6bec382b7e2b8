"""Laws of the calibration: its numbers are those of the network and of the scheduler."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from conftest import ddim, make_pipe

from autofr.errors import MeasurementError
from autofr.measure.calibration import (
    Calibration,
    calibrate,
)
from autofr.measure.costs import Costs
from autofr.measure.masks import candidate_masks, worth_calibrating
from autofr.runtime.families import discover
from autofr.runtime.patch import Patch
from autofr.runtime.recording import record
from autofr.runtime.sampler import draw

N, GAPS, SEEDS = 6, 3, [0, 1]
CHOSEN = ("frdiff", "branches", "cut0", "cut6")
SOLVERS = {
    "ddim": ddim,
    "euler": lambda: diffusers.EulerDiscreteScheduler.from_config(ddim().config),
    "heun": lambda: diffusers.HeunDiscreteScheduler.from_config(ddim().config),
    "pndm": lambda: diffusers.PNDMScheduler.from_config(ddim().config, skip_prk_steps=True),
    "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler.from_config(ddim().config),
    "unipc": lambda: diffusers.UniPCMultistepScheduler.from_config(ddim().config),
}


def masks_of(pipe):
    """A few of the candidate masks."""
    every = candidate_masks(discover(pipe.unet))
    return {name: every[name] for name in CHOSEN}


def measured(pipe, masks=None, gaps=GAPS, **kwargs):
    """A calibration of this pipe."""
    masks = masks_of(pipe) if masks is None else masks
    return calibrate(pipe, SEEDS, N, masks, max_gap=gaps, **kwargs)


def taped(pipe):
    """What the teacher did on the calibration seeds."""
    with record(pipe, calls=True) as tape:
        draw(pipe, SEEDS, N)
    return tape


def flat(score):
    return score.flatten().double().numpy()


# -- inner products ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    """A pipe, what it does unaccelerated, and its calibration."""
    pipe = make_pipe()
    return pipe, taped(pipe), measured(pipe)


def test_teachers_scores_with_each_other(teacher):
    """`teacher` holds the inner products of the teacher's scores, `norm` the final latents'."""
    _, tape, table = teacher
    scores = np.stack([flat(score) for score in tape.scores])
    np.testing.assert_allclose(table.teacher, scores @ scores.T, rtol=1e-5)
    assert table.norm == pytest.approx(float(tape.latents[-1].double().square().sum()), rel=1e-5)
    assert (table.steps, table.max_gap, table.masks) == (N, GAPS, CHOSEN)


@pytest.mark.parametrize("mask", CHOSEN)
def test_reduced_scores_with_the_teachers(teacher, mask):
    """`cross` and `own` are inner products of scores that a patched network gives by hand."""
    pipe, tape, table = teacher
    points = discover(pipe.unet)
    scores = np.stack([flat(score) for score in tape.scores])
    patch = Patch(pipe, [[points[name] for name in masks_of(pipe)[mask]]]).install()
    m = CHOSEN.index(mask)
    try:
        for step, gap in ((1, 1), (3, 2), (5, 1), (5, 3)):
            for mode, at in ((patch.keyframe(), step - gap), (patch.reduced(1), step)):
                args, kwargs = tape.calls[at].given
                with mode, torch.inference_mode():
                    reduced = flat(pipe.unet(*args, **kwargs)[0])
            np.testing.assert_allclose(table.cross[m, step, gap - 1], scores @ reduced, rtol=1e-5)
            assert table.own[m, step, gap - 1] == pytest.approx(reduced @ reduced, rel=1e-5)
    finally:
        patch.remove()


def test_entries_without_a_keyframe_are_nan(teacher):
    """Exactly the entries that no keyframe reaches are left open."""
    table = teacher[2]
    unreached = np.arange(1, GAPS + 1)[None] > np.arange(N)[:, None]
    assert (np.isnan(table.own) == unreached).all()
    assert (np.isnan(table.cross) == unreached[:, :, None]).all()


def test_reuse_errs_more_with_the_gap_and_the_mask(teacher):
    """Errors |reduced - teacher|² are positive, and the shallow cut's exceed the deep cut's."""
    table = teacher[2]
    steps = np.arange(1, N)
    error = table.own[:, steps, 0] - 2 * table.cross[:, steps, 0, steps]
    error += table.teacher.diagonal()[steps]
    assert (error > 0).all()
    assert error[CHOSEN.index("cut0")].sum() < error[CHOSEN.index("cut6")].sum()


@pytest.mark.parametrize("gaps", [1, 3, 9])
def test_calls_are_as_promised(pipe, gaps):
    """The teacher, N - 1 keyframes, every mask at every gap that fits; errors drawn on."""
    calls, seen = [], []
    handle = pipe.unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    masks = {name: masks_of(pipe)[name] for name in ("branches", "cut6")}
    measured(pipe, masks, gaps, on_step=lambda done, total: seen.append((done, total)))
    handle.remove()
    reduced = sum(min(gaps, N - 1 - key) * len(masks) for key in range(N - 1))
    drawn_on = sum(1 + N - 1 - place for place in range(1, N))
    assert len(calls) == N + (N - 1) + reduced + drawn_on
    assert seen == [(key + 1, N - 1) for key in range(N - 1)]


def test_calibrating_leaves_the_pipe_as_it_was(pipe):
    """No hook stays behind, also after an error in the middle."""
    before = draw(pipe, SEEDS, N).latents
    hooks = {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()}

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(pipe, on_step=fail)
    assert {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()} == hooks
    assert torch.equal(draw(pipe, SEEDS, N).latents, before)


def test_a_second_order_solver_is_calibrated_at_its_steps(pipe):
    """Heun calls twice per step: the table has one row per step, of the first call."""
    pipe.scheduler = SOLVERS["heun"]()
    tape = taped(pipe)
    table = measured(pipe, {"cut6": masks_of(pipe)["cut6"]})
    scores = np.stack([flat(score) for score in tape.scores[::2]])
    assert len(tape.calls) == 2 * N - 1 and len(scores) == N
    np.testing.assert_allclose(table.teacher, scores @ scores.T, rtol=1e-5)
    assert (table.gain > 0).all() and table.stages == 2


def test_nan_is_refused(pipe):
    """A network that gives NaN stops the calibration."""
    pipe.unet.conv_out.bias.data[:] = float("nan")
    with pytest.raises(MeasurementError, match="NaN or infinity during calibration"):
        measured(pipe)


def test_saving_and_loading_are_inverse(teacher, tmp_path):
    """The file gives back every number."""
    table = teacher[2]
    table.save(tmp_path / "table.npz")
    again = Calibration.load(tmp_path / "table.npz")
    assert (again.masks, again.norm, again.stages) == (table.masks, table.norm, 1)
    for name in ("teacher", "cross", "own", "gain"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert [path.name for path in tmp_path.iterdir()] == ["table.npz"]


def test_batches_add_up(pipe):
    """Inner products measured seed by seed are those of all seeds at once."""
    whole, parts = measured(pipe), measured(pipe, batch=1)
    for name in ("teacher", "cross", "own", "norm"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4)
    np.testing.assert_allclose(parts.gain, whole.gain, rtol=0.05)


def test_progress_runs_through_all_batches(pipe):
    """The count of keyframes goes on from batch to batch, up to the total."""
    seen = []
    measured(pipe, batch=1, on_step=lambda done, total: seen.append((done, total)))
    total = len(SEEDS) * (N - 1)
    assert seen == [(done, total) for done in range(1, total + 1)]


# -- masks ---------------------------------------------------------------------------------------


def test_candidates_are_the_published_masks(pipe):
    """FRDiff's points, branches, attention, and every cut from the deepest to the shallowest."""
    points = discover(pipe.unet)
    masks = candidate_masks(points)
    kinds = {name: {points[p].kind for p in mask} for name, mask in masks.items()}
    assert kinds["frdiff"] == {"conv", "attn"}
    assert kinds["branches"] == {"branch", "attn"}
    assert kinds["attn"] == {"attn"}
    stages = [name for name, point in points.items() if point.kind == "stage"]
    assert [masks[f"cut{i}"] for i in range(len(stages))] == [(name,) for name in stages]
    assert len(masks) == 3 + len(stages)


def test_only_masks_that_save_are_calibrated():
    """Dear masks are left out, and cuts that save hardly more than a deeper one that is kept."""
    masks = {
        "attn": ("a#attn",), "frdiff": ("a#conv", "a#attn"), "branches": ("a#branch", "a#attn"),
        "cut0": ("a#stage",), "cut1": ("b#stage",), "cut2": ("c#stage",), "cut3": ("d#stage",),
        "cut4": ("e#stage",),
    }  # fmt: skip
    spent = dict(
        attn=0.9, frdiff=0.5, branches=0.48, cut0=0.86, cut1=0.7, cut2=0.66, cut3=0.63, cut4=0.3
    )
    for unit in (1.0, 1e-3):
        costs = Costs(unit, 0.0, 0.0, {name: unit * share for name, share in spent.items()})
        kept = worth_calibrating(masks, costs)
        assert [*kept] == ["frdiff", "branches", "cut1", "cut3", "cut4"]  # 0.63 < 0.7 - 0.06
        assert all(kept[name] == masks[name] for name in kept)
