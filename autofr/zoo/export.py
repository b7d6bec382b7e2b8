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
    for module in (pipe.unet, pipe.vqvae, encoder.cpu()):
        module.half().float()  # what is measured below is what is shipped
    real = (views.cpu() / 2 + 0.5).clamp(0, 1)
    unnamed = Features(encoder.eval(), Reference(torch.zeros(0), torch.zeros(0), 0), "")
    embedded = unnamed(real)
    features = Features(encoder, Reference.of(embedded), "bundled")
    half = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    halves = [embedded[half[: len(real) // 2]], embedded[half[len(real) // 2 :]]]
    some = real[half[:SAMPLES]]
    rebuilt = torch.cat([vae(batch * 2 - 1).sample for batch in some.split(64)]) / 2 + 0.5
    drawn = []
    for start in range(0, SAMPLES, 64):
        generators = [torch.Generator().manual_seed(10**6 + start + i) for i in range(64)]
        images = pipe(64, num_inference_steps=50, generator=generators, output_type="np").images
        drawn.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    first = Features(encoder, Reference.of(halves[0]), "half")
    expected = {
        "features": "bundled ldm4 features (64-d); not comparable with Inception FID",
        "samples": SAMPLES,
        "steps": 50,
        "fid_teacher": round(features.fid(features(torch.cat(drawn))), 3),
        "fid_autoencoder": round(features.fid(features(rebuilt.clamp(0, 1))), 3),
        "fid_real_sample": round(features.fid(embedded[half[:SAMPLES]]), 3),
        "fid_two_halves": round(first.fid(halves[1]), 4),
        "autoencoder_l1": round(float((rebuilt - some).abs().mean()) * 2, 4),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "recipe": recipe,
        "date": time.strftime("%Y-%m-%d"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pipe.to(torch.float16).save_pretrained(folder)
    pipe.to(torch.float32)
    save_file(
        {k: v.half() for k, v in encoder.state_dict().items()}, folder / "features.safetensors"
    )
    reference = features.reference
    save_file(
        {
            "mean": reference.mean.float(),
            "covariance": reference.covariance.float(),
            "count": torch.tensor(reference.count),
        },
        folder / "reference.safetensors",
    )
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (folder / "README.md").write_text(CARD.read_text(encoding="utf-8").format(**expected))
