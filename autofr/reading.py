"""Read files that others may have written: as data, and within limits."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofr.errors import brief

if TYPE_CHECKING:
    import numpy as np
    from pydantic import ValidationError

OWN = 64 * 2**20
"""Bytes of a file that autofr writes itself, beside a run or a model."""
MOST_FIELDS = 1000
"""Fields of one JSON object."""
MOST_PARTS = 100_000
"""Objects and lists of one JSON text."""
MOST_DOTS = 100
"""Dots in a line of TOML: its parser takes time with the square of a dotted key's length."""
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What moves a terminal's cursor, turns letters around, or is half a character."""

_SAID = {"string_pattern_mismatch": "a name is some text without control characters"}
"""What says more than pydantic does."""


def content(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises: OSError whose `strerror` says what is wrong: also for a larger file, for what is no file
        (a pipe, a device; nothing is waited for) and for what no file can be called.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            _check_size(path, state.st_size, limit)
            return file.read(state.st_size)
    except ValueError:
        raise OSError(errno.EINVAL, "not the name of a file", brief(str(path))) from None


def arrays(path: Path, limit: int) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, at most `limit` bytes of them; nothing in it is run.

    Raises: OSError as `content` does; ValueError for what is no archive of plain arrays.
    """
    import numpy as np

    packed = content(path, limit)
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        _check_size(path, unpacked, limit)
        with np.load(io.BytesIO(packed), allow_pickle=False) as found:
            return {name: np.asarray(found[name]) for name in found.files}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and numpy say it in a dozen ways
        raise ValueError(f"no archive of arrays ({brief(error)})") from None


def toml(path: Path, limit: int) -> dict[str, Any]:
    """Read a TOML file.

    Raises: OSError as `content` does; ValueError for what is no TOML.
    """
    text = content(path, limit).decode("utf-8-sig")
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"more than {MOST_DOTS} dots in a line")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parsed(text: str) -> Any:
    """Read a JSON text.

    Raises: ValueError, also for what is nested too deeply, for a field that is written twice, for
        an object of more than `MOST_FIELDS` fields, for more than `MOST_PARTS` objects and lists.
    """
    if text.count("{") + text.count("[") > MOST_PARTS:
        raise ValueError(f"more than {MOST_PARTS} objects and lists")
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def inside(root: Path, path: Path) -> bool:
    """Say whether a path stays in a folder; links that its owner has put there are followed."""
    way = os.path.relpath(os.path.normpath(path), root)
    return "\0" not in way and way.split(os.sep)[0] != os.pardir


def printable(text: str, most: int | None = None) -> str:
    """A text without what no line of output should hold, cut to a length."""
    text = _CONTROL.sub("\ufffd", text)
    return text if most is None or len(text) <= most else f"{text[:most]}..."


def objections(error: ValidationError, most: int = 8) -> str:
    """The first things that a check found, each with its field, and how many there are besides."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for item in found[:most]:
        place = ".".join(str(part) for part in item["loc"])
        message = _SAID.get(item["type"], item["msg"]).removeprefix("Value error, ")
        lines.append(printable(f"{place}: {message}" if place else message, 400))
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(lines) + more


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(pairs) > MOST_FIELDS:
        raise ValueError(f"an object of {len(pairs)} fields; {MOST_FIELDS} are the most")
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {brief(double)} is written twice")
    return fields


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        said = f"{_mebibytes(size)}, larger than {_mebibytes(limit)}, the most that is read of it"
        raise OSError(errno.EFBIG, said, str(path))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.6g} MiB"
