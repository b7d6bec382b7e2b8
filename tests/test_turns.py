"""Laws of turns: no more workers at a time than cores, and none waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autofr.search import turns
from autofr.search.turns import in_turn, turn


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four cores, with a folder for its locks that no other test uses."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    return tmp_path


def most_at_once(workers: int, threads: int, rounds: int = 3) -> tuple[int, int]:
    """How many of some workers were at work together, and how often one was done."""
    at_work, seen, done = 0, [0], []
    count = threading.Lock()

    def score(one: int) -> None:
        nonlocal at_work
        with count:
            at_work += 1
            seen.append(at_work)
        time.sleep(0.02)
        with count:
            at_work -= 1
            done.append(one)

    def live() -> None:
        for one in range(rounds):
            in_turn(score, threads)(one)

    born = [threading.Thread(target=live) for _ in range(workers)]
    for one in born:
        one.start()
    for one in born:
        one.join()
    return max(seen), len(done)


@pytest.mark.parametrize(("threads", "most"), [(1, 4), (2, 2), (3, 1), (0, 1), (9, 1)])
def test_as_many_work_as_there_are_cores(threads: int, most: int) -> None:
    """Of six workers with so many threads each, no more are at work; all get to their end."""
    assert most_at_once(6, threads) == (most, 18)


def test_cores_of_others_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may use other cores, as in jobs beside each other, has turns of its own."""
    monkeypatch.setattr(turns, "PATIENCE", 0.0)
    with turn(0):
        with turn(1) as taken:
            assert not taken
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5})
        with turn(0) as taken:
            assert taken


def test_what_is_scored_is_passed_on() -> None:
    """The value comes back, an error comes through, and the cores are free after both."""

    def fail(one: int) -> int:
        raise ValueError(one)

    assert in_turn(str, 0)(7) == "7"
    with pytest.raises(ValueError, match="7"):
        in_turn(fail, 0)(7)
    with turn(0) as taken:
        assert taken


def test_a_paused_holder_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while it goes on without its turn."""
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    with turn(0), turn(1) as taken:
        assert not taken


def test_where_nothing_can_be_locked_nothing_is_waited_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another user, or none, does not keep a worker from its work."""
    (place / f"autofr-{os.getuid()}").write_text("no folder")
    with turn(1) as taken:
        assert not taken


HOLD = """
import time
from autofr.search.turns import turn
with turn(0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_gives_its_cores_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a process ends, its turn ends too."""
    monkeypatch.undo()  # the other process knows only the real cores
    environment = {**os.environ, "TMPDIR": str(place)}
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        monkeypatch.setattr(turns, "PATIENCE", 0.0)
        with turn(0) as taken:
            assert not taken
        other.kill()
        other.wait()
    with turn(0) as taken:
        assert taken
