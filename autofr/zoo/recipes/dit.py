"""The recipe of `dit`: a diffusion transformer of emoji by group, in the stock DiTPipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from autofr.zoo.loop import kept
from autofr.zoo.recipe import Order, Trained, load_module
from autofr.zoo.recipes import diffusion, emoji
from autofr.zoo.recipes.autoencoder import CHANNELS, LATENT

CLASSES = {
    "smileys": (
        "face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses", "cat-face",
        "heart",
    ),
    "animals": ("animal-mammal",),
    "food": ("food-fruit", "food-sweet"),
    "travel": ("sky & weather",),
    "symbols": ("zodiac", "geometric"),
}  # fmt: skip
"""Five of Unicode's groups, each with the subgroups that so small a model draws well."""
STEPS = 30
GUIDANCE = 2.0
RATE = 7e-4  # learning rate of the denoiser, at its peak
NOBODY = 1000
"""The label of no class; DiTPipeline knows no other."""


def class_of(subgroup: str) -> int:
    """Number of the class that a subgroup of the domain belongs to."""
    return next(i for i, subgroups in enumerate(CLASSES.values()) if subgroup in subgroups)


def build() -> torch.nn.Module:
    """A 12.7 M parameter DiT of 8 blocks, 256 wide, 2x2 patches: 64 tokens.

    The modulations and the last layer start at zero (Peebles & Xie 2023, section 3.2, adaLN-Zero),
    which diffusers leaves to its users.
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=8,
        sample_size=LATENT,
        patch_size=2,
        num_embeds_ada_norm=NOBODY,
    )
    blocks = [block.norm1.linear for block in model.transformer_blocks]
    for layer in [*blocks, model.proj_out_1, model.proj_out_2]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    return model


def run(order: Order) -> Trained:
    """Train `dit` from nothing, or an exported folder of it on."""
    from diffusers import DiTTransformer2DModel

    shared = emoji.prepare(order)
    drawn = shared.domain.of([name for names in CLASSES.values() for name in names])
    labels = torch.tensor([class_of(glyph.subgroup) for glyph in drawn.glyphs])
    found = emoji.encode(shared.vae, drawn.images, order.seed)
    start = build()
    if order.init is not None:
        start = load_module(DiTTransformer2DModel, order.init / "transformer")
    given, seconds, work = labels[found.rows], 60 * order.minutes, order.folder("dit")
    model = fit(start, found.latents, given, seconds, work, order.draws(), order.rate(RATE))
    return Trained(
        pipe=build_pipe(model, shared.vae),
        encoder=shared.encoder,
        views=found.views,
        seconds=shared.seconds | {"denoiser": seconds},
        glyphs=len(drawn.glyphs),
        inputs=[{"class_labels": label} for label in range(len(CLASSES))],
        call={"guidance_scale": GUIDANCE},
        steps=STEPS,
        argument="class_labels",
        sets={name: [label] for label, name in enumerate(CLASSES)},
        labels=given.tolist(),
        moments=kept(work, "denoiser"),
    )


def build_pipe(model: torch.nn.Module, vae: torch.nn.Module) -> Any:
    """Assemble the stock pipeline, with the names of the classes."""
    from diffusers import DiTPipeline

    names = dict(enumerate(CLASSES))
    pipe = DiTPipeline(model, vae, diffusion.build_scheduler(), id2label=names)
    pipe.register_to_config(id2label=names)  # else diffusers would not save them
    return pipe


def fit(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    seconds: float,
    work: Path,
    seed: int,
    lr: float = RATE,
) -> torch.nn.Module:
    """Train on `latents` (n, 4, 16, 16) with their classes `labels` (n,), a tenth left out."""
    torch.manual_seed(seed)
    for block in model.transformer_blocks:
        # Its own dropout would leave out the label in some blocks and not in others.
        block.norm1.emb.class_embedder.dropout_prob = 0.0

    def condition(pick: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        out = diffusion.dropped(len(pick), generator)
        return {"class_labels": torch.where(out, NOBODY, labels[pick]).to(latents.device)}

    phases = [(math.inf, latents)]
    return diffusion.denoiser(model, phases, condition, seconds, work, seed, lr)
