"""Failures of other caching tools: each function says what was expected and what happened.

The tools are imported where they are used, since peers.py runs with those that are installed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import hooks
from diffusers.hooks import hooks as registry
from peer_pipes import (
    BLOCKS,
    STEPS,
    Outcome,
    UNetPipe,
    dit_pipe,
    draw,
    equal,
    flux,
    hooked,
    interrupted,
    planned,
    shown,
    trace,
    words,
)
from torch import nn

EVERY_SECOND = [1, 0] * (STEPS // 2)

# -- DeepCache ------------------------------------------------------------------------------------


def deepcache(pipe: Any, mode: str = "uniform", branch: int = 0) -> Any:
    """Enable it with interval 2."""
    from DeepCache import DeepCacheSDHelper

    tool = DeepCacheSDHelper(pipe)
    tool.set_params(cache_interval=2, cache_branch_id=branch, skip_mode=mode)
    tool.enable()
    return tool


def deepcache_under(solver: str) -> Outcome:
    """Every second solver step of 20 is computed."""
    pipe = UNetPipe(getattr(diffusers, solver)())
    deepcache(pipe)
    calls = trace(pipe)
    return planned(pipe), shown(calls)


def deepcache_keyword() -> Outcome:
    """The timestep may be given by its name."""
    pipe = UNetPipe()
    deepcache(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    time, sample = pipe.scheduler.timesteps[0], torch.zeros(1, 3, 8, 8)
    return "runs", words(lambda: pipe.unet(sample=sample, timestep=time), "runs")


def deepcache_mode() -> Outcome:
    """Steps need not be evenly spaced."""
    pipe = UNetPipe()
    deepcache(pipe, "quad")
    return "runs", words(lambda: draw(pipe), "runs")


def deepcache_middle() -> Outcome:
    """A run that begins at another step than the last one draws what it draws alone."""
    pipe, fresh = UNetPipe(), UNetPipe()
    deepcache(pipe), deepcache(fresh)
    pipe(start=4)
    return "equal", equal(pipe(start=5), fresh(start=5))


def deepcache_twice() -> Outcome:
    """New parameters replace the old ones."""
    pipe = UNetPipe()
    tool = deepcache(pipe)
    tool.enable()
    return "runs", words(lambda: draw(pipe), "runs")


def deepcache_split() -> Outcome:
    """Two calls per step (guidance) do not read each other's features."""
    scores = []
    for branches in (2, 1):
        pipe = UNetPipe()
        deepcache(pipe)
        pipe.scheduler.set_timesteps(STEPS)
        samples = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for time in pipe.scheduler.timesteps[:2]:
            found = [pipe.unet(sample, time).sample for sample in samples[:branches]]
        scores.append(found[0])
    return "equal", equal(*scores)


def deepcache_batch() -> Outcome:
    """The batch may shrink during a run (a callback that ends guidance)."""
    pipe = UNetPipe()
    deepcache(pipe)
    return "runs", words(lambda: pipe(batch=2, halve=5), "runs")


def deepcache_memory() -> Outcome:
    """What was kept is freed at the end of a run."""
    pipe = UNetPipe()
    tool = deepcache(pipe)
    draw(pipe)
    return "0 features held after the run", f"{len(tool.cached_output)} features held after the run"


def deepcache_freeu() -> Outcome:
    """FreeU, which scales hidden states in place, changes nothing that is kept."""
    pipe = UNetPipe()
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    pipe.scheduler.set_timesteps(STEPS)
    tool = deepcache(pipe, branch=3)
    sample, text = torch.ones(1, 4, 8, 8), torch.ones(1, 3, 16)
    pipe.unet(sample, pipe.scheduler.timesteps[0], encoder_hidden_states=text)
    kept = tool.cached_output["up", "block", 2, 0]  # of the deepest block, which is not computed
    before = kept.clone()
    pipe.unet(sample, pipe.scheduler.timesteps[1], encoder_hidden_states=text)
    return "equal", equal(kept, before)


