"""Laws of many processes on one search: children of the driver, workers on PostgreSQL."""

from __future__ import annotations

import csv
import datetime
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faults import ANSWER, context, save_model, wait
from optuna.trial import TrialState
from postgres import Postgres
from test_docs import objection
from test_search import few_rows, settings, stop_at, work_clock

from autofr.cli import app
from autofr.cli.worker import submit
from autofr.errors import AutofrError, BudgetError, MeasurementError, StorageError, redacted
from autofr.policy_file import load
from autofr.request import Request, remade
from autofr.search.address import ENVIRONMENT, LONGEST, checked
from autofr.search.crew import Crew
from autofr.search.database import Storage, open_storage
from autofr.search.evaluate import Candidate
from autofr.search.facts import check_code, check_study, check_worker, facts_of, study_name
from autofr.search.folder import STATE, Settings
from autofr.search.ledger import RETRIES, Ledger
from autofr.search.queue import PAUSES, Queue, joined, pause
from autofr.search.search import Search
from autofr.search.shared import QUEUED, Helped, Share, SharedLedger
from autofr.search.trial import Outcome, Proposal, Scorer
from autofr.search.trials import Own, Trials
from autofr.search.worker import work

ROOT = Path(__file__).parents[1]
POLICY = load(ROOT / "results" / "ldm4-1.5x" / "policy.json")
BEAT = (1, 1)  # seconds: a heart beats, and may be silent


# -- trials of nothing ----------------------------------------------------------------------------


def proposal(number: int) -> Proposal:
    """A proposal that is told from others by its name, and by how often it is corrected."""
    return Proposal(Candidate(f"p{number}", "planned", POLICY, float(number)), number)


def score(one: Proposal) -> Outcome:
    """The error is the number in the name."""
    return Outcome(one.candidate.seconds, {"label": one.candidate.name, "digest": "d"})


@contextmanager
def driver(at: Postgres, name: str = "one", seed: int = 0) -> Iterator[SharedLedger]:
    """A driver's ledger; its study is let go at the end."""
    book = SharedLedger(Share(at.url, heartbeat=BEAT), name, seed, "tiny")
    book.publish({"heartbeat": BEAT, "request": None})
    try:
        yield book
    finally:
        book.release()


def ask(book: SharedLedger) -> Any:
    """A trial with its parameter read."""
    trial = book.ask()
    trial.suggest_float("x", 0, 1)
    return trial


def propose(book: SharedLedger, count: int = 1) -> None:
    """Queue so many of the algorithm's proposals."""
    for _ in range(count):
        trial = ask(book)
        book.hand_over(trial, proposal(trial.number))


def queue_of(at: Postgres, name: str = "one", beat: tuple[int, int] = BEAT) -> Queue:
    """A worker's queue, over connections of its own."""
    return Queue(name, open_storage(at.url, beat))


def states(book: SharedLedger) -> list[str]:
    """The state of every trial in the database."""
    return [trial.state.name for trial in book._trials()]


# -- addresses ------------------------------------------------------------------------------------

URL = "postgresql://me:se:c@ret/@db.example:5432/autofr"


@pytest.mark.parametrize(
    "text",
    [
        URL,
        f"autofr search --storage {URL} --budget 2x",
        f"autofr search --storage='{URL}'",
        "postgresql+psycopg://me:se:c@ret/@host/db",
        "postgresql://host/db?user=me&password=se:c@ret/",
        "connection failed: host=db user=me password=se:c@ret/ dbname=autofr",
    ],
)
def test_passwords_are_left_out(text: str) -> None:
    """Wherever an address may stand, its password is not told; the rest is."""
    said = redacted(text)
    assert "c@ret" not in said and "se:" not in said
    assert "***" in said and "me" in said
    assert redacted(said) == said


def test_text_without_passwords_stays() -> None:
    """Nothing else is taken for one."""
    for text in ("postgresql://me@host/db", "hub:owner/name@main", "a: b@c", "https://a.b/c"):
        assert redacted(text) == text


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:Xq%zz@127.0.0.1:1/db",
        "postgresql://me:Xq/cret@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?user=me&password=Xq%zz",
        "postgresql://me:Xq cret@127.0.0.1:1/db",
    ],
)
def test_passwords_that_cannot_be_read_are_not_quoted(address: str) -> None:
    """What the driver, or we, say of an address with a bad password has no part of it."""
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match="--storage") as refusal:
        open_storage(address)
    assert "Xq" not in str(refusal.value)


