"""Laws of whole runs, of every supported denoiser class and every solver."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from laws import ALL, state
from loop import STEPS, Loop

from autofr.errors import ModelError
from autofr.measure.masks import candidate_masks
from autofr.mix import Constant, Mix, Table
from autofr.policy import Policy
from autofr.runtime import sampler
from autofr.runtime.clock import solver_steps
from autofr.runtime.families import discover
from autofr.runtime.recording import record

PLAN = ("key", "mask", "jump", "key", "mask", "mask")
each = pytest.mark.parametrize("name", ALL)


def drawn(pipe: Loop, batch: int = 2, steps: int = STEPS) -> torch.Tensor:
    """Final latents of fixed seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    torch.manual_seed(5)  # solvers that add noise draw it from here
    with record(pipe) as tape:
        pipe(batch_size=batch, num_inference_steps=steps, generator=generators)
    return tape.latents[-1]


def policy(pipe: Loop, steps: tuple[str, ...], mix: Mix | None = None) -> Policy:
    """A policy that reuses every sub-layer at its mask steps."""
    masks = candidate_masks(discover(pipe.transformer))
    name = "frdiff" if "frdiff" in masks else next(iter(masks))
    return sampler.compose(
        pipe, "tiny", steps, {"mask": masks[name]}, mix or Constant(), replaces=len(steps),
        latent_shape=(1,),
    )  # fmt: skip


def planned(pipe: Loop, steps: tuple[str, ...]) -> dict[str, int]:
    """Calls by kind: each pass of the loop does what its solver step says, for every branch."""
    calls = Counter(steps[step] for step in solver_steps(pipe.scheduler))
    return {kind: count * (2 if pipe.split else 1) for kind, count in calls.items()}


def check_runs(pipe: Loop) -> None:
    """The laws of whole runs on one pipe."""
    bare, before = drawn(pipe), state(pipe.transformer)
    with sampler.reuse(pipe, policy(pipe, ("key",) * STEPS)) as patch:
        assert torch.equal(drawn(pipe), bare)
        assert patch.counts == planned(pipe, ("key",) * STEPS)
    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        found = drawn(pipe)
        assert patch.counts == planned(pipe, PLAN)
        assert patch.run.kept_bytes == 0 and patch.run.peak_bytes > 0
        assert found.isfinite().all() and not torch.equal(found, bare)
        drawn(pipe, batch=1)
        assert torch.equal(drawn(pipe), found)
    assert state(pipe.transformer) == before
    assert torch.equal(drawn(pipe), bare)


@each
def test_runs_of_every_family(name: str) -> None:
    """Keyframes are bit-identical, calls are those planned, runs repeat, nothing is left."""
    check_runs(Loop(name))


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel sd", "SD3Transformer2DModel", "ZImageTransformer2DModel"]
)
def test_runs_with_two_calls_per_step(name: str) -> None:
    """Guidance branches that are called one after the other keep their tensors apart."""
    check_runs(Loop(name, split=True))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("own", [(), (0.9, 0.1)])
@pytest.mark.parametrize(
    "name",
    ["UNet2DModel", "DiTTransformer2DModel", "FluxTransformer2DModel", "ZImageTransformer2DModel"],
)
def test_mixing_with_older_scores(name: str, own: tuple[float, ...], split: bool) -> None:
    """Fitted weights on two keyframes' scores, at keyframes too, work on every kind of output."""
    rows: tuple[Any, ...] = ((), (0.5, 0.5), (0.0, 1.0), own, (0.6, 0.3, 0.1), (0.0, 1.2, -0.2))
    pipe = Loop(name, split=split)
    steps = ("key", "mask", "jump", "key", "mask", "jump")
    with sampler.reuse(pipe, policy(pipe, steps, Table(weights=rows))) as patch:
        assert drawn(pipe).isfinite().all()
        assert patch.counts == planned(pipe, steps)