# -- SmoothCache ----------------------------------------------------------------------------------


def smoothcache(model: nn.Module, schedule: Mapping[str, list[int]] | None = None) -> Any:
    """Enable its helper for diffusers with attention computed at every second step."""
    from SmoothCache import DiffuserCacheHelper

    tool = DiffuserCacheHelper(model, schedule=schedule or {"attn1": EVERY_SECOND})
    tool.enable()
    return tool


def smoothcache_second() -> Outcome:
    """The second generation is accelerated as the first is."""
    pipe = dit_pipe()
    smoothcache(pipe.transformer)
    return shown(trace(pipe)), shown(trace(pipe))


def smoothcache_prints() -> Outcome:
    """A run prints nothing."""
    pipe, said = dit_pipe(), io.StringIO()
    smoothcache(pipe.transformer)
    with contextlib.redirect_stdout(said):
        draw(pipe)
    return "0 lines printed", f"{len(said.getvalue().splitlines())} lines printed"


def smoothcache_components(schedule: Mapping[str, list[int]]) -> Outcome:
    """A schedule of components that are not wrapped does something, or is refused."""
    pipe = dit_pipe()
    bare = draw(pipe)
    smoothcache(pipe.transformer, schedule)
    same = torch.equal(draw(pipe), bare)
    return "reused or refused", "ignored: output unchanged" if same else "reused or refused"


def smoothcache_steps(steps: int) -> Outcome:
    """A schedule for 20 steps is refused at other counts."""
    pipe = dit_pipe()
    smoothcache(pipe.transformer)
    return "refused", "drawn: " + shown(trace(pipe, partial(draw, steps=steps)))


def smoothcache_nothing(model: nn.Module) -> Outcome:
    """A model without the block that it knows is refused."""
    wrapped = len(smoothcache(model).original_forwards)
    return "refused", f"accepted, {wrapped} modules wrapped"


def smoothcache_twice() -> Outcome:
    """Enabling twice is enabling once: disabling restores the pipe."""
    pipe = dit_pipe()
    bare = draw(pipe)
    tool = smoothcache(pipe.transformer)
    tool.enable()
    tool.disable()
    return "equal", equal(draw(pipe), bare)


def smoothcache_under_heun() -> Outcome:
    """Every second solver step of 20 is computed."""
    pipe = dit_pipe(diffusers.HeunDiscreteScheduler())
    smoothcache(pipe.transformer)
    calls = trace(pipe)
    return planned(pipe), shown(calls)


def smoothcache_calibrator() -> Outcome:
    """The wheel contains what makes schedules."""
    import SmoothCache

    return "there", words(lambda: SmoothCache.DiffuserCalibrationHelper, "there")


# -- cache-dit ------------------------------------------------------------------------------------

STATIC = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "steps_computation_mask": EVERY_SECOND,
    "steps_computation_policy": "static",
}


def cache_dit(target: Any, **config: Any) -> Any:
    """Enable it with a static mask of every second step."""
    import cache_dit as tool

    return tool.enable_cache(target, cache_config=tool.DBCacheConfig(**{**STATIC, **config}))


def cache_dit_off(target: Any) -> None:
    """Disable it."""
    import cache_dit as tool

    tool.disable_cache(target)


def cache_dit_steps(steps: int) -> Outcome:
    """A mask of 20 steps is refused at other counts."""
    pipe = dit_pipe()
    cache_dit(pipe)
    return "refused", "drawn: " + shown(trace(pipe, partial(draw, steps=steps)))


def cache_dit_under_heun() -> Outcome:
    """Every second solver step of 20 is computed."""
    pipe = dit_pipe(diffusers.HeunDiscreteScheduler())
    cache_dit(pipe)
    calls = trace(pipe)
    return planned(pipe), shown(calls)


