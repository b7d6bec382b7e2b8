"""Tiny random pipelines for peers.py, and what can be seen of a run of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from autofr.runtime.clock import solver_steps

STEPS, BLOCKS = 20, 8
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16}
SQUARE = {"sample_size": 8, "patch_size": 2, "in_channels": 4}

Outcome = tuple[str, str]
"""What was expected, and what happened, in equal words."""


class Stop(Exception):  # noqa: N818 - no error of anybody's
    """Ends a run in the middle."""


# -- tiny pipelines -------------------------------------------------------------------------------


class UNetPipe:
    """A U-Net, a scheduler and a sampling loop, written as diffusers' pipelines write theirs."""

    def __init__(self, scheduler: Any = None) -> None:
        torch.manual_seed(0)
        self.unet = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ).eval().requires_grad_(False)  # fmt: skip
        self.scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)

    def __call__(
        self, steps: int = STEPS, batch: int = 1, start: int = 0, halve: int | None = None
    ) -> torch.Tensor:
        """Final sample; the loop may begin late, and go on with half of the batch."""
        self.scheduler.set_timesteps(steps)
        sample = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for index, time in enumerate(self.scheduler.timesteps[start:]):
            if index == halve:
                sample = sample[: batch // 2]
            score = self.unet(self.scheduler.scale_model_input(sample, time), time).sample
            sample = self.scheduler.step(score, time, sample).prev_sample
        return sample


def dit(blocks: int = BLOCKS) -> nn.Module:
    """A DiT."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**SIZES, **SQUARE, out_channels=8, num_layers=blocks)
    return model.eval().requires_grad_(False)


def pixart() -> nn.Module:
    """A PixArt of three blocks."""
    return diffusers.PixArtTransformer2DModel(
        **SIZES, **SQUARE, num_layers=3, cross_attention_dim=32, caption_channels=32
    ).eval()


def flux(kind: str = "FluxTransformer2DModel", axes: tuple[int, ...] = (4, 6, 6)) -> nn.Module:
    """A Flux of three double and three single blocks."""
    torch.manual_seed(0)
    own = {"pooled_projection_dim": 32} if kind == "FluxTransformer2DModel" else {}
    return getattr(diffusers, kind)(
        **SIZES, **own, in_channels=16, num_layers=3, num_single_layers=3,
        joint_attention_dim=32, axes_dims_rope=axes,
    ).eval().requires_grad_(False)  # fmt: skip


def dit_pipe(scheduler: Any = None, blocks: int = BLOCKS) -> Any:
    """A DiTPipeline, drawn from with batched guidance."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(dit(blocks), vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int = STEPS, batch: int = 1) -> torch.Tensor:
    """What a pipe draws of one seed."""
    if isinstance(pipe, UNetPipe):
        return pipe(steps, batch)
    given = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    images = pipe(class_labels=[1] * batch, num_inference_steps=steps, **given).images
    return torch.from_numpy(images)


# -- what happened --------------------------------------------------------------------------------


def trace(pipe: Any, call: Callable[[Any], Any] = draw) -> str:
    """Per call of the denoiser "X" where its inner layers ran, "." where they did not."""
    if isinstance(pipe, UNetPipe):
        denoiser, inner = pipe.unet, pipe.unet.mid_block.resnets[0].conv1
    else:
        denoiser = pipe.transformer
        inner = denoiser.transformer_blocks[3].attn1.to_q
    ran: list[bool] = []
    found: list[str] = []

    def end(*_: Any) -> None:
        found.append("X" if ran else ".")
        ran.clear()

    handles = [
        inner.register_forward_hook(lambda *_: ran.append(True)),
        denoiser.register_forward_hook(end),
    ]
    try:
        call(pipe)
    finally:
        for handle in handles:
            handle.remove()
    return "".join(found)


def shown(calls: str) -> str:
    """How many calls were computed, and how they begin."""
    return f"{calls.count('X')} of {len(calls)} calls computed ({calls[:8]}…)"


def planned(pipe: Any) -> str:
    """What every second solver step computes, with all stages of a step alike."""
    passes = solver_steps(pipe.scheduler)
    return shown("".join(".X"[step % 2 == 0] for step in passes))


def words(call: Callable[[], Any], ok: str) -> str:
    """`ok`, or the error that the call raises."""
    try:
        call()
    except Exception as error:  # anything that a tool raises is its answer
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:90]}{'…' * (len(text) > 90)}"
    return ok


def equal(one: torch.Tensor, other: torch.Tensor) -> str:
    """Whether two draws have the same bits."""
    if torch.equal(one, other):
        return "equal"
    return f"differ by {float((one - other).norm() / other.norm()):.2g} (relative)"


def hooked(module: nn.Module) -> str:
    """How many modules diffusers' hooks are on."""
    found = (getattr(one, "_diffusers_hook", None) for one in module.modules())
    return f"{sum(1 for one in found if one and one.hooks)} modules hooked"


def interrupted(pipe: Any, calls: int = 5) -> None:
    """Give up a run after some calls of the denoiser."""
    made: list[None] = []

    def count(*_: Any) -> None:
        made.append(None)
        if len(made) == calls:
            raise Stop

    denoiser = pipe.unet if isinstance(pipe, UNetPipe) else pipe.transformer
    handle = denoiser.register_forward_hook(count)
    with contextlib.suppress(Stop):
        draw(pipe)
    handle.remove()


def after_an_error(pipe: Any, enable: Callable[[Any], Any]) -> Outcome:
    """A run after one that was given up draws what it would have drawn."""
    enable(pipe)
    good = draw(pipe)
    interrupted(pipe)
    return "equal", words(lambda: draw(pipe), "") or equal(draw(pipe), good)


def again(pipe: Any, enable: Callable[[Any], Any], steps: int = STEPS) -> Outcome:
    """A second generation of the same seed draws what the first drew."""
    enable(pipe)
    first = draw(pipe, steps)
    return "equal", equal(draw(pipe, steps), first)


def restored(pipe: Any, enable: Callable[[Any], Any], disable: Callable[[Any], Any]) -> Outcome:
    """After disabling, the pipe draws what it drew before."""
    bare = draw(pipe)
    tool = enable(pipe)
    draw(pipe)
    disable(tool)
    return "equal", equal(draw(pipe), bare)
