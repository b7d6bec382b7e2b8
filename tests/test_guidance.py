"""Laws of the map from a denoiser's outputs to the score that the scheduler gets."""

from __future__ import annotations

import diffusers
import pytest
import torch
from conftest import make_pipe

from autofr.errors import ModelError
from autofr.runtime.guidance import LINEAR, fit, of
from autofr.task import Task


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_batched_guidance_is_found(scale):
    """u + s (c - u) of one output with both branches, in either order."""
    out = noise(6, 4, 8, 8)
    uncond, cond = out.chunk(2)
    guide = fit([out], uncond + scale * (cond - uncond), samples=3)
    torch.testing.assert_close(guide.weights, torch.tensor([1 - scale, scale]).double())
    assert guide.residual < 1e-6
    other = noise(6, 4, 8, 8, seed=1)
    expected = (1 - scale) * other[:3] + scale * other[3:]
    torch.testing.assert_close(guide([other]), expected.double().flatten(), rtol=1e-4, atol=1e-5)


def test_split_guidance_and_a_third_branch_are_found():
    """Calls one after the other, and perturbed attention's third prediction."""
    outs = [noise(2, 4, 8, 8, seed=seed) for seed in range(3)]
    score = outs[0] + 4.0 * (outs[0] - outs[1]) + 3.0 * (outs[0] - outs[2])
    guide = fit(outs, score, samples=2)
    torch.testing.assert_close(guide.weights, torch.tensor([8.0, -4.0, -3.0]).double())


def test_learned_variances_and_doubled_latents_are_cut():
    """DiT: eight channels out, four used, and both halves of the batch guided alike."""
    out = noise(4, 8, 4, 4)
    cond, uncond = out[:, :4].chunk(2)
    half = uncond + 4.0 * (cond - uncond)
    guide = fit([out], torch.cat([half, half]), samples=2)
    torch.testing.assert_close(guide.weights, torch.tensor([4.0, -3.0]).double())
    assert guide.shape == (2, 4, 4, 4)


def test_lists_and_other_layouts_are_read_by_size():
    """Z-Image gives a list with a frame axis, and the pipeline a negated tensor without."""
    out = [noise(4, 1, 8, 8, seed=seed) for seed in range(2)]
    score = -torch.stack(out).squeeze(2)
    guide = fit([out], score, samples=2)
    torch.testing.assert_close(guide.weights, torch.tensor([-1.0]).double())


def test_what_is_not_linear_is_told_apart():
    """A rescaled or unrelated score leaves a residual; other sizes have no map at all."""
    out = noise(2, 4, 8, 8)
    assert fit([out], out.square(), samples=2).residual > LINEAR
    strange = fit([noise(2, 3, 5)], noise(2, 4, 8, 8), samples=2)
    assert strange.weights is None
    assert strange([noise(2, 3, 5)]).shape == (30,)


def test_noise_that_no_seed_decides_is_refused():
    """LDMPipeline gives its solver no generator: with eta = 1 no two runs are alike."""
    pipe = make_pipe()
    assert of(pipe).kind == "none"
    with pytest.raises(ModelError, match="eta=0"):
        of(Task(pipe, [{}], {"eta": 1.0}))
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ModelError, match="DDPMScheduler no generator"):
        of(pipe)
