"""Training images of the bundled models: emoji glyphs rendered from an installed colour font."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from autofr.errors import UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
LDM4_GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
MILD: dict[str, Any] = {"rotate": 4.0, "scale": (0.92, 1.0), "shift": 0.02}
"""The affine variation of images that a model shall draw."""

_BITMAP = 109  # the only pixel size that the font's bitmaps come in
_LINE = re.compile(r"^([0-9A-F ]+?)\s*; fully-qualified\s*#\s*\S+\s+E[\d.]+\s+(.+)$")


class Glyph(NamedTuple):
    """One emoji: its text, Unicode name, group and subgroup."""

    text: str
    name: str
    group: str
    subgroup: str


def read_names(path: Path = NAMES, groups: tuple[str, ...] | None = None) -> list[Glyph]:
    """List the fully-qualified emoji of `emoji-test.txt`, without skin-tone variants."""
    if not path.is_file():
        raise UserError(
            f"{path} not found: the recipe needs Unicode's emoji-test.txt"
            " (Debian: apt-get install unicode-data)."
        )
    glyphs, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        if line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        match = _LINE.match(line)
        if not match or (groups is not None and group not in groups):
            continue
        codes = [int(code, 16) for code in match[1].split()]
        if not any(0x1F3FB <= code <= 0x1F3FF for code in codes):
            glyphs.append(Glyph("".join(map(chr, codes)), match[2], group, subgroup))
    return glyphs


def render(glyphs: list[Glyph], font: Path = FONT, size: int = 128) -> torch.Tensor:
    """Draw each glyph centred on a white square.

    Returns: float tensor (glyphs, 3, size, size) in [-1, 1].
    Raises: UserError when the font is not installed.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not font.is_file():
        raise UserError(
            f"{font} not found: the recipe draws its training images with Noto Color Emoji"
            " (Debian: apt-get install fonts-noto-color-emoji)."
        )
    face = ImageFont.truetype(str(font), _BITMAP)
    images = []
    for glyph in glyphs:
        left, top, right, bottom = (int(edge) for edge in face.getbbox(glyph.text))
        side = max(right - left, bottom - top) + 4
        canvas = Image.new("RGB", (side, side), "white")
        corner = ((side - right - left) // 2, (side - bottom - top) // 2)
        ImageDraw.Draw(canvas).text(corner, glyph.text, font=face, embedded_color=True)
        canvas = canvas.resize((size, size), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1))
    return torch.stack(images).float() / 127.5 - 1


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    size: int = 64,
    rotate: float = 10.0,
    scale: tuple[float, float] = (0.82, 1.0),
    shift: float = 0.05,
) -> torch.Tensor:
    """Apply one random affine map per image, on white, and shrink with anti-aliasing.

    Args: images (n, 3, s, s) in [-1, 1]; `rotate` in degrees; `shift` as a share of the side.
    Returns: (n, 3, size, size) in [-1, 1].
    """
    n = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        draw = torch.rand(n, generator=generator).to(images.device)
        return low + (high - low) * draw

    angle = uniform(-rotate, rotate) * math.pi / 180
    factor = 1 / uniform(*scale)
    cos, sin = torch.cos(angle) * factor, torch.sin(angle) * factor
    dx, dy = uniform(-2 * shift, 2 * shift), uniform(-2 * shift, 2 * shift)
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, [n, 3, 2 * size, 2 * size], align_corners=False)
    ink = F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)
    return 1 - F.avg_pool2d(ink, 2)


def views(images: torch.Tensor, seed: int, count: int, **affine: Any) -> torch.Tensor:
    """Every image `count` times, all in turn, each in a view of its own (see `augment`)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([augment(images, generator, **affine) for _ in range(count)])


def draw(images: torch.Tensor, generator: torch.Generator, count: int, crop: bool) -> torch.Tensor:
    """Views of `count` random images, (count, 3, 64, 64); or a 32x32 part, the same of each."""
    pick = torch.randint(len(images), (count,), generator=generator).to(images.device)
    whole = augment(images[pick], generator)
    if not crop:
        return whole
    top, left = torch.randint(0, 33, (2,), generator=generator).tolist()
    return whole[:, :, top : top + 32, left : left + 32]
