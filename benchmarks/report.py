"""How long `autofr report` takes over a search of many trials, and how large its page is.

    python benchmarks/report.py --run results/sd-2x --trials 500

The run is a reference run whose table of trials is repeated, every error with a little noise of its
own; each round is one process from its start to its end.
"""

from __future__ import annotations

import argparse
import csv
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protocol import load, write

from autofr.report.report import load_result


def enlarge(table: Path, trials: int) -> None:
    """Repeat the rows of a table of trials until there are so many, with errors of their own."""
    noise = random.Random(0)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for number in range(trials):
        row = rows[number % len(rows)] | {"trial": str(number)}
        if row["error"] and number >= len(rows):
            row["error"] = str(float(row["error"]) * noise.uniform(1, 1.5))
        found.append(row)
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(found)


def timed(folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one process that writes the report."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "autofr", "report", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, spent


def main() -> None:
    """Measure the run as it is, and with many trials."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("results/sd-2x"))
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = load_result(args.run).model
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / args.run.name
        shutil.copytree(args.run, folder)
        given = sum(1 for _ in (folder / "trials.csv").open(encoding="utf-8")) - 1
        for trials in (given, args.trials):
            enlarge(folder / "trials.csv", trials)
            times = [timed(folder) for _ in range(args.rounds)]
            wall, cpu = (statistics.median(each) for each in zip(*times, strict=True))
            size = (folder / "report.html").stat().st_size
            rows.append(
                {
                    "trials": trials,
                    "wall s": round(wall, 2),
                    "CPU s": round(cpu, 2),
                    "page MB": round(size / 1e6, 2),
                }
            )
    command = f"python benchmarks/report.py --run {args.run} --trials {args.trials}"
    note = "One process of `autofr report` over a finished run, tables, plots and page; medians."
    write("report", load(model, 1), command, rows, note)


if __name__ == "__main__":
    main()
