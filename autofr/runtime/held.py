"""What is held of a score: the noise (or velocity) that it stands for.

Between steps of a noise schedule the predicted noise changes least, and holding it makes Jump with
DDIM sampling on the keyframes alone (FRDiff, section 4.1, is written for ε-prediction). Networks
that predict v, the clean sample, or EDM's F are therefore held as noise; flow matching holds its
velocity, which Euler steps along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Form:
    """`noise = p * given + q * score`, with the denoiser's input `given`, at one pass of the loop.

    Where score and input differ in size (inpainting's masks, learned variances), the part that both
    have is converted, and the rest stays as it is. Noises have single precision at least: at SVD's
    first levels all that a score says is in the last digits.
    """

    p: float
    q: float

    def noise(self, given: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        """The noise that a score stands for; a fresh tensor of the score's shape."""
        held, both = _precise(score), _both(given, score)
        held[both].mul_(self.q).add_(given[both], alpha=self.p)
        return held

    def score(self, given: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The score that stands for a noise here: the inverse of `noise`, in the input's type."""
        found, both = _precise(noise), _both(given, noise)
        found[both].sub_(given[both], alpha=self.p).div_(self.q)
        return found.to(given.dtype)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _both(given: torch.Tensor, score: torch.Tensor) -> tuple[slice, ...]:
    sizes = zip(given.shape, score.shape, strict=True)
    return tuple(slice(min(pair)) for pair in sizes)


def forms(scheduler: Any) -> list[Form] | None:
    """The form of each pass of the loop, after `set_timesteps`; None where scores stay as is."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    edm = hasattr(scheduler, "precondition_outputs")
    if not edm and kind not in ("v_prediction", "sample"):
        return None
    sigmas = noise_levels(scheduler)
    if edm:
        data = float(scheduler.config.get("sigma_data", 0.5))
        slope = -data if kind == "epsilon" else data
        sizes = np.sqrt(sigmas**2 + data**2)
        return [Form(float(s / r), slope / float(r)) for s, r in zip(sigmas, sizes, strict=True)]
    signal = 1 / np.sqrt(1 + sigmas**2)
    noise = np.sqrt(np.clip(1 - signal**2, 1e-8, 1))
    rows = zip(map(float, signal), map(float, noise), strict=True)
    if kind == "sample":
        return [Form(1 / s, -a / s) for a, s in rows]
    return [Form(s, a) for a, s in rows]


def noise_levels(scheduler: Any) -> np.ndarray:
    """Noise over signal, σ, at each pass of the loop."""
    passes = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= passes:
        found = _numbers(sigmas)[:passes]
        between = getattr(scheduler, "sigmas_interpol", None)
        if between is not None:  # KDPM2 takes its second stage between two of its levels
            found[1::2] = _numbers(between)[:passes][1::2]
        return found
    signal = _numbers(scheduler.alphas_cumprod)
    levels = np.log(np.sqrt(np.clip(1 - signal, 1e-12, 1) / np.clip(signal, 1e-12, 1)))
    return np.exp(np.interp(_numbers(scheduler.timesteps), np.arange(len(signal)), levels))


def _numbers(values: Any) -> np.ndarray:
    return torch.as_tensor(values).double().cpu().numpy().copy()
