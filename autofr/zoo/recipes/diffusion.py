"""Training of denoisers: noise levels, timesteps and the loss that all recipes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from autofr.zoo.loop import mixed_precision, train

MOMENTS = 5  # of training, whose scores show whether more of it would help

Condition = Callable[[torch.Tensor, torch.Generator], Mapping[str, Any]]
"""(picked rows, generator) -> what the model is given beside noisy latents and timesteps."""


def build_scheduler(**more: Any) -> Any:
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
        **more,
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
    condition: Condition,
    seconds: float,
    work: Path,
    seed: int,
    lr: float,
) -> torch.nn.Module:
    """Train `model` to predict the noise (DDPM's simple loss), with an average of weights.

    `phases` are (share of the time at which it ends, latents (n, c, h, w)). Channels beyond those
    that the model predicts get no noise: it reads them as they are.
    """
    device, channels = phases[0][1].device, model.config.out_channels
    model = model.to(device)
    signal = build_scheduler().alphas_cumprod.to(device)
    count = 32 if device.type == "cpu" else 256

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        latents = next(latents for end, latents in phases if fraction < end)
        pick = torch.randint(len(latents), (count,), generator=generator)
        time = draw_times(count, len(signal), generator).to(device)
        clean, beside = latents[pick.to(device)].tensor_split([channels], 1)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = signal[time].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        with mixed_precision(latents):
            given = torch.cat([noisy, beside], 1)
            predicted = model(given, timestep=time, **condition(pick, generator)).sample
        return F.mse_loss(predicted.float(), noise)

    return train(
        "denoiser", model, loss, seconds, work, seed=seed, lr=lr, ema=0.999, moments=MOMENTS
    )


def dropped(count: int, generator: torch.Generator, share: float = 0.1) -> torch.Tensor:
    """Which of `count` conditions are left out, for classifier-free guidance (Ho & Salimans)."""
    return torch.rand(count, generator=generator) < share