@pytest.mark.parametrize(
    "address", ["sqlite:///study.db", "study.db", "sqlite+pysqlite:///:memory:"]
)
def test_several_processes_on_sqlite_are_refused(address: str) -> None:
    """SQLite cannot lock rows: trials would run twice. The refusal says so, and what to give."""
    with pytest.raises(StorageError, match=r"SQLite cannot lock .* twice .*postgresql://"):
        checked(address)


@pytest.mark.parametrize("address", ["mysql://a:secret@b/c", "redis://x", "journal.log", ""])
def test_other_databases_are_refused(address: str) -> None:
    """What cannot be used is named without its password."""
    with pytest.raises(StorageError, match="expected the address of a PostgreSQL") as refusal:
        checked(address)
    assert "secret" not in str(refusal.value)


def test_a_database_that_does_not_answer_is_named(server: Postgres) -> None:
    """A wrong port or password is said at once, and the password is not."""
    for wrong in (server.url.replace(f":{server.port}", ":1"), server.url.replace("@", "0@")):
        with pytest.raises(StorageError, match=r"--storage postgresql://autofr:\*\*\*@.* cannot"):
            open_storage(wrong)
        with pytest.raises(StorageError) as refusal:
            open_storage(wrong)
        assert server.password not in str(refusal.value)


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_ends_its_trial(error: float) -> None:
    """Optuna would close it without a word, or keep infinity; here it has a reason."""
    with pytest.raises(MeasurementError, match=r"unaccelerated pipe is (nan|inf)"):
        Scorer(None, settings(), None).value(SimpleNamespace(errors=np.array([0.1, error])))


@pytest.mark.parametrize(
    "kind", [BudgetError, MeasurementError, MemoryError, RuntimeError, OSError]
)
def test_only_what_a_proposal_is_to_blame_for_is_its_outcome(kind: type[Exception]) -> None:
    """That is kept with its key, for equal ones; want of memory or a lost line passes through."""

    def fails(policy: Any, seeds: int) -> Any:
        raise kind("out of memory")

    scorer, one = Scorer(None, settings(), SimpleNamespace(score=fails)), proposal(0)
    if issubclass(kind, AutofrError):
        assert scorer.outcome(one) == Outcome(None, {"proposal": one.key}, "out of memory")
        return
    with pytest.raises(kind, match="out of memory"):
        scorer.outcome(one)


