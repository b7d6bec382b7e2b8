"""The recipe that trained the bundled models: `python -m autofr.zoo.train ldm4`.

Stages: autoencoder, feature extractor, denoiser (on latents standardised per channel), export.
Every stage resumes from its checkpoint under `--work`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from autofr.quality import Encoder
from autofr.zoo import glyphs
from autofr.zoo.loop import train

FEATURE_CHANNELS = 64
WIDE = {"count": 24}
MILD = {"count": 12, "rotate": 4.0, "scale": (0.92, 1.0), "shift": 0.02}


def mixed_precision(like: torch.Tensor) -> torch.autocast:
    """bf16 where it is safe: twice as fast on CPUs with AVX512-BF16 or AMX, and on GPUs."""
    return torch.autocast(like.device.type, torch.bfloat16)


def autoencoder(images: torch.Tensor, seconds: float, work: Path, seed: int) -> torch.nn.Module:
    """Train a stock VQModel (f = 4) with L1 and gradient loss.

    For the first fifth of the time the quantiser is bypassed; then its codebook is filled with
    latents of the data, which spares the dead codes of a random start. Random 32x32 crops come
    first, since they vary more; the last quarter sees whole images, whose group-norm statistics
    are the ones met in use.
    """
    from diffusers import VQModel

    torch.manual_seed(seed)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=3,
        sample_size=64,
        num_vq_embeddings=2048,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).to(images.device)
    filled = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    model.register_parameter("codebook_filled", filled)

    def draw(generator: torch.Generator, count: int, crop: bool) -> torch.Tensor:
        pick = torch.randint(len(images), (count,), generator=generator).to(images.device)
        whole = glyphs.augment(images[pick], generator)
        if not crop:
            return whole
        corner = torch.randint(0, 33, (2,), generator=generator)
        return whole[:, :, corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]

    def fill_codebook(generator: torch.Generator) -> None:
        with torch.no_grad():
            latents = (
                model.encode(draw(generator, 256, crop=True))
                .latents.permute(0, 2, 3, 1)
                .reshape(-1, 3)
            )
            pick = torch.randperm(len(latents), generator=generator)[:2048].to(images.device)
            noise = torch.randn(2048, 3, generator=generator).to(images.device)
            model.quantize.embedding.weight.copy_(latents[pick] + 0.05 * latents.std() * noise)
            filled.fill_(1)

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        if fraction > 0.2 and not filled:
            fill_codebook(generator)
        crop = fraction < 0.73
        target = draw(generator, 32 if crop else 8, crop)
        with mixed_precision(images):
            latents = model.encode(target).latents
        latents = latents.float()
        codes, commitment, _ = (
            model.quantize(latents) if filled else (latents, torch.zeros(()), None)
        )
        with mixed_precision(images):
            error = model.decoder(model.post_quant_conv(codes)).float() - target
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        small = 1e-3 * latents.square().mean()
        return error.abs().mean() + edges + commitment.to(error) + small

    checkpoint = work / "autoencoder.pt"
    train(
        "autoencoder",
        model,
        loss,
        seconds=seconds,
        checkpoint=checkpoint,
        lr=1e-3,
        seed=seed,
        ema=0.998,
    )
    del model._parameters["codebook_filled"]
    return model


def features(images: torch.Tensor, seconds: float, work: Path, seed: int) -> Encoder:
    """Train the bundled feature extractor to tell all glyphs apart under strong augmentation."""
    torch.manual_seed(seed)
    encoder = Encoder(FEATURE_CHANNELS).to(images.device)
    classes = torch.nn.Linear(FEATURE_CHANNELS, len(images), bias=False).to(images.device)
    both = torch.nn.ModuleDict({"encoder": encoder, "classes": classes})

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(images), (64,), generator=generator).to(images.device)
        view = glyphs.augment(images[pick], generator, rotate=25, scale=(0.6, 1.1), shift=0.1)
        shape = (64, 3, 1, 1)
        gain = 1 + 0.3 * (2 * torch.rand(shape, generator=generator) - 1).to(view)
        offset = 0.2 * torch.randn(shape, generator=generator).to(view)
        level = 0.15 * torch.rand((64, 1, 1, 1), generator=generator).to(view)
        noise = torch.randn(view.shape, generator=generator).to(view)
        embedded = both["encoder"]((view * gain + offset + level * noise) / 2 + 0.5)
        logits = F.normalize(embedded, dim=1) @ F.normalize(both["classes"].weight, dim=1).T
        return F.cross_entropy(16 * logits, pick) + 1e-3 * (embedded.square().mean() - 1).square()

    checkpoint = work / "features.pt"
    train("features", both, loss, seconds=seconds, checkpoint=checkpoint, lr=2e-3, seed=seed)
    return both["encoder"].eval()


@torch.no_grad()
def encode(
    vae: torch.nn.Module, images: torch.Tensor, seed: int, count: int, **affine: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` augmented views of each glyph and their latents."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.cat([glyphs.augment(images, generator, **affine) for _ in range(count)])
    latents = torch.cat([vae.encode(batch).latents for batch in views.split(64)])
    return views, latents


@torch.no_grad()
def standardise(vae: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a per-channel standardisation of the latents into the 1x1 convolutions and codebook.

    LDMPipeline knows one scalar only; after this the latents have mean 0 and deviation 1.
    """
    vae.quant_conv.weight.div_(std.view(3, 1, 1, 1))
    vae.quant_conv.bias.sub_(mean).div_(std)
    vae.quantize.embedding.weight.sub_(mean).div_(std)
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight.flatten(1) @ mean)
    vae.post_quant_conv.weight.mul_(std.view(1, 3, 1, 1))


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


