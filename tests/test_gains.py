"""Laws of gains: how far an error of a score moves the final latents."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from conftest import ddim, make_pipe
from diffusers.models.unets.unet_2d import UNet2DOutput
from test_calibration import SEEDS, SOLVERS, N, taped

from autofr.measure.calibration import calibrate
from autofr.measure.gains import PLACES, _missed, by_scheduler, through_network
from autofr.runtime.recording import record
from autofr.runtime.sampler import draw


@pytest.fixture
def pipe():
    """A tiny LDMPipeline."""
    return make_pipe()


def coefficients(scheduler):
    """DDIM's step is x ← a x + b s: a and b of every step."""
    scheduler.set_timesteps(N)
    now = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    then = np.append(now[1:], float(scheduler.final_alpha_cumprod))
    a = np.sqrt(then / now)
    return a, np.sqrt(1 - then) - a * np.sqrt(1 - now)


def smoothed(shares):
    """Shares with a quarter of each neighbour's logarithm; the first and last have one twice."""
    logs = np.pad(np.log(np.abs(shares)), 1, "edge")
    return np.exp(0.25 * logs[:-2] + 0.5 * logs[1:-1] + 0.25 * logs[2:])


# -- by the scheduler alone ------------------------------------------------------------------------


def test_gains_of_ddim_are_products_of_coefficients():
    """DDIM's step is x ← a x + b s: an error of the score i moves the end by b_i Π a_j."""
    pipe = make_pipe()
    tape = taped(pipe)
    found = by_scheduler(tape)
    a, b = coefficients(pipe.scheduler)
    expected = [abs(b[i]) * a[i + 1 :].prod() for i in range(N)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gains_agree_with_finite_differences(pipe, solver):
    """The score of one step, perturbed at any size or direction, moves the end by the gain."""
    pipe.scheduler = SOLVERS[solver]()
    tape = taped(pipe)
    scores = [call.output for call in tape.calls]
    found = by_scheduler(tape)
    assert found.shape == (N,)

    def end(changed, nudge):
        scheduler = SOLVERS[solver]()
        scheduler.set_timesteps(N)
        latents = tape.first_latents
        for k, score in enumerate(scores):
            moved = score + nudge if tape.steps[k] == changed else score
            latents = scheduler.step(moved, scheduler.timesteps[k], latents)[0]
        return latents.double()

    nudge = torch.randn(scores[0].shape, generator=torch.Generator().manual_seed(7))
    for step in range(N):
        moved = float((end(step, nudge) - end(None, nudge)).norm() / nudge.norm())
        assert moved == pytest.approx(found[step], rel=2e-3, abs=1e-4)


def test_gains_call_no_network(pipe):
    """The scheduler alone is run, on a copy of its own."""
    tape = taped(pipe)
    state = dict(vars(pipe.scheduler))
    pipe.unet.forward = None
    by_scheduler(tape)
    assert vars(pipe.scheduler) == state


def test_gains_of_noisy_solvers_repeat(pipe):
    """A stochastic scheduler draws the same noise in every replay, and leaves the global state."""
    pipe.scheduler = diffusers.DDPMScheduler.from_config(ddim().config)
    tape = taped(pipe)
    torch.manual_seed(5)
    first = by_scheduler(tape)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    np.testing.assert_array_equal(by_scheduler(tape), first)
    quiet = SOLVERS["ddim"]()  # noise that differed between replays would show as a huge gain
    quiet.set_timesteps(N)
    calm = by_scheduler(dataclasses.replace(tape, scheduler=quiet))
    assert (first < 3 * calm).all()


# -- through the network ---------------------------------------------------------------------------


def linear(pipe, slope):
    """The pipe with a network that returns its input times a slope."""
    pipe.unet.forward = lambda sample, *_, **__: UNet2DOutput(sample=slope * sample)
    return pipe


def through(pipe):
    """Gains with and without the network."""
    tape = taped(pipe)
    alone = by_scheduler(tape)
    return through_network(pipe, SEEDS, tape, alone), alone


def test_a_network_that_ignores_its_input_changes_no_gain(pipe):
    """All that an error does then, the scheduler does."""
    constant = torch.randn(pipe.unet.config.out_channels, 8, 8)
    pipe.unet.forward = lambda sample, time, **_: UNet2DOutput(
        sample=(constant * float(time) ** 0.5).expand(len(sample), -1, -1, -1).clone()
    )
    found, alone = through(pipe)
    np.testing.assert_allclose(found, alone, rtol=1e-2)


@pytest.mark.parametrize("slope", [-0.5, 0.3, 0.9])
def test_gains_of_a_linear_network_are_products(pipe, slope):
    """x ← (a + c b) x: an error of the score i moves the end by b_i Π (a_j + c b_j)."""
    found, alone = through(linear(pipe, slope))
    a, b = coefficients(pipe.scheduler)
    assert N - 1 <= PLACES  # each step after the first has a place
    shares = [np.prod(1 + slope * b[i + 1 :] / a[i + 1 :]) for i in range(1, N)]
    np.testing.assert_allclose((found / alone)[1:], smoothed(shares), rtol=2e-2)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp", "unipc"])
def test_every_solver_leaves_what_runs_with_an_error_end_with(pipe, solver):
    """Any other error of the same step, added by hand in a whole run, is left as much."""
    pipe.scheduler = SOLVERS[solver]()
    found, alone = through(linear(pipe, 0.4))
    tape = taped(pipe)
    error = torch.randn(tape.scores[0].shape, generator=torch.Generator().manual_seed(7))

    def end(step):
        """The final latents of a run with the error."""

        def revise(score, _):
            return score + error if tape.ran[len(run.scores)] == step else score

        with record(pipe, revise=revise) as run:
            draw(pipe, SEEDS, N)
        return run.latents[-1].double()

    shares = [float((end(i) - end(None)).norm() / error.norm()) / alone[i] for i in range(1, N)]
    np.testing.assert_allclose((found / alone)[1:], smoothed(shares), rtol=0.05)


def test_steps_before_an_error_are_not_computed(pipe):
    """A place costs the calls after it, and one for the first step: nothing is held before it."""
    tape, calls = taped(pipe), []
    alone, original = by_scheduler(tape), pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    through_network(pipe, SEEDS, tape, alone)
    assert len(calls) == sum(1 + N - 1 - place for place in range(1, N))


def test_a_longer_call_is_measured_at_a_few_places(pipe):
    """So the cost does not grow with the square of the steps."""
    seen = []
    with record(pipe, calls=True) as tape:
        draw(pipe, SEEDS, 24)
    with record(pipe, revise=lambda score, _: seen.append(1) or score):
        found = through_network(pipe, SEEDS, tape, by_scheduler(tape))
    assert len(seen) == 24 * PLACES and found.shape == (24,)


def test_the_pipe_is_left_as_it_was(pipe):
    """Hooks are off again, and the same seeds draw the same."""
    before = draw(pipe, SEEDS, N).latents
    names = {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()}
    through(pipe)
    assert {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()} == names
    assert torch.equal(draw(pipe, SEEDS, N).latents, before)


@pytest.mark.parametrize("solver", ["heun", "pndm"])
def test_solvers_with_stages_or_idle_scores_have_gains_too(pipe, solver):
    """A stage is given what it had; a score that the solver drops keeps its gain of nothing."""
    pipe.scheduler = SOLVERS[solver]()
    found, alone = through(linear(pipe, 0.4))
    assert np.isfinite(found).all() and ((found > 0) == (alone > 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_stand_out_of_what_is_rounded_off(dtype):
    """Also where the scores around explain everything, or there are none."""
    score = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    least = torch.finfo(dtype).eps ** 0.5
    for scores, at in [([score] * 3, 1), ([score], 0), ([score, 2 * score, 4 * score], 2)]:
        size = _missed(scores, at).float().norm() / scores[at].float().norm()
        assert size == pytest.approx(least, rel=0.1)
    assert not _missed([torch.zeros_like(score)] * 2, 1).any()


def test_an_error_is_what_the_scores_around_do_not_explain():
    """Least squares on two before and one after; it is the residual, as large as it is."""
    draws = torch.Generator().manual_seed(0)
    scores = list(torch.randn(5, 2, 3, 8, 8, generator=draws))
    error = _missed(scores, 2).flatten().double()
    basis = torch.stack([scores[i].flatten() for i in (0, 1, 3)]).double()
    assert (basis @ error).abs().max() < 1e-3 * error.norm() * basis.norm(dim=1).max()
    left = scores[2].flatten().double() - error
    weights = torch.linalg.lstsq(basis.T, left[:, None]).solution
    torch.testing.assert_close(basis.T @ weights, left[:, None], rtol=1e-4, atol=1e-4)


def test_a_calibration_has_the_gains_of_the_network(pipe):
    """Planning weighs errors by them."""
    found, _ = through(pipe)
    table = calibrate(pipe, SEEDS, N, {}, max_gap=1)
    np.testing.assert_allclose(table.gain, found, rtol=1e-6)