def cache_dit_all_blocks() -> Outcome:
    """A static mask may reuse all blocks."""
    pipe = dit_pipe()
    return "runs", words(lambda: (cache_dit(pipe, Fn_compute_blocks=0), draw(pipe)), "runs")


def cache_dit_unet() -> Outcome:
    """A U-Net is accelerated."""
    return "runs", words(lambda: cache_dit(UNetPipe().unet), "runs")


def cache_dit_no_block() -> Outcome:
    """A mask whose Fn leaves no block of eight to reuse is refused (8 is the default)."""
    pipe = dit_pipe()
    cache_dit(pipe, Fn_compute_blocks=BLOCKS)
    return "refused", "accepted: " + shown(trace(pipe))


def cache_dit_defaults() -> Outcome:
    """Enabled as it comes, it changes what is computed, or says that it does not."""
    import cache_dit as tool

    pipe = dit_pipe(blocks=12)
    bare = draw(pipe)
    tool.enable_cache(pipe)
    return "something reused or refused", (
        "nothing reused: output unchanged"
        if torch.equal(draw(pipe), bare)
        else "something reused or refused"
    )


def cache_dit_twice() -> Outcome:
    """A second configuration replaces the first."""
    pipe = dit_pipe()
    cache_dit(pipe)
    cache_dit(pipe, steps_computation_mask=[1] * STEPS)
    return shown("X" * STEPS), shown(trace(pipe))


def cache_dit_module() -> Outcome:
    """Enabled on the transformer alone, a second generation begins with a computed step."""
    pipe = dit_pipe()
    cache_dit(pipe.transformer, num_inference_steps=STEPS, enable_separate_cfg=False)
    return shown(trace(pipe)), shown(trace(pipe))


# -- hooks of diffusers ---------------------------------------------------------------------------


def in_context(model: nn.Module) -> None:
    """Give the hooks a cache context; these classes have no `cache_context` of their own."""
    registry._set_cache_context(model, registry.CacheContext(name="run"))


def taylorseer(pipe: Any) -> None:
    """Enable it with patterns that match, within a context."""
    patterns = [r".*\.attn1", r".*\.ff"]
    config = hooks.TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=patterns)
    hooks.apply_taylorseer_cache(pipe.transformer, config)
    in_context(pipe.transformer)


def taylorseer_defaults(model: nn.Module) -> Outcome:
    """The default patterns hook attention, or the model is refused."""
    said = words(lambda: hooks.apply_taylorseer_cache(model, hooks.TaylorSeerCacheConfig()), "")
    return "some modules hooked or refused", f"accepted, {said or hooked(model)}"


def no_context(apply: Callable[[nn.Module], None]) -> Outcome:
    """The stock pipeline runs under the hook as it is."""
    pipe = dit_pipe()
    apply(pipe.transformer)
    return "runs", words(lambda: draw(pipe), "runs")


def first_block(model: nn.Module) -> None:
    """Enable first-block caching."""
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=0.5))


def first_block_batch() -> Outcome:
    """The batch may change between two calls."""
    pipe = dit_pipe()
    first_block(pipe.transformer)
    in_context(pipe.transformer)
    draw(pipe)
    return "runs", words(lambda: draw(pipe, batch=2), "runs")


def on_flux2(config: Any) -> Outcome:
    """Blocks that return two streams in a tuple are cached, at two calls one after the other."""
    model = flux("Flux2Transformer2DModel", (4, 4, 4, 4))
    model.enable_cache(config)
    given = {
        "hidden_states": torch.ones(1, 16, 16), "encoder_hidden_states": torch.ones(1, 6, 32),
        "timestep": torch.full((1,), 0.5), "guidance": torch.full((1,), 4.0),
        "img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 6, 4),
    }  # fmt: skip

    def twice() -> None:
        with model.cache_context("run"):
            model(**given), model(**given)

    return "runs", words(twice, "runs")


