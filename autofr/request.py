"""One search as it is asked for, on a command line or in a job file, and what it is run with."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autofr.errors import StorageError
from autofr.search.address import check_name, checked

if TYPE_CHECKING:
    from autofr.measure.alignment import Judge
    from autofr.runtime.points import Pipe
    from autofr.search.crew import Crew
    from autofr.search.folder import Settings
    from autofr.search.shared import Share


class Request(BaseModel):
    """The options of a search, as text and numbers; their defaults are those of the command."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = "ldm4"
    budget: str = "1.5x"
    steps: int | None = Field(default=None, ge=2, le=1000)
    batch: int | None = Field(default=None, ge=1, le=4096)
    space: str = "default"
    trials: int = Field(default=20, ge=1)
    time_limit: float | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int = Field(default=0, ge=0, le=1024)
    device: str = "cpu"
    dtype: str = "float32"
    task: Literal["text2img", "img2img", "inpaint", "upscale"] | None = None
    inputs: Path | None = None
    call: tuple[str, ...] = ()
    keep_dtype: Literal["float16", "bfloat16"] | None = None
    keep_on_host: bool = False
    max_memory: str | None = None
    out: Path | None = None

    @property
    def command(self) -> str:
        """The command line that asks for the same."""
        words = ["autofr", "search"]
        for name, value in self.given().items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            else:
                for one in value if isinstance(value, tuple) else (value,):
                    words += [option, str(one)]
        return shlex.join(words)

    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        blank = Request()
        return {name: value for name, value in self if value != getattr(blank, name)}


@dataclass(frozen=True)
class Prepared:
    """What `job.run` takes: a pipe, the settings of a search, its folder, who judges images."""

    pipe: Pipe
    settings: Settings
    folder: Path
    judge: Judge


def prepare(request: Request, command: str) -> Prepared:
    """Read a request, the cheap parts first, and load its model.

    Raises: UserError for whatever cannot be read, found or loaded.
    """
    from autofr.measure.costs import parse_budget
    from autofr.memory import parse_size
    from autofr.policy import Keep
    from autofr.search.space import load_space

    budget, space = parse_budget(request.budget), load_space(request.space)
    memory = parse_size(request.max_memory) if request.max_memory else None
    keep = Keep(dtype=request.keep_dtype, host=request.keep_on_host)
    from autofr.loading import load

    loaded = load(
        request.model,
        request.device,
        request.dtype,
        request.threads,
        request.task,
        request.inputs,
        call=request.call,
    )
    from autofr.measure.alignment import load_judge
    from autofr.search.folder import Settings

    settings = Settings(
        name=loaded.name,
        budget=budget,
        space=space,
        steps=request.steps or loaded.steps,
        batch=request.batch or loaded.batch,
        seed=request.seed,
        trials=request.trials,
        time_limit=request.time_limit,
        inputs=getattr(loaded.pipe, "digest", ""),
        inputs_count=getattr(loaded.pipe, "rows", 0),
        keep=keep,
        max_memory=memory,
        command=command,
    )
    folder = request.out or Path("results") / f"{loaded.title}-{budget.text}"
    return Prepared(loaded.pipe, settings, folder, load_judge(loaded.folder, loaded.pipe))


# -- help -----------------------------------------------------------------------------------------


def check_help(workers: int | None, storage: str | None, study: str | None) -> None:
    """Refuse before any work what cannot help a search.

    Raises: StorageError saying what goes together.
    """
    if workers and storage:
        raise StorageError(
            "--workers and --storage: give one of them; with a database, `autofr worker` processes"
            " score trials, on this machine too"
        )
    if study and not storage:
        raise StorageError("--study: names a study in a database; give that with --storage")
    if storage:
        checked(storage)
        check_name(study)


def crew(request: Request, count: int) -> Crew:
    """So many children of this process, which share its cores."""
    from autofr.loading import cores
    from autofr.search.crew import Crew

    threads = max(1, (request.threads or cores()) // count)
    asked = request.model_copy(update={"threads": threads})
    return Crew(count, partial(remade, asked.model_dump_json()))


def share(request: Request, storage: str, study: str | None) -> Share:
    """A database where workers take part in a search; they learn there what was asked for."""
    from autofr.search.shared import Share

    return Share(storage, study, request.model_dump(mode="json", exclude={"out"}))


def remade(text: str, **changes: Any) -> tuple[Pipe, Settings]:
    """The pipe and settings of a request that another process has written as JSON.

    Raises: UserError for whatever cannot be read, found or loaded here.
    """
    asked = Request.model_validate_json(text).model_copy(update=changes)
    prepared = prepare(asked, "")
    return prepared.pipe, prepared.settings
