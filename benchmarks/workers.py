"""Many workers on one study: what they lose to each other, what a trial's storage costs, who dies.

python benchmarks/workers.py count       1,000 trials of nothing, a worker killed every 20
python benchmarks/workers.py storage     what the database adds to a trial of nothing
python benchmarks/workers.py speed       4 workers on PostgreSQL against 2 children, real trials
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from protocol import load, write

from autofr import policy_file
from autofr.request import Request, remade
from autofr.search.crew import Crew
from autofr.search.database import open_storage
from autofr.search.evaluate import Candidate
from autofr.search.facts import facts_of
from autofr.search.queue import Queue, joined
from autofr.search.shared import Helped, Share, SharedLedger
from autofr.search.trial import Outcome, Proposal
from autofr.search.worker import work

ROOT = Path(__file__).parents[1]
POSTGRES = runpy.run_path(str(ROOT / "tests" / "postgres.py"))
POLICY = policy_file.load(ROOT / "results" / "ldm4-1.5x" / "policy.json")
ROUNDS = 3
BEAT = (1, 3)  # seconds between heartbeats, and without one until a trial is given away


@contextmanager
def server() -> Iterator[Any]:
    """A PostgreSQL of our own."""
    found = POSTGRES["binaries"]()
    assert found, "PostgreSQL is not installed"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        one = POSTGRES["Postgres"](Path(folder), found)
        one.start()
        try:
            yield one
        finally:
            one.stop()


def proposal(number: int) -> Proposal:
    """The same policy under another name."""
    return Proposal(Candidate(f"p{number}", "planned", POLICY, float(number)))


def nothing(one: Proposal) -> Outcome:
    """Score a trial that costs nothing, with notes of the usual size."""
    return Outcome(one.candidate.seconds, one.dump())


def queue(book: SharedLedger, count: int) -> None:
    """Propose and queue the same policy, each time to be scored."""
    for _ in range(count):
        trial = book.ask()
        trial.suggest_float("x", 0, 1)
        book.hand_over(trial, proposal(trial.number))


# -- who dies -------------------------------------------------------------------------------------


def count(trials: int, every: int, workers: int) -> list[dict[str, Any]]:
    """Trials of nothing by a few workers; whenever `every` more are over, one of them is killed."""
    with server() as at:
        book = SharedLedger(Share(at.url, heartbeat=BEAT), "count", 0, "none")
        book.publish({"heartbeat": BEAT})
        born = [_Server(at.url) for _ in range(workers)]
        killed, due, began = 0, every, time.monotonic()
        while True:
            for _ in range(4):
                queue(book, int(book.room() and book.more(trials)))
            if not book.watch() and not book.more(trials):
                break
            if book.finished() >= due and (victim := _at_work(born)):
                victim.process.kill()
                born[born.index(victim)], killed = _Server(at.url), killed + 1
                due = book.finished() + every
            time.sleep(0.01)
        spent = time.monotonic() - began
        book.dismiss()
        for one in born:
            one.process.kill()
        states = Counter(trial.state.name for trial in book._trials())
        chains = Counter(record.notes["chain"] for record in book.records())
        values = {record.value for record in book.records()}
        book.release()
        return [
            {
                "trials asked for": trials,
                "workers": workers,
                "killed -9": killed,
                "scored": states["COMPLETE"],
                "scored twice": sum(n > 1 for n in chains.values()),
                "lost": len({*map(float, range(trials))} - values),
                "cut off and tried again": states["FAIL"],
                "seconds": round(spent),
            }
        ]


def _at_work(born: list[_Server]) -> _Server | None:
    """A worker that has a trial in hand at this moment; it is waited for a second."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        if at_work := [one for one in born if one.busy.value]:
            return random.choice(at_work)
        time.sleep(0.001)
    return None


