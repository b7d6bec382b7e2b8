"""Laws that other caching tools break: each test names the tool and its failure.

benchmarks/peers.py reproduces those of installable tools with the tools themselves; the other ones
were read in their files (FRDiff, ECAD, BudCache, TeaCache) or in their users' reports.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import ddim, make_pipe, tiny_unet, tiny_vae
from torch import nn

from autofr import interchange
from autofr.errors import InterchangeError, ModelError, PolicyError
from autofr.measure.calibration import Calibration, calibrate
from autofr.measure.masks import candidate_masks
from autofr.mix import Constant, HardSigmoid, Mix
from autofr.policy import Policy
from autofr.policy_file import load
from autofr.runtime import sampler
from autofr.runtime.clock import solver_steps
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser
from autofr.runtime.recording import record

sys.path.append(str(Path(__file__).parent / "conformance"))
Loop: Any = importlib.import_module("loop").Loop  # tiny models of every class, in a sampling loop
laws: Any = importlib.import_module("laws")
randomise: Any = importlib.import_module("tiny").randomise

N = 6
SD, DIT, PIXART = "UNet2DConditionModel sd", "DiTTransformer2DModel", "PixArtTransformer2DModel"
RESULTS = Path(__file__).parents[1] / "results" / "benchmarks" / "peers.json"


def deepest(pipe: Any) -> tuple[str, ...]:
    """The mask that reuses most: all but the shallowest layers, or all blocks."""
    points = discover(find_denoiser(pipe))
    cuts = [name for name, point in points.items() if point.kind == "stage"]
    return tuple(cuts[-1:]) or tuple(n for n in points if n.endswith(".0-2#block"))


def policy(
    pipe: Any,
    steps: Sequence[str],
    mask: Sequence[str] | None = None,
    mix: Mix | None = None,
    **masks: Sequence[str],
) -> Policy:
    """A policy for the pipe as it is; `mask` is the deepest one where it is not given."""
    return sampler.compose(
        pipe, "tiny", steps, {"mask": mask or deepest(pipe), **masks}, mix or Constant(),
        replaces=len(steps), latent_shape=(1,),
    )  # fmt: skip


def every_second(steps: int = N) -> list[str]:
    return ["mask" if step % 2 else "key" for step in range(steps)]


def drawn(pipe: Any, steps: int = N, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Final latents of one seed."""
    torch.manual_seed(9)  # solvers that add noise draw it from here
    with record(pipe) as tape:
        pipe(
            batch_size=batch, num_inference_steps=steps, output_type="np",
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    return tape.latents[-1]


def trace(pipe: Any, call: Callable[[Any], Any], inner: str = "") -> str:
    """Per call of the denoiser "X" where an inner layer ran, "." where it did not."""
    denoiser = find_denoiser(pipe)
    cut = hasattr(denoiser, "mid_block")
    inner = inner or ("mid_block.resnets.0.conv1" if cut else "transformer_blocks.1.attn1.to_q")
    ran: list[bool] = []
    found: list[str] = []

    def end(*_: Any) -> None:
        found.append("X" if ran else ".")
        ran.clear()

    hooks = [
        denoiser.get_submodule(inner).register_forward_hook(lambda *_: ran.append(True)),
        denoiser.register_forward_hook(end),
    ]
    try:
        call(pipe)
    finally:
        for hook in hooks:
            hook.remove()
    return "".join(found)


Call = Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]
"""(denoiser, sample, time) -> what it returns."""


@torch.inference_mode()
def by_hand(
    pipe: Any,
    start: int = 0,
    batches: Sequence[int] = (1,) * N,
    size: int = 8,
    call: Call = lambda unet, sample, time: unet(sample, time),
) -> list[torch.Tensor]:
    """Scores of a sampling loop that may begin late, with a batch size for each step."""
    pipe.scheduler.set_timesteps(len(batches))
    sample = torch.randn(max(batches), 3, size, size, generator=torch.Generator().manual_seed(0))
    scores = []
    for time, batch in [*zip(pipe.scheduler.timesteps, batches, strict=True)][start:]:
        scores.append(call(pipe.unet, sample[:batch], time).sample)
        full = scores[-1][:1].expand_as(sample)
        sample = pipe.scheduler.step(full, time, sample).prev_sample
    return scores


def same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors have the same bits."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# -- which calls are computed ---------------------------------------------------------------------

STAGES = {
    "Heun": (diffusers.HeunDiscreteScheduler, ("XX.." * 10)[:39]),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, ("XX.." * 10)[:39]),
    "KDPM2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, ("XX.." * 10)[:39]),
    "PNDM": (lambda: diffusers.PNDMScheduler(skip_prk_steps=True), "XX" + ".X" * 9 + "."),
    "PNDM with PRK": (diffusers.PNDMScheduler, "XXXX....XXXX" + ".X" * 8 + "."),
    "DDIM": (ddim, "X." * 10),
}


