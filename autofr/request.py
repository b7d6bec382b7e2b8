"""One search as it is asked for, on a command line or in a job file, and what it is run with."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from autofr.measure.alignment import Judge
    from autofr.runtime.points import Pipe
    from autofr.search.study import Settings


class Request(BaseModel):
    """The options of a search, as text and numbers; their defaults are those of the command."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = "ldm4"
    budget: str = "1.5x"
    steps: int | None = Field(default=None, ge=2, le=1000)
    batch: int | None = Field(default=None, ge=1)
    space: str = "default"
    trials: int = Field(default=20, ge=1)
    time_limit: float | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0)
    device: str = "cpu"
    dtype: str = "float32"
    task: Literal["text2img", "img2img", "inpaint"] | None = None
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
    from autofr.measure.latency import parse_budget
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
    from autofr.search.study import Settings

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
