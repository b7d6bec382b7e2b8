"""Read what a pipe is given: prompts, arguments of calls, pictures; within limits."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofr import reading
from autofr.errors import TaskError, brief

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 16 * 2**20
MOST_PICTURE_BYTES = 64 * 2**20
MOST_PIXELS = 64 * 2**20
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PROMPTS = (
    "a red bicycle leaning against a white wall",
    "portrait of an old fisherman, soft light",
    "a bowl of ramen on a wooden table, top view",
    "snowy mountains at sunrise",
    "a small robot watering a plant",
    "a watercolor painting of a fox in a forest",
    "the skyline of a city at night, seen from a bridge",
    "a close-up of a bee on a sunflower",
    "an empty library with tall windows",
    "two sailing boats on a calm lake",
    "a pencil sketch of a lighthouse",
    "a slice of strawberry cake on a blue plate",
    "a grey cat asleep on a stack of books",
    "an astronaut riding a horse in the desert",
    "a market street after the rain",
    "a green vase with dried flowers, studio photo",
)
"""What is drawn where no prompts are given."""


def read_inputs(path: Path, root: Path | None = None) -> list[dict[str, Any]]:
    """Read a file of inputs: a prompt per line, or (`.jsonl`) a JSON object of call arguments.

    Arguments whose name says image are paths, relative to the file; in a `root` if one is given.
    Raises: TaskError naming the line.
    """
    try:
        lines = reading.content(path, MOST_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise TaskError(f"--inputs {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise TaskError(f"--inputs {path}: not a text file in UTF-8") from None
    texts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise TaskError(f"--inputs {path}: empty; expected a prompt per line")
    if path.suffix.lower() != ".jsonl":
        return [{"prompt": line} for _, line in texts]
    return [_row(path, number, line, root) for number, line in texts]


def parse_call(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` pairs; values are JSON, or text where they are not.

    Arguments whose name says image are paths, relative to the working directory.
    Raises: TaskError for a pair without a name or a value, or a picture that cannot be read.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not name or not mark or not text:
            raise TaskError(f"--call {brief(pair)}: expected NAME=VALUE, such as guidance_scale=5")
        value = _argument(pair, text)
        found[name] = _value(f"--call {reading.printable(pair, 80)}", Path(), name, value)
    return found


def _row(path: Path, number: int, line: str, root: Path | None) -> dict[str, Any]:
    try:
        row = _finite(reading.parsed(line))
    except ValueError as error:
        raise TaskError(f"--inputs {path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not row:
        raise TaskError(
            f"--inputs {path}, line {number}: expected an object of call arguments such as"
            ' {"prompt": "a cat"}'
        )
    where = f"--inputs {path}, line {number}"
    return {name: _value(where, path.parent, name, value, root) for name, value in row.items()}


def _finite(value: Any) -> Any:
    """A value of JSON as it is.

    Raises: ValueError for NaN and infinity, which no file of ours can say.
    """
    try:
        json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _value(where: str, folder: Path, name: str, value: Any, root: Path | None = None) -> Any:
    """The value of an argument: the picture itself, where its name says that it is one."""
    if "image" not in name or not isinstance(value, str):
        return value
    place = folder / value
    what = f"{where}: {reading.printable(name, 80)} {reading.printable(str(place), 200)}"
    if root is not None and not reading.inside(root, place):
        raise TaskError(f"{what} leads out of {root}")
    try:
        return _picture(place).convert("L" if "mask" in name else "RGB")
    except Exception as error:  # each decoder has errors of its own
        raise TaskError(f"{what} cannot be read ({reading.printable(str(error), 300)})") from None


def _picture(place: Path) -> Image:
    """Open a picture of one of the usual kinds; others may start programs (EPS).

    Raises: OSError for one that is too large, or is none; ValueError.
    """
    import PIL.Image

    packed = reading.content(place, MOST_PICTURE_BYTES)
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of what is refused below
        found = PIL.Image.open(io.BytesIO(packed), formats=PICTURES)
    if math.prod(found.size) > MOST_PIXELS:
        raise OSError(f"{found.width} x {found.height} pixels; {MOST_PIXELS} are the most")
    return found


def _argument(pair: str, text: str) -> Any:
    try:
        value = reading.parsed(text)
    except ValueError:
        return text
    try:
        return _finite(value)
    except ValueError as error:
        raise TaskError(f"--call {brief(pair)}: expected numbers of JSON ({error})") from None
