"""The recipe of `sd`: emoji by name, in the stock StableDiffusionPipeline and its siblings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autofr.zoo.loop import kept
from autofr.zoo.recipe import Order, Trained, load_module
from autofr.zoo.recipes import diffusion, emoji, inputs, text
from autofr.zoo.recipes.autoencoder import CHANNELS, LATENT

STEPS = 30
GUIDANCE = 3.0
RATE = 8e-4  # learning rate of the denoiser, at its peak
TEXT_MINUTES = 6.0
SUBGROUPS = (
    "face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses", "cat-face",
    "heart", "animal-mammal", "animal-bird", "food-fruit", "food-sweet", "transport-ground",
    "sky & weather",
)  # fmt: skip
"""What it draws: subgroups of Unicode's that so small a model draws well."""


def build() -> torch.nn.Module:
    """An 8.3 M parameter UNet2DConditionModel, transformers on the two lower levels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=2,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 3, 4),  # what diffusers calls so is the number of heads
        cross_attention_dim=text.WIDTH,
    )


@torch.no_grad()
def begin_with(unet: torch.nn.Module, other: torch.nn.Module) -> None:
    """Copy from `ldm4`'s UNet2DModel what both have; transformers start as no change.

    The channel that it does not have is neither read nor written at first.
    """
    theirs = other.state_dict()
    for name, ours in unet.state_dict().items():
        if name in theirs:
            given = theirs[name]
            if given.shape != ours.shape:
                ours.zero_()
            ours[tuple(slice(0, size) for size in given.shape)] = given
        elif name.endswith(("proj_out.weight", "proj_out.bias")):
            ours.zero_()


def run(order: Order) -> Trained:
    """Train `sd`: text tower first, then the denoiser, from `ldm4`'s or an exported one."""
    shared = emoji.prepare(order)
    tokenizer, towers = _towers(order, shared.domain)
    drawn = shared.domain.of(SUBGROUPS)
    names = [glyph.name for glyph in drawn.glyphs]
    found = emoji.encode(shared.vae, drawn.images, order.seed)
    prompts = [names[row] for row in found.rows.tolist()]
    read, seconds = text.Reader(tokenizer, towers["text"]), 60 * order.minutes
    work = order.folder("sd")
    reading = {"text": 60 * TEXT_MINUTES} if order.init is None else {}
    lr = order.rate(RATE)
    unet = fit(_start(order), found.latents, prompts, read, seconds, work, order.draws(), lr)
    return Trained(
        pipe=build_pipe(unet, shared.vae, read),
        encoder=shared.encoder,
        views=found.views,
        seconds=shared.seconds | reading | {"denoiser": seconds},
        glyphs=len(names),
        inputs=[{"prompt": name} for name in inputs.shuffled(names, order.seed)],
        call={"guidance_scale": GUIDANCE},
        steps=STEPS,
        argument="prompt",
        sets=drawn.by_group(),
        labels=prompts,
        towers=towers,
        moments=kept(work, "denoiser"),
        files=inputs.files(drawn.glyphs, drawn.images.cpu(), order.seed),
    )


def _towers(order: Order, found: emoji.Domain) -> tuple[Any, torch.nn.ModuleDict]:
    """Tokenizer and towers: trained on all glyphs, or those of the folder that is trained on."""
    if order.init is not None:
        tokenizer, towers = text.load(order.init)
        return tokenizer, towers.to(order.device)
    names = [glyph.name for glyph in found.glyphs]
    tokenizer, work = text.build_tokenizer(names), order.folder("emoji")
    towers = text.fit(tokenizer, found.images, names, 60 * TEXT_MINUTES, work, order.seed)
    return tokenizer, towers


def _start(order: Order) -> torch.nn.Module:
    """The denoiser that training begins with."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    if order.init is not None:
        return load_module(UNet2DConditionModel, order.init / "unet")
    unet = build()
    begin_with(unet, load_module(UNet2DModel, emoji.LDM4 / "unet"))
    return unet


def build_pipe(unet: torch.nn.Module, vae: torch.nn.Module, read: text.Reader) -> Any:
    """Assemble the stock pipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=read.encoder,
        tokenizer=read.tokenizer,
        unet=unet,
        scheduler=diffusion.build_scheduler(steps_offset=1),  # the pipeline asks for it
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def fit(
    unet: torch.nn.Module,
    latents: torch.Tensor,
    names: Sequence[str],
    read: text.Reader,
    seconds: float,
    work: Path,
    seed: int,
    lr: float = RATE,
) -> torch.nn.Module:
    """Train on `latents` (n, 4, 16, 16) with their emoji's `names`; a tenth of them are empty.

    The text tower stays as it is.
    """
    torch.manual_seed(seed)

    def condition(pick: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        out = diffusion.dropped(len(pick), generator).tolist()
        rows = zip(pick.tolist(), out, strict=True)
        prompts = ["" if gone else text.vary(names[row], generator) for row, gone in rows]
        return {"encoder_hidden_states": read(prompts)}

    phases = [(math.inf, latents)]
    return diffusion.denoiser(unet, phases, condition, seconds, work, seed, lr)
