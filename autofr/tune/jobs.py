"""What a job of a job file is: its name, the search that it asks for, where its results go."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofr.request import Request

LONGEST = 100  # characters of a name; those of a matrix may have to be cut
TUNED = ".tune"  # folder inside `out`: states, logs and what jobs share
SHOWN = ("model", "task", "budget")  # what a name begins with
UNSEEN = ("trials", "time_limit", "out")  # a run is the same with other ones


@dataclass(frozen=True)
class Job:
    """One search of a job file: its name, what is asked for, and the table that it comes from."""

    name: str
    request: Request
    table: str

    @property
    def folder(self) -> Path:
        """Where its results go."""
        assert self.request.out is not None
        return self.request.out

    @property
    def asked(self) -> str:
        """Hash of what is asked for; files count with their state, so that a change is seen."""
        request = self.request
        bundled = Path(__file__).parents[1] / "zoo" / request.model
        places = (request.inputs or "", request.space, request.model, bundled)
        stamps = [_stamp(Path(place)) for place in places if place]
        text = json.dumps([request.model_dump(mode="json"), stamps])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """The jobs of a file in order, and the folder that their results go to."""

    path: Path
    out: Path
    jobs: tuple[Job, ...]

    @property
    def home(self) -> Path:
        """Folder of the states and logs of these jobs."""
        return self.out / TUNED / self.path.stem

    @property
    def shelf(self) -> Path:
        """Folder of the profiles and calibrations that jobs share."""
        return self.out / TUNED / "shelf"


def _stamp(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a file, or of all files in a folder; nothing if there is none."""
    if os.path.isfile(place):
        files = [place]
    elif os.path.isdir(place):
        files = sorted(path for path in place.rglob("*") if path.is_file())
    else:
        return []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# -- names ----------------------------------------------------------------------------------------


def named(name: str | None, request: Request, varied: Sequence[str]) -> str:
    """A job's name: of its model, task, budget and whatever is not as by default, in one order.

    It depends on no other job, so that a file can grow and its results stay where they are. A
    name that the table gives is followed by what varies in the table.
    """
    rest = [key for key in request.given() if key not in (*SHOWN, *UNSEEN)]
    keys = varied if name else (*SHOWN, *rest)
    labels = [_label(key, getattr(request, key)) for key in keys]
    slugs = [re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.") for label in labels]
    title = "-".join(filter(None, [name, *slugs])) or "job"
    if len(title) <= LONGEST:
        return title
    return f"{title[: LONGEST - 9]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


def _label(key: str, value: Any) -> str:
    """How a value is written in a name."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    if key == "call":
        pairs = [pair.partition("=") for pair in value]
        return "-".join(n + (Path(v).stem if "image" in n else v) for n, _, v in pairs) or "plain"
    if key == "model":
        return os.path.basename(os.path.abspath(value))
    if key in ("space", "inputs"):
        return Path(value).stem
    plain = key in ("budget", "task", "device", "dtype", "max_memory")
    return str(value) if plain else f"{key}{value}"
