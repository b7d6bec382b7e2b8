"""Does a reuse step take what the profile says? Whole minus skipped parts, against measured masks.

python benchmarks/steps.py --model ldm4
"""

from __future__ import annotations

import argparse
from typing import Any

from protocol import load, random_dit, write

from autofr.measure import profiling
from autofr.measure.masks import candidate_masks
from autofr.measure.profile_file import Profile
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser


def rows_of(name: str, found: Profile) -> list[dict[str, Any]]:
    """Every mask of a profile: seconds measured, and a full evaluation minus what it skips."""
    skippable = {point.name: point.skippable_seconds for point in found.points}
    rows = []
    for mask, points in found.masks.items():
        if any(point.endswith("#stage") for point in points):
            continue  # a cut's skippable part is itself known from its mask
        expected = found.key_seconds - sum(skippable[point] for point in points)
        measured = found.mask_seconds[mask]
        rows.append(
            {
                "model": name,
                "mask": mask,
                "full ms": round(1000 * found.key_seconds, 2),
                "measured ms": round(1000 * measured, 2),
                "full - skipped ms": round(1000 * expected, 2),
                "difference %": round(100 * (measured - expected) / found.key_seconds, 1),
            }
        )
    return rows


def main() -> None:
    """Profile the model and a random DiT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ldm4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for name, pipe, batch in (
        (args.model, load(args.model, args.threads), args.batch),
        ("random DiT-S/2", random_dit(), 2),
    ):
        masks = candidate_masks(discover(find_denoiser(pipe)))
        found = profiling.profile(pipe, masks, steps=10, batch=batch, seeds=[0, 1])
        rows += rows_of(name, found)
    command = f"python benchmarks/steps.py --model {args.model}"
    note = "Difference in percent of a full evaluation."
    write("steps", load(args.model, args.threads), command, rows, note)


if __name__ == "__main__":
    main()
