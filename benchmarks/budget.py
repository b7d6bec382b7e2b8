"""Is a predicted speed-up realised? Costs are measured afresh, then each policy is timed in pairs.

python benchmarks/budget.py --model ldm4 results/ldm4-*/policy.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import load, write

from autofr import policy_file
from autofr.measure import profiling
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser
from autofr.search import verify


def main() -> None:
    """Compare prediction and measurement for each policy file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policies", nargs="+", type=Path)
    parser.add_argument("--model", default="ldm4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90.0, help="time limit per policy")
    args = parser.parse_args()
    pipe = load(args.model, args.threads)
    points = discover(find_denoiser(pipe))
    rows = []
    for path in args.policies:
        policy = policy_file.load(path)
        steps = policy.sampler.replaces
        costs = profiling.costs_of(pipe, points, policy.masks, steps, args.batch)
        predicted = costs.teacher(steps) / costs.of_call(verify.policy_steps(policy))
        found = verify.time_policy(
            pipe, policy, steps, args.batch, half_width=0.01, max_seconds=args.seconds
        )
        ratio = found.ratio
        rows.append(
            {
                "policy": path.parent.name,
                "predicted": f"{predicted:.3f}x",
                "measured": f"{ratio.value:.3f}x",
                "95 % interval": f"{ratio.low:.3f} to {ratio.high:.3f}",
                "difference %": round(100 * (ratio.value / predicted - 1), 2),
                "CPU time ratio": round(found.cpu_ratio, 3),
                "pairs": found.pairs,
            }
        )
    names = " ".join(map(str, args.policies))
    options = f"--model {args.model} --threads {args.threads} --seconds {args.seconds:g}"
    command = f"python benchmarks/budget.py {options} {names}"
    write("budget", pipe, command, rows, "Speed-up of the whole call, predicted and measured.")


if __name__ == "__main__":
    main()
