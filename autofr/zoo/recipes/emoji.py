"""What `dit` and `sd` share: the glyphs that they know, and the autoencoder trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autofr.measure.quality import Encoder
from autofr.zoo import glyphs
from autofr.zoo.recipe import Order, load_module
from autofr.zoo.recipes import autoencoder, features

SUBGROUPS = (
    "transport-ground", "transport-water", "transport-air", "sky & weather", "event", "sport",
    "award-medal", "geometric", "arrow", "zodiac",
)  # fmt: skip
"""Known besides the groups of `ldm4`; what a model draws is a part."""
LDM4 = Path(__file__).parents[1] / "ldm4"
MINUTES = 9.0
COUNT = 24  # views of each glyph that the denoisers are trained on


class Domain(NamedTuple):
    """Glyphs with their images (n, 3, 128, 128) in [-1, 1]."""

    glyphs: list[glyphs.Glyph]
    images: torch.Tensor

    def of(self, subgroups: Sequence[str]) -> Domain:
        """The part of it that belongs to some subgroups."""
        rows = [row for row, glyph in enumerate(self.glyphs) if glyph.subgroup in subgroups]
        return Domain([self.glyphs[row] for row in rows], self.images[rows])

    def by_group(self) -> dict[str, list[str]]:
        """The names of its glyphs by Unicode's groups."""
        groups = dict.fromkeys(glyph.group for glyph in self.glyphs)
        return {
            group: [glyph.name for glyph in self.glyphs if glyph.group == group] for group in groups
        }


class Encoded(NamedTuple):
    """Views (v, 3, 64, 64) in [-1, 1], their latents (v, 4, 16, 16), and whose views they are."""

    views: torch.Tensor
    latents: torch.Tensor
    rows: torch.Tensor


def domain(device: str) -> Domain:
    """The glyphs that the autoencoder and the text towers are trained on, rendered."""
    every = glyphs.read_names()
    some = [g for g in every if g.group in glyphs.LDM4_GROUPS or g.subgroup in SUBGROUPS]
    return Domain(some, glyphs.render(some).to(device))


class Shared(NamedTuple):
    """The domain, the autoencoder of its images, and the feature extractor, which is `ldm4`'s.

    `seconds` says what was trained here, and for how long.
    """

    domain: Domain
    vae: torch.nn.Module
    encoder: Encoder
    seconds: dict[str, float]


def prepare(order: Order) -> Shared:
    """Train what `dit` and `sd` share, or read it from the folder that is trained on."""
    from diffusers import AutoencoderKL, VQModel

    if order.init is not None:
        encoder = features.load(order.init).to(order.device)
        vae = load_module(AutoencoderKL, order.init / "vae").to(order.device)
        return Shared(domain(order.device), vae, encoder, {})
    found = domain(order.device)
    start = load_module(VQModel, LDM4 / "vqvae")
    vae = _trained(start, found, order.folder("emoji"), order.seed)
    encoder = features.load(LDM4).to(order.device)
    return Shared(found, vae, encoder, {"autoencoder": 60 * MINUTES})


def _trained(vqvae: Any, found: Domain, work: Path, seed: int) -> torch.nn.Module:
    """Train the autoencoder on from `ldm4`'s, and scale its latents to mean 0, deviation 1."""
    vae = autoencoder.fit(vqvae, found.images, 60 * MINUTES, work, seed)
    _, latents = autoencoder.encode(vae, found.images, seed, count=4)
    autoencoder.standardise(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return vae


def encode(vae: torch.nn.Module, images: torch.Tensor, seed: int) -> Encoded:
    """Views of `images`, mildly varied, and their latents."""
    views, latents = autoencoder.encode(vae, images, seed, COUNT)
    return Encoded(views, latents, torch.arange(len(images)).repeat(COUNT))
