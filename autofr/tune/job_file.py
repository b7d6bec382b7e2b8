"""Job files: a matrix of searches in TOML, read as data and checked before any of them starts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from autofr import reading
from autofr.errors import JobsError, UserError, brief
from autofr.request import Request
from autofr.tune.jobs import Job, Plan
from autofr.tune.matrix import FIELDS, KEYS, MOST_JOBS, Table, expand, inside

MOST_BYTES = 256 * 1024
MOST_SAID = 20  # things that are wrong, in one message
TOP = ("out", "defaults", "job")


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
        jobs += expand(at, given, place, root, problems)
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
        return inside(root, text)
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
