"""What a search is asked for, and the folder that holds its run: one spec, one owner at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from autofr import files, reading
from autofr.errors import RunFolderError
from autofr.measure.costs import Budget
from autofr.policy import AS_IS, Keep
from autofr.runtime.families import discover
from autofr.runtime.points import (
    Pipe,
    dtype_of,
    find_denoiser,
    fingerprint,
    name_of,
    weights_hash,
)
from autofr.runtime.sampler import scheduler_config
from autofr.search.space import Space

STATE = "study"  # folder inside a run's: what it needs to resume
PURPOSES = ("calibration", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Which seeds draw the images of a purpose; those of the three purposes are disjoint.

    `inputs_count` is how many rows a task's inputs have (0: images are drawn from noise alone);
    seed s draws row s modulo that.
    """

    seed: int = 0
    calibration_seeds: int = 8
    validation_seeds: int = 40
    test_seeds: int = 96
    inputs_count: int = 0

    def seeds(self, purpose: str) -> list[int]:
        """Seeds of "calibration", "validation" or "test".

        They draw other inputs than the purposes before them, as long as there are enough rows.
        """
        place = PURPOSES.index(purpose)
        start = self.seed * 1_000_000 + place * 100_000
        if self.inputs_count:
            before = sum(getattr(self, f"{name}_seeds") for name in PURPOSES[:place])
            start += (before - start) % self.inputs_count
        return list(range(start, start + getattr(self, f"{purpose}_seeds")))

    def seen(self) -> int:
        """How many of the test seeds draw an input that an earlier purpose has drawn."""
        if not self.inputs_count:
            return 0
        drawn = [{s % self.inputs_count for s in self.seeds(name)} for name in PURPOSES[:2]]
        return sum(s % self.inputs_count in set.union(*drawn) for s in self.seeds("test"))


@dataclass(frozen=True, kw_only=True)
class Settings(Seeds):
    """What the user asked for.

    `inputs` is the digest of a task's inputs. `max_memory` limits the bytes kept on the device. No
    trial starts `time_limit` seconds after the first, nor after the moment `deadline` of
    `time.monotonic()`.
    """

    name: str
    budget: Budget
    space: Space
    steps: int = 50
    batch: int = 8
    trials: int = 20
    time_limit: float | None = None
    deadline: float | None = None
    trial_seeds: int = 16
    inputs: str = ""
    keep: Keep = AS_IS
    max_memory: int | None = None
    command: str = ""


class Spec(BaseModel):
    """What a run's results depend on; a folder holds one spec.

    Folders of older versions do not say how the scheduler was set, nor of which class the pipeline
    is: there that is not compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    pipeline: str = ""
    denoiser: str
    fingerprint: str
    weights: str
    scheduler: str
    scheduler_config: dict[str, Any] | None = None
    budget: str
    steps: int
    batch: int
    space: str
    space_digest: str
    seed: int
    device: str
    dtype: str
    threads: int
    inputs: str = ""
    inputs_count: int = 0
    keep: Keep = Keep()
    max_memory: int | None = None


def spec_of(pipe: Pipe, settings: Settings) -> Spec:
    """What a run of this pipe depends on."""
    denoiser = find_denoiser(pipe)
    text = settings.space.model_dump_json()
    return Spec(
        model=settings.name,
        pipeline=name_of(pipe),
        denoiser=type(denoiser).__name__,
        fingerprint=fingerprint(denoiser, discover(denoiser)),
        weights=weights_hash(denoiser),
        scheduler=type(pipe.scheduler).__name__,
        scheduler_config=json.loads(json.dumps(scheduler_config(pipe), default=str)),
        budget=settings.budget.text,
        steps=settings.steps,
        batch=settings.batch,
        space=settings.space.name,
        space_digest=hashlib.sha256(text.encode()).hexdigest()[:12],
        seed=settings.seed,
        device=str(denoiser.device),
        dtype=dtype_of(pipe),
        threads=torch.get_num_threads(),
        inputs=settings.inputs,
        inputs_count=settings.inputs_count,
        keep=settings.keep,
        max_memory=settings.max_memory,
    )


@contextmanager
def run_folder(folder: Path, spec: Spec) -> Iterator[Path]:
    """Own a results folder: create it, lock it, and hold it to one spec.

    What a run needs to resume lies in `study/` inside; results without it (a reference run from a
    repository, say) are replaced when the run ends.
    Raises: RunFolderError when it cannot be written, is in use, or holds another run.
    """
    _check_foreign(folder)
    state = folder / STATE
    with ExitStack() as stack:
        try:
            state.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(files.locked(state / "lock"))
        except OSError as error:
            raise RunFolderError(
                f"{folder}: cannot write there ({error.strerror}); give another folder with --out"
            ) from None
        if not free:
            raise RunFolderError(
                f"{folder}: another autofr process is working there; wait for it, or give another"
                " folder with --out"
            )
        try:
            _check_spec(folder, state / "spec.json", spec)
            yield folder
        except Exception as error:
            if not _full(error):
                raise
            raise RunFolderError(
                f"{folder}: no space is left on its disk; free some and give the same command"
                " again: what was finished is kept"
            ) from error


def _full(error: BaseException | None) -> bool:
    """Whether an error comes of a disk without space."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_foreign(folder: Path) -> None:
    if not folder.is_dir() or (folder / STATE).is_dir() or (folder / "result.json").is_file():
        return
    if any(folder.iterdir()):
        raise RunFolderError(
            f"{folder}: holds other files and no run of autofr; give an empty or new folder with"
            " --out"
        )


def _check_spec(folder: Path, path: Path, spec: Spec) -> None:
    if not path.exists():
        files.write(path, spec.model_dump_json(indent=1) + "\n")
        return
    try:
        there = Spec.model_validate_json(reading.content(path, reading.OWN))
    except (OSError, ValidationError, UnicodeDecodeError):
        raise RunFolderError(
            f"{path} is damaged or of another version; give another folder with --out"
        ) from None
    different = differences(there, spec)
    if different:
        raise RunFolderError(
            f"{folder} holds another run ({'; '.join(different)}); give another folder with --out,"
            " or ask for the same run to resume it"
        )


def differences(there: Spec, asked: Spec) -> list[str]:
    """Every field of two specs that differs, with both values; of the scheduler, every setting."""
    old, new = there.model_dump(), asked.model_dump()
    before, after = old.pop("scheduler_config"), new.pop("scheduler_config")
    old["pipeline"] = old["pipeline"] or new["pipeline"]
    if before is not None and after is not None and there.scheduler == asked.scheduler:
        old |= {f"scheduler's {name}": before.get(name) for name in before | after}
        new |= {f"scheduler's {name}": after.get(name) for name in before | after}
    return [f"{k}: {old[k]} there, {new[k]} asked" for k in new if old[k] != new[k]]
