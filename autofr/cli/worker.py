"""The command of a worker: it scores the trials of a search that shares its study."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autofr.cli import console
from autofr.cli.options import Inputs, Storage, Study, Threads
from autofr.errors import StorageError
from autofr.request import remade
from autofr.search.address import ENVIRONMENT, check_name, checked

app = typer.Typer()

Model = Annotated[
    str | None, typer.Option(help="the search's model, where it lies elsewhere on this machine")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default the search's")]
Dtype = Annotated[str | None, typer.Option(help="float32, ...; default the search's")]
MaxTrials = Annotated[int | None, typer.Option(min=1, help="trials after which it ends")]
IdleLimit = Annotated[
    float, typer.Option(min=0, help="seconds without a search or a trial after which it ends")
]
Slurm = Annotated[
    int | None, typer.Option(min=1, help="start so many workers as Slurm jobs, and end")
]


@app.command()
def worker(
    storage: Storage = None,
    study: Study = None,
    model: Model = None,
    inputs: Inputs = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 0,
    max_trials: MaxTrials = None,
    idle_limit: IdleLimit = 600.0,
    slurm: Slurm = None,
) -> None:
    """Score the trials of a search that was started with --storage; any number may help.

    It needs the search's version of autofr and the same model, not the same device. Ending it in
    any way costs at most the trial that it has.

    Example: `autofr worker --storage postgresql://autofr@db/autofr`
    """
    if not storage:
        raise StorageError("--storage: give the database of the search, also as $AUTOFR_STORAGE")
    checked(storage)
    check_name(study)
    given = {"model": model, "inputs": inputs, "device": device, "dtype": dtype}
    changes = {name: value for name, value in given.items() if value is not None}
    if slurm:
        os.environ[ENVIRONMENT] = storage  # of the jobs: no password in a command line
        more = {"study": study, "threads": threads, "max-trials": max_trials} | changes
        options = [f"--{name}={value}" for name, value in more.items() if value]
        words = [sys.executable, "-m", "autofr", "worker", f"--idle-limit={idle_limit}", *options]
        for job in submit(slurm, words, Path("results") / "workers"):
            typer.echo(f"job {job.job_id}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from autofr.runtime.points import device_of
    from autofr.search.facts import check_code, check_worker
    from autofr.search.queue import joined
    from autofr.search.trial import Scorer
    from autofr.search.turns import in_turn
    from autofr.search.worker import work

    with joined(storage, study, idle_limit, console.say) as queue:
        facts = queue.user_attrs["facts"]
        check_code(facts)
        if not facts["request"]:
            raise StorageError(
                f"study {queue.study_name!r}: its search was started in Python; say there how"
                " workers make its pipe"
            )
        pipe, settings = remade(json.dumps(facts["request"]), threads=threads, **changes)
        settings = check_worker(facts, pipe, settings)
        console.say(f"helps {queue.study_name}")
        alone = Scorer.alone(pipe, settings).outcome
        score = in_turn(alone, threads) if device_of(pipe).type == "cpu" else alone
        done = work(queue, score, max_trials, idle_limit, console.say)
    typer.echo(f"{done} trials scored")


def submit(count: int, words: list[str], folder: Path, cluster: str = "slurm") -> list[Any]:
    """Start a command so many times as jobs, which inherit the environment; their logs lie there.

    Of Slurm's options `SBATCH_PARTITION`, `SBATCH_TIMELIMIT` and the like say what they need.
    Raises: StorageError without submitit, or without Slurm.
    """
    try:
        import submitit
    except ImportError:
        raise StorageError("--slurm: needs submitit; pip install 'autofr[slurm]'") from None
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise StorageError("--slurm: there is no sbatch here; start `autofr worker` without it")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(name="autofr-worker", timeout_min=24 * 60)
    with executor.batch():
        return [executor.submit(subprocess.run, words, check=True) for _ in range(count)]
