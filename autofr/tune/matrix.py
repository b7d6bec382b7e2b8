"""One table of a job file: lists span a matrix of searches, each read and named by itself."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autofr import reading
from autofr.errors import JobsError, brief
from autofr.request import Request
from autofr.tune.jobs import Job, named

MOST_JOBS = 1000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
FIELDS = tuple(name for name in Request.model_fields if name != "out")
KEYS = ("name", *FIELDS)
PATHS = ("inputs", "space", "model")

Table = dict[str, Any]


def expand(at: str, given: Table, out: Path, root: Path, problems: list[str]) -> Iterator[Job]:
    """The jobs of one table: lists span a matrix, the last key varies fastest."""
    name = given.pop("name", None)
    if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
        problems.append(f"{at}: name {brief(name)}: expected up to 60 letters, digits, . _ -")
        return
    lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    empty = [key for key, value in lists.items() if not value]
    problems += [f"{at}: {key} is an empty list" for key in empty]
    if empty:
        return
    if math.prod(map(len, lists.values())) > MOST_JOBS:
        problems.append(f"{at}: more than {MOST_JOBS} jobs; split the file")
        return
    varied = [key for key in KEYS if len(lists.get(key, ())) > 1]
    for values in itertools.product(*lists.values()):
        request = _request(at, dict(zip(lists, values, strict=True)), root, problems)
        title = named(name, request, varied)
        yield Job(title, request.model_copy(update={"out": out / title}), at)


def _request(at: str, fields: Table, root: Path, problems: list[str]) -> Request:
    """What one cell of the matrix asks for; what cannot be read is left out, and said."""
    for key in (*PATHS, "call"):
        try:
            if key == "call" and key in fields:
                fields[key] = _call(fields[key], root)
            elif isinstance(text := fields.get(key), str):
                fields[key] = _placed(key, text, root)
        except JobsError as error:
            del fields[key]
            problems.append(f"{at}: {key} {error}")
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = str(item["loc"][0])
            problems.append(f"{at}: {key} {brief(item['input'])}: {_wanted(key, item['msg'])}")
            fields.pop(key, None)
        return Request.model_validate(fields)


def _wanted(key: str, said: str) -> str:
    """What a key takes."""
    examples = {"budget": '"1.5x" or "180ms"', "max_memory": '"200MB"', "inputs": '"prompts.txt"'}
    if key in examples:
        return f"expected text such as {examples[key]}"
    return said[0].lower() + said[1:]


def _placed(key: str, text: str, root: Path) -> Path | str:
    """A path of the file, from the root; names of models and spaces stay as they are.

    Raises: JobsError when it leads out.
    """
    if key == "inputs":
        return inside(root, text)
    if key == "space":
        return str(inside(root, text)) if "/" in text or text.endswith(".toml") else text
    local = text.startswith((".", "/")) or text.count("/") > 1 or os.path.isdir(root / text)
    if not local or text == Path(text).name != "..":  # on the hub, or bundled
        return text
    return os.path.join(os.curdir, inside(root, text))


def inside(root: Path, text: str) -> Path:
    """A path from the root; links that its owner has put there are followed.

    Raises: JobsError when it leads out.
    """
    path = Path(os.path.normpath(root / text))
    if not reading.inside(root, path):
        raise JobsError(
            f"{brief(text)}: leads out of {root.resolve()}, where the paths of a job file stay;"
            " --root allows another folder"
        )
    return path


def _call(value: object, root: Path) -> tuple[str, ...]:
    """Call arguments as the command line takes them.

    Raises: JobsError when they are no table, or a picture leads out of the root.
    """
    if not isinstance(value, dict):
        raise JobsError(f"{brief(value)}: expected a table such as {{guidance_scale = 5.0}}")
    pairs = []
    for name, one in value.items():
        if "image" in name and isinstance(one, str):
            one = str(inside(root, one))
        try:
            pairs.append(f"{name}={one if isinstance(one, str) else json.dumps(one)}")
        except TypeError:
            raise JobsError(f"{name}: expected text, a number, a list or a table") from None
    return tuple(pairs)