@pytest.mark.parametrize("solver", STAGES)
def test_stages_of_a_solver_step_run_together(solver: str) -> None:
    """DeepCache 0.1.1 computes 1 of Heun's 39 calls where every second step was asked for, 9 of
    PNDM's 29 and no second stage of KDPM2; dit-smoothcache 0.1.1 and cache-dit 1.5.3 count calls.
    """
    pipe = make_pipe()
    build, wanted = STAGES[solver]
    pipe.scheduler = build()
    with sampler.reuse(pipe, policy(pipe, every_second(20))) as patch:
        assert trace(pipe, lambda pipe: drawn(pipe, 20)) == wanted
    assert patch.counts == {"key": wanted.count("X"), "mask": wanted.count(".")}


FORMS: dict[str, Call] = {
    "keyword": lambda unet, sample, time: unet(sample, timestep=time),
    "keywords": lambda unet, sample, time: unet(timestep=time, sample=sample),
    "number": lambda unet, sample, time: unet(sample, int(time)),
    "batch": lambda unet, sample, time: unet(sample, time[None]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_timestep_may_be_a_keyword(form: str) -> None:
    """DeepCache 0.1.1 raises IndexError when the timestep is a keyword and AttributeError when it
    is a plain number.
    """
    pipe = make_pipe()
    with sampler.reuse(pipe, policy(pipe, every_second())) as patch:
        expected = by_hand(pipe)
        assert same(by_hand(pipe, call=FORMS[form]), expected)
    assert patch.counts == {"key": 3, "mask": 3}


def test_keyframes_need_not_be_evenly_spaced() -> None:
    """DeepCache 0.1.1 raises KeyError for every mode but uniform."""
    pipe = make_pipe()
    steps = ["key", "key", "mask", "mask", "mask", "key", "mask", "key"]
    with sampler.reuse(pipe, policy(pipe, steps)):
        assert trace(pipe, lambda pipe: drawn(pipe, 8)) == "XX...X.X"


def test_reuse_may_keep_to_a_window_of_a_noisy_solver() -> None:
    """DeepCache 0.1.1 has no first and last step of caching (its issue 12), as is wanted with SDE
    samplers (its issue 9).
    """
    pipe = make_pipe()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    steps = ["key"] * 4 + ["mask", "mask", "key", "key"]
    with sampler.reuse(pipe, policy(pipe, steps)):
        assert trace(pipe, lambda pipe: drawn(pipe, 8)) == "XXXX..XX"


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("kind", ["mask", "jump"])
def test_a_run_from_the_middle_begins_with_a_keyframe(kind: str, start: int) -> None:
    """DeepCache 0.1.1 remembers where the first run began: an image-to-image call of another
    strength begins with features of the call before.
    """
    pipe, fresh, steps = make_pipe(), make_pipe(), ["key", kind] * (N // 2)
    with sampler.reuse(pipe, policy(pipe, steps)):
        by_hand(pipe, 2)
        found = by_hand(pipe, start)
    with sampler.reuse(fresh, policy(fresh, steps)):
        late = "".join("X" if step == "key" else "." for step in steps[start + 1 :])
        assert trace(fresh, lambda pipe: by_hand(pipe, start)) == "X" + late
        assert same(found, by_hand(fresh, start))


@pytest.mark.parametrize("steps", [10, 30])
def test_another_step_count_is_refused(steps: int) -> None:
    """cache-dit 1.5.3 and dit-smoothcache 0.1.1 draw with a 20-step mask at 10 and at 30 steps,
    MagCache of diffusers 0.42.1 with ratios for 20, and FRDiff with the counts given when wrapped.
    """
    pipe = Loop(DIT)
    with sampler.reuse(pipe, policy(pipe, every_second(20))) as patch:
        with pytest.raises(PolicyError, match=f"20 steps, the call asked for {steps}"):
            drawn(pipe, steps)
        assert patch.run.kept_bytes == 0
    for kind, source in (("cache-dit", [1, 0] * 10), ("smoothcache", {"ff": [1, 0] * 10})):
        with pytest.raises(InterchangeError, match=f"for 20 steps, asked for {steps}"):
            interchange.read(kind, json.dumps(source), pipe, "tiny", steps, (1,))


def test_a_policy_is_stretched_only_when_asked() -> None:
    """MagCache of diffusers 0.42.1 resamples its ratios to another step count without a word;
    SmoothCache's users ask how to get schedules for other counts (its issue 2).
    """
    pipe = Loop(DIT)
    long = policy(pipe, every_second(20))
    short = long.retime(10)
    assert short.steps == tuple(every_second(10)) and short.sampler.replaces == 10
    with sampler.reuse(pipe, short):
        assert trace(pipe, lambda pipe: drawn(pipe, 10)) == "X." * 5
    assert long.steps == tuple(every_second(20))


def test_calls_do_not_depend_on_the_sample() -> None:
    """cache-dit 1.5.3, TeaCache and the first-block cache of diffusers 0.42.1 decide anew for
    every sample, so that nobody knows before how long a call takes.
    """
    pipe = Loop(DIT)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        found = {trace(pipe, lambda pipe, s=seed: drawn(pipe, seed=s)) for seed in range(4)}
    assert found == {"X.X.X."}


# -- what is hooked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("transformer_blocks.0.attn#attn",), ("transformer_blocks.*attn",), ("attention",)]
)
def test_a_mask_of_no_point_is_refused(names: tuple[str, ...]) -> None:
    """The default patterns of TaylorSeer in diffusers 0.42.1 match no module of DiT, PixArt and
    U-Nets, dit-smoothcache 0.1.1 takes any component's name, and neither says so.
    """
    pipe = Loop(DIT)
    with pytest.raises(PolicyError, match="points that this denoiser does not have"):
        sampler.apply(pipe, policy(pipe, every_second(), names))
    with pytest.raises(ValueError, match=r'masks\["empty"\]: no points'):
        policy(pipe, ["key", "empty"], empty=())


def test_a_schedule_that_reuses_nothing_is_refused() -> None:
    """cache-dit 1.5.3 takes a static mask whose Fn covers all blocks (8, the default) and computes
    everything; dit-smoothcache 0.1.1 takes a schedule of components that there are not.
    """
    pipe = Loop(DIT)
    config = {"steps_computation_policy": "static", "steps_computation_mask": [1, 0] * 3}
    whole = json.dumps({**config, "Fn_compute_blocks": 3})
    with pytest.raises(InterchangeError, match="leave no block to reuse"):
        interchange.read("cache-dit", whole, pipe, "tiny", N, (1,))
    with pytest.raises(InterchangeError, match="no component 'attention'"):
        interchange.read("smoothcache", '{"attention": [1, 0, 1, 0, 1, 0]}', pipe, "tiny", N, (1,))


def test_a_denoiser_without_points_is_refused() -> None:
    """MagCache of diffusers 0.42.1 logs a warning and FRDiff nothing where no layer is of a class
    that they know.
    """
    with pytest.raises(ModelError, match="no known reuse points in Linear"):
        discover(nn.Linear(2, 2))


class Renamed(diffusers.UNet2DModel):
    """A class of somebody's own."""


def test_a_renamed_class_is_accelerated(caplog: pytest.LogCaptureFixture) -> None:
    """FRDiff converts layers and pipelines of the very classes that it names and leaves others as
    they are; DeepCache 0.1.1 is asked for renamed and small models (its issues 28 and 58).
    """
    model = Renamed(**{k: v for k, v in tiny_unet().config.items() if not k.startswith("_")})
    pipe = diffusers.LDMPipeline(unet=model.eval(), vqvae=tiny_vae(), scheduler=ddim())
    pipe.set_progress_bar_config(disable=True)
    points = discover(pipe.unet)
    assert {point.kind for point in points.values()} == {"conv", "branch", "attn"}
    bare = drawn(pipe)
    with sampler.reuse(pipe, policy(pipe, every_second(), candidate_masks(points)["frdiff"])) as p:
        assert not torch.equal(drawn(pipe), bare)
    assert p.counts == {"key": 3, "mask": 3}


@pytest.mark.parametrize("name", ["UNet2DModel", SD, DIT, PIXART, "FluxTransformer2DModel",
                                  "Flux2Transformer2DModel", "WanTransformer3DModel"])  # fmt: skip
def test_every_kind_of_denoiser_is_accelerated(name: str) -> None:
    """cache-dit 1.5.3 and SeaCache refuse U-Nets, DeepCache 0.1.1 transformers; in diffusers 0.42.1
    FirstBlockCache (Flux.2 too) and FasterCache raise in the middle, MagCache does nothing.
    """
    pipe = Loop(name)
    masks = candidate_masks(discover(pipe.transformer))
    bare = drawn(pipe)
    for mask in ("frdiff", "cut0" if "cut0" in masks else "run0"):
        with sampler.reuse(pipe, policy(pipe, every_second(), masks[mask])) as patch:
            found = drawn(pipe)
        assert patch.counts == {"key": 3, "mask": 3}
        assert found.isfinite().all() and not torch.equal(found, bare)


@pytest.mark.parametrize("name", [DIT, PIXART, "WanTransformer3DModel"])
def test_no_cache_context_is_needed(name: str) -> None:
    """FirstBlockCache and TaylorSeer of diffusers 0.42.1 raise ValueError in pipelines that set no
    cache context, as those of DiT and PixArt, or Wan's for images once (issue 12013).
    """
    pipe = Loop(name)
    blocks = "blocks" if name.startswith("Wan") else "transformer_blocks"
    with sampler.reuse(pipe, policy(pipe, every_second())):
        assert trace(pipe, drawn, f"{blocks}.1.attn1.to_q") == "X.X.X."


@pytest.mark.parametrize("kind", ["ldm", "ddim", "ddpm", "loop"])
def test_any_pipe_with_a_denoiser_will_do(kind: str) -> None:
    """FRDiff copies the calls of two pipeline classes and refuses all others."""
    pipe = Loop(DIT) if kind == "loop" else make_pipe(kind)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        assert trace(pipe, drawn) == "X.X.X."


def test_what_is_applied_has_an_effect() -> None:
    """cache-dit 1.5.3 with its defaults reuses nothing in 20 steps, SeaCache of diffusers 0.42.1
    nothing without a callback; here what was computed is counted, and every mask changes it.
    """
    pipe = Loop(DIT)
    bare = drawn(pipe)
    for name, mask in candidate_masks(discover(pipe.transformer)).items():
        with sampler.reuse(pipe, policy(pipe, every_second(), mask)) as patch:
            assert not torch.equal(drawn(pipe), bare), name
        assert patch.counts == {"key": 3, "mask": 3}


@pytest.mark.parametrize(("kind", "attn", "ff"), [("ff", "XXXXXX", "X.X.X."),
                                                  ("attn", "X.X.X.", "XXXXXX")])  # fmt: skip
def test_feed_forward_layers_are_reused_too(kind: str, attn: str, ff: str) -> None:
    """dit-smoothcache 0.1.1 and FRDiff's DiT wrap attention alone; a SmoothCache schedule of
    feed-forward layers changes nothing there.
    """
    pipe = Loop(DIT)
    mask = candidate_masks(discover(pipe.transformer))[kind]
    with sampler.reuse(pipe, policy(pipe, every_second(), mask)):
        assert trace(pipe, drawn, "transformer_blocks.1.attn1.to_q") == attn
        assert trace(pipe, drawn, "transformer_blocks.1.ff.net.2") == ff


def test_all_blocks_may_be_reused() -> None:
    """cache-dit 1.5.3 asserts that the first block is computed at every step, even for a static
    mask (Fn >= 1).
    """
    pipe = Loop(DIT)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        for block in range(3):
            assert trace(pipe, drawn, f"transformer_blocks.{block}.norm3") == "X.X.X."


def test_a_reused_branch_computes_nothing() -> None:
    """FRDiff's ResNet block still normalises, activates and resamples at reuse steps for a result
    that it does not use.
    """
    pipe = Loop(SD)
    mask = candidate_masks(discover(pipe.transformer))["branches"]
    with sampler.reuse(pipe, policy(pipe, every_second(), mask)):
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            assert trace(pipe, drawn, f"up_blocks.0.resnets.1.{layer}") == "X.X.X."
        assert trace(pipe, drawn, "up_blocks.0.resnets.1.conv_shortcut") == "X" * N


def test_each_step_may_have_a_mask_of_its_own() -> None:
    """FRDiff's Auto-FR has one gate per step for all blocks, DeepCache 0.1.1 one branch and
    cache-dit 1.5.3 one run of blocks for all steps.
    """
    pipe = Loop(DIT)
    one, two = "transformer_blocks.1.attn1#attn", "transformer_blocks.2.ff#ff"
    steps = ["key", "mask", "other", "key", "other", "mask"]
    with sampler.reuse(pipe, policy(pipe, steps, [one], other=[two])):
        assert trace(pipe, drawn, "transformer_blocks.1.attn1.to_q") == "X.XXX."
        assert trace(pipe, drawn, "transformer_blocks.2.ff.net.2") == "XX.X.X"
        assert trace(pipe, drawn, "transformer_blocks.0.ff.net.2") == "X" * N


def test_the_autoencoder_is_left_alone() -> None:
    """Autoencoders have layers of the very class that FRDiff converts wherever it is found."""
    pipe = make_pipe()
    before = laws.state(pipe.vqvae)
    masks = candidate_masks(discover(pipe.unet))
    with sampler.reuse(pipe, policy(pipe, every_second(), masks["frdiff"])):
        drawn(pipe)
        assert laws.state(pipe.vqvae) == before
        assert laws.state(pipe.unet) != before


def test_a_module_that_runs_twice_keeps_both_results() -> None:
    """FRDiff has one slot for each module: CogView4, which calls its feed-forward twice per block,
    would get for the image what was computed for the text.
    """
    pipe = Loop("CogView4Transformer2DModel")
    mask = candidate_masks(discover(pipe.transformer))["ff"]
    with sampler.reuse(pipe, policy(pipe, every_second(), mask)):
        assert drawn(pipe).isfinite().all()


# -- from call to call ----------------------------------------------------------------------------


def test_a_second_generation_is_accelerated_too() -> None:
    """dit-smoothcache 0.1.1 never resets its step counters: its second image is drawn uncached."""
    pipe = Loop(DIT)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        assert [trace(pipe, drawn) for _ in range(3)] == ["X.X.X."] * 3


@pytest.mark.parametrize("steps", [5, 6, 7])
@pytest.mark.parametrize("name", [DIT, PIXART, "UNet2DModel"])
def test_a_second_generation_equals_the_first(name: str, steps: int) -> None:
    """cache-dit 1.5.3 on a transformer alone begins the second generation with features of the
    first; TaylorSeer, MagCache and attention broadcast of diffusers 0.42.1 go on counting.
    """
    pipe = Loop(name)
    with sampler.reuse(pipe, policy(pipe, every_second(steps))):
        first = drawn(pipe, steps)
        drawn(pipe, steps, seed=5)
        assert torch.equal(drawn(pipe, steps), first)


def test_applying_again_replaces_the_policy() -> None:
    """cache-dit 1.5.3 ignores a second configuration, DeepCache 0.1.1 recurses without end, and
    dit-smoothcache 0.1.1 can then not be disabled any more.
    """
    pipe = Loop(DIT)
    bare = drawn(pipe)
    sampler.apply(pipe, policy(pipe, every_second()))
    sampler.apply(pipe, policy(pipe, ["key", "mask", "mask"] * 2))
    assert trace(pipe, drawn) == "X..X.."
    sampler.remove(pipe)
    assert torch.equal(drawn(pipe), bare) and trace(pipe, drawn) == "X" * N
    sampler.remove(pipe)


@pytest.mark.parametrize("name", ["UNet2DModel", SD, DIT])
def test_removing_restores_every_bit(name: str) -> None:
    """FRDiff cannot be taken off; DeepCache and dit-smoothcache 0.1.1 leave a `forward` in the
    dictionary of every module that they wrapped.
    """
    pipe = Loop(name)
    bare, before = drawn(pipe), laws.state(pipe.transformer)
    scheduler = sorted(vars(pipe.scheduler))
    with sampler.reuse(pipe, policy(pipe, every_second())):
        assert not torch.equal(drawn(pipe), bare)
    assert laws.state(pipe.transformer) == before and sorted(vars(pipe.scheduler)) == scheduler
    assert torch.equal(drawn(pipe), bare)


class Stop(Exception):  # noqa: N818 - no error of anybody's
    """Ends a run in the middle."""


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_error_leaves_nothing_behind(at: int, batch: int) -> None:
    """After an error in a run MagCache of diffusers 0.42.1, dit-smoothcache 0.1.1 and FRDiff draw
    the next image with what the first one left, MagCache of another batch without its residual.
    """
    pipe, calls = Loop(DIT), 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop

    with sampler.reuse(pipe, policy(pipe, every_second())) as patch:
        good = drawn(pipe, batch=batch)
        handle = pipe.transformer.proj_out_2.register_forward_hook(fail)
        with pytest.raises(Stop):
            drawn(pipe, seed=3)
        handle.remove()
        assert patch.run.kept_bytes == 0
        assert torch.equal(drawn(pipe, batch=batch), good)


def test_nothing_is_held_after_a_run() -> None:
    """DeepCache 0.1.1 and FRDiff hold the features of the last run until they are disabled, or for
    good.
    """
    pipe = make_pipe()
    with sampler.reuse(pipe, policy(pipe, every_second())) as patch:
        drawn(pipe)
        assert patch.run.peak_bytes > 0 and patch.run.kept_bytes == 0


def test_two_pipes_of_a_class_share_nothing() -> None:
    """TeaCache sets its state on the class and FRDiff in globals: two pipes in turns mix up their
    steps.
    """
    plans = {"a": every_second(), "b": ["key", *["mask"] * (N - 1)]}
    alone, pipes, found = {}, {}, {"a": [], "b": []}
    for name, steps in plans.items():
        pipe = pipes[name] = make_pipe()
        sampler.apply(pipe, policy(pipe, steps))
        alone[name] = by_hand(pipe)
        pipe.scheduler.set_timesteps(N)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = dict.fromkeys(plans, noise)
    with torch.inference_mode():
        for time in pipes["a"].scheduler.timesteps:
            for name, pipe in pipes.items():
                score = pipe.unet(samples[name], time).sample
                samples[name] = pipe.scheduler.step(score, time, samples[name]).prev_sample
                found[name].append(score)
    assert all(same(found[name], alone[name]) for name in plans)


def test_a_shared_denoiser_follows_the_pipe_that_was_given() -> None:
    """FRDiff keeps its state in the modules: a second pipe with the same denoiser reads and
    overwrites it (here in turns; at the same time is not supported).
    """
    pipe = make_pipe()
    other = diffusers.LDMPipeline(unet=pipe.unet, vqvae=pipe.vqvae, scheduler=ddim())
    other.set_progress_bar_config(disable=True)
    bare = drawn(other)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        alone = drawn(pipe)
        assert torch.equal(drawn(other), bare) and not torch.equal(alone, bare)
        assert torch.equal(drawn(pipe), alone)


# -- batches, sizes, guidance ---------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("name", ["UNet2DModel", DIT])
def test_the_batch_may_change_between_calls(name: str, batches: tuple[int, int]) -> None:
    """FRDiff broadcasts features of one image to two; FirstBlockCache of diffusers 0.42.1 raises
    RuntimeError with DiT, whose state is never reset.
    """
    pipe, fresh = Loop(name), Loop(name)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        drawn(pipe, batch=batches[0])
        found = drawn(pipe, batch=batches[1])
    with sampler.reuse(fresh, policy(fresh, every_second())):
        assert torch.equal(drawn(fresh, batch=batches[1]), found)


def test_the_resolution_may_change_between_calls() -> None:
    """FRDiff raises deep inside the network when the next image has another size."""
    pipe, fresh = make_pipe(), make_pipe()
    with sampler.reuse(pipe, policy(pipe, every_second())):
        small, large, again = (by_hand(pipe, size=size) for size in (8, 16, 8))
    with sampler.reuse(fresh, policy(fresh, every_second())):
        assert same(by_hand(fresh, size=16), large)
    assert same(small, again)


@pytest.mark.parametrize("batches", [(2, 2, 1, 1, 1, 1), (1, 1, 1, 2, 2, 2), (2, 1, 2, 1, 2, 1)])
def test_the_batch_may_change_during_a_run(batches: tuple[int, ...]) -> None:
    """DeepCache 0.1.1 raises RuntimeError when a callback ends guidance and with it half of the
    batch; FRDiff draws on with one image's features for two.
    """
    pipe = make_pipe()
    with sampler.reuse(pipe, policy(pipe, ["key", *["mask"] * 5])):
        calls = trace(pipe, lambda pipe: by_hand(pipe, batches=batches))
        assert [len(score) for score in by_hand(pipe, batches=batches)] == [*batches]
    changes = [a != b for a, b in zip((0, *batches), batches, strict=False)]
    assert calls == "".join(".X"[change] for change in changes)


def test_guidance_branches_are_kept_apart() -> None:
    """DeepCache 0.1.1, FRDiff and MagCache of diffusers 0.42.1 outside a context have one store for
    both calls of a step: each reads what the other one left.
    """
    found = {}
    noise = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for branches in ((0,), (1,), (0, 1)):
        pipe = make_pipe()
        with sampler.reuse(pipe, policy(pipe, ["key", *["mask"] * 5])):
            pipe.scheduler.set_timesteps(N)
            for time in pipe.scheduler.timesteps:
                for branch in branches:
                    score = found[branches, branch] = pipe.unet(noise[branch], time).sample
                pipe.scheduler.step(score, time, noise[0])
    assert torch.equal(found[(0, 1), 0], found[(0,), 0])
    assert torch.equal(found[(0, 1), 1], found[(1,), 1])


def test_a_changed_prompt_counts_from_the_next_keyframe() -> None:
    """FRDiff reads a prompt that a callback changed never while λ = 0; here the next keyframe does,
    and what is kept after it is of the new one.
    """
    pipe = Loop(SD)
    inputs = {**pipe.tiny.inputs(0, 0.5, 1), "return_dict": False}
    sample = inputs.pop("sample")
    inputs.pop("timestep")
    changed = {**inputs, "encoder_hidden_states": 2 * inputs["encoder_hidden_states"]}
    found = []
    with sampler.reuse(pipe, policy(pipe, ["key", "jump"] * 3)), torch.inference_mode():
        pipe.scheduler.set_timesteps(N)
        for time, given in zip(pipe.scheduler.timesteps, [inputs, *[changed] * 5], strict=True):
            found.append(pipe.transformer(sample, time, **given)[0])
            pipe.scheduler.step(found[-1], time, sample)
    fresh = pipe.transformer(sample, pipe.scheduler.timesteps[2], **changed)[0]
    assert same(found[:2], [found[0]] * 2) and same(found[2:4], [fresh] * 2)


def test_a_controlnet_may_add_to_the_skip_connections() -> None:
    """DeepCache 0.1.1 is asked for ControlNet (its issues 4 and 9), whose residuals go to layers
    that are not computed.
    """
    pipe = Loop(SD)
    side = randomise(diffusers.ControlNetModel.from_unet(pipe.transformer))
    original, picture = pipe.tiny.inputs, torch.randn(1, 3, 64, 64)

    def controlled(seed: int, time: float, batch: int) -> dict[str, Any]:
        given = original(seed, time, batch)
        about = given["sample"], given["timestep"], given["encoder_hidden_states"]
        down, middle = side(*about, picture, return_dict=False)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return {**given, **extra}

    plain = drawn(pipe)
    pipe.tiny = dataclasses.replace(pipe.tiny, inputs=controlled)
    bare = drawn(pipe)
    with sampler.reuse(pipe, policy(pipe, ["key"] * N)):
        assert torch.equal(drawn(pipe), bare) and not torch.equal(bare, plain)
    with sampler.reuse(pipe, policy(pipe, every_second())):
        assert trace(pipe, drawn) == "X.X.X."


def test_a_held_score_is_a_fresh_tensor() -> None:
    """FRDiff hands out the score that it holds: solvers with memory and pipelines that work in
    place then change what is held.
    """
    pipe = make_pipe()
    sample = torch.randn(1, 3, 8, 8)
    found = []
    with sampler.reuse(pipe, policy(pipe, ["key", *["jump"] * 5])), torch.inference_mode():
        pipe.scheduler.set_timesteps(N)
        for time in pipe.scheduler.timesteps:
            score = pipe.unet(sample, time).sample
            found.append(score.clone())
            pipe.scheduler.step(score, time, sample)
            if len(found) > 1:
                score.mul_(2)
    assert same(found, found[:1] * N)


@pytest.mark.parametrize("kind", ["conv", "transformer", "stage"])
def test_what_is_kept_is_not_changed_in_place(kind: str) -> None:
    """FreeU scales hidden states in place: a tool that hands out what it keeps, as DeepCache 0.1.1
    does, scales it again at every step.
    """
    pipe = Loop(SD)
    pipe.transformer.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    inputs = pipe.tiny.inputs(0, 0.5, 1)
    points = [p for p in discover(pipe.transformer).values() if p.kind == kind]
    for point in points:
        patch = laws.patched(pipe.transformer, [[point]])
        with patch.keyframe():
            expected = laws.score(pipe.transformer, inputs)
        for _ in range(2):
            with patch.reduced(1):
                found = laws.score(pipe.transformer, inputs)
            assert laws.distance(found, expected) < 1e-4, point.name
        patch.remove()


# -- what is said ---------------------------------------------------------------------------------


def test_a_run_prints_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """dit-smoothcache 0.1.1 prints a line for each call of a layer (160 in a run of 20 steps), and
    FRDiff its debugging.
    """
    pipe = make_pipe()
    drawn(pipe)
    capfd.readouterr()
    with caplog.at_level(logging.INFO), sampler.reuse(pipe, policy(pipe, every_second())):
        drawn(pipe)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_calibration_is_a_value(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """MagCache of diffusers 0.42.1 prints what it has calibrated, to be copied by hand; the wheel
    of dit-smoothcache 0.1.1 has no calibrator, and TeaCache's is not published.
    """
    pipe = make_pipe()
    masks = {"mask": deepest(pipe)}
    capfd.readouterr()
    table = calibrate(pipe, [0], 4, masks, max_gap=2)
    assert capfd.readouterr() == ("", "")
    table.save(tmp_path / "table.npz")
    found = Calibration.load(tmp_path / "table.npz")
    assert found.masks == ("mask",) and (found.teacher == table.teacher).all()
    assert (calibrate(pipe, [0], 4, masks, max_gap=2).teacher == table.teacher).all()


def test_calibration_needs_no_gradients() -> None:
    """FRDiff's Auto-FR propagates back through the whole trajectory, which takes tens of gigabytes
    for DiT-XL/2; it also takes its teacher to have 50 steps.
    """
    pipe = make_pipe()
    pipe.unet.requires_grad_(True)
    made: list[bool] = []
    pipe.unet.register_forward_hook(lambda _, __, output: made.append(output[0].requires_grad))
    calibrate(pipe, [0], 3, {"mask": deepest(pipe)}, max_gap=1)
    assert len(made) > 3 and not any(made)


# -- files ----------------------------------------------------------------------------------------


def test_a_file_is_all_that_a_run_needs(tmp_path: Path) -> None:
    """The hooks of diffusers 0.42.1 have no file, Model-Optimizer's cachify takes lambdas, and
    FRDiff is switched by editing its lines.
    """
    pipe = Loop(DIT)
    made = policy(pipe, every_second())
    made.save(tmp_path / "policy.json")
    with sampler.reuse(pipe, made):
        expected = drawn(pipe)
    fresh = Loop(DIT)
    with sampler.reuse(fresh, tmp_path / "policy.json"):
        assert torch.equal(drawn(fresh), expected)
    assert load(tmp_path / "policy.json") == made


def test_a_file_names_its_scheduler_and_model() -> None:
    """Schedules of ECAD and SmoothCache say nothing of scheduler and checkpoint: they are taken by
    any pipe that has their blocks.
    """
    pipe = Loop(DIT)
    made = policy(pipe, every_second())
    euler = Loop(DIT, diffusers.EulerDiscreteScheduler())
    with pytest.raises(PolicyError, match="for DDIMScheduler, this pipe has EulerDiscrete"):
        sampler.apply(euler, made)
    shifted = Loop(DIT, diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=True))
    with pytest.raises(PolicyError, match="clip_sample"):
        sampler.apply(shifted, made)
    with pytest.raises(PolicyError, match="for a DiTTransformer2DModel"):
        sampler.apply(Loop(PIXART), made)
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight[0, 0] += 1.0
    assert policy(pipe, every_second()).model.weights != made.model.weights


def test_an_ecad_file_of_another_model_is_refused() -> None:
    """ECAD's files name no model: what they say of its blocks is all that a reader can go by."""
    pipe = Loop(PIXART)
    parts = dict.fromkeys(("attn1", "attn2", "ff"), True)
    table = {str(step): {str(block): parts for block in range(2)} for step in range(N)}
    text = json.dumps({"cache_schedule": {"schedule": table}})
    with pytest.raises(InterchangeError, match=r"says nothing of transformer_blocks\.2"):
        interchange.read("ecad", text, pipe, "tiny", N, (1,))


class Bomb:
    """An object whose pickle runs code."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    """BudCache and Learning-to-Cache keep their schedules as pickles, which run code when they are
    read.
    """
    for name in ("policy.pt", "policy.json"):
        torch.save({"cache_step": Bomb()}, tmp_path / name)
        with pytest.raises(InterchangeError, match="is not read"):
            interchange.read("budcache", tmp_path / name, Loop(DIT), "tiny", N, (1,))
        with pytest.raises(PolicyError):
            sampler.apply(Loop(DIT), tmp_path / name)


# -- the published method -------------------------------------------------------------------------


def test_the_method_runs_on_the_installed_diffusers() -> None:
    """FRDiff's code is for diffusers 0.26.3 and raises TypeError on 0.42.1; here its features, its
    keyframes and its λ run: holds until 43 % of the steps, reduced calls after that.
    """
    pipe = Loop(SD)
    mask = candidate_masks(discover(pipe.transformer))["frdiff"]
    assert {name.rpartition("#")[2] for name in mask} == {"conv", "transformer"}
    steps = every_second(20)
    with sampler.reuse(pipe, policy(pipe, steps, mask, HardSigmoid())) as patch:
        assert drawn(pipe, 20).isfinite().all()
    held = sum((30 * (step / 20 - 0.5) + 2) / 4 <= 0 for step in range(1, 20, 2))
    assert patch.counts == {"key": 10, "jump": held, "mask": 10 - held} and held == 4


def test_lambda_is_a_function_of_solver_steps() -> None:
    """FRDiff divides the loop's index by the count that was declared: with Heun, which calls 2N - 1
    times, λ is 1 after a third of the run and the stages of a step differ.
    """
    pipe = make_pipe()
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    steps = every_second(20)
    made = policy(pipe, steps, mix=HardSigmoid())
    runs = ["jump" if made.weights(i)[:1] == (0.0,) else step for i, step in enumerate(steps)]
    with sampler.reuse(pipe, made) as patch:
        drawn(pipe, 20)
        passes = solver_steps(pipe.scheduler)
    assert patch.counts == Counter(runs[step] for step in passes)
    assert patch.counts == {"key": 20, "jump": 8, "mask": 11}


@pytest.mark.parametrize("name", [SD, DIT])
def test_reuse_is_exact_in_half_precision(name: str) -> None:
    """Output minus input, as first-block caches and MagCache keep it, gives what a transformer adds
    back to 8e-3 only in bfloat16; FRDiff keeps it before it is added, and so do its masks here.
    """
    model = laws.ALL[name].build().to(torch.bfloat16)
    inputs = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in laws.ALL[name].inputs(0, 0.5, 1).items()
    }
    points = discover(model)
    patch = laws.patched(model, [[points[n] for n in candidate_masks(points)["frdiff"]]])
    with patch.keyframe():
        expected = laws.score(model, inputs)
    with patch.reduced(1):
        assert same(laws.score(model, inputs), expected)


# -- the benchmark --------------------------------------------------------------------------------


def test_every_reproduced_failure_has_a_law() -> None:
    """The results of benchmarks/peers.py name tests of this file, tools with their versions."""
    if not RESULTS.is_file():
        pytest.skip("benchmarks/peers.py was not run")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {row["autofr"] for row in rows} <= set(globals())
    assert all(row["tool"].split()[1:] for row in rows if row["reproduced"] != "skipped")
