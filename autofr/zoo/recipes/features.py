"""The feature extractor of all bundled models: the offline stand-in for Inception."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from autofr.errors import UserError
from autofr.measure.quality import Encoder, load_features
from autofr.zoo import glyphs
from autofr.zoo.loop import train

CHANNELS = 64


def fit(images: torch.Tensor, seconds: float, work: Path, seed: int) -> Encoder:
    """Train the bundled feature extractor to tell all glyphs apart under strong augmentation."""
    torch.manual_seed(seed)
    encoder = Encoder(CHANNELS).to(images.device)
    classes = torch.nn.Linear(CHANNELS, len(images), bias=False).to(images.device)
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


def load(folder: Path) -> Encoder:
    """The extractor of an exported folder.

    Raises: UserError when there is none.
    """
    found = load_features(folder)
    if found is None or not isinstance(found.encoder, Encoder):
        raise UserError(f"--init {folder}: no features.safetensors beside the weights")
    return found.encoder
