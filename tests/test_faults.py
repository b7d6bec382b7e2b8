"""Laws of what goes wrong: nothing finished is lost, nothing counts twice, one line says it.

What every fault did, and what was said, goes into the properties of the test's report:
`benchmarks/faults.py` makes a table of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
from faults import BEAT, Autofr, Way, World, save_model, search_words, under, wait
from optuna.study import StudyDirection
from postgres import Postgres, public_folder, running
from sqlalchemy.event import listen
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from test_cli import Ran, make_policy, ran
from test_search import STEPS, tiny_pipe
from test_workers import driver, made, proposal, propose, states

from autofr import files
from autofr.errors import MeasurementError
from autofr.search import crew, database
from autofr.search.database import open_storage
from autofr.search.evaluate import Evaluator
from autofr.search.folder import STATE
from autofr.search.ledger import Ledger, notes_of
from autofr.search.queue import Queue
from autofr.search.trial import Proposal, Scorer

TRIALS = 6
ROWS = 2  # published schedules
Tell = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipe in a folder."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tell(record_property: Callable[[str, object], None], tmp_path: Path) -> Tell:
    """Note a fault: what was done, the line that was said, what was kept."""

    def noted(fault: str, done: str, said: str, kept: str) -> None:
        assert said and "\n" not in said
        for own, instead in ((f"{tmp_path}/", ""), (socket.gethostname(), "host")):
            said = said.replace(own, instead)
        text = json.dumps({"fault": fault, "done": done, "said": said, "kept": kept})
        record_property("fault", text)

    return noted


@pytest.fixture
def crowd(model: Path, tmp_path: Path) -> Iterator[Crowd]:
    """Processes of one search; all are gone at the end."""
    found = Crowd(model, tmp_path)
    yield found
    for one in found.all:
        one.gone()
        print(f"{one.name}:\n{one.said}")


class Crowd:
    """A search's processes."""

    def __init__(self, model: Path, place: Path) -> None:
        self.model, self.place = model, place
        self.all: list[Autofr] = []

    def _born(self, name: str, words: tuple[object, ...], **world: Any) -> Autofr:
        self.all.append(Autofr(self.place, name, words, **world))
        return self.all[-1]

    def driver(self, url: str, name: str = "driver", out: str = "out", **world: Any) -> Autofr:
        """`autofr search --storage`."""
        return self._born(name, self.words(url, out), **world)

    def words(self, url: str, out: str = "out") -> tuple[object, ...]:
        more = ("--storage", url, "--study", "one")
        return search_words(self.model, self.place / out, TRIALS, *more)

    def worker(self, url: str, name: str, **world: Any) -> Autofr:
        """`autofr worker`."""
        words = ("worker", "--storage", url, "--study", "one", "--threads", 1)
        return self._born(name, words, **world)


def alone(words: tuple[object, ...], place: Path, **world: Any) -> Ran:
    """A command in this process."""
    return ran(words, under(World(place / "ran", place / "hold", **world)))


def last(ran: Ran) -> str:
    """The line that a refused command ends with."""
    assert ran.code != 0 and "Traceback" not in ran.err, ran
    lines = [line for line in ran.err.splitlines() if line.startswith("autofr")]
    assert len(lines) == 1, ran.err
    return lines[0]


# -- counting -------------------------------------------------------------------------------------


def study(url: str) -> Queue:
    """The study, over connections of its own."""
    return Queue("one", open_storage(url, BEAT))


def counted(trials: Any, cut_off: int | None = None) -> str:
    """Check that everything is there, once; how much that is, in words."""
    states = Counter(trial.state.name for trial in trials)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    rows = [trial.user_attrs["row"] for trial in done if "row" in trial.user_attrs]
    own = [trial for trial in done if "row" not in trial.user_attrs]
    scored = [notes_of(t)["digest"] for t in own if not {"duplicate_of", "chain"} & {*notes_of(t)}]
    assert len(rows) == len({*rows}) == ROWS
    assert len(own) == TRIALS and {*states} <= {"COMPLETE", "FAIL"}, states
    assert len({json.dumps(trial.params) for trial in own}) == TRIALS
    assert len({*scored}) == len(scored)  # of those that one process scored after another
    assert all(np.isfinite(trial.value) for trial in done)
    lost = [trial for trial in trials if trial.state.name == "FAIL"]
    again = [trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs]
    assert sorted(again) == sorted(trial.number for trial in lost)
    if cut_off is not None:
        assert len(lost) == cut_off, states
    return f"{len(done)} of {TRIALS + ROWS} trials, each once; {len(lost)} cut off and tried again"


