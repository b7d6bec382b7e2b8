"""Laws of what is held: the noise that a score stands for, at every solver's own levels."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from conftest import ddim

from autofr.runtime.held import Form, forms, noise_levels

N = 6
SOLVERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "dpmpp": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
}


def scheduler_of(name, kind):
    """A solver with its timesteps set."""
    found = SOLVERS[name].from_config(ddim().config, prediction_type=kind)
    found.set_timesteps(N)
    return found


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_noise_and_velocity_are_held_as_they_are(kind):
    """ε-prediction needs no conversion, and flow matching holds its velocity."""
    if kind == "epsilon":
        assert forms(scheduler_of("ddim", kind)) is None
    else:
        flow = diffusers.FlowMatchEulerDiscreteScheduler()
        flow.set_timesteps(N)
        assert forms(flow) is None


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_noise_of_a_score_is_the_noise_that_was_added(name, kind):
    """At every pass, a score made of a known clean sample and noise gives back that noise."""
    scheduler = scheduler_of(name, kind)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    passes = list(zip(forms(scheduler), noise_levels(scheduler), strict=True))
    assert len(passes) == len(scheduler.timesteps)
    for form, sigma in passes:
        a, s = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)
        given = a * clean + s * noise
        score = a * noise - s * clean if kind == "v_prediction" else clean
        torch.testing.assert_close(form.noise(given, score), noise, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(form.score(given, noise), score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_levels_are_those_at_which_the_network_is_asked(name):
    """Every solver's level is the training schedule's at the timestep that it asks for."""
    scheduler = scheduler_of(name, "v_prediction")
    signal = np.array(scheduler.alphas_cumprod, dtype=float)
    table = np.sqrt((1 - signal) / signal)
    times = np.array([float(t) for t in scheduler.timesteps])
    expected = np.interp(times, np.arange(len(table)), table)
    np.testing.assert_allclose(noise_levels(scheduler), expected, rtol=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_preconditioned_networks_are_held_as_noise(kind):
    """EDM's F, put through the scheduler's own preconditioning, gives (x - x0) / σ."""
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
    scheduler.set_timesteps(N)
    generator = torch.Generator().manual_seed(0)
    sample, raw = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    for form, sigma in zip(forms(scheduler), scheduler.sigmas.double(), strict=False):
        clean = scheduler.precondition_outputs(sample, raw, sigma)
        expected = (sample - clean) / sigma
        given = scheduler.precondition_inputs(sample, sigma)
        torch.testing.assert_close(form.noise(given, raw), expected, rtol=1e-5, atol=1e-5)


def test_only_what_input_and_score_share_is_converted():
    """Inpainting's extra inputs are ignored, learned variances pass through."""
    form = Form(p=0.6, q=0.8)
    given, score = torch.randn(2, 9, 4, 4), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(form.noise(given, score), 0.6 * given[:, :4] + 0.8 * score)
    wide, latents = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    held = form.noise(latents, wide)
    assert torch.equal(held[:, 4:], wide[:, 4:])
    torch.testing.assert_close(form.score(latents, held), wide)
