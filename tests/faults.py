"""Real `autofr` processes that tests hold, kill and pause, and a way to a server that can break.

Processes are forked from one that has imported everything once. They search the tiny pipe of
`test_search`, whose time passes with its work.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_cli import FEW
from test_search import few_rows, tiny_pipe, work_clock

from autofr.cli.app import main
from autofr.search import database, evaluate, facts, folder, shared, turns
from autofr.search.search import Search
from autofr.search.trial import Outcome, Proposal, Scorer

HERE = Path(__file__).parent
facts.code()  # of the one process that all others are forked from
ANSWER = 120.0  # seconds that anything here may take on a busy machine
BEAT = (1, 2)  # seconds: a heart beats, and may be silent
FEW_SEEDS = {f"{purpose}_seeds": 2 for purpose in ("calibration", "trial", "validation", "test")}


@dataclass(frozen=True)
class World:
    """What a process lives under.

    Every trial that it begins is a line in `ran`, and does not go on while the file `hold` is
    there; then `act` is done, if it has one. `patience` are the seconds that a database may be
    away; `jump` is by how much its clock is wrong, and by how much more at every look.
    A search ends well after its trials: what comes later is not what is at stake.
    """

    ran: Path
    hold: Path
    act: Callable[[Proposal], None] | None = None
    patience: float = 30.0
    jump: float = 0.0


def wait(sign: Callable[[], Any], seconds: float = ANSWER) -> Any:
    """What is true at last."""
    until = time.monotonic() + seconds
    while not (found := sign()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
    return found


# -- processes ------------------------------------------------------------------------------------


def context() -> Any:
    """Where processes are forked from: it has imported what they need, and no more."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["faults"])
    paths = [str(HERE), str(HERE.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return found


class Autofr:
    """A command that runs in a process of its own."""

    def __init__(self, place: Path, name: str, words: tuple[object, ...], **world: Any) -> None:
        self.name = name
        self.ran, self.hold, self._said = (
            place / f"{name}.{one}" for one in ("ran", "hold", "said")
        )
        self.begin(*words, **world)

    def begin(self, *words: object, hold: bool = False, **world: Any) -> None:
        """Give a command, another one or the same again."""
        if hold:
            self.hold.touch()
        given = (tuple(map(str, words)), self._said, World(self.ran, self.hold, **world))
        self.process = context().Process(target=live, args=given, daemon=True)
        self.process.start()

    @property
    def said(self) -> str:
        """All that it has printed, on either stream."""
        return self._said.read_text() if self._said.exists() else ""

    def line(self, text: str) -> str:
        """The one line with a text in it; fails where there are more, or none."""
        found = [line for line in self.said.splitlines() if text in line]
        assert len(found) == 1, self.said
        return found[0]

    def trials(self) -> list[str]:
        """Keys of the trials that it has begun, in order."""
        return self.ran.read_text().split() if self.ran.exists() else []

    def held(self, count: int = 1) -> str:
        """Wait until it stands in the middle of its trial of that number; its key."""
        self.wait(lambda: len(self.trials()) >= count)
        return self.trials()[count - 1]

    def wait(self, sign: Callable[[], Any]) -> Any:
        """Wait for something that needs this process alive."""

        def seen() -> Any:
            found = sign()
            assert found or self.process.is_alive(), self.said
            return found

        return wait(seen)

    def go_on(self) -> None:
        self.hold.unlink(missing_ok=True)

    def step(self) -> None:
        """Let it go on, and hold it in its next trial."""
        path, count = self.ran.with_suffix(".on"), len(self.trials())
        self.go_on()
        self.wait(lambda: path.exists() and len(path.read_text().split()) == count)
        self.hold.touch()

    def signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it with kill -9."""
        self.signal(signal.SIGKILL)
        self.process.join(ANSWER)
        assert self.process.exitcode == -signal.SIGKILL

    def ended(self) -> int:
        """Its exit code, once it has one."""
        self.process.join(ANSWER)
        assert self.process.exitcode is not None, self.said
        assert "Traceback" not in self.said, self.said
        return self.process.exitcode

    def gone(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(ANSWER)


def live(words: tuple[str, ...], said: Path, world: World) -> None:
    """Be the command, in a process of its own."""
    out = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["autofr", *words]
    with under(world):
        main()


@contextmanager
def under(world: World) -> Iterator[None]:
    """Let this process live in a world."""
    outcome = Scorer.outcome

    def begun(self: Scorer, proposal: Proposal) -> Outcome:
        with world.ran.open("a") as file:
            file.write(f"{proposal.key}\n")
        while world.hold.exists():
            time.sleep(0.02)
        with world.ran.with_suffix(".on").open("a") as file:
            file.write(f"{proposal.key}\n")
        if world.act:
            world.act(proposal)
        return outcome(self, proposal)

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(Scorer, "outcome", begun)
        patch.setattr(folder, "Settings", functools.partial(folder.Settings, **FEW_SEEDS))
        patch.setattr(evaluate, "FINE", 1)
        patch.setattr(shared, "Share", functools.partial(shared.Share, heartbeat=BEAT))
        patch.setattr(shared.SharedLedger, "at_work", lambda *_: False)  # few policies, all wanted
        patch.setattr(database, "PATIENCE", world.patience)
        patch.setattr(turns, "PATIENCE", 0.0)  # others stand still in the middle of a trial
        if world.jump:
            patch.setattr(time, "time", jumping(world.jump))
        patch.setattr(Search, "_timed", until_trials)
        stack.enter_context(work_clock())
        stack.enter_context(few_rows())
        yield


def until_trials(self: Search, stage: str, work: Callable[[], Any]) -> Any:
    """A stage of a search, the last of which are the trials."""
    if stage == "choose":
        raise SystemExit(0)
    return work()


def jumping(by: float) -> Callable[[], float]:
    """A clock that is wrong, and more so at every look."""
    clock, looks = time.time, iter(range(1, sys.maxsize))
    return lambda: clock() + by * next(looks)


def search_words(model: Path, out: Path, trials: int, *more: object) -> tuple[object, ...]:
    """The command of a tiny search."""
    return (
        "search",
        "--model",
        model,
        "--budget",
        "1.3x",
        "--trials",
        trials,
        *FEW,
        "--out",
        out,
        *more,
    )


def save_model(place: Path) -> Path:
    """The tiny pipe, as a folder."""
    tiny_pipe().save_pretrained(place)
    return place


# -- ways -----------------------------------------------------------------------------------------


class Way:
    """A port that leads to another one, until it is blocked: then nothing passes, either way."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._blocked, self._forgotten, self._over = (threading.Event() for _ in range(3))
        self._door = socket.create_server(("127.0.0.1", 0))
        self._door.setblocking(False)
        self.port = self._door.getsockname()[1]
        self._other: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def block(self) -> None:
        self._blocked.set()

    def heal(self) -> None:
        self._blocked.clear()

    def reset(self) -> None:
        """Break all connections, as a router does that has forgotten them; new ones may pass."""
        self._forgotten.set()
        wait(lambda: not self._forgotten.is_set())

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _carry(self) -> None:
        with selectors.DefaultSelector() as ready, self._door:
            ready.register(self._door, selectors.EVENT_READ)
            while not self._over.is_set():
                if self._forgotten.is_set():
                    self._forget(ready)
                if self._blocked.is_set():
                    time.sleep(0.02)
                    continue
                for key, _ in ready.select(0.02):
                    self._pass(ready, key.fileobj)
            for one in self._other:
                one.close()

    def _forget(self, ready: selectors.BaseSelector) -> None:
        for one in self._other:
            ready.unregister(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        self._other.clear()
        self._forgotten.clear()

    def _pass(self, ready: selectors.BaseSelector, one: Any) -> None:
        if one is self._door:
            pair = (self._door.accept()[0], socket.create_connection(("127.0.0.1", self._to)))
            self._other |= {pair[0]: pair[1], pair[1]: pair[0]}
            for end in pair:
                end.setblocking(True)
                ready.register(end, selectors.EVENT_READ)
            return
        if one not in self._other:
            return
        with contextlib.suppress(OSError):
            if found := one.recv(65536):
                self._other[one].sendall(found)
                return
        for end in (one, self._other[one]):
            ready.unregister(end)
            end.close()
            del self._other[end]
