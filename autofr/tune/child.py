"""One process of `autofr tune`: does one order of its driver, and tells of it as JSON lines.

The order is the first line of standard input, which then stays open: when it ends the driver is
gone, and so is this process. Events go to standard output; whatever else is printed, to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from autofr.errors import AutofrError, BudgetError
from autofr.request import Prepared, Request, prepare

Tell = Callable[..., None]
ORPHANED = 3  # exit code without a driver


class TimeUpError(Exception):
    """The time of all jobs was up before this one could try anything."""


def main() -> None:
    """Do the order on standard input."""
    order = _order()
    tell = _events()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the driver decides
    try:
        {"search": _search, "estimate": _estimate}[order["do"]](order, tell)
    except KeyboardInterrupt:
        tell(state="stopped", reason="")
    except Exception as error:
        if not isinstance(error, AutofrError | TimeUpError):
            traceback.print_exc()
        tell(**_outcome(error))


def _outcome(error: Exception) -> dict[str, str]:
    """How a job ended that has no result."""
    if isinstance(error, TimeUpError):
        return {"state": "stopped", "reason": "the time was up"}
    kind = "" if isinstance(error, AutofrError) else f"{type(error).__name__}: "
    return {"state": "failed", "reason": f"{kind}{error}".replace("\n", " ")[:500]}


# -- orders ---------------------------------------------------------------------------------------


def _search(order: dict[str, Any], tell: Tell) -> None:
    """Search as `autofr search` does, with what other jobs have measured."""
    left = order["seconds"]
    deadline = None if left is None else time.monotonic() + left
    (request,) = order["requests"].values()
    prepared = _prepare(request)
    from autofr import job

    tried = late = False

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal tried, late
        over = deadline is not None and time.monotonic() > deadline
        if over and not tried:
            raise TimeUpError
        tried |= stage == "trials"
        late |= over and stage == "trials"
        tell(stage=stage, done=done, total=total)

    try:
        job.run(
            prepared.pipe,
            replace(prepared.settings, deadline=deadline),
            prepared.folder,
            prepared.judge,
            on_progress,
            Path(order["shelf"]),
        )
    except BudgetError:
        if late:
            raise TimeUpError from None
        raise
    tell(state="short" if late else "finished", reason="")


def _estimate(order: dict[str, Any], tell: Tell) -> None:
    """Say how many seconds each of some searches will take, all of the same pipe."""
    prepared = _prepare(next(iter(order["requests"].values())))
    from autofr import job
    from autofr.measure.costs import parse_budget

    call = job.call_seconds(prepared.pipe, prepared.settings)
    for name, fields in order["requests"].items():
        budget, trials = parse_budget(fields["budget"]), fields["trials"]
        settings = replace(prepared.settings, budget=budget, trials=trials)
        try:
            tell(job=name, seconds=job.search_seconds(settings, call))
        except BudgetError as error:
            tell(job=name, unknown=str(error))


def _prepare(fields: dict[str, Any]) -> Prepared:
    request = Request.model_validate_json(json.dumps(fields))
    return prepare(request, request.command)


# -- the driver -----------------------------------------------------------------------------------


def _order() -> dict[str, Any]:
    """Read the order, and end with the driver from now on."""
    line = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    read = bytearray()
    while not read.endswith(b"\n"):
        part = os.read(line, 65536)
        if not part:
            sys.exit(ORPHANED)
        read += part

    def watch() -> None:
        while os.read(line, 1):
            pass
        os._exit(ORPHANED)  # what was finished is kept, as after kill -9

    threading.Thread(target=watch, daemon=True).start()
    return json.loads(read)


def _events() -> Tell:
    """Take standard output for events."""
    out = os.dup(1)
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        os.write(out, json.dumps(event).encode() + b"\n")

    return tell


if __name__ == "__main__":
    main()
