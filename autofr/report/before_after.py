"""The same seeds before and after: strips of images in a run's folder, and tiles of a page."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from autofr.errors import RunFolderError, damaged
from autofr.report.html import data_url

if TYPE_CHECKING:
    from torch import Tensor

BEFORE, AFTER = "before.png", "after.png"
WIDTH = "width"  # the note in a strip's file that says how wide an image is
SIDE = 256  # pixels of an image in a strip, at most
SHOWN = 192  # pixels of the page that an image takes, at most


@dataclass(frozen=True)
class Tiles:
    """Images of the same seeds, without and with the policy, as addresses that hold them.

    `width` is in pixels of the page; `exact` says that it is a multiple of the images' own.
    """

    before: list[str]
    after: list[str]
    width: int
    exact: bool


def save(teacher: Tensor, policy: Tensor, folder: Path) -> None:
    """Write images (n, 3, h, w) in [0, 1] as two strips, shrunk where large.

    Raises: RunFolderError when they cannot be written.
    """
    for images, name in ((teacher, BEFORE), (policy, AFTER)):
        path = folder / name
        tiles = [Image.fromarray(pixels) for pixels in _pixels(images)]
        for tile in tiles:
            tile.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        note = PngInfo()
        note.add_text(WIDTH, str(tiles[0].width))
        strip = Image.fromarray(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
        try:
            strip.save(path, pnginfo=note)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot write ({error.strerror})") from None


def _pixels(images: Tensor) -> np.ndarray:
    """Images as bytes (n, h, w, 3)."""
    return images.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def load(folder: Path) -> Tiles | None:
    """Read what `save` left; None where it left nothing.

    Raises: RunFolderError when a strip is damaged.
    """
    if not all((folder / name).is_file() for name in (BEFORE, AFTER)):
        return None
    (before, width), (after, _) = (_tiles(folder / name) for name in (BEFORE, AFTER))
    if len(before) != len(after):
        raise damaged(folder / AFTER)
    zoom = max(1, SHOWN // width)
    return Tiles(before, after, min(SHOWN, zoom * width), width <= SHOWN)


def _tiles(path: Path) -> tuple[list[str], int]:
    try:
        with Image.open(path, formats=["PNG"]) as strip:
            strip.load()
            width = int(strip.info[WIDTH])
            lefts = range(0, strip.width, width)
            tiles = [strip.crop((x, 0, x + width, strip.height)) for x in lefts]
    except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise damaged(path) from None
    return [_address(tile) for tile in tiles], width


def _address(tile: Image.Image) -> str:
    buffer = io.BytesIO()
    tile.save(buffer, "PNG")
    return data_url(buffer.getvalue())