def magcache(pipe: Any, **config: Any) -> None:
    """Enable it for 20 steps with flat ratios, or calibrate."""
    given = {"num_inference_steps": STEPS, **(config or {"mag_ratios": [1.0] * STEPS})}
    hooks.apply_mag_cache(pipe.transformer, hooks.MagCacheConfig(**given))


def magcache_calibration() -> Outcome:
    """Calibration gives a value or a file."""
    pipe, said = dit_pipe(), io.StringIO()
    magcache(pipe, calibrate=True)
    with contextlib.redirect_stdout(said):
        draw(pipe)
    printed = "Copy these values" in said.getvalue()
    return "a value or a file", "printed to be copied by hand" if printed else "a value or a file"


def magcache_unet() -> Outcome:
    """A U-Net, which has no blocks that it knows, is refused."""
    model = UNetPipe().unet
    config = hooks.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS)
    hooks.apply_mag_cache(model, config)
    return "refused", f"a warning, {hooked(model)}"


def magcache_steps(steps: int) -> Outcome:
    """Ratios for 20 steps are refused at other counts."""
    pipe = dit_pipe()
    magcache(pipe)
    return "refused", "drawn: " + shown(trace(pipe, partial(draw, steps=steps)))


def magcache_batch() -> Outcome:
    """After a run that was given up, one of another batch draws what it draws alone."""
    pipe, fresh = dit_pipe(), dit_pipe()
    magcache(pipe), magcache(fresh)
    interrupted(pipe)
    return "equal", equal(draw(pipe, batch=2), draw(fresh, batch=2))


def magcache_split() -> Outcome:
    """Two calls per step (guidance) do not read each other's residuals."""
    scores = []
    for branches in (2, 1):
        pipe = dit_pipe()
        magcache(pipe, mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS * branches)
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for time in range(STEPS - 1, -1, -1):
            given = {"timestep": torch.tensor([50 * time])}
            found = [
                pipe.transformer(sample, **given, class_labels=torch.tensor([label])).sample
                for label in range(branches)
            ]
        scores.append(found[0])
    return "equal", equal(*scores)


def broadcast(pipe: Any) -> None:
    """Enable attention broadcast at every second step in the middle of the noise."""
    now: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        now[:] = [int(kwargs["timestep"][0])]

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: now[0]
    )
    hooks.apply_pyramid_attention_broadcast(pipe.transformer, config)


def faster_cache(pipe: Any) -> Outcome:
    """Attention is extrapolated at some of the steps."""
    config = hooks.FasterCacheConfig(current_timestep_callback=lambda: 500, tensor_format="BCHW")
    model = pipe.unet if isinstance(pipe, UNetPipe) else pipe.transformer
    hooks.apply_faster_cache(model, config)
    return "runs", words(lambda: draw(pipe), "runs")


def seacache(model: nn.Module) -> None:
    """Enable it with a threshold that nothing exceeds."""
    hooks.apply_sea_cache(model, hooks.SeaCacheConfig(threshold=1000.0))


def seacache_dit() -> Outcome:
    """Told the step, its level and the count at each call, it reuses something, or refuses."""
    pipe = dit_pipe()
    bare = draw(pipe)
    seacache(pipe.transformer)
    steps = iter(range(STEPS))

    def tell(*_: Any) -> None:
        step = next(steps)
        told = {"step_index": step, "num_inference_steps": STEPS, "sigma": 1 - step / STEPS}
        registry._set_cache_context(pipe.transformer, registry.CacheContext(name="run", **told))

    pipe.transformer.register_forward_pre_hook(tell)
    same = torch.equal(draw(pipe), bare)
    happened = f"{hooked(pipe.transformer)}, output unchanged" if same else "reused or refused"
    return "reused or refused", happened


def no_mixin(name: str) -> Outcome:
    """A class can be told to cache."""
    return "there", words(lambda: getattr(diffusers, name).enable_cache, "there")