# -- workers, drivers and the database that they share --------------------------------------------


def exhaust(one: Proposal) -> None:
    """Let this process have 64 MiB more, and take them: what it asks for next is refused."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**26
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    taken = []
    while True:
        taken.append(torch.zeros(2**20))


@pytest.mark.slow
def test_workers_and_drivers_that_die(crowd: Crowd, postgres: Postgres, tell: Tell) -> None:
    """kill -9 of a worker and of the driver, a worker without memory, a second driver."""
    url = postgres.url
    driver = crowd.driver(url, hold=True)
    driver.held()
    killed = crowd.worker(url, "killed", hold=True)
    poor = crowd.worker(url, "poor", act=exhaust)
    steady = crowd.worker(url, "steady", hold=True, jump=3600.0)
    second = crowd.driver(url, "second", out="other")
    same = crowd.driver(url, "same")

    assert poor.ended() == 1
    assert "memory" in poor.line("autofr failed")
    for one in (second, same):
        assert one.ended() == 2
    said = second.line("another autofr search drives it")
    assert "profile" not in second.said  # nothing is measured before
    tell("two drivers on one study", "the same study in another folder", said, "exit code 2")
    said = same.line("another autofr process is working there")
    tell("two drivers on one study", "the same folder", said, "exit code 2")

    killed.held()
    steady.held()
    killed.kill()
    driver.kill()
    steady.go_on()
    wait(lambda: sum(t.state.name == "COMPLETE" for t in study(url).trials) > ROWS)
    before = {t.number: t.value for t in study(url).trials if t.state.name == "COMPLETE"}
    driver.go_on()
    driver.begin(*crowd.words(url))
    assert driver.ended() == 0 and steady.ended() == 0
    trials = study(url).trials
    assert {number: trials[number].value for number in before} == before
    kept = counted(trials)
    lines = [line for line in driver.said.splitlines() if "tried again" in line]
    memory = next(line for line in lines if "memory" in line)
    ended = next(line for line in lines if "memory" not in line)
    tell("worker out of memory", "a trial takes all that its process may have", memory, kept)
    tell("kill -9 of a worker", "in the middle of a trial", ended, kept)
    steady.line("the search has all its trials")
    what = f"{len(before)} trials stayed as they were; {kept}"
    tell("kill -9 of the driver", "in the middle of a trial; same command", ended, what)


def test_a_database_that_goes_away(crowd: Crowd, postgres: Postgres, tell: Tell) -> None:
    """Connections ended by the server, kill -9 of the server, and a server that stays away."""
    url = postgres.url
    driver = crowd.driver(url, hold=True)
    worker = crowd.worker(url, "worker", hold=True)
    driver.held()
    worker.held()
    postgres.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    )
    for one in (driver, worker):
        one.step()
    wait(lambda: len(driver.trials() + worker.trials()) > 3)  # over new connections
    noticed = [
        t for t in study(url).trials if t.state.name == "COMPLETE" and "worker" in notes_of(t)
    ]
    tell(
        "lost connection",
        "every connection ended by the server, in the middle of two trials",
        "(nothing: they connect again)",
        f"{len(noticed)} of 2 results arrived",
    )
    postgres.kill()
    for one in (driver, worker):
        one.go_on()
    said = wait(lambda: [one for one in (driver, worker) if "database is away" in one.said])[0]
    postgres.start()
    assert driver.ended() == 0 and worker.ended() == 0
    kept = counted(study(url).trials)
    line = said.line("the database is away")
    assert postgres.password not in driver.said + worker.said
    tell("kill -9 of PostgreSQL", "in the middle of two trials; started again", line, kept)


@pytest.mark.slow
def test_a_database_that_stays_away(crowd: Crowd, postgres: Postgres, tell: Tell) -> None:
    """Waiting has an end, with one line; the same command goes on when it is back."""
    driver = crowd.driver(postgres.url, hold=True, patience=1.0)
    driver.held()
    before = len(study(postgres.url).trials)
    postgres.kill()
    driver.go_on()
    assert driver.ended() == 2
    line = driver.line("cannot be used")
    assert postgres.password not in driver.said
    postgres.start()
    driver.begin(*crowd.words(postgres.url))
    assert driver.ended() == 0
    trials = study(postgres.url).trials
    kept = f"{counted(trials)}; exit code 2, then 0"
    assert len(trials) >= before
    tell("kill -9 of PostgreSQL", "not started again until the patience ends", line, kept)


@pytest.mark.slow
def test_workers_that_are_paused_or_cut_off(crowd: Crowd, postgres: Postgres, tell: Tell) -> None:
    """Longer than the grace period: others get their trials, and they go on with other ones."""
    way = Way(postgres.port)
    through = postgres.url.replace(str(postgres.port), str(way.port))
    driver = crowd.driver(postgres.url, hold=True)
    driver.held()
    far = crowd.worker(through, "far", hold=True)
    paused = crowd.worker(postgres.url, "paused", hold=True)
    far.held()
    paused.held()
    way.block()
    paused.signal(signal.SIGSTOP)
    for one in (far, paused):
        one.go_on()
    time.sleep(BEAT[1] + 1)  # longer than the grace period
    driver.go_on()
    driver.wait(lambda: driver.said.count("tried again") == 2)
    paused.signal(signal.SIGCONT)
    way.heal()
    assert driver.ended() == 0
    assert far.ended() == 0 and paused.ended() == 0
    way.close()
    trials = study(postgres.url).trials
    kept = counted(trials, cut_off=2)
    scored = Counter(notes_of(trial).get("worker") for trial in trials)
    assert scored["driver"] >= 2
    tell(
        "lost connection",
        "no byte passes, longer than the grace period",
        far.line("given to another"),
        kept,
    )
    tell(
        "paused worker",
        "SIGSTOP, longer than the grace period",
        paused.line("given to another"),
        kept,
    )


def test_a_process_that_is_paused_within_a_transaction(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has locked is given free after seconds: others go on, and then it does."""
    import psycopg

    options = database._CONNECT["options"].replace("timeout=15000", "timeout=1000")
    monkeypatch.setitem(database._CONNECT, "options", options)
    with driver(postgres) as book:
        propose(book)
        number = Queue("one", open_storage(postgres.url, BEAT))._pop_waiting_trial_id()
        paused = database._opened(postgres.url)
        paused.execute("SELECT 1 FROM trials WHERE trial_id = %s FOR UPDATE", [number])
        wait(lambda: book.watch() and states(book) == ["FAIL", "WAITING"])
        with pytest.raises(psycopg.Error) as found:
            paused.execute("SELECT 1")
        assert database._away(found.value)


