"""The recipe of `ldm4-sr`: 16x16 pictures of emoji to 64x64, in LDMSuperResolutionPipeline."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from autofr.zoo.loop import kept
from autofr.zoo.recipe import Order, Trained, load_module
from autofr.zoo.recipes import diffusion, emoji, features, inputs, ldm4

STEPS = 50
RATE = 1e-3  # learning rate of the denoiser, at its peak
COUNT = 12  # views of each glyph that the denoiser is trained on
UNSEEN = 10
"""Every tenth emoji is never trained on: the model is measured on these alone."""
ASKED = 512  # small pictures of them that the scores are of


def build() -> torch.nn.Module:
    """A 1.9 M parameter UNet2DModel of 6 channels: noisy latents, then the small picture."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(64, 64, 80),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=16,
    )


def shrink(views: torch.Tensor) -> torch.Tensor:
    """The mean of every 4x4 pixels: (n, 3, 64, 64) to (n, 3, 16, 16)."""
    return F.avg_pool2d(views, 4)


def encode(vae: torch.nn.Module, images: torch.Tensor, seed: int, count: int) -> torch.Tensor:
    """Latents and small pictures (count * n, 6, 16, 16) of `count` views of each image.

    One round after the other, so that no more views are held than there are images.
    """
    found = []
    for number in range(count):
        views, latents = ldm4.encode(vae, images, seed * count + number, 1)
        found.append(torch.cat([latents, shrink(views)], 1))
    return torch.cat(found)


def build_pipe(unet: torch.nn.Module, vae: torch.nn.Module) -> Any:
    """Assemble the stock pipeline."""
    from diffusers import LDMSuperResolutionPipeline

    return LDMSuperResolutionPipeline(vqvae=vae, unet=unet, scheduler=diffusion.build_scheduler())


def run(order: Order) -> Trained:
    """Train `ldm4-sr` over the autoencoder of `ldm4`, or an exported folder of it on."""
    from diffusers import UNet2DModel, VQModel

    work, folder = order.folder("ldm4-sr"), order.init or emoji.LDM4
    encoder = features.load(folder).to(order.device)
    vae = load_module(VQModel, folder / "vqvae").to(order.device)
    torch.manual_seed(order.seed)
    start = build() if order.init is None else load_module(UNet2DModel, folder / "unet")
    images, _ = ldm4.read_glyphs(work, order.device)
    seen = torch.arange(len(images)) % UNSEEN != 0
    pairs = encode(vae, images[seen], order.draws(), COUNT)
    seconds, lr = 60 * order.minutes, order.rate(RATE)
    unet = diffusion.denoiser(
        start, [(math.inf, pairs)], lambda *_: {}, seconds, work, order.draws(), lr
    )
    unseen = images[~seen]
    shuffled = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(order.seed))
    views, _ = ldm4.encode(vae, unseen[shuffled], order.seed, **ldm4.MILD)
    originals = views[:ASKED].cpu()  # one of every emoji, then the next
    return Trained(
        pipe=build_pipe(unet, vae),
        encoder=encoder,
        views=views,
        seconds={"denoiser": seconds},
        glyphs=int(seen.sum()),
        steps=STEPS,
        inputs=[{"image": picture} for picture in shrink(originals)],
        originals=originals,
        moments=kept(work, "denoiser"),
        files=inputs.small(shrink(originals)),
    )
