"""Children of the driver that work out proposals; they never touch the study.

Each is a process of its own, spawned: its death costs the trial that it had. A child ends with its
driver, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from autofr.errors import AutofrError, MeasurementError
from autofr.search.trial import Outcome, Proposal, Recipe, Scorer

DEATHS = 4  # children in a row that die before the search is given up
GRACE = 5.0  # seconds that a child has to end
_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class _Child:
    """A process, the way to it, the trial that it works out, and the key of its proposal."""

    process: Any
    line: connection.Connection
    trial: Any = None
    key: str = ""


class Crew:
    """So many children, made when there is work; leave the block, and they are gone."""

    away = False

    def __init__(self, count: int, recipe: Recipe) -> None:
        self._count, self._recipe = count, recipe
        self._children: list[_Child] = []
        self._deaths = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *failure: object) -> None:
        for child in self._children:
            child.process.terminate()
            child.line.close()
        for child in self._children:
            child.process.join(GRACE)
            child.process.kill()
            child.process.join()
        self._children = []

    @property
    def pids(self) -> list[int]:
        """Process ids of the children."""
        return [child.process.pid for child in self._children]

    def free(self, twins: int = 0) -> bool:
        return twins < self._count and len(self._busy()) < self._count

    def at_work(self, proposal: Proposal) -> bool:
        return any(child.key == proposal.key for child in self._busy())

    def busy(self) -> bool:
        return bool(self._busy())

    def _busy(self) -> list[_Child]:
        return [child for child in self._children if child.trial is not None]

    def begin(self, trial: Any, proposal: Proposal) -> None:
        """Give a proposal to an idle child, or to a new one."""
        idle = [child for child in self._children if child.trial is None]
        child = idle[0] if idle else self._born()
        child.trial, child.key = trial, proposal.key
        with suppress(OSError):  # it died while it was idle: `over` sees that
            child.line.send(proposal)

    def over(self) -> list[tuple[Any, Outcome | None]]:
        """Wait for a child that is done, or dead.

        Raises: MeasurementError when children fail, or die one after another.
        """
        busy = {child.line: child for child in self._busy()}
        return [self._answer(busy[line]) for line in connection.wait([*busy])]  # type: ignore[index]

    def _answer(self, child: _Child) -> tuple[Any, Outcome | None]:
        trial, child.trial = child.trial, None
        try:
            said = child.line.recv()
        except (EOFError, OSError):
            self._bury(child)
            return trial, None
        if isinstance(said, str):
            child.trial = trial
            raise MeasurementError(f"a worker failed: {said}")
        self._deaths = 0
        return trial, said

    def _born(self) -> _Child:
        own, other = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_live, args=(other, self._recipe), daemon=True)
        process.start()
        other.close()  # so that the line ends with the child
        self._children.append(_Child(process, own))
        return self._children[-1]

    def _bury(self, child: _Child) -> None:
        self._children.remove(child)
        child.line.close()
        child.process.join()
        self._deaths += 1
        if self._deaths >= DEATHS:
            raise MeasurementError(
                f"{DEATHS} workers in a row were ended from outside (exit code"
                f" {child.process.exitcode}), perhaps for want of memory: ask for fewer --workers"
            )


def _live(line: connection.Connection, recipe: Recipe) -> None:
    """Work out what comes along the line, to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the driver decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        scorer = Scorer.alone(*recipe())
        while True:
            line.send(scorer.outcome(line.recv()))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        if isinstance(error, MemoryError | RuntimeError) and "memory" in f"{error!r}".lower():
            os._exit(1)  # as the system ends it where there is too little: costs its trial
        kind = "" if isinstance(error, AutofrError) else f"{type(error).__name__}: "
        line.send(f"{kind}{error}")