@pytest.mark.parametrize("statement", range(1, 8))
def test_a_connection_lost_at_any_statement(postgres: Postgres, statement: int) -> None:
    """Whatever was being asked of the database is asked again, over a new connection."""
    seen: list[str] = []

    def lose(connection: object, cursor: object, words: str, *_: object) -> None:
        seen.append(words)
        if len(seen) == statement:
            postgres.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname IS NOT NULL AND pid <> pg_backend_pid()"
            )

    with driver(postgres) as book:
        propose(book)
        storage = open_storage(postgres.url, BEAT)
        listen(storage.engine, "before_cursor_execute", lose)
        assert len(Queue("one", storage).get_trials()) == 1 and len(seen) > statement


@pytest.mark.slow
def test_packets_that_are_lost(crowd: Crowd, postgres: Postgres, tell: Tell) -> None:
    """Nothing passes, then all connections are reset: driver and worker go on over new ones."""
    way = Way(postgres.port)
    through = postgres.url.replace(str(postgres.port), str(way.port))
    driver = crowd.driver(through, hold=True)
    driver.held()
    worker = crowd.worker(through, "worker", hold=True)
    worker.held()
    way.block()
    for one in (driver, worker):
        one.go_on()
    time.sleep(BEAT[0])  # shorter than the grace period
    way.reset()
    way.heal()
    assert driver.ended() == 0 and worker.ended() == 0
    way.close()
    kept = counted(study(postgres.url).trials)
    done = "no byte passes for a while, then every connection is reset"
    lines = [line for line in f"{driver.said}{worker.said}".splitlines() if "is away" in line]
    tell("dropped packets", done, (lines or ["(nothing: they connect again)"])[0], kept)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tables", "log"])
def test_a_database_whose_disk_is_full(what: str, crowd: Crowd, tell: Tell) -> None:
    """Whoever has a result waits and says so; with space, and the server again, all go on."""
    psycopg = pytest.importorskip("psycopg")
    with public_folder() as folder, mounted(folder, "128m") as disk, running(disk) as postgres:
        driver = crowd.driver(postgres.url, hold=True)
        worker = crowd.worker(postgres.url, "worker", hold=True)
        driver.held()
        worker.held()
        fill(disk, 0)
        if what == "log":  # the server ends where it cannot write that
            with pytest.raises(psycopg.Error):
                wait(lambda: postgres.query("SELECT pg_switch_wal()") is None)
            wait(postgres.ended)
        for one in (driver, worker):
            one.go_on()
        said = wait(lambda: [one for one in (driver, worker) if "database is away" in one.said])[0]
        (disk / "ballast").unlink()
        wait(postgres.answers)
        assert driver.ended() == 0 and worker.ended() == 0
        trials = study(postgres.url).trials
        kept = counted(trials)
        line = said.line("the database is away").replace(str(disk), "data")
        done = {"tables": "tables cannot grow", "log": "its log cannot grow, and it ends"}
        tell("full disk of PostgreSQL", done[what], line, kept)


