"""Cost of the runtime itself: the all-keyframe policy against the bare pipe.

    python benchmarks/overhead.py --model ldm4

Whole `pipe(...)` calls in interleaved pairs; the law is bit-identity and at most 1 % more time,
on a U-Net and on a DiT.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from protocol import load, random_dit, write

from autofr import mix
from autofr.runtime.sampler import compose, draw, reuse
from autofr.search import verify


def rows_of(name: str, pipe: Any, batches: tuple[int, ...], args: Any) -> list[dict[str, Any]]:
    """One row per batch size."""
    bare = draw(pipe, range(2), args.steps)
    policy = compose(
        pipe,
        name,
        [mix.KEY] * args.steps,
        {},
        mix.Constant(),
        replaces=args.steps,
        latent_shape=tuple(bare.latents.shape[1:]),
    )
    with reuse(pipe, policy):
        same = torch.equal(draw(pipe, range(2), args.steps).latents, bare.latents)
    rows = []
    for batch in batches:
        found = verify.time_policy(
            pipe, policy, args.steps, batch, half_width=0.004, max_seconds=args.seconds
        )
        ratio = found.ratio
        rows.append(
            {
                "model": name,
                "batch": batch,
                "bare ms": round(1000 * found.first_seconds, 1),
                "all-keyframe ms": round(1000 * found.second_seconds, 1),
                "overhead %": round(100 * (1 / ratio.value - 1), 2),
                "95 % interval": " to ".join(
                    f"{100 * (1 / end - 1):.2f}" for end in (ratio.high, ratio.low)
                ),
                "CPU time overhead %": round(100 * (1 / found.cpu_ratio - 1), 2),
                "pairs": found.pairs,
                "bit-identical": same,
            }
        )
    return rows


def main() -> None:
    """Measure the model at batch 1 and 8, and a DiT with random weights at batch 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ldm4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90.0, help="time limit per row")
    args = parser.parse_args()
    pipe = load(args.model, args.threads)
    rows = rows_of(args.model, pipe, (1, 8), args)
    rows += rows_of("random DiT-S/2", random_dit(), (1,), args)
    options = f"--model {args.model} --threads {args.threads} --seconds {args.seconds:g}"
    command = f"python benchmarks/overhead.py {options}"
    write("overhead", pipe, command, rows, "All-keyframe policy against the bare pipe.")


if __name__ == "__main__":
    main()
