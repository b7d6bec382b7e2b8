"""The recipe of `ldm4`: emoji of three groups, unconditional, in the stock LDMPipeline.

Stages: autoencoder, feature extractor, denoiser (on latents standardised per channel).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from autofr.measure.quality import Encoder
from autofr.zoo import glyphs
from autofr.zoo.loop import kept, mixed_precision, train
from autofr.zoo.recipe import Order, Trained, load_module
from autofr.zoo.recipes import autoencoder as kl
from autofr.zoo.recipes import diffusion, features

STEPS = 50
RATE = 1e-3  # learning rate of the denoiser, at its peak
WIDE: dict[str, Any] = {"count": 24}
MILD: dict[str, Any] = {"count": 12, **glyphs.MILD}


def build_autoencoder() -> torch.nn.Module:
    """A 1.6 M parameter VQModel, f = 4: 64x64 RGB images, latents of 3x16x16."""
    from diffusers import VQModel

    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=3,
        sample_size=64,
        num_vq_embeddings=2048,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


@torch.no_grad()
def fill_codebook(vae: torch.nn.Module, images: torch.Tensor, generator: torch.Generator) -> None:
    """Set the codebook to latents of `images` (n, 3, h, w), with a little noise."""
    latents = vae.encode(images).latents.permute(0, 2, 3, 1).reshape(-1, 3)
    codes = vae.quantize.embedding.weight
    pick = torch.randperm(len(latents), generator=generator)[: len(codes)].to(latents.device)
    noise = torch.randn(codes.shape, generator=generator).to(latents)
    codes.copy_(latents[pick] + 0.05 * latents.std() * noise)


def autoencoder(images: torch.Tensor, seconds: float, work: Path, seed: int) -> torch.nn.Module:
    """Train the autoencoder with L1 and gradient loss.

    For the first fifth of the time the quantiser is bypassed; then its codebook is filled with
    latents of the data, which spares the dead codes of a random start. Random 32x32 crops come
    first, since they vary more; the last quarter sees whole images, whose group-norm statistics
    are the ones met in use.
    """
    torch.manual_seed(seed)
    model = build_autoencoder().to(images.device)
    filled = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    model.register_parameter("codebook_filled", filled)  # so that the checkpoint knows

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        if fraction > 0.2 and not filled:
            fill_codebook(model, glyphs.draw(images, generator, 256, crop=True), generator)
            filled.data.fill_(1)
        crop = fraction < 0.73
        target = glyphs.draw(images, generator, 32 if crop else 8, crop)
        with mixed_precision(images):
            latents = model.encode(target).latents
        latents = latents.float()
        codes, commitment, _ = (
            model.quantize(latents) if filled else (latents, torch.zeros(()), None)
        )
        with mixed_precision(images):
            error = model.decoder(model.post_quant_conv(codes)).float() - target
        small = 1e-3 * latents.square().mean()
        return kl.distance(error) + commitment.to(error) + small

    train("autoencoder", model, loss, seconds, work, seed=seed, lr=1e-3, ema=0.998)
    del model._parameters["codebook_filled"]
    return model


@torch.no_grad()
def encode(
    vae: torch.nn.Module, images: torch.Tensor, seed: int, count: int, **affine: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` augmented views of each glyph and their latents."""
    views = glyphs.views(images, seed, count, **affine)
    latents = torch.cat([vae.encode(batch).latents for batch in views.split(64)])
    return views, latents


@torch.no_grad()
def standardise(vae: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a per-channel standardisation of the latents into the 1x1 convolutions and codebook."""
    kl.standardise(vae, mean, std)
    vae.quantize.embedding.weight.sub_(mean).div_(std)


def build_denoiser() -> torch.nn.Module:
    """A 5.6 M parameter UNet2DModel, attention on the two lower levels."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=32,
    )


