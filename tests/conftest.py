"""Tiny pipelines of the real diffusers classes, with random weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest
import torch
from postgres import postgres, server  # noqa: F401  (fixtures)

torch.set_num_threads(1)


ONCE = {"cli", "docs_commands", "export", "faults", "job", "report", "search", "workers"}
"""Files whose tests share what takes seconds to make: one process runs all of such a file."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal the tests out one by one, but the files of `ONCE` whole, and these first.

    `--dist loadgroup` and its marks would do, but pytest-xdist 3.8 loses them under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).stem.removeprefix("test_") in ONCE else nodeid

    return Scheduling(config, log)


def tiny_unet(channels: int = 3, beside: int = 0) -> diffusers.UNet2DModel:
    """Three levels, attention on the lower two, as in `ldm4`; `beside` channels are read alone."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels + beside,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return unet.eval().requires_grad_(False)


def tiny_vae() -> diffusers.VQModel:
    """f = 4, three latent channels."""
    torch.manual_seed(1)
    vae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    return vae.eval().requires_grad_(False)


def ddim() -> diffusers.DDIMScheduler:
    """The scheduler of `ldm4`."""
    return diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )


def make_pipe(kind: str = "ldm") -> diffusers.DiffusionPipeline:
    """A tiny pipe: ldm, ddim or ddpm."""
    if kind == "ldm":
        pipe = diffusers.LDMPipeline(unet=tiny_unet(), vqvae=tiny_vae(), scheduler=ddim())
    elif kind == "ddim":
        pipe = diffusers.DDIMPipeline(unet=tiny_unet(), scheduler=ddim())
    else:
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        pipe = diffusers.DDPMPipeline(unet=tiny_unet(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> diffusers.DiffusionPipeline:
    """A fresh tiny LDMPipeline."""
    return make_pipe()