def build_scheduler() -> Any:
    """DDIM with the noise levels of the public LDM-4 (scaled linear, 0.0015 to 0.0195).

    Trailing timesteps: every step count starts at the same noise, so that fewer steps are a fair
    floor.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def denoiser(
    wide: torch.Tensor, mild: torch.Tensor, seconds: float, work: Path, seed: int
) -> torch.nn.Module:
    """Train the denoiser to predict the noise (DDPM's simple loss), with an average of weights.

    Widely varied views come first, mildly varied ones last: few samples are enough then to draw
    glyphs that one recognises.
    """
    torch.manual_seed(seed)
    model = build_denoiser().to(wide.device)
    signal = build_scheduler().alphas_cumprod.to(wide.device)

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        latents = wide if fraction < 0.6 else mild
        count = 32 if latents.device.type == "cpu" else 256
        clean = latents[
            torch.randint(len(latents), (count,), generator=generator).to(latents.device)
        ]
        time = torch.randint(len(signal), (count,), generator=generator).to(latents.device)
        noise = torch.randn(clean.shape, generator=generator).to(latents.device)
        level = signal[time].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        with mixed_precision(latents):
            predicted = model(noisy, time).sample
        return F.mse_loss(predicted.float(), noise)

    checkpoint = work / "denoiser.pt"
    return train(
        "denoiser",
        model,
        loss,
        seconds=seconds,
        checkpoint=checkpoint,
        lr=1e-3,
        seed=seed,
        ema=0.999,
    )


def main(
    model: Annotated[str, typer.Argument(help="name of the bundled model to train")] = "ldm4",
    minutes: Annotated[float, typer.Option(help="training time, all stages together")] = 120,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    work: Annotated[Path, typer.Option(help="checkpoints; the same folder resumes")] = Path("work"),
    out: Annotated[Path, typer.Option(help="folder of the exported pipeline")] = Path(
        "work/export"
    ),
    seed: Annotated[int, typer.Option(help="seed of every stage")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train a bundled model from nothing: autoencoder, features, denoiser, export."""
    if model != "ldm4":
        raise typer.BadParameter(f"no recipe for {model!r}; recipes: ldm4")
    torch.set_num_threads(threads)
    work = work / model
    work.mkdir(parents=True, exist_ok=True)
    every = glyphs.read_names()
    domain = [i for i, glyph in enumerate(every) if glyph.group in glyphs.LDM4_GROUPS]
    cached = work / "glyphs.pt"
    if not cached.is_file():
        torch.save(glyphs.render(every).mul(127.5).add(127.5).round().byte(), cached)
    images = (torch.load(cached, weights_only=True).to(device).float() / 127.5) - 1
    share = {"autoencoder": 0.17, "features": 0.06, "denoiser": 0.77}
    seconds = {stage: 60 * minutes * part for stage, part in share.items()}
    vae = autoencoder(images[domain], seconds["autoencoder"], work, seed)
    encoder = features(images, seconds["features"], work, seed)
    _, wide = encode(vae, images[domain], seed, **WIDE)
    mean, std = wide.mean((0, 2, 3)), wide.std((0, 2, 3))
    standardise(vae, mean, std)
    wide = (wide - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    views, mild = encode(vae, images[domain], seed, **MILD)
    unet = denoiser(wide, mild, seconds["denoiser"], work, seed)
    recipe = dict(minutes=minutes, device=device, seed=seed, glyphs=len(domain), seconds=seconds)
    from autofr.zoo.export import export

    export(out / model, unet, vae, build_scheduler(), encoder, views, recipe)
    typer.echo(json.dumps(recipe))


if __name__ == "__main__":
    typer.run(main)
