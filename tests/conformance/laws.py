"""What the laws need: tiny models under a patch without a plan, and how far two scores differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import Tiny
from tiny_image import IMAGE
from tiny_unet import UNET
from tiny_video import VIDEO
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autofr.runtime.families import discover
from autofr.runtime.patch import Patch
from autofr.runtime.points import Point
from autofr.runtime.store import tensors_in

ALL: dict[str, Tiny] = UNET | IMAGE | VIDEO


def patched(model: nn.Module, masks: list[list[Point]]) -> Patch:
    """Hooks on a bare denoiser; the caller sets the mode of each call."""
    pipe: Any = SimpleNamespace(transformer=model, scheduler=object())
    return Patch(pipe, masks).install()


@torch.no_grad()
def score(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The denoiser's output for a call, as tensors."""
    return list(tensors_in(model(**inputs)[0]))


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest relative L2 distance of the tensors of two scores."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def counted(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
    """The denoiser's output for a call, and how many multiplications it took."""
    with FlopCounterMode(display=False) as counter:
        found = score(model, inputs)
    return found, counter.get_total_flops()


def points_of(name: str) -> tuple[nn.Module, dict[str, Point]]:
    """A tiny model and its points."""
    model = ALL[name].build()
    return model, discover(model)


def state(model: nn.Module) -> dict[str, set[str]]:
    """Names of every attribute and hook of every module: what a patch could leave behind."""
    return {
        path: {
            *vars(module),
            *map(str, module._forward_hooks),
            *map(str, module._forward_pre_hooks),
        }
        for path, module in model.named_modules()
    }
