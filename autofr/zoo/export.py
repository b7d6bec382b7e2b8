"""Write a trained model as a diffusers folder: weights, features, reference, card, expectations."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from autofr.quality import Encoder, Features, Reference

SAMPLES = 512
STEPS = 50
BATCH = 64
CARD = Path(__file__).with_name("card.md")


def build(unet: torch.nn.Module, vae: torch.nn.Module, scheduler: Any) -> Any:
    """Assemble the stock pipeline."""
    from diffusers import LDMPipeline

    pipe = LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def export(
    folder: Path,
    unet: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: Any,
    encoder: Encoder,
    views: torch.Tensor,
    recipe: dict[str, Any],
) -> None:
    """Save fp16 safetensors in diffusers' layout, and measure what the model is expected to score.

    `views` (n, 3, 64, 64) in [-1, 1] are the real images of the reference statistics.
    """
    pipe = build(unet.cpu().eval(), vae.cpu().eval(), scheduler)
    for module in (pipe.unet, pipe.vqvae, encoder.cpu().eval()):
        module.half().float()  # what is measured below is what is shipped
    real = (views.cpu() / 2 + 0.5).clamp(0, 1)
    unnamed = Features(encoder, Reference(torch.zeros(0), torch.zeros(0), 0), "")
    embedded = unnamed(real)
    features = Features(encoder, Reference.of(embedded), "bundled")
    scores = _measure(pipe, features, real, embedded)
    about = {"recipe": recipe, "date": time.strftime("%Y-%m-%d")}
    _write(folder, pipe, features, scores | about)


def _measure(
    pipe: Any, features: Features, real: torch.Tensor, embedded: torch.Tensor
) -> dict[str, Any]:
    """Score samples and reconstructions against `real` images, whose features are `embedded`."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    some, middle = order[:SAMPLES], len(real) // 2
    rebuilt = [pipe.vqvae(batch * 2 - 1).sample / 2 + 0.5 for batch in real[some].split(BATCH)]
    again = torch.cat(rebuilt)
    half = Features(features.encoder, Reference.of(embedded[order[:middle]]), "half")
    return {
        "features": "bundled ldm4 features (64-d); not comparable with Inception FID",
        "samples": SAMPLES,
        "steps": STEPS,
        "fid_teacher": round(features.fid(features(_draw(pipe))), 3),
        "fid_autoencoder": round(features.fid(features(again.clamp(0, 1))), 3),
        "fid_real_sample": round(features.fid(embedded[some]), 3),
        "fid_two_halves": round(half.fid(embedded[order[middle:]]), 4),
        "autoencoder_l1": round(float((again - real[some]).abs().mean()) * 2, 4),
        "parameters": sum(p.numel() for p in pipe.unet.parameters()),
    }


def _draw(pipe: Any) -> torch.Tensor:
    """Draw `SAMPLES` images (n, 3, h, w) in [0, 1] of fixed seeds."""
    drawn = []
    for start in range(0, SAMPLES, BATCH):
        seeds = range(10**6 + start, 10**6 + start + BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(
            BATCH, num_inference_steps=STEPS, generator=generators, output_type="np"
        ).images
        drawn.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(drawn)


def _write(folder: Path, pipe: Any, features: Features, expected: dict[str, Any]) -> None:
    """Write the pipeline, the extractor with its reference, the expectations and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.to(torch.float16).save_pretrained(folder)
    pipe.to(torch.float32)
    weights = {name: value.half() for name, value in features.encoder.state_dict().items()}
    save_file(weights, folder / "features.safetensors")
    reference = features.reference
    statistics = {
        "mean": reference.mean.float(),
        "covariance": reference.covariance.float(),
        "count": torch.tensor(reference.count),
    }
    save_file(statistics, folder / "reference.safetensors")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (folder / "README.md").write_text(CARD.read_text(encoding="utf-8").format(**expected))
