"""Processes of jobs, as their driver sees them; `child.py` is what runs in them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from autofr.tune.jobs import Job

CHILD = (sys.executable, "-P", "-m", "autofr.tune.child")
GRACE = 30.0  # seconds that a job has to stop


@contextmanager
def process(
    child: Sequence[str], order: dict[str, Any], jobs: Sequence[Job], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A job's process with its order; it is gone when the block is left, however that happens."""
    parent = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    born = subprocess.Popen(
        child,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,  # Ctrl-C comes to the driver alone
    )
    assert born.stdin and born.stdout
    requests = {job.name: job.request.model_dump(mode="json") for job in jobs}
    try:
        with suppress(BrokenPipeError):  # it ended already; its exit code says why
            born.stdin.write(json.dumps(order | {"requests": requests}).encode() + b"\n")
            born.stdin.flush()
        yield born
    finally:
        _end(born)


def _end(born: subprocess.Popen[bytes]) -> None:
    """Ask a process to stop, and stop it when it does not, or at a second Ctrl-C."""
    assert born.stdin and born.stdout
    try:
        if born.poll() is None:
            born.terminate()
            born.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        born.kill()
    finally:
        born.wait()
        born.stdout.close()
        with suppress(OSError):
            born.stdin.close()


def events(born: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What a process tells, line by line, to its end."""
    assert born.stdout
    for line in born.stdout:
        with suppress(ValueError):  # half a line of a process that was killed
            yield json.loads(line)


def death(code: int, log: str) -> str:
    """Why a process ended that did not say so itself."""
    if code < 0:
        name = {one.value: one.name for one in signal.Signals}.get(-code, f"signal {-code}")
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}; see {log}"
    return f"its process ended with exit code {code}; see {log}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM stop what Ctrl-C stops."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
