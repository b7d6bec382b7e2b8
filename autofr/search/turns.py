"""Turns of the workers of one machine: only as many score at a time as its cores are for.

More processes at once take more CPU time for the same trials (benchmarks/workers.py speed). Each
core has a lock file, and a worker holds as many as it has threads. Its next trial it takes before
it waits, so that no core waits for the database.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from autofr.cores import usable
from autofr.files import locked

PATIENCE = 60.0  # seconds after which a turn is not waited for: its holder may be paused
LOOK = 0.05  # seconds between two looks
One = TypeVar("One")
Found = TypeVar("Found")


def in_turn(score: Callable[[One], Found], threads: int) -> Callable[[One], Found]:
    """The function, called in turn with other processes of this user; 0 threads take all cores."""

    def scored(one: One) -> Found:
        with turn(threads):
            return score(one)

    return scored


@contextmanager
def turn(threads: int) -> Iterator[bool]:
    """Hold so many of this process's cores inside the block; False where it goes on without."""
    until = time.monotonic() + PATIENCE
    while True:
        with ExitStack() as held:
            found = _taken(threads, held)
            if found or found is None or time.monotonic() > until:
                yield bool(found)
                return
        time.sleep(LOOK)


def _taken(threads: int, held: ExitStack) -> bool | None:
    """Whether so many cores could be taken; None where locks cannot be held."""
    free = usable()
    wanted = min(threads or len(free), len(free))
    try:
        folder = Path(tempfile.gettempdir()) / f"autofr-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        while 0 < wanted <= len(free):  # with fewer left, nothing is taken from others
            wanted -= held.enter_context(locked(folder / f"core-{free.pop(0)}.lock"))
    except OSError:
        return None
    return not wanted
