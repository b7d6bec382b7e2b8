"""How long it takes to read a policy of 200 steps that each reuse 200 points, and to compile it.

    python benchmarks/load.py

CPU time, median of many; beside it that of parsing the same text with the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from protocol import load as load_pipe
from protocol import write

from autofr import policy_file
from autofr.mix import Table
from autofr.policy import Model, Policy, Sampler
from autofr.runtime.sampler import compile_plan


def large(steps: int, points: int) -> Policy:
    """A policy whose every reduced step has a mask and weights of its own."""
    names = [
        f"up_blocks.{i % 4}.attentions.{i}.transformer_blocks.0.attn1#attn" for i in range(points)
    ]
    plan = ["key" if i % 4 == 0 else f"mask{i}" for i in range(steps)]
    rows = [() if step == "key" else (0.912345, 0.123456, -0.035801) for step in plan]
    rows[1:4] = [(0.912345, 0.087655)] * 3  # there is one keyframe before these
    return Policy(
        model=Model(name="large", denoiser="UNet2DConditionModel", fingerprint="0" * 16),
        sampler=Sampler(
            scheduler="DDIMScheduler", config={}, num_inference_steps=steps, replaces=steps,
            prediction_type="epsilon", latent_shape=(4, 64, 64), dtype="float16",
        ),
        masks={f"mask{i}": (*names[i % points :], *names[: i % points]) for i in range(steps)},
        steps=tuple(plan),
        mix=Table(weights=tuple(rows)),
    )  # fmt: skip


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median CPU time of a call."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(1000 * (time.process_time() - began))
    return statistics.median(found)


def row_of(steps: int, points: int, rounds: int) -> dict[str, Any]:
    """Times of one size."""
    one = large(steps, points)
    known: Any = {name: SimpleNamespace() for mask in one.masks.values() for name in mask}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.json"
        one.save(path)
        text = path.read_text(encoding="utf-8")
        reading = milliseconds(lambda: policy_file.load(path), rounds)
    parsing = milliseconds(lambda: json.loads(text), rounds)
    return {
        "steps": steps,
        "points per mask": points,
        "MB": round(len(text) / 1e6, 2),
        "load ms": round(reading, 1),
        "json.loads ms": round(parsing, 1),
        "ratio": round(reading / parsing, 1),
        "compile ms": round(milliseconds(lambda: compile_plan(one, known), rounds), 1),
    }


def main() -> None:
    """Measure a policy of the usual size, and a very large one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    rows = [row_of(steps, points, args.rounds) for steps, points in ((50, 20), (200, 200))]
    note = (
        "Reading a policy file with all checks, and compiling it for the hooks; CPU time, medians."
    )
    command = f"python benchmarks/load.py --rounds {args.rounds}"
    write("load", load_pipe("ldm4", 1), command, rows, note)


if __name__ == "__main__":
    main()