# -- the database ---------------------------------------------------------------------------------


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What jobs give that begin at the same moment, each in a thread of its own."""
    gate, found = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(index: int) -> None:
        gate.wait()
        found[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(ANSWER)
    return found


def test_a_new_database_is_opened_by_many_at_once(postgres: Postgres) -> None:
    """Whoever comes first makes the tables; nobody trips over them."""
    found = together([lambda: open_storage(postgres.url)] * 6)
    assert all(isinstance(one, Storage) for one in found)


def test_several_workers_score_every_trial_once(postgres: Postgres) -> None:
    """However many take from a queue, every trial in it is scored by one of them."""
    seen: list[str] = []

    def scored(one: Proposal) -> Outcome:
        seen.append(one.candidate.name)
        return score(one)

    with driver(postgres) as book:
        propose(book, 16)
        book.dismiss()
        calm = (60, 300)  # nobody is taken for dead where the machine is busy
        done = together([lambda: work(queue_of(postgres, beat=calm), scored, idle=0)] * 4)
        assert sum(done) == 16 and set(Counter(seen).values()) == {1} and len(seen) == 16
        assert [record.value for record in book.records()] == [float(n) for n in range(16)]
        assert not book.watch()


def test_only_the_driver_proposes(postgres: Postgres) -> None:
    """An empty queue gives a worker nothing, and leaves no trace."""
    with driver(postgres) as book:
        assert queue_of(postgres).take(score, "me") == "none"
        assert states(book) == []


def test_two_drivers_are_refused(postgres: Postgres) -> None:
    """A study has one driver; when that is gone the next may come."""
    with driver(postgres), pytest.raises(StorageError, match=r"another autofr search .*--study"):
        SharedLedger(Share(postgres.url), "one", 0, "tiny")
    with driver(postgres), driver(postgres, "two"):
        pass


def test_a_study_has_a_name_that_fits(postgres: Postgres) -> None:
    """The longest name is taken, in any script; a longer one is refused before it is looked for."""
    with driver(postgres, "é" * LONGEST) as book:
        assert book._study.study_name == "é" * LONGEST
    with pytest.raises(StorageError, match=rf"--study: .* {LONGEST} .*got {LONGEST + 1}"):
        SharedLedger(Share("postgresql://nowhere/db"), "x" * (LONGEST + 1), 0, "tiny")


def test_a_study_of_other_people_is_refused(postgres: Postgres) -> None:
    """Optuna would open it, whatever is in it; nothing is added to it."""
    import optuna

    theirs = optuna.create_study(study_name="one", storage=open_storage(postgres.url))
    theirs.tell(theirs.ask(), 1.0)
    with pytest.raises(StorageError, match=r"none of autofr's.*--study"), driver(postgres):
        pass
    assert len(theirs.trials) == 1 and theirs.user_attrs == {}


# -- proposals ------------------------------------------------------------------------------------


def test_a_driver_that_resumes_proposes_something_else(postgres: Postgres) -> None:
    """With the same seed, what is proposed after a stop is new, and so are its numbers."""
    with driver(postgres) as book:
        book.guess({"x": 0.5})
        propose(book, 3)
        while book.take(score):
            pass
        propose(book)  # stays queued
    with driver(postgres) as book:
        book.guess({"x": 0.5})
        propose(book, 3)
        tried = [trial.params["x"] for trial in book._trials()]
        assert len(set(tried)) == 7 and tried.count(0.5) == 1
        assert book.proposed() == 7
    with driver(postgres, "other") as book:
        propose(book, 2)
        assert {trial.params["x"] for trial in book._trials()} < {*tried}  # a new study begins anew


def test_what_another_version_has_queued_stops_no_driver(postgres: Postgres) -> None:
    """A proposal is read by who scores it, not by who resumes the study."""
    with driver(postgres) as book:
        notes = {"chain": "old", "proposal": {"policy": "of another version"}}
        book._add(ask(book), TrialState.COMPLETE, notes, 1.0)
    with driver(postgres) as book:
        assert not book.watch() and [one.value for one in book.records()] == [1.0]
        assert [one.state.name for one in book._proposer.trials] == ["COMPLETE"]


def test_as_many_are_proposed_as_are_asked_for(postgres: Postgres) -> None:
    """Retries, rows and what is given up change nothing about the count."""
    with driver(postgres) as book:
        assert book.begin_row("4 steps")
        book.add_row("4 steps", Outcome(0.5, {"label": "4 steps"}), datetime.datetime.now())
        while book.more(4):
            propose(book)
        book.take(score)
        with pytest.raises(MeasurementError):
            book.take(broken)
        book.watch()
        assert not book.more(4) and book.proposed() == 4
        assert states(book).count("WAITING") == 3


def test_a_queue_that_ran_dry_is_made_longer(postgres: Postgres) -> None:
    """Where others take all trials while a slow driver scores one, there are more next time."""
    with driver(postgres) as book:
        other = queue_of(postgres)

        def fill() -> int:
            while book.room():
                propose(book)
            return book.waiting()

        def slow(one: Proposal) -> Outcome:
            while other.take(score, "me") == "scored":
                pass
            return score(one)

        assert fill() == QUEUED
        assert book.take(score) and fill() == QUEUED
        assert book.take(slow) and fill() == 2 * QUEUED
        assert book.take(slow) and not book.room(twins=2 * QUEUED)  # enough to wait for


def test_what_was_never_queued_is_proposed_anew(postgres: Postgres) -> None:
    """Ctrl-C while a proposal is worked out costs none of those that were asked for."""

    def interrupted(trial: Any) -> Proposal:
        raise KeyboardInterrupt

    with driver(postgres) as book:
        hands = Helped(book, SimpleNamespace(outcome=score))
        given = (book, settings(trials=2), hands, {}, [])
        with pytest.raises(KeyboardInterrupt):
            Trials(*given, interrupted, lambda *_: None).run()
        assert book.proposed() == 0 and states(book) == []


def keyed(one: Proposal) -> Outcome:
    """The error is the number of rollouts; the key is noted, as a scorer does."""
    noted = {"label": one.candidate.name, "digest": "d", "proposal": one.key}
    return Outcome(float(one.rollouts), noted)


EQUAL = [1, 1, 1, 1, 1, 2, 3, 2]
TOLD = [(1.0, False), *[(1.0, True)] * 4, (2.0, False), (2.0, True), (3.0, False)]


def trials_of(book: Ledger, hands: Any, numbers: list[int], count: int = len(EQUAL)) -> Trials:
    """So many trials that propose these numbers, one after another."""
    coming = iter(numbers)

    def propose_next(trial: Any) -> Proposal:
        trial.suggest_float("x", 0, 1)
        return proposal(next(coming))

    given = settings(trials=count)
    return Trials(book, given, hands, {}, [], propose_next, lambda *_: None)


def told(book: Ledger) -> list[tuple[float, bool]]:
    """Values of the records in order of size, and whether each is that of a twin."""
    return sorted((one.value, "duplicate_of" in one.notes) for one in book.records())


def test_equal_proposals_are_scored_once(postgres: Postgres) -> None:
    """One that is queued, by this driver or one before, is waited for; its twin counts too."""
    with driver(postgres) as book:
        book.hand_over(ask(book), proposal(1))
    begun: list[tuple[int, int]] = []

    def scored(one: Proposal) -> Outcome:
        begun.append((one.rollouts, book.proposed()))
        return keyed(one)

    with driver(postgres) as book:
        hands = Helped(book, SimpleNamespace(outcome=scored))
        trials_of(book, hands, EQUAL[1:]).run()
        assert begun == [(1, QUEUED), (2, 8), (3, 8)]  # twins are waited for, not without end
        assert told(book) == TOLD
        assert [one.state.name for one in book._proposer.trials] == ["COMPLETE"] * 8


def refused(one: Proposal) -> Outcome:
    """Equal proposals give NaN; the key is noted, as a scorer does."""
    return Outcome(notes={"proposal": one.key}, reason="NaN") if one.rollouts == 1 else keyed(one)


def test_twins_of_what_is_refused_take_that_over(postgres: Postgres) -> None:
    """Where the one at work ends without a value, its twins do, also those of the next driver."""
    begun: list[int] = []

    def scored(one: Proposal) -> Outcome:
        begun.append(one.rollouts)
        return refused(one)

    for count in (len(EQUAL), len(EQUAL) + 1):
        with driver(postgres) as book:
            hands = Helped(book, SimpleNamespace(outcome=scored))
            trials_of(book, hands, [1] * count, count).run()
            assert states(book) == ["PRUNED"] * count and book.reasons() == {"NaN": count}
            assert sum("duplicate_of" in one.user_attrs for one in book._trials()) == count - 1
    assert begun == [1]


def test_twins_of_what_is_cut_off_are_scored(tmp_path: Path) -> None:
    """The death of who had an equal proposal is not taken over; what is found later is."""
    begun: list[int] = []

    class Mortal(Own):
        def over(self) -> list[tuple[Any, Outcome | None]]:
            begun.append(1)
            return [(trial, one if begun[1:] else None) for trial, one in super().over()]

    (tmp_path / STATE).mkdir()
    book = Ledger(tmp_path, 0, "tiny")
    hands = Mortal(SimpleNamespace(outcome=keyed))
    trials_of(book, hands, [1] * (len(EQUAL) + 1)).run()
    assert told(book) == [(1.0, False), *[(1.0, True)] * (len(EQUAL) - 1)]
    assert book.reasons() == {} and len(begun) == 2


def test_a_look_reads_the_study_twice(postgres: Postgres, monkeypatch: Any) -> None:
    """However many trials and twins wait: what is read serves all who ask for it."""
    read, reads = Storage._get_trials, []

    def noted(*words: Any, **more: Any) -> Any:
        reads.append(words)
        return read(*words, **more)

    with driver(postgres) as book:
        monkeypatch.setattr(book, "take", lambda work: False)  # the driver leaves all to others
        hands = Helped(book, SimpleNamespace(outcome=score))
        trials = trials_of(book, hands, [1] * QUEUED)
        trials._fill()
        assert len(trials._twins) == QUEUED - 1
        monkeypatch.setattr(Storage, "_get_trials", noted)
        assert trials._unfinished() and hands.over() == []
        trials._fill()
        assert len(reads) == 2 and len(trials._twins) == QUEUED - 1


def quick(model: Path, end: Callable[[Proposal], Outcome]) -> tuple[Any, Settings]:
    """Make the pipe of a child that only counts."""
    Scorer.outcome = lambda self, one: end(one)  # type: ignore[method-assign]
    return made(model)


@pytest.mark.parametrize("end", [keyed, refused])
def test_children_score_equal_proposals_once(
    end: Callable[[Proposal], Outcome],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No two children have the same in hand: as many twins as there are children wait for it."""
    monkeypatch.setattr("autofr.search.crew._SPAWN", context())
    begin, begun, most = Crew.begin, [], []

    def noted(self: Crew, trial: Any, one: Proposal) -> None:
        begun.append(one.rollouts)
        begin(self, trial, one)

    def over(self: Crew) -> Any:
        most.append(len(trials._twins))
        return real(self)

    real = Crew.over
    monkeypatch.setattr(Crew, "begin", noted)
    monkeypatch.setattr(Crew, "over", over)
    (tmp_path / STATE).mkdir()
    book = Ledger(tmp_path, 0, "tiny")
    with Crew(2, partial(quick, model, end)) as children:
        trials = trials_of(book, children, EQUAL)
        trials.run()
    assert sorted(begun) == [1, 2, 3] and most[0] == max(most) == 2
    lost = 5 if end is refused else 0
    assert told(book) == TOLD[lost:] and book.reasons().total() == lost