def poor(model: Path) -> Any:
    """Make the pipe of a child that has too little memory for a trial."""
    Scorer.outcome = lambda self, one: exhaust(one)  # type: ignore[method-assign]
    return made(model)


def test_children_without_memory(model: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    """Each costs its trial; when they all die the search ends, with the reason."""
    monkeypatch.setattr(crew, "_SPAWN", faults.context())
    with crew.Crew(1, partial(poor, model)) as children:
        for _ in range(crew.DEATHS - 1):
            children.begin("trial", proposal(0))
            assert children.over() == [("trial", None)]
        children.begin("trial", proposal(0))
        with pytest.raises(MeasurementError, match=r"want of memory.*fewer --workers") as refused:
            children.over()
    done = f"the trials of {crew.DEATHS} children of --workers in a row take all they may have"
    tell("worker out of memory", done, str(refused.value), "each trial but the last is tried again")


def test_an_answer_that_is_lost(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was queued although its answer never came is not queued again, by whomever."""
    import psycopg

    real, lost = Session.commit, []

    def torn(self: Session) -> None:
        real(self)
        if not lost:
            lost.append(self)
            raise OperationalError("COMMIT", {}, psycopg.OperationalError("connection lost"))

    with driver(postgres) as book:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "commit", torn)
            propose(book)
        propose(book)
        assert len(lost) == 1 and states(book) == ["WAITING"] * 2


def test_clocks_and_zones_do_not_matter(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    """A heart beats by the database's clock in one zone, whatever a worker believes."""
    storages = []
    for zone in ("Pacific/Kiritimati", "UTC", "Pacific/Pago_Pago"):
        monkeypatch.setenv("PGTZ", zone)
        storages.append(open_storage(postgres.url, BEAT))
    number = storages[0].create_new_study([StudyDirection.MINIMIZE], "one")
    monkeypatch.setattr(time, "time", faults.jumping(86400.0))
    for one in storages:
        one.record_heartbeat(one.create_new_trial(number))
    assert [one._get_stale_trial_ids(number) for one in storages] == [[], [], []]
    time.sleep(BEAT[1] + 0.5)
    assert [len(one._get_stale_trial_ids(number)) for one in storages] == [3, 3, 3]
    said = "(nothing: a heart beats by the database's clock, limits by a clock that never jumps)"
    tell("clock jump", "a day at every look; three time zones", said, "3 of 3 trials stayed alive")


# -- the run's own folder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that was stopped after its trials."""
    place = tmp_path_factory.mktemp("run")
    assert alone(search_words(model, place / "out", TRIALS), place).code == 0
    return place / "out"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """That folder, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def halved(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def overwritten(whole: bytes) -> bytes:
    """Most pages of the file hold something else."""
    return whole[:4096] + b"\xa5" * (len(whole) - 8192) + whole[-4096:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("study.db", halved),
        ("study.db", overwritten),
        ("study.db", lambda whole: b"no database" * 999),
        ("profile.json", halved),
        ("profile.json", lambda whole: b""),
        (f"calibration-{STEPS}.npz", halved),
        ("spec.json", halved),
    ],
)
def test_a_damaged_file_of_a_run(
    name: str, damage: Callable[[bytes], bytes], copy: Path, model: Path, tell: Tell
) -> None:
    """It is named with what to do, and nothing at all is touched."""
    path = copy / STATE / name
    path.write_bytes(damage(path.read_bytes()))
    before = tree(copy)
    ran = alone(search_words(model, copy, TRIALS), copy.parent)
    line = last(ran)
    assert ran.code == 2 and str(path) in line
    assert any(text in line for text in ("delete it", "move the file away", "--out"))
    assert tree(copy) == before
    what = getattr(damage, "__name__", "").replace("<lambda>", "replaced by something else")
    tell(f"damaged {name}", what, line.replace(str(copy), "out"), "no file was touched")


def test_an_empty_study_is_a_new_one(copy: Path) -> None:
    """A kill at the first moment leaves a file of no bytes: nothing was in it."""
    (copy / STATE / "study.db").write_bytes(b"")
    assert Ledger(copy, 0, "default").records() == []


@pytest.mark.parametrize("name", ["policy.json", "result.json"])
def test_a_damaged_result(name: str, tmp_path: Path, tell: Tell) -> None:
    """Policies and results are read whole or not at all."""
    make_policy(tiny_pipe()).save(tmp_path / "policy.json")
    whole = (tmp_path / "policy.json").read_bytes()
    (tmp_path / name).write_bytes(halved(whole))
    words = ("show", tmp_path / name) if name == "policy.json" else ("report", tmp_path)
    ran = alone(words, tmp_path)
    line = last(ran)
    assert ran.code == 2 and name in line
    tell(f"damaged {name}", "halved", line.replace(str(tmp_path), "out"), "no file was touched")


# -- the disk -------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A small disk in an empty folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted (needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place, "1m") as found:
        yield found


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes of a disk."""
    state = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"\0" * max(0, state.f_bavail * state.f_bsize - left))


@pytest.mark.parametrize("moment", ["before", "study", "trial"])
def test_a_full_disk(disk: Path, moment: str, run: Path, model: Path, tell: Tell) -> None:
    """At whatever moment it is full, one line says so, and with space the same command goes on."""
    names = ["spec.json", "profile.json", f"calibration-{STEPS}.npz"]
    (disk / "out" / STATE).mkdir(parents=True)
    for name in names if moment != "before" else names[:2]:
        shutil.copy(run / STATE / name, disk / "out" / STATE)
    begun: list[Proposal] = []

    def act(one: Proposal) -> None:
        begun.append(one)
        if len(begun) == 2:
            fill(disk, 0)

    if moment != "trial":
        fill(disk, {"before": 0, "study": 40_960}[moment])
    words = search_words(model, disk / "out", TRIALS)
    ran = alone(words, disk.parent, act=act)
    line = last(ran)
    assert ran.code == 2 and "space" in line, line
    assert not list(disk.rglob("*.part*"))
    (disk / "ballast").unlink()
    before = finished(disk / "out")
    assert (len(before) > ROWS) == (moment == "trial")
    assert alone(words, disk.parent).code == 0
    after = finished(disk / "out")
    assert {number: after[number] for number in before} == before
    kept = counted(Ledger(disk / "out", 0, "default")._trials())
    done = {"before": "before the calibration is written", "study": "before the study is made"}
    tell(
        "full disk",
        done.get(moment, "in the middle of a trial"),
        line.replace(f"{disk}/", ""),
        f"{len(before)} trials stayed as they were; {kept}",
    )


def finished(folder: Path) -> dict[int, float]:
    """Values of the trials in a folder that are over, by their numbers."""
    path = folder / STATE / "study.db"
    return (
        {r.number: r.value for r in Ledger(folder, 0, "default").records()} if path.exists() else {}
    )


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    """Whole files are replaced by whole files, or stay."""
    path = tmp_path / "policy.json"
    files.write(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write(path, b"\0" * 8193)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, kept)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["policy.json"]


def test_no_link_is_written_through(tmp_path: Path) -> None:
    """What lies where a file is prepared is replaced, not followed, and nothing is left there."""
    path, other = tmp_path / "policy.json", tmp_path / "other"
    other.write_text("theirs")
    (tmp_path / f"policy.json.{os.getpid()}.part").symlink_to(other)
    path.symlink_to(other)
    files.write(path, "mine")
    assert (path.read_text(), other.read_text()) == ("mine", "theirs")
    assert sorted(os.listdir(tmp_path)) == ["other", "policy.json"] and not path.is_symlink()


# -- the model ------------------------------------------------------------------------------------


def test_a_model_that_gives_nan_for_some_policies(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    """Those trials are refused with the reason, the others count, and no NaN is kept."""
    score, seen = Evaluator.score, []

    def sick(self: Evaluator, policy: Any, seeds: int | None = None) -> Any:
        seen.append(policy.digest)
        if len({*seen}) > ROWS + 1:
            monkeypatch.setattr(self.pipe.unet.conv_out.bias, "data", torch.tensor([np.nan] * 3))
        return score(self, policy, seeds)

    monkeypatch.setattr(Evaluator, "score", sick)
    ran = alone(search_words(model, tmp_path / "out", TRIALS), tmp_path)
    assert ran.code == 0, ran
    book = Ledger(tmp_path / "out", 0, "default")
    (reason,) = book.reasons()
    assert "NaN" in reason
    values = [record.value for record in book.records()]
    assert np.isfinite(values).all() and len(values) >= ROWS + 1
    lost = book.reasons()[reason]
    assert book.finished() == TRIALS + ROWS
    tell(
        "NaN from a model",
        "from the second policy on",
        reason,
        f"{len(values)} trials; {lost} refused",
    )
