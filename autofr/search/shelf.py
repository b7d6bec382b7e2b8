"""Profiles and calibrations that runs share: they depend on pipe and protocol, on no budget."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from autofr import files, reading
from autofr.errors import RunFolderError
from autofr.measure import profile_file, profiling
from autofr.measure.calibration import Calibration
from autofr.runtime.points import Pipe
from autofr.search.folder import STATE, Settings, Spec
from autofr.search.space import largest_gap

ALONE = ("budget", "space", "space_digest", "keep", "max_memory")
"""Fields of a run's spec that neither its profile nor its calibrations depend on."""


def ground_of(pipe: Pipe, settings: Settings, spec: Spec) -> dict[str, Any]:
    """All that a profile of this run depends on, as JSON data; it names the profile's place."""
    parts = getattr(pipe, "components", {})
    sizes = {
        name: f"{type(part).__name__} {sum(p.numel() for p in part.parameters())}"
        for name, part in parts.items()
        if isinstance(part, nn.Module)
    }
    ground = spec.model_dump(mode="json", exclude={*ALONE}) | {
        "parts": sizes,
        "machine": profiling.device_name(pipe),
        "seeds": settings.seeds("calibration"),
        "versions": profiling.versions(),
    }
    return json.loads(json.dumps(ground))


@contextmanager
def shared(
    shelf: Path | None, folder: Path, pipe: Pipe, settings: Settings, spec: Spec
) -> Iterator[None]:
    """Give a run what others have measured for it, and leave there what it measures itself.

    `shelf` is the folder of what is shared (None: nothing is); `folder` is the run's own, which
    the caller owns. What is damaged on the shelf is left out and replaced.
    """
    if shelf is None:
        yield
        return
    ground = ground_of(pipe, settings, spec)
    digest = hashlib.sha256(json.dumps(ground, sort_keys=True).encode()).hexdigest()[:16]
    place, own, gap = shelf / digest, folder / STATE, f"gap-{largest_gap(settings.space)}"
    if not _whole(place, ground):
        shutil.rmtree(place, ignore_errors=True)
    _copy_all(place, own, gap)
    try:
        yield
    finally:
        with suppress(OSError):  # what cannot be shared (a full disk) is measured again
            _leave(own, place, ground, gap)


def _leave(own: Path, place: Path, ground: dict[str, Any], gap: str) -> None:
    if (own / "profile.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        files.write(place / "ground.json", json.dumps(ground, indent=1, sort_keys=True).encode())
        _copy_all(own, place, gap)


def _whole(place: Path, ground: dict[str, Any]) -> bool:
    """Whether a place on the shelf can be trusted: it says the same ground, and can be read."""
    try:
        there = reading.parsed(reading.content(place / "ground.json", reading.OWN).decode())
        profile_file.load(place / "profile.json")
        for path in place.glob("*/calibration-*.npz"):
            Calibration.load(path)
    except (OSError, ValueError, RunFolderError):
        return False
    return there == ground


def _copy_all(source: Path, target: Path, gap: str) -> None:
    """Copy what the target lacks; calibrations only along with the profile they were made from.

    On the shelf (which has a `gap` folder per reach of a calibration) and in a run's folder.
    """
    if not (source / "profile.json").is_file():
        return
    profile = (source / "profile.json").read_bytes()
    if not (target / "profile.json").is_file():
        files.write(target / "profile.json", profile)
    if (target / "profile.json").read_bytes() != profile:
        return
    on_shelf = (target / "ground.json").is_file()
    here, there = (source, target / gap) if on_shelf else (source / gap, target)
    for path in here.glob("calibration-*.npz"):
        if not (there / path.name).exists():
            there.mkdir(parents=True, exist_ok=True)
            files.write(there / path.name, path.read_bytes())