def test_the_proposer_learns_what_workers_find(postgres: Postgres) -> None:
    """Values told by others reach the algorithm, each once, with what is still open as pending."""
    with driver(postgres) as book:
        propose(book, 3)
        other = queue_of(postgres)
        assert other.take(score, "me") == "scored"
        assert book.watch() and book.watch()
        known = book._proposer.trials
        assert [one.state.name for one in known] == ["COMPLETE", "RUNNING", "RUNNING"]
        assert [one.params for one in known] == [one.params for one in book._trials()]


# -- what is cut off ------------------------------------------------------------------------------


def broken(one: Proposal) -> Outcome:
    """Fails as a program does."""
    raise MeasurementError("out of memory")


def stopped(one: Proposal) -> Outcome:
    """Is ended by Ctrl-C or SIGTERM."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("end", "kind"), [(broken, MeasurementError), (stopped, KeyboardInterrupt)]
)
def test_a_trial_whose_worker_fails_is_tried_again(
    postgres: Postgres, end: Callable[..., Any], kind: type
) -> None:
    """Whoever is first gets it again, with its parameters; after a few times it is given up."""
    with driver(postgres) as book:
        propose(book)
        for tries in range(RETRIES + 1):
            assert book.watch()
            with pytest.raises(kind):
                queue_of(postgres).take(end, "me")
            assert states(book) == ["FAIL"] * (tries + 1)
        assert not book.watch()
        assert len({trial.params["x"] for trial in book._trials()}) == 1
        assert not book.more(1) and book.records() == []
        assert [one.state.name for one in book._proposer.trials] == ["FAIL"]


def test_what_a_trial_alone_is_to_blame_for_is_not_tried_again(postgres: Postgres) -> None:
    """A policy that cannot be scored is closed with its reason."""
    with driver(postgres) as book:
        propose(book)
        found = queue_of(postgres).take(lambda one: Outcome(reason="NaN"), "me")
        assert found == "scored" and not book.watch()
        assert states(book) == ["PRUNED"] and book.reasons() == {"NaN": 1}


def test_a_trial_taken_by_a_process_that_died_at_once_is_found(postgres: Postgres) -> None:
    """Between taking a trial and its first heartbeat a process can die too."""
    with driver(postgres) as book:
        propose(book)
        queue_of(postgres)._pop_waiting_trial_id()  # and no more
        assert states(book) == ["RUNNING"]
        wait(lambda: book.watch() and "WAITING" in states(book))
        assert states(book) == ["FAIL", "WAITING"]
        assert book.take(score) and not book.watch()
        assert [record.value for record in book.records()] == [0.0]


def test_a_silent_trial_that_ends_at_the_last_moment_counts(
    postgres: Postgres, monkeypatch: Any
) -> None:
    """Its result arrives just when the driver closes it: the driver goes on, with the result."""
    real, other = Storage.get_trial, open_storage(postgres.url, BEAT)

    def looked_up(self: Storage, number: int) -> Any:
        found = real(self, number)
        monkeypatch.undo()
        other.set_trial_state_values(number, TrialState.COMPLETE, [1.0])
        return found

    with driver(postgres) as book:
        propose(book)
        queue_of(postgres)._pop_waiting_trial_id()
        monkeypatch.setattr(Storage, "get_trial", looked_up)
        wait(lambda: not book.watch())
        assert states(book) == ["COMPLETE"] and book.records()[0].value == 1.0


LIVE = """
import sys, time
import test_workers
from autofr.search import worker
from autofr.search.queue import joined

