"""Job files: a matrix of searches in TOML, read as data and checked before any of them starts."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autofr import reading
from autofr.errors import JobsError, UserError, brief
from autofr.request import Request

MOST_BYTES = 256 * 1024
MOST_JOBS = 1000
MOST_SAID = 20  # things that are wrong, in one message
LONGEST = 100  # characters of a name; those of a matrix may have to be cut
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
TOP = ("out", "defaults", "job")
FIELDS = tuple(name for name in Request.model_fields if name != "out")
KEYS = ("name", *FIELDS)
PATHS = ("inputs", "space", "model")
TUNED = ".tune"  # folder inside `out`: states, logs and what jobs share

Table = dict[str, Any]


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


def read(path: Path, out: Path | None = None, root: Path | None = None) -> Plan:
    """Read a job file; nothing but the file is looked at.

    Its paths start from `root` (default: the working directory) and must stay in it; `out`
    replaces the file's own.
    Raises: JobsError listing everything that is wrong.
    """
    plan, problems = _draft(path, out, root or Path())
    if problems:
        raise _refusal(path, problems)
    return plan


def read_checked(path: Path, out: Path | None = None, root: Path | None = None) -> Plan:
    """Read a job file, and look whether models, inputs, spaces and devices are there.

    No weights are loaded.
    Raises: JobsError listing everything that is wrong.
    """
    plan, problems = _draft(path, out, root or Path())
    problems += _missing(plan, root or Path())
    if problems:
        raise _refusal(path, problems)
    return plan


def _refusal(path: Path, problems: Sequence[str]) -> JobsError:
    many = f"{len(problems)} things are wrong" if len(problems) > 1 else "one thing is wrong"
    said = [f"  {reading.printable(line, 400)}" for line in problems[:MOST_SAID]]
    more = [f"  and {len(problems) - MOST_SAID} more"] if len(problems) > MOST_SAID else []
    lines = [f"{path}: {many}; nothing was started", *said, *more]
    return JobsError("\n".join(lines))


# -- the file -------------------------------------------------------------------------------------


def _parse(path: Path) -> Table:
    """The file as a table.

    Raises: JobsError when it cannot be read, is too large or no TOML.
    """
    try:
        return reading.toml(path, MOST_BYTES)
    except OSError as error:
        raise JobsError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise JobsError(f"{path}: not valid TOML ({error})") from None


def _draft(path: Path, out: Path | None, root: Path) -> tuple[Plan, list[str]]:
    """The plan of all jobs that can be read, and what is wrong with the others."""
    fields = _parse(path)
    problems = [_unknown("top level", key, TOP) for key in fields if key not in TOP]
    defaults, tables = fields.get("defaults", {}), fields.get("job", [])
    if not isinstance(defaults, dict) or not isinstance(tables, list):
        return Plan(path, root, ()), [*problems, "expected one [defaults], and a [[job]] per model"]
    problems += [_unknown("[defaults]", key, FIELDS) for key in defaults if key not in FIELDS]
    place = _out(fields.get("out", "results"), out, root, problems)
    if not tables:
        problems.append('no [[job]]: expected at least one, such as [[job]] with model = "ldm4"')
    known = {key: value for key, value in defaults.items() if key in FIELDS}
    jobs: list[Job] = []
    for number, table in enumerate(tables, 1):
        at = f"[[job]] {number}"
        if not isinstance(table, dict):
            problems.append(f"{at}: expected a table")
            continue
        problems += [_unknown(at, key, KEYS) for key in table if key not in KEYS]
        given = known | {key: value for key, value in table.items() if key in KEYS}
        jobs += _expand(at, given, place, root, problems)
        if len(jobs) > MOST_JOBS:
            problems.append(f"more than {MOST_JOBS} jobs; split the file")
            break
    return Plan(path, place, tuple(jobs)), [*dict.fromkeys(problems)] or _twice(jobs)


def _out(text: object, given: Path | None, root: Path, problems: list[str]) -> Path:
    """The folder of all results: the caller's, or the file's inside the root."""
    if given is not None:
        return given
    try:
        if not isinstance(text, str) or not text.strip():
            raise JobsError(f"expected the name of a folder, got {brief(text)}")
        return _inside(root, text)
    except JobsError as error:
        problems.append(f"out: {error}")
        return root


def _unknown(where: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return f"{where}: unknown key {brief(key)}; {hint}"


def _twice(jobs: Sequence[Job]) -> list[str]:
    """Names that several jobs would have; case alone tells no folders apart everywhere."""
    seen: dict[str, Job] = {}
    found = []
    for job in jobs:
        other = seen.setdefault(job.name.lower(), job)
        if other is not job:
            found.append(
                f"{job.table}: {job.name} is also a job of {other.table}; give one of them another"
                " name"
            )
    return list(dict.fromkeys(found))


# -- one table ------------------------------------------------------------------------------------


def _expand(at: str, given: Table, out: Path, root: Path, problems: list[str]) -> Iterator[Job]:
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
        title = _named(name, request, varied)
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
        return _inside(root, text)
    if key == "space":
        return str(_inside(root, text)) if "/" in text or text.endswith(".toml") else text
    local = text.startswith((".", "/")) or text.count("/") > 1 or os.path.isdir(root / text)
    if not local or text == Path(text).name != "..":  # on the hub, or bundled
        return text
    return os.path.join(os.curdir, _inside(root, text))


def _inside(root: Path, text: str) -> Path:
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
            one = str(_inside(root, one))
        try:
            pairs.append(f"{name}={one if isinstance(one, str) else json.dumps(one)}")
        except TypeError:
            raise JobsError(f"{name}: expected text, a number, a list or a table") from None
    return tuple(pairs)


# -- names ----------------------------------------------------------------------------------------


SHOWN = ("model", "task", "budget")  # what a name begins with
UNSEEN = ("trials", "time_limit", "out")  # a run is the same with other ones


def _named(name: str | None, request: Request, varied: Sequence[str]) -> str:
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


# -- what must be there ---------------------------------------------------------------------------


def _missing(plan: Plan, root: Path) -> list[str]:
    """What the jobs need and is not there, each with the first table that asks for it."""
    found: dict[str, None] = {}
    asked: dict[object, None] = {}
    for job in plan.jobs:
        for key, check in _checks(job.request, root).items():
            if key in asked:
                continue
            asked[key] = None
            try:
                check()
            except UserError as error:
                found[f"{job.table}: {error}"] = None
    return [*found]


def _checks(request: Request, root: Path) -> Mapping[object, Callable[[], object]]:
    """What can be looked at without weights, by what the outcome depends on."""
    from autofr.inputs import parse_call, read_inputs
    from autofr.loading import check
    from autofr.measure.costs import parse_budget
    from autofr.memory import parse_size
    from autofr.search.space import load_space

    model = (request.model, request.device, request.dtype)
    checks: dict[object, Callable[[], object]] = {
        ("budget", request.budget): lambda: parse_budget(request.budget),
        ("space", request.space): lambda: load_space(request.space),
        ("call", request.call): lambda: parse_call(request.call),
        model: lambda: check(request.model, request.device, request.dtype),
    }
    if inputs := request.inputs:
        checks["inputs", inputs] = lambda: read_inputs(inputs, root)
    if limit := request.max_memory:
        checks["memory", limit] = lambda: parse_size(limit)
    return checks


def _stamp(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a file, or of all files in a folder; nothing if there is none."""
    if os.path.isfile(place):
        files = [place]
    elif os.path.isdir(place):
        files = sorted(path for path in place.rglob("*") if path.is_file())
    else:
        return []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
