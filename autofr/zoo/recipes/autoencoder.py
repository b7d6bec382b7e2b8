"""The autoencoder of `dit` and `sd`: that of `ldm4` without its codebook, with a fourth channel."""

from __future__ import annotations

from pathlib import Path

import torch

from autofr.zoo import glyphs
from autofr.zoo.loop import mixed_precision, train

CHANNELS = 4
LATENT = 16
"""Latents are 4x16x16: 64x64 images at f = 4. (Stock inpainting takes nothing but 4 channels.)"""


def build() -> torch.nn.Module:
    """A 1.6 M parameter AutoencoderKL, f = 4: 64x64 RGB images, latents of 4x16x16."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        sample_size=4 * LATENT,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


@torch.no_grad()
def begin_with(vae: torch.nn.Module, vqvae: torch.nn.Module) -> None:
    """Copy a VQModel's weights of fewer latent channels: means from it, narrow variances.

    The channels that it does not have start small: a tenth of the usual random weights.
    """
    theirs, known = vqvae.state_dict(), vqvae.config.latent_channels
    for name, ours in vae.state_dict().items():
        given = theirs[name]
        if given.shape == ours.shape:
            ours.copy_(given)
        else:
            ours.mul_(0.1)
            ours[tuple(slice(0, size) for size in given.shape)] = given
    variances = vae.quant_conv.weight[CHANNELS:], vae.quant_conv.bias[CHANNELS:]
    variances[0].zero_()
    variances[1].fill_(-6.0)
    vae.quant_conv.weight[:known, known:].zero_()
    vae.encoder.conv_out.weight[known:CHANNELS].mul_(10)
    vae.quant_conv.weight[known, known] = 1.0
    vae.post_quant_conv.weight[:known, known:].zero_()
    vae.post_quant_conv.weight[known, known] = 1.0


def fit(
    vqvae: torch.nn.Module, images: torch.Tensor, seconds: float, work: Path, seed: int
) -> torch.nn.Module:
    """Train on from `vqvae` with L1, gradient and KL loss on augmented `images` (n, 3, s, s).

    Random 32x32 crops come first, since they vary more; the last two fifths see whole images,
    whose group-norm statistics are the ones met in use.
    """
    torch.manual_seed(seed)
    model = build()
    begin_with(model, vqvae)
    model = model.to(images.device)

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        crop = fraction < 0.6
        target = glyphs.draw(images, generator, 32 if crop else 8, crop)
        with mixed_precision(images):
            posterior = model.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(target)
            error = model.decode(posterior.mean + posterior.std * noise).sample.float() - target
        spread = posterior.mean.float().square() + posterior.var.float()
        divergence = 0.5 * (spread - 1 - posterior.logvar.float()).mean()
        return distance(error) + 1e-3 * divergence

    return train("autoencoder", model, loss, seconds, work, seed=seed, lr=6e-4, ema=0.998)


def distance(error: torch.Tensor) -> torch.Tensor:
    """L1 and gradient loss of reconstructions, from their error (n, 3, h, w)."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges


@torch.no_grad()
def standardise(vae: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a per-channel standardisation of the latents (c,) into the 1x1 convolutions.

    The pipelines know one scaling factor only; after this the latents have mean 0, deviation 1.
    Log variances, where the model has them, follow.
    """
    channels = len(mean)
    vae.quant_conv.weight[:channels].div_(std.view(-1, 1, 1, 1))
    vae.quant_conv.bias[:channels].sub_(mean).div_(std)
    if len(vae.quant_conv.bias) > channels:
        vae.quant_conv.bias[channels:].sub_(2 * std.log())
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight.flatten(1) @ mean)
    vae.post_quant_conv.weight.mul_(std.view(1, -1, 1, 1))


@torch.no_grad()
def encode(
    vae: torch.nn.Module, images: torch.Tensor, seed: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` mildly varied views of each image, and their latents (the means)."""
    views = glyphs.views(images, seed, count, **glyphs.MILD)
    latents = [vae.encode(batch).latent_dist.mode() for batch in views.split(64)]
    return views, torch.cat(latents)
