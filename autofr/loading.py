"""What a command draws from: a model, for a task, with its inputs and arguments of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autofr import task as tasks
from autofr import zoo
from autofr.cores import usable
from autofr.errors import TaskError
from autofr.inputs import parse_call, read_inputs
from autofr.runtime.points import Pipe, name_of

Rows = list[dict[str, Any]]
SIBLINGS: dict[str, str] = {
    "text2img": "AutoPipelineForText2Image",
    "img2img": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}
"""Tasks, and what diffusers makes their pipelines with."""
TASKS = {
    "Inpaint": "inpaint",
    "Img2Img": "img2img",
    "SuperResolution": "upscale",
    "Upscale": "upscale",
}
"""Parts of pipelines' names, and the tasks that they say; others draw from texts or nothing."""


def load(
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 0,
    task: str | None = None,
    inputs: Path | None = None,
    prompts: Sequence[str] = (),
    call: Sequence[str] = (),
) -> zoo.Loaded:
    """Load a model as a pipe that can be called by seeds.

    Inputs are those of a file, or prompts; without either, those that lie in the model's folder for
    the task (see `zoo.INPUTS`), else what `task.as_task` says. Prompts alone get the pictures of
    the folder's rows in turn. `call` goes before the arguments that the model has by itself.
    Raises: ModelError for a model that cannot be loaded or has no points; TaskError for a task,
        inputs or arguments that do not fit it.
    """
    arguments = parse_call(call)
    if prompts and inputs:
        raise TaskError("--prompt and --inputs: give one of them")
    rows = read_inputs(inputs) if inputs else [{"prompt": text} for text in prompts]
    import torch

    from autofr.runtime.families import discover
    from autofr.runtime.points import find_denoiser

    torch.set_num_threads(threads or cores())
    loaded = zoo.load(model, device, dtype)
    if task:
        loaded = _turned(loaded, task)
    discover(find_denoiser(loaded.pipe))  # a pipe without known points is refused before any work
    own = _own_rows(loaded, task or task_of(loaded.pipe))
    found = _with_pictures(rows, own, arguments) if rows else own
    pipe = tasks.as_task(loaded.pipe, found or None, {**loaded.call, **arguments})
    return replace(loaded, pipe=pipe)


def check(model: str, device: str = "cpu", dtype: str = "float32") -> None:
    """Refuse what `load` would refuse, as far as that is known without reading weights.

    Raises: ModelError when there is no such model, device or type, or they do not go together.
    """
    zoo.check(model, device, dtype)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(usable())


# -- tasks ----------------------------------------------------------------------------------------


def task_of(pipe: Pipe) -> str:
    """The task that a pipeline is made for, by its name."""
    name = name_of(pipe)
    for word, task in TASKS.items():
        if word in name:
            return task
    return "text2img"


def sibling(pipe: Pipe, task: str) -> Pipe:
    """The pipeline of the same family for a task, over the same components.

    Raises: TaskError when diffusers has none.
    """
    import diffusers

    if task == task_of(pipe) and task not in SIBLINGS:
        return pipe
    zoo.quieten_transformers()  # diffusers loads its other pipelines to find one
    try:
        found = getattr(diffusers, SIBLINGS[task]).from_pipe(pipe)
    except (KeyError, ValueError, TypeError) as error:
        raise TaskError(
            f"--task {task}: diffusers has no such pipeline over the components of"
            f" {name_of(pipe)}; without --task it draws what it is made for"
        ) from error
    if type(found) is type(pipe):
        return pipe
    found.set_progress_bar_config(disable=True)
    return found


def _turned(loaded: zoo.Loaded, task: str) -> zoo.Loaded:
    """The model for a task; its title says so where it is made for another."""
    pipe = sibling(loaded.pipe, task)
    return loaded if pipe is loaded.pipe else replace(loaded, pipe=pipe, task=task)


# -- inputs ---------------------------------------------------------------------------------------


def _own_rows(loaded: zoo.Loaded, task: str) -> Rows:
    """The inputs for a task that lie in the model's folder, if it has some and takes them.

    Raises: TaskError when they are damaged.
    """
    path = loaded.folder / zoo.INPUTS[task] if loaded.folder else None
    if path is None or not path.is_file():
        return []
    rows = read_inputs(path, loaded.folder)
    return rows if {*rows[0]} <= {*inspect.signature(loaded.pipe.__call__).parameters} else []


def _with_pictures(rows: Rows, own: Rows, call: Mapping[str, Any]) -> Rows:
    """Rows that name no picture to start from, with the pictures of the model's own in turn."""
    missing = [
        name for name in tasks.STARTS if own and name in own[0] and name not in {*rows[0], *call}
    ]
    return [
        {**{name: own[index % len(own)][name] for name in missing}, **row}
        for index, row in enumerate(rows)
    ]