class _Server:
    """A process that works on `count`; it says when it has a trial in hand."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("forkserver")  # forked where nothing is open
        context.set_forkserver_preload(["autofr.search.worker", "autofr.request", "protocol"])
        self.busy = context.Value("b", False)
        self.process = context.Process(target=_serve, args=(url, self.busy), daemon=True)
        self.process.start()


def _serve(url: str, busy: Any) -> None:
    def score(one: Proposal) -> Outcome:
        busy.value = True
        time.sleep(0.1)
        busy.value = False
        return nothing(one)

    with joined(url, "count", 60, print) as found:
        work(found, score, idle=60)


# -- what storage costs ---------------------------------------------------------------------------


def storage(trials: int) -> list[dict[str, Any]]:
    """Time of a trial of nothing, at the driver and at a worker, in a study that grows."""
    rows = []
    with server() as at:
        book = SharedLedger(Share(at.url), "storage", 0, "none")
        book.publish({"heartbeat": (60, 300)})
        worker = Queue("storage", open_storage(at.url))
        times: dict[str, list[float]] = {"propose and queue": [], "take, score and tell": []}
        for _ in range(trials):
            began = time.perf_counter()
            queue(book, 1)
            between = time.perf_counter()
            worker.take(nothing, "me")
            times["propose and queue"].append(between - began)
            times["take, score and tell"].append(time.perf_counter() - between)
        for name, taken in times.items():
            last = taken[-trials // 4 :]
            rows.append(
                {
                    "what": name,
                    "trials": trials,
                    "median ms": round(1000 * statistics.median(taken), 1),
                    "median ms of the last quarter": round(1000 * statistics.median(last), 1),
                }
            )
        book.release()
    return rows


# -- what workers lose ----------------------------------------------------------------------------


def speed(model: str, trials: int) -> list[dict[str, Any]]:
    """Real trials: 2 children in turns with 4 workers, on as many cores.

    All are made before, and score a trial each before a round begins; who has no turn is stopped.
    CPU time is that of the driver, of those who have the turn, and of the database.
    """
    asked = Request(model=model, threads=1)
    pipe, settings = remade(asked.model_dump_json())
    facts = facts_of(pipe, settings, asked.model_dump(mode="json", exclude={"out"}), (60, 300))
    taken: dict[str, list[tuple[float, float]]] = {"2 children": [], "4 workers": []}
    with _crew(asked) as crew, _crowd(facts) as (born, book, server_pid):
        workers = [one.pid for one in born]
        for _ in range(ROUNDS):
            for one in born:
                one.send_signal(signal.SIGSTOP)
            _children(crew, 2)
            taken["2 children"].append(_timed(partial(_children, crew, trials), crew.pids))
            for one in born:
                one.send_signal(signal.SIGCONT)
            _workers(book, 4)
            known = [*workers, server_pid]
            taken["4 workers"].append(_timed(partial(_workers, book, trials), known))
    return [_speed(name, trials, found, taken["2 children"]) for name, found in taken.items()]


def _speed(
    name: str, trials: int, found: list[tuple[float, float]], base: list[tuple[float, float]]
) -> dict[str, Any]:
    """A row: pairs of wall and CPU seconds, a pair for each round, against those of the base."""
    wall, cpu = (sum(each) for each in zip(*found, strict=True))
    shares = sorted(100 * b[0] / f[0] for f, b in zip(found, base, strict=True))
    done = trials * len(found)
    return {
        "evaluators": name,
        "trials": done,
        "seconds per trial": round(wall / done, 2),
        "CPU seconds per trial": round(cpu / done, 2),
        "cores in use": round(cpu / wall, 2),
        "speed, of 2 children": f"{100 * sum(b[0] for b in base) / wall:.0f} %",
        "in each round": " ".join(f"{share:.0f}" for share in shares),
        "speed per core in use": f"{100 * sum(b[1] for b in base) / cpu:.0f} %",
    }


def _timed(work: Callable[[], None], pids: list[int]) -> tuple[float, float]:
    """Wall and CPU seconds of some work that this process does with others."""
    known = [os.getpid(), *pids]
    cpu, began = sum(map(_cpu, known)), time.monotonic()
    work()
    return time.monotonic() - began, sum(map(_cpu, known)) - cpu


def _cpu(pid: int) -> float:
    """CPU seconds of a process and all its children; of such as are gone too, if it buried them."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if pid == os.getpid():  # its children are named by themselves
        below = []
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + sum(_cpu(int(one)) for one in below)


@contextmanager
def _crew(asked: Request) -> Iterator[Crew]:
    """Two children that are ready."""
    with Crew(2, partial(remade, asked.model_dump_json())) as crew:
        _children(crew, 2)
        yield crew


def _children(crew: Crew, trials: int) -> None:
    """Score so many trials on children."""
    while trials or crew.busy():
        while trials and crew.free():
            crew.begin(trials, proposal(trials))
            trials -= 1
        crew.over()


@contextmanager
def _crowd(facts: dict[str, Any]) -> Iterator[tuple[list[Any], SharedLedger, int]]:
    """Four workers that are ready, their driver's ledger, and the process id of its database."""
    with server() as at:
        book = SharedLedger(Share(at.url, heartbeat=(60, 300)), "speed", 0, "none")
        book.publish(facts)
        environment = {**os.environ, "AUTOFR_STORAGE": at.url}
        command = [sys.executable, "-m", "autofr", "worker", "--threads", "1"]
        born = [subprocess.Popen(command, env=environment) for _ in range(4)]
        try:
            while len({record.notes["worker"] for record in book.records()}) < len(born):
                assert all(one.poll() is None for one in born), "a worker has ended"
                queue(book, int(book.waiting() < len(born)))
                book.watch()
                time.sleep(0.5)
            _workers(book, 0)
            yield born, book, at.pid
        finally:
            for one in born:
                one.kill()
                one.wait()
            book.release()


def _workers(book: SharedLedger, trials: int) -> None:
    """Score so many trials on workers; their driver queues and waits, as it does in a search."""
    book.take = lambda work: False
    hands = Helped(book, SimpleNamespace(outcome=nothing))
    while trials or hands.busy():
        while trials and hands.free(0):
            trial = book.ask()
            trial.suggest_float("x", 0, 1)
            hands.begin(trial, proposal(trial.number))
            trials -= 1
        hands.over()


NOTES = {
    "count": "Trials of nothing on PostgreSQL. Whenever as many more are over as the command says,"
    " a worker with a trial in hand is ended by kill -9. Each number from 0 is to be found once.",
    "storage": "What the study on PostgreSQL adds to a trial that costs nothing itself.",
    "speed": "The same policy, scored as a trial is, in turns: a round of each, three times. Each"
    " evaluator has scored a trial right before its round, and who has no turn is stopped. The"
    " driver scores nothing itself; its CPU time and the database's are counted with the workers'."
    " Speed is trials per second; per core in use, trials per CPU second.",
}


def main() -> None:
    """Run one of the three; `--trials` of speed are those of each round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["count", "storage", "speed"])
    parser.add_argument("--model", default="ldm4")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    trials = args.trials or {"count": 1000, "storage": 200, "speed": 16}[args.what]
    rows = {
        "count": lambda: count(trials, args.every, args.workers),
        "storage": lambda: storage(trials),
        "speed": lambda: speed(args.model, trials),
    }[args.what]()
    command = " ".join(["python", "benchmarks/workers.py", *sys.argv[1:]])
    write(f"workers-{args.what}", load(args.model, 1), command, rows, NOTES[args.what])


if __name__ == "__main__":
    main()
