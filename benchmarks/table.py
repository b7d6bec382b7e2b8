"""The README's table of results, from the reference runs.

    python benchmarks/table.py

The right half compares within one run's table: the best row of each kind that is at most 3 %
slower than the policy.
"""

from __future__ import annotations

from pathlib import Path

from autofr.report.report import load_result
from autofr.search.compare import AS_FAST, speed
from autofr.search.result import Result

RESULTS = Path(__file__).parents[1] / "results"
RUNS = (
    "ldm4-1.5x", "ldm4-2x", "ldm4-3x", "dit-1.5x", "dit-2x", "sd-1.5x", "sd-2x",
    "sd-img2img-2x", "sd-inpaint-2x", "ldm4-sr-1.5x", "ldm4-sr-2x",
)  # fmt: skip
KINDS = {"fewer steps": "fewer steps", "DeepCache": "deepcache", "FRDiff": "frdiff"}
HEAD = (
    "run", "measured speed-up", "error, test seeds", "PSNR", "FID policy / teacher",
    "same table: policy", *KINDS,
)  # fmt: skip


def text() -> str:
    """The table in Markdown."""
    found = (_line(run, load_result(RESULTS / run)) for run in RUNS)
    lines = [HEAD, ("---",) * len(HEAD), *found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---")


def _line(run: str, result: Result) -> tuple[str, ...]:
    measured = result.policy.measured
    assert measured is not None and measured.fid is not None
    gain, error, fid = measured.speedup, measured.trajectory_error, measured.fid
    chosen = next(row for row in result.rows if row.group == "chosen")
    return (
        f"`{run}`",
        f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})",
        f"{error.value:.4f} ({error.low:.4f} to {error.high:.4f})",
        f"{measured.psnr:.1f} dB",
        f"{fid.policy:.2f} / {fid.teacher:.2f}"
        f" ({fid.difference.low:+.3f} to {fid.difference.high:+.3f})",
        f"{chosen.error.value:.4f}",
        *(_best(result, group) for group in KINDS.values()),
    )


def _best(result: Result, group: str) -> str:
    """The row of a group with the least error among those as fast as the choice."""
    chosen = next(row for row in result.rows if row.group == "chosen")
    fast = [
        row for row in result.rows if row.group == group and speed(row) >= AS_FAST * speed(chosen)
    ]
    if not fast:
        return "none as fast"
    best = min(fast, key=lambda row: row.error.value)
    times = best.error.value / chosen.error.value
    return f"{best.error.value:.4f} ({best.name}, {speed(best):.2f}x; {times:.1f} times)"


if __name__ == "__main__":
    print(text(), end="")