SOLVERS: dict[str, Any] = {
    "DDIM": diffusers.DDIMScheduler,
    "DDPM": diffusers.DDPMScheduler,
    "PNDM": diffusers.PNDMScheduler,
    "LMS": diffusers.LMSDiscreteScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "KDPM2": diffusers.KDPM2DiscreteScheduler,
    "KDPM2 ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler,
    "DPM-Solver++ 2M SDE": partial(
        diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"
    ),
    "DPM-Solver++ 2S": diffusers.DPMSolverSinglestepScheduler,
    "DEIS": diffusers.DEISMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "LCM": diffusers.LCMScheduler,
    "EDM Euler": diffusers.EDMEulerScheduler,
    "EDM DPM-Solver++ 2M": diffusers.EDMDPMSolverMultistepScheduler,
    "FlowMatch Euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "FlowMatch Heun": diffusers.FlowMatchHeunDiscreteScheduler,
}


SOLVED = (
    "UNet2DModel", "UNet2DConditionModel sd", "DiTTransformer2DModel", "FluxTransformer2DModel",
    "WanTransformer3DModel",
)  # fmt: skip


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("solver", SOLVERS)
def test_runs_with_every_solver(solver: str, name: str) -> None:
    """The laws of whole runs hold for solvers with stages, memory and noise."""
    check_runs(Loop(name, SOLVERS[solver]()))


ONLY_NOISE_AND_V = ("PNDM", "Euler ancestral", "KDPM2", "KDPM2 ancestral", "EDM Euler",
                    "EDM DPM-Solver++ 2M")  # fmt: skip
PREDICTING = [(name, "v_prediction") for name in SOLVERS if "FlowMatch" not in name]
PREDICTING += [(name, "sample") for name, _ in PREDICTING if name not in ONLY_NOISE_AND_V]


@pytest.mark.parametrize(("solver", "prediction"), PREDICTING)
def test_runs_of_networks_that_predict_otherwise(solver: str, prediction: str) -> None:
    """The same laws where what is held is another form of what the network predicts."""
    check_runs(Loop("UNet2DModel", SOLVERS[solver](prediction_type=prediction)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", ["DDIM", "Euler"])
def test_holding_is_sampling_on_the_keyframes(solver: str, prediction: str) -> None:
    """With every second step held, DDIM and Euler land where the coarser grid lands."""
    options: dict[str, Any] = dict(prediction_type=prediction, timestep_spacing="trailing")
    if solver == "DDIM":
        options |= dict(clip_sample=False)
    pipe = Loop("UNet2DModel", SOLVERS[solver](**options))
    with sampler.reuse(pipe, policy(pipe, ("key", "jump") * 4)):
        held = drawn(pipe, steps=8)
    coarse = drawn(Loop("UNet2DModel", SOLVERS[solver](**options)), steps=4)
    torch.testing.assert_close(held, coarse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["DDIM", "Euler", "DPM-Solver++ 2M", "UniPC", "Heun"])
def test_a_run_from_the_middle_follows_the_later_steps(solver: str) -> None:
    """Where the scheduler is not told, the first timestep says where a run begins."""
    steps = ("key", "jump", "mask", "mask", "key", "jump")
    scheduler = SOLVERS[solver]()
    stages = getattr(scheduler, "order", 1) if solver == "Heun" else 1
    pipe = Loop("UNet2DModel", scheduler, start=2 * stages)
    with sampler.reuse(pipe, policy(pipe, steps)) as patch:
        assert drawn(pipe).isfinite().all()
    passes = Counter(solver_steps(pipe.scheduler)[2 * stages :])
    expected = Counter()
    for step, count in passes.items():
        first = step == 2  # has nothing to reuse yet
        expected[steps[step]] += count - 1 if first else count
        expected["key"] += first
    assert patch.counts == {kind: count for kind, count in expected.items() if count}


@pytest.mark.parametrize("start", range(4))
def test_a_beginning_that_cannot_be_told_is_refused(start: int) -> None:
    """PNDM visits its second timestep twice: a run from the second of these is no run from it."""
    pipe = Loop("UNet2DModel", diffusers.PNDMScheduler(skip_prk_steps=True), start=start)
    steps = ("key", "jump", "mask", "mask", "key", "jump")
    with sampler.reuse(pipe, policy(pipe, steps)) as patch:
        if start == 2:
            with pytest.raises(ModelError, match=r"second timestep twice.*a step earlier or later"):
                drawn(pipe)
            return
        assert drawn(pipe).isfinite().all()
    rest = solver_steps(pipe.scheduler)[start + 1 :]
    assert patch.counts == Counter(["key", *(steps[step] for step in rest)])
