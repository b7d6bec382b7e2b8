"""How far does a run's table depend on its seeds? Policies and their rivals on many others.

    python benchmarks/seeds.py --count 200 results/dit-1.5x results/dit-2x

Rivals are those of the run's table: of each kind the nearest row that is at most 3 % slower.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from protocol import write
from scipy.stats import gmean

from autofr.loading import load
from autofr.measure import confidence, profile_file
from autofr.measure.quality import trimmed_mean
from autofr.plan.baselines import fewer_steps, published
from autofr.policy import Interval, Policy
from autofr.report.report import load_result
from autofr.runtime.sampler import compose, draw
from autofr.search.compare import rivals
from autofr.search.evaluate import draw_all, latent_errors
from autofr.search.result import Result
from autofr.search.verify import drawn_with


def policies_of(pipe: Any, run: Path, result: Result) -> dict[str, Policy]:
    """The choice of a run and its rivals, by name; the choice comes first."""
    profile = profile_file.load(run / profile_file.FILE)
    own, costs, n = result.policy, profile.costs, result.steps
    names = [row.name for row in rivals(result.rows)]
    drafts = {one.name: one for one in published(profile.masks, costs, n, costs.teacher(n) / 2)}
    drafts |= {one.name: one for one in map(fewer_steps, range(1, n))}
    found = {"policy": own}
    for name in names:
        found[name] = compose(
            pipe,
            own.model.name,
            drafts[name].steps,
            profile.masks,
            drafts[name].mix,
            replaces=n,
            latent_shape=own.sampler.latent_shape,
            guidance=own.sampler.guidance,
        )
    return found


def multiples(errors: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Errors (n,), and how many times those of the policy on the same seeds they are."""
    mean, times = confidence.of_mean(errors), confidence.of_times(errors, base)
    typical = trimmed_mean(errors) / trimmed_mean(base)
    return {
        "error": f"{mean.value:.4f} ({mean.low:.4f} to {mean.high:.4f})",
        "median": f"{np.median(errors):.4f}",
        "times the policy's": _text(times),
        "without the largest eighth": f"{typical:.1f}",
        "geometric mean": f"{gmean(errors / base):.1f}",
    }


def _text(found: Interval) -> str:
    return f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"


def main() -> None:
    """Draw each run's policies with the same new seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of one model")
    parser.add_argument("--first", type=int, default=1_000_000)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    results = {run: load_result(run) for run in args.runs}
    first = results[args.runs[0]]
    pipe = load(first.model, threads=args.threads).pipe
    seeds = range(args.first, args.first + args.count)

    def quiet(done: int, total: int) -> None:
        """Rows are told, not batches."""

    teacher = draw_all(lambda some: draw(pipe, some, first.steps), seeds, first.batch)
    rows = []
    for run, result in results.items():
        base = None
        for name, policy in policies_of(pipe, run, result).items():
            found, _ = drawn_with(pipe, policy, seeds, first.batch, quiet)
            errors = latent_errors(found.latents, teacher.latents)
            base = errors if base is None else base
            rows.append({"run": run.name, "schedule": name, **multiples(errors, base)})
            print(rows[-1], flush=True)
    options = f"--first {args.first} --count {args.count} --threads {args.threads}"
    command = f"python benchmarks/seeds.py {options} {' '.join(map(str, args.runs))}"
    note = (
        f"Relative L2 error of final latents, and how many times the policy's error on the same"
        f" {args.count} seeds that is: the ratio of means with its 95 % interval over seeds, the"
        " same without the largest eighth of each, and the geometric mean of each seed's ratio."
    )
    write("seeds", pipe, command, rows, note)


if __name__ == "__main__":
    main()
