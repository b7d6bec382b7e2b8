"""What a shared study says of its search, and what a worker's code and model must agree with."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autofr.errors import StorageError
from autofr.runtime.points import Pipe
from autofr.search.folder import Settings, Spec, differences, spec_of

OWN = ("model", "device", "threads", "budget", "space", "space_digest", "seed", "max_memory")
"""Fields of a run's spec that its workers need not share, or take from the search."""
COUNTS = ("calibration_seeds", "validation_seeds", "trial_seeds")


def facts_of(
    pipe: Pipe, settings: Settings, request: Mapping[str, Any] | None, heartbeat: tuple[int, int]
) -> dict[str, Any]:
    """What a search publishes, as JSON data; `request` is how its pipe was asked for."""
    return {
        "code": code(),
        "spec": spec_of(pipe, settings).model_dump(mode="json"),
        "counts": {name: getattr(settings, name) for name in COUNTS},
        "request": request and dict(request),
        "heartbeat": list(heartbeat),
    }


@functools.cache
def code() -> dict[str, str]:
    """Versions of what decides a score, and the hash of our own source."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("autofr", "diffusers")}
    return versions | {"source": digest.hexdigest()[:16]}


def study_name(title: str, facts: Mapping[str, Any]) -> str:
    """The name of a study, where none is given: what its run depends on."""
    text = json.dumps(facts["spec"], sort_keys=True)
    return f"{title}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_study(name: str, there: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    """Refuse to resume the study of another search.

    Raises: StorageError with the differences.
    """
    if there is None:
        return
    old, new = (Spec.model_validate(one["spec"], strict=False) for one in (there, facts))
    if different := differences(old, new):
        raise StorageError(
            f"study {name!r} is of another search ({'; '.join(different)}); give another name with"
            " --study, or ask for the same search to resume it"
        )


def check_code(facts: Mapping[str, Any]) -> None:
    """Refuse to help a search of another version, before anything else of it is read.

    Raises: StorageError with the differences.
    """
    different = [
        f"{name}: {old} there, {code().get(name)} here"
        for name, old in facts["code"].items()
        if old != code().get(name)
    ]
    if different:
        raise StorageError(
            f"this worker would give other scores than its search ({'; '.join(different)}); install"
            " the same version of autofr and diffusers"
        )


def check_worker(facts: Mapping[str, Any], pipe: Pipe, settings: Settings) -> Settings:
    """The settings for a worker of a search; refuse what would give other scores.

    Its device and number of threads are its own, its type too if it asks for another.
    Raises: StorageError with the differences.
    """
    settings = replace(settings, **facts["counts"])
    there = Spec.model_validate(facts["spec"], strict=False)
    here = spec_of(pipe, settings)
    own = [*OWN, "dtype", *(["weights"] if here.dtype != there.dtype else [])]
    here = here.model_copy(update={name: getattr(there, name) for name in own})
    different = [line.removesuffix("asked") + "here" for line in differences(there, here)]
    if different:
        raise StorageError(
            f"this worker would give other scores than its search ({'; '.join(different)}); give"
            " the same model with --model, and the same inputs with --inputs"
        )
    return settings
