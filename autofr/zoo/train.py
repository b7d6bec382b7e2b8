"""The recipe that trained the bundled models: `python -m autofr.zoo.train ldm4`.

Stages: autoencoder, feature extractor, denoiser (on latents standardised per channel), export.
Every stage resumes from its checkpoint under `--work`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer

from autofr.quality import Encoder, load_features
from autofr.zoo import glyphs
from autofr.zoo.loop import train

FEATURE_CHANNELS = 64
WIDE: dict[str, Any] = {"count": 24}
MILD: dict[str, Any] = {"count": 12, "rotate": 4.0, "scale": (0.92, 1.0), "shift": 0.02}


def mixed_precision(like: torch.Tensor) -> torch.autocast:
    """bf16 where it is safe: twice as fast on CPUs with AVX512-BF16 or AMX, and on GPUs."""
    return torch.autocast(like.device.type, torch.bfloat16)


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

    def draw(generator: torch.Generator, count: int, crop: bool) -> torch.Tensor:
        pick = torch.randint(len(images), (count,), generator=generator).to(images.device)
        whole = glyphs.augment(images[pick], generator)
        if not crop:
            return whole
        corner = torch.randint(0, 33, (2,), generator=generator)
        return whole[:, :, corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        if fraction > 0.2 and not filled:
            fill_codebook(model, draw(generator, 256, crop=True), generator)
            filled.data.fill_(1)
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

    train("autoencoder", model, loss, seconds, work, seed=seed, lr=1e-3, ema=0.998)
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

    train("features", both, loss, seconds, work, seed=seed, lr=2e-3)
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


def draw_times(count: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps to train at, shape (count,): half uniform, half where shapes are decided.

    The second half follows a logit-normal around 0.45 of the schedule (as in Esser et al. 2024,
    "Scaling Rectified Flow Transformers", section 3.1): there the signal is between a thirtieth
    of the noise's power and its equal, which is where one glyph becomes that one and no other.
    """
    uniform = torch.rand(count, generator=generator)
    middle = torch.sigmoid(0.9 * torch.randn(count, generator=generator) - 0.2)
    chosen = torch.where(torch.arange(count) < count // 2, uniform, middle)
    return (chosen * steps).long().clamp_max(steps - 1)


def denoiser(
    model: torch.nn.Module,
    phases: list[tuple[float, torch.Tensor]],
    seconds: float,
    work: Path,
    seed: int,
    lr: float,
) -> torch.nn.Module:
    """Train `model` to predict the noise (DDPM's simple loss), with an average of weights.

    `phases` are (share of the time at which it ends, latents (n, 3, 16, 16)).
    """
    device = phases[0][1].device
    model = model.to(device)
    signal = build_scheduler().alphas_cumprod.to(device)
    count = 32 if device.type == "cpu" else 256

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        latents = next(latents for end, latents in phases if fraction < end)
        pick = torch.randint(len(latents), (count,), generator=generator).to(device)
        time = draw_times(count, len(signal), generator).to(device)
        clean = latents[pick]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = signal[time].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        with mixed_precision(latents):
            predicted = model(noisy, time).sample
        return F.mse_loss(predicted.float(), noise)

    return train("denoiser", model, loss, seconds, work, seed=seed, lr=lr, ema=0.999)


class Trained(NamedTuple):
    """What a recipe makes: the pipeline's modules, the feature extractor and the seconds spent."""

    unet: torch.nn.Module
    vae: torch.nn.Module
    encoder: Encoder
    seconds: dict[str, float]


def train_from_nothing(
    images: torch.Tensor, domain: torch.Tensor, minutes: float, work: Path, seed: int
) -> Trained:
    """Run every stage of the recipe.

    Widely varied views train the denoiser first, mildly varied ones last: few samples are enough
    then to draw glyphs that one recognises.
    """
    share = {"autoencoder": 0.17, "features": 0.06, "denoiser": 0.77}
    seconds = {stage: 60 * minutes * part for stage, part in share.items()}
    vae = autoencoder(domain, seconds["autoencoder"], work, seed)
    encoder = features(images, seconds["features"], work, seed)
    _, wide = encode(vae, domain, seed, **WIDE)
    mean, std = wide.mean((0, 2, 3)), wide.std((0, 2, 3))
    standardise(vae, mean, std)
    wide = (wide - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    _, mild = encode(vae, domain, seed, **MILD)
    torch.manual_seed(seed)
    phases = [(0.6, wide), (math.inf, mild)]
    unet = denoiser(build_denoiser(), phases, seconds["denoiser"], work, seed, lr=1e-3)
    return Trained(unet, vae, encoder, seconds)


def _load(kind: Any, folder: Path) -> torch.nn.Module:
    """Load a module in float32, without the note of its folder that would be exported again."""
    saved = kind.from_pretrained(folder)
    module = kind.from_config({k: v for k, v in saved.config.items() if k != "_name_or_path"})
    module.load_state_dict(saved.float().state_dict())
    return module


def train_on(folder: Path, domain: torch.Tensor, minutes: float, work: Path, seed: int) -> Trained:
    """Train the denoiser of an exported folder on; its autoencoder and features stay.

    So the latents and the reference statistics keep their meaning. Mildly varied views only, at
    half the recipe's learning rate.
    """
    from diffusers import UNet2DModel, VQModel

    vae = _load(VQModel, folder / "vqvae").eval().to(domain.device)
    unet = _load(UNet2DModel, folder / "unet")
    bundled = load_features(folder)
    if bundled is None or not isinstance(bundled.encoder, Encoder):
        raise typer.BadParameter(f"--init {folder}: no features.safetensors beside the weights")
    _, mild = encode(vae, domain, seed + 1, **MILD | {"count": 36})
    seconds = 60 * minutes
    unet = denoiser(unet, [(math.inf, mild)], seconds, work, seed, lr=5e-4)
    return Trained(unet, vae, bundled.encoder, {"denoiser": seconds})


def read_glyphs(work: Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all glyphs and those of ldm4's domain, (n, 3, 128, 128) in [-1, 1]."""
    every = glyphs.read_names()
    cached = work / "glyphs.pt"
    if not cached.is_file():
        torch.save(glyphs.render(every).mul(127.5).add(127.5).round().byte(), cached)
    images = (torch.load(cached, weights_only=True).to(device).float() / 127.5) - 1
    domain = [i for i, glyph in enumerate(every) if glyph.group in glyphs.LDM4_GROUPS]
    return images, images[domain]


def main(
    model: Annotated[str, typer.Argument(help="name of the bundled model to train")] = "ldm4",
    minutes: Annotated[float, typer.Option(help="training time, all stages together")] = 120,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    work: Annotated[Path, typer.Option(help="checkpoints; the same folder resumes")] = Path("work"),
    out: Annotated[Path, typer.Option(help="folder of the exported pipeline")] = Path(
        "work/export"
    ),
    init: Annotated[
        Path | None, typer.Option(help="exported folder whose denoiser is trained on")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of every stage")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train a bundled model: autoencoder, features, denoiser, export."""
    if model != "ldm4":
        raise typer.BadParameter(f"no recipe for {model!r}; recipes: ldm4")
    torch.set_num_threads(threads)
    work = work / model
    work.mkdir(parents=True, exist_ok=True)
    images, domain = read_glyphs(work, device)
    recipe: dict[str, Any] = dict(minutes=minutes, device=device, seed=seed, glyphs=len(domain))
    if init is None:
        trained = train_from_nothing(images, domain, minutes, work, seed)
    else:
        trained = train_on(init, domain, minutes, work, seed)
        recipe["after"] = json.loads((init / "expected.json").read_text())["recipe"]
    recipe["seconds"] = trained.seconds
    views, _ = encode(trained.vae, domain, seed, **MILD)
    from autofr.zoo.export import export

    export(
        out / model, trained.unet, trained.vae, build_scheduler(), trained.encoder, views, recipe
    )
    typer.echo(json.dumps(recipe))


if __name__ == "__main__":
    typer.run(main)
