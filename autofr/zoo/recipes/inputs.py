"""What searches draw from when nothing else is given: prompts, pictures and masks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import torch

from autofr.zoo import glyphs

PICTURES = 160  # enough for the seeds of a search: none is calibrated on and tested on
MASKS = 8
SIDE = 64


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The names in an order of their own, so that neighbours are of different groups."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[row] for row in order]


def files(found: Sequence[glyphs.Glyph], images: torch.Tensor, seed: int) -> dict[str, bytes]:
    """Contents by file name: prompts.txt, img2img.jsonl, inpaint.jsonl, and what they refer to.

    `images` (n, 3, s, s) in [-1, 1] are those of `found`. Image to image: a glyph, to be turned
    into the next one of its subgroup. Inpainting: a glyph, with a rectangle to be drawn again.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(found))[:PICTURES]
    views = glyphs.augment(
        images[rows], torch.Generator().manual_seed(seed), size=SIDE, **glyphs.MILD
    )
    contents = {"prompts.txt": "\n".join(shuffled([g.name for g in found], seed)).encode() + b"\n"}
    for number in range(MASKS):
        contents[f"inputs/mask-{number}.png"] = _png(_mask(rng))
    turned, filled = [], []
    for number, (row, view) in enumerate(zip(rows.tolist(), views, strict=True)):
        picture = f"inputs/{number:03d}.png"
        contents[picture] = _png(_pixels(view))
        turned.append({"prompt": _next(found, row), "image": picture})
        mask = f"inputs/mask-{number % MASKS}.png"
        filled.append({"prompt": found[row].name, "image": picture, "mask_image": mask})
    for name, lines in (("img2img.jsonl", turned), ("inpaint.jsonl", filled)):
        contents[name] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return contents


def small(pictures: torch.Tensor) -> dict[str, bytes]:
    """Contents by file name: upscale.jsonl, and the first of `pictures` (n, 3, s, s) in [-1, 1]."""
    contents = {
        f"inputs/{number:03d}.png": _png(_pixels(picture))
        for number, picture in enumerate(pictures[:PICTURES])
    }
    lines = [json.dumps({"image": name}) + "\n" for name in contents]
    return contents | {"upscale.jsonl": "".join(lines).encode()}


def _next(found: Sequence[glyphs.Glyph], row: int) -> str:
    """Name of the glyph that follows in the same subgroup, the first after the last."""
    same = [other for other, glyph in enumerate(found) if glyph.subgroup == found[row].subgroup]
    return found[same[(same.index(row) + 1) % len(same)]].name


def _mask(rng: np.random.Generator) -> np.ndarray:
    """A white rectangle on black: between a quarter and a half of the picture's sides."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    edges = []
    for length in rng.integers(SIDE // 4, SIDE // 2 + 1, size=2).tolist():
        start = int(rng.integers(SIDE // 8, 7 * SIDE // 8 - length + 1))
        edges.append(slice(start, start + length))
    mask[edges[0], edges[1]] = 255
    return mask


def _pixels(picture: torch.Tensor) -> np.ndarray:
    """A picture (3, h, w) in [-1, 1] as bytes (h, w, 3)."""
    found = ((picture.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255)
    return found.astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
