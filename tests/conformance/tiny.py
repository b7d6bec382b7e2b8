"""What the conformance suite needs to know of a tiny model of a real diffusers class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Tiny:
    """`build()` gives a seeded float32 eval model on the CPU; `inputs(seed, time, batch)` the
    keyword arguments of one denoiser call.

    `time` runs from 0 (clean) to 1 (noise); the inputs hold what the class wants for it. The
    first argument is the latent, the only one that depends on the seed.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, float, int], dict[str, Any]]
    prediction: str  # "epsilon", "v_prediction" or "flow_prediction"


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew and return the model, frozen and in eval mode.

    Real models start with zero gates and output projections, behind which a block does nothing;
    here every sub-layer changes the output.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.data = noise / value[0].numel() ** 0.5
        else:
            value.data = 0.1 * noise + float(name.endswith("weight"))  # of a norm
    return model.eval().requires_grad_(False)