def denoiser(
    model: torch.nn.Module,
    phases: list[tuple[float, torch.Tensor]],
    seconds: float,
    work: Path,
    seed: int,
    lr: float,
) -> torch.nn.Module:
    """Train `model`, which is given nothing but noisy latents and timesteps."""
    return diffusion.denoiser(model, phases, lambda *_: {}, seconds, work, seed, lr)


def build_pipe(unet: torch.nn.Module, vae: torch.nn.Module) -> Any:
    """Assemble the stock pipeline."""
    from diffusers import LDMPipeline

    return LDMPipeline(vqvae=vae, unet=unet, scheduler=diffusion.build_scheduler())


def run(order: Order) -> Trained:
    """Train `ldm4` from nothing, or an exported folder of it on."""
    work = order.folder("ldm4")
    images, domain = read_glyphs(work, order.device)
    if order.init is None:
        unet, vae, encoder, seconds = _from_nothing(images, domain, order, work)
    else:
        unet, vae, encoder, seconds = _on_from(order.init, domain, order, work)
    views, _ = encode(vae, domain, order.seed, **MILD)
    return Trained(
        pipe=build_pipe(unet, vae),
        encoder=encoder,
        views=views,
        seconds=seconds,
        glyphs=len(domain),
        steps=STEPS,
        moments=kept(work, "denoiser"),
    )


Parts = tuple[torch.nn.Module, torch.nn.Module, Encoder, dict[str, float]]
"""Denoiser, autoencoder, feature extractor, and the seconds spent on each stage."""


def _from_nothing(images: torch.Tensor, domain: torch.Tensor, order: Order, work: Path) -> Parts:
    """Run every stage of the recipe.

    Widely varied views train the denoiser first, mildly varied ones last: few samples are enough
    then to draw glyphs that one recognises.
    """
    seed = order.seed
    share = {"autoencoder": 0.17, "features": 0.06, "denoiser": 0.77}
    seconds = {stage: 60 * order.minutes * part for stage, part in share.items()}
    vae = autoencoder(domain, seconds["autoencoder"], work, seed)
    encoder = features.fit(images, seconds["features"], work, seed)
    _, wide = encode(vae, domain, seed, **WIDE)
    mean, std = wide.mean((0, 2, 3)), wide.std((0, 2, 3))
    standardise(vae, mean, std)
    wide = (wide - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    _, mild = encode(vae, domain, seed, **MILD)
    torch.manual_seed(seed)
    phases = [(0.6, wide), (math.inf, mild)]
    unet = denoiser(build_denoiser(), phases, seconds["denoiser"], work, seed, RATE)
    return unet, vae, encoder, seconds


def _on_from(folder: Path, domain: torch.Tensor, order: Order, work: Path) -> Parts:
    """Train the denoiser of an exported folder on; its autoencoder and features stay.

    So the latents and the reference statistics keep their meaning. Mildly varied views only, at
    half the recipe's learning rate.
    """
    from diffusers import UNet2DModel, VQModel

    encoder = features.load(folder)
    vae = load_module(VQModel, folder / "vqvae").to(domain.device)
    unet = load_module(UNet2DModel, folder / "unet")
    _, mild = encode(vae, domain, order.seed + 1, **MILD | {"count": 36})
    seconds = 60 * order.minutes
    unet = denoiser(unet, [(math.inf, mild)], seconds, work, order.draws(), order.rate(RATE))
    return unet, vae, encoder, {"denoiser": seconds}


def read_glyphs(work: Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all glyphs and those of ldm4's domain, (n, 3, 128, 128) in [-1, 1]."""
    every = glyphs.read_names()
    cached = work / "glyphs.pt"
    if not cached.is_file():
        torch.save(glyphs.render(every).mul(127.5).add(127.5).round().byte(), cached)
    images = (torch.load(cached, weights_only=True).to(device).float() / 127.5) - 1
    domain = [i for i, glyph in enumerate(every) if glyph.group in glyphs.LDM4_GROUPS]
    return images, images[domain]