def slow(one):
    print(one.candidate.name, flush=True)
    if one.candidate.name != "p2":
        time.sleep(600 if one.candidate.name == "p1" else 4)
    return test_workers.score(one)

with joined(sys.argv[1], None, 60, print) as queue:
    worker.work(queue, slow, say=lambda text: print(text, flush=True))
"""


@contextmanager
def process(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that can import the tests; it is gone when the block is left."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    born = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield born
    finally:
        with suppress(ProcessLookupError):
            born.kill()
        born.wait()
        assert born.stdout
        born.stdout.close()


def heard(born: subprocess.Popen[str]) -> str:
    """The next line that a process says."""
    assert born.stdout
    return born.stdout.readline().strip()


def test_a_worker_that_is_paused_or_killed_costs_one_trial(postgres: Postgres) -> None:
    """What it had is scored by others, once; paused for too long it goes on with the next."""
    with driver(postgres) as book:
        propose(book, 2)
        with process(LIVE, postgres.url) as worker:
            assert heard(worker) == "p0"
            os.kill(worker.pid, signal.SIGSTOP)
            wait(lambda: book.watch() and len(states(book)) == 3)  # taken for dead
            other = queue_of(postgres)
            assert [other.take(score, "me") for _ in range(2)] == ["scored", "scored"]
            propose(book)
            os.kill(worker.pid, signal.SIGCONT)
            assert "was given to another" in heard(worker)
            assert heard(worker) == "p2" and heard(worker) == "1 trials"
            book.watch()
            book.hand_over(ask(book), proposal(1))
            assert heard(worker) == "p1"
        wait(lambda: book.watch() and "WAITING" in states(book))  # killed: silent since
        assert book.take(score) and not book.watch()
        assert sorted(record.value for record in book.records()) == [0.0, 1.0, 1.0, 2.0]
        assert states(book).count("FAIL") == 2
        assert all(trial.system_attrs == {} for trial in book._trials())  # nothing is inherited


def test_a_database_that_is_away_for_a_while_costs_nothing(postgres: Postgres, caplog: Any) -> None:
    """Killed in the middle of a trial and started again, it gets the result, keeps its driver."""

    def outlived(one: Proposal) -> Outcome:
        postgres.kill()
        threading.Timer(1.0, postgres.start).start()
        return score(one)

    with driver(postgres) as book:
        propose(book, 2)
        worker = queue_of(postgres)
        assert worker.take(outlived, "me") == "scored"
        assert worker.take(score, "me") == "scored"
        assert not book.watch()  # over a new connection, the study its own again
        assert [record.value for record in book.records()] == [0.0, 1.0]
        with pytest.raises(StorageError, match="another autofr search"):
            SharedLedger(Share(postgres.url), "one", 0, "tiny")
    said = [record.message for record in caplog.records if "database is away" in record.message]
    assert said and postgres.password not in "".join(said)


# -- joining --------------------------------------------------------------------------------------


def test_a_worker_waits_for_a_search_and_for_trials(postgres: Postgres) -> None:
    """Without a study, or without trials in it, a worker ends after its time, and says so."""
    said: list[str] = []
    with (
        pytest.raises(StorageError, match="no search has opened"),
        joined(postgres.url, None, 0, said.append),
    ):
        pass
    with driver(postgres), joined(postgres.url, None, 5, said.append) as queue:
        assert queue.study_name == "one"
        assert work(queue, score, idle=0, say=said.append) == 0
        assert said[-1].startswith("no trial came")
    with (
        driver(postgres, "two"),
        pytest.raises(StorageError, match="one, two"),
        joined(postgres.url, None, 5, said.append),
    ):
        pass


def test_what_comes_is_found_soon_and_idlers_look_seldom(monkeypatch: Any) -> None:
    """At most a tenth of an idle time is lost; in an hour there are as many looks as seconds."""
    now, looks, (shortest, longest) = 0.0, 0, PAUSES
    monkeypatch.setattr("time.monotonic", lambda: now)
    while now < 3600:
        assert shortest <= pause(0) <= max(shortest, min(longest, now / 10))
        now, looks = now + pause(0), looks + 1
    assert looks < 1.02 * 3600 / longest


def test_a_worker_goes_home_when_the_search_has_its_trials(postgres: Postgres) -> None:
    """What is queued is scored first; after so many trials as it may take it goes too."""
    said: list[str] = []
    with driver(postgres) as book:
        propose(book, 3)
        assert work(queue_of(postgres), score, most=1) == 1
        book.dismiss()
        assert work(queue_of(postgres), score, say=said.append) == 2
        assert said[-1] == "the search has all its trials"


# -- whole searches -------------------------------------------------------------------------------


def few(given: Settings) -> Settings:
    """A search of seconds, of whatever pipe."""
    small = settings()
    names = ("calibration_seeds", "validation_seeds", "test_seeds", "trial_seeds", "space")
    return replace(given, **{name: getattr(small, name) for name in names})


def asked(model: Path) -> Request:
    """How the tiny pipe in a folder is asked for."""
    return Request(model=str(model), budget="1.3x", steps=6, batch=2, trials=5, threads=1)


def made(model: Path) -> tuple[Any, Settings]:
    """The pipe in a folder, and the settings of its search."""
    pipe, given = remade(asked(model).model_dump_json())
    return pipe, few(given)


def found(run: Search) -> dict[str, float]:
    """What a search's proposals scored, by the policies that they became."""
    with work_clock(), few_rows(), pytest.raises(StopIteration):
        run.run()
    with (run.folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["masks"]]
    assert len([row for row in rows if row["state"] != "FAIL"]) == 5
    return {row["digest"]: float(row["error"]) for row in rows if row["error"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipe in a folder."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What one process by itself finds."""
    place = tmp_path_factory.mktemp("alone")
    return found(Search(*made(model), place, on_progress=stop_at("table")))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody buries does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_children_find_what_one_process_finds(
    model: Path, alone: dict[str, float], tmp_path: Path, monkeypatch: Any
) -> None:
    """The same policies have the same scores; one child is killed, and costs one trial only."""
    crew, begin, pids = Crew(2, partial(made, model)), Crew.begin, set()

    def deadly(self: Crew, trial: Any, one: Proposal) -> None:
        begin(self, trial, one)
        if not pids:
            os.kill(self.pids[0], signal.SIGKILL)
        pids.update(self.pids)

    monkeypatch.setattr(Crew, "begin", deadly)
    run = Search(*made(model), tmp_path, on_progress=stop_at("table"), crew=crew)
    assert found(run) == pytest.approx(alone)
    table = (tmp_path / "trials.csv").read_text()
    assert table.count("FAIL") == 1 and "its process ended" in table
    assert len(pids) > 1 and not any(map(alive, pids))  # another took its place


WORKER = """
import sys
from autofr.cli.app import main
sys.argv[1:] = ["worker", "--threads", "1"]
main()
"""


def test_workers_find_what_one_process_finds(
    model: Path,
    alone: dict[str, float],
    postgres: Postgres,
    tmp_path: Path,
    tmp_path_factory: Any,
    monkeypatch: Any,
) -> None:
    """`autofr worker` scores what `autofr search` queues, with the same results, and then ends.

    It takes turns with the other workers of its machine.
    """
    monkeypatch.setenv("TMPDIR", str(turns := tmp_path_factory.mktemp("turns")))
    share = Share(postgres.url, None, asked(model).model_dump(mode="json"), (1, 30))
    run = Search(*made(model), tmp_path, on_progress=stop_at("table"), share=share)
    monkeypatch.setenv("AUTOFR_STORAGE", postgres.url)
    with process(WORKER) as worker:

        def leave(*_: Any) -> bool:
            """The driver leaves all to others, as long as there are any."""
            assert worker.poll() in (None, 0), heard(worker)
            return False

        monkeypatch.setattr(SharedLedger, "take", leave)
        assert found(run) == pytest.approx(alone)
        assert re.fullmatch("[1-5] trials scored", heard(worker)) and worker.wait(ANSWER) == 0
    assert f"{socket.gethostname()}-{worker.pid}" in (tmp_path / "trials.csv").read_text()
    assert list(turns.glob("autofr-*/core-*.lock"))
    assert not list((tmp_path / STATE).glob("*.db"))
    assert postgres.query("SELECT study_name FROM studies") == [(run._provenance(5).study,)]


ORPHANS = """
import sys, time
from functools import partial
from pathlib import Path
import test_workers
from autofr.search.crew import Crew

if __name__ == "__main__":
    crew = Crew(2, time.time)
    for number in range(2):
        crew.begin(number, test_workers.proposal(number))
    print(*crew.pids, flush=True)
    time.sleep(600)
"""


def test_children_end_with_their_driver() -> None:
    """After `kill -9` of the driver none of its children is left."""
    with process(ORPHANS) as born:
        pids = [int(word) for word in heard(born).split()]
        assert len(pids) == 2 and all(map(alive, pids))
    wait(lambda: not any(map(alive, pids)))


# -- who may help ---------------------------------------------------------------------------------


def test_a_worker_with_another_model_or_version_is_refused(model: Path, monkeypatch: Any) -> None:
    """What would give other scores is named with both values; the device is the worker's own."""
    pipe, given = made(model)
    facts = facts_of(pipe, given, None, BEAT)
    assert check_worker(facts, pipe, replace(given, name="elsewhere", trial_seeds=9)) == replace(
        given, name="elsewhere"
    )
    pipe.unet.conv_in.weight.data += 1
    with pytest.raises(StorageError, match=r"weights: \w+ there, \w+ here.*--model"):
        check_worker(facts, pipe, given)
    with pytest.raises(StorageError, match="steps: 6 there, 7 here"):
        check_worker(facts, pipe, replace(given, steps=7))
    check_code(facts)
    old = {"code": facts["code"] | {"source": "0" * 16, "of tomorrow": "1"}}
    with pytest.raises(StorageError, match=r"source: 0000.* there, .* install the same version"):
        check_code(old)


def test_the_study_of_another_search_is_refused(model: Path) -> None:
    """A study holds one search; what differs is named, with the way out."""
    pipe, given = made(model)
    facts = facts_of(pipe, given, None, BEAT)
    check_study("one", None, facts)
    check_study("one", facts, facts)
    other = facts_of(pipe, replace(given, seed=1), None, BEAT)
    assert study_name("tiny", facts) != study_name("tiny", other)
    with pytest.raises(StorageError, match=r"'one'.*seed: 0 there, 1 asked.*--study"):
        check_study("one", facts, other)


# -- starting workers -----------------------------------------------------------------------------


PLACE = ["--storage", "postgresql://h/d"]


def said(*words: str, capsys: Any, monkeypatch: Any) -> str:
    """What the command line says to bad words."""
    monkeypatch.setattr(sys, "argv", ["autofr", *words])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search", "--storage", "sqlite:///a.db"], "SQLite cannot lock single rows"),
        (["search", "--storage", "mysql://me:secret@h/d"], r"mysql://me:\*\*\*@h/d: expected"),
        (["search", "--storage", "postgresql://h/d", "--workers", "2"], "give one of them"),
        (["search", "--study", "mine"], "--study: names a study in a database"),
        (["search", *PLACE, "--study", "x" * 513], "at most 512 printable characters, got 513"),
        (["search", *PLACE, "--study", "a\udcff"], "at most 512 printable characters"),
        (["worker", *PLACE, "--study", "x" * 513], "at most 512 printable characters, got 513"),
        (["worker"], "AUTOFR_STORAGE"),
        (["worker", "--storage", "sqlite:///a.db"], "SQLite cannot lock single rows"),
        (["worker", "--storage", "postgresql://me:secret@127.0.0.1:1/d"], "cannot be used"),
    ],
)
def test_what_cannot_help_is_refused_in_words(
    words: list[str], expected: str, capsys: Any, monkeypatch: Any
) -> None:
    """Bad options end with what was expected, before a model is loaded, and without passwords."""
    monkeypatch.delenv("AUTOFR_STORAGE", raising=False)
    text = said(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert re.search(expected, " ".join(text.split())) and "secret" not in text
    assert "Traceback" not in text


def test_workers_are_started_as_jobs(tmp_path: Path, monkeypatch: Any) -> None:
    """Each is a job of submitit, the database in its environment; without Slurm that is said."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("AUTOFR_STORAGE", URL)
    look = "import os; print('length', len(os.environ['AUTOFR_STORAGE']))"
    jobs = submit(2, [sys.executable, "-c", look], tmp_path / "logs", cluster="local")
    assert [job.result().returncode for job in jobs] == [0, 0]
    assert all(f"length {len(URL)}" in job.stdout() for job in jobs)
    assert not any("se:c" in path.read_text(errors="replace") for path in tmp_path.rglob("*.*"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="no sbatch here"):
        submit(2, [], tmp_path)


def test_the_kubernetes_job_runs_a_worker() -> None:
    """The manifest can be read, its command is one that the program takes, no secret is in it."""
    import yaml  # comes with Optuna

    text = (ROOT / "docs" / "kubernetes" / "worker-job.yaml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert objection(shlex.join(container["command"])) is None
    (variable,) = container["env"]
    assert variable["name"] == ENVIRONMENT and "secretKeyRef" in variable["valueFrom"]
    assert job["kind"] == "Job" and job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_workers_that_are_faster_than_their_driver_end_no_search(
    postgres: Postgres, monkeypatch: Any
) -> None:
    """Where all that was queued is over before the driver looks, it goes on to propose."""
    with driver(postgres) as book:
        other, begin = queue_of(postgres), Helped.begin

        def at_once(self: Helped, trial: Any, one: Proposal) -> None:
            begin(self, trial, one)
            assert other.take(score, "me") == "scored"

        def propose_x(trial: Any) -> Proposal:
            trial.suggest_float("x", 0, 1)
            return proposal(trial.number)

        monkeypatch.setattr(Helped, "begin", at_once)
        rooms = iter([True, False] * 20)
        monkeypatch.setattr(book, "room", lambda twins: next(rooms))
        hands = Helped(book, SimpleNamespace(outcome=score))
        Trials(book, settings(trials=7), hands, {}, [], propose_x, lambda *_: None).run()
        assert states(book) == ["COMPLETE"] * 7
