"""The README's table of results, from the reference runs.

    python benchmarks/table.py

All is measured on the test seeds, rivals too: of each kind the best row of the run's table that is
at most 3 % slower than the policy.
"""

from __future__ import annotations

from pathlib import Path

from autofr.report.report import load_result
from autofr.search.compare import rivals, speed
from autofr.search.result import Result

RESULTS = Path(__file__).parents[1] / "results"
RUNS = (
    "ldm4-1.5x", "ldm4-2x", "ldm4-3x", "dit-1.5x", "dit-2x", "sd-1.5x", "sd-2x",
    "sd-img2img-2x", "sd-inpaint-2x", "ldm4-sr-1.5x", "ldm4-sr-2x",
)  # fmt: skip
KINDS = {"fewer steps": "fewer steps", "DeepCache": "deepcache", "FRDiff": "frdiff"}
HEAD = ("run", "measured speed-up", "error", "PSNR", "FID policy / teacher", *KINDS)


def text() -> str:
    """The table in Markdown."""
    found = (_line(run, load_result(RESULTS / run)) for run in RUNS)
    lines = [HEAD, ("---",) * len(HEAD), *found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---")


def _line(run: str, result: Result) -> tuple[str, ...]:
    measured = result.policy.measured
    assert measured is not None and measured.fid is not None
    gain, error, fid = measured.speedup, measured.trajectory_error, measured.fid
    return (
        f"`{run}`",
        f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})",
        f"{error.value:.4f} ({error.low:.4f} to {error.high:.4f})",
        f"{measured.psnr:.1f} dB",
        f"{fid.policy:.2f} / {fid.teacher:.2f}"
        f" ({fid.difference.low:+.3f} to {fid.difference.high:+.3f})",
        *(_rival(result, group) for group in KINDS.values()),
    )


def _rival(result: Result, group: str) -> str:
    """The nearest row of a group among those as fast as the choice, on the test seeds."""
    for row in rivals(result.rows):
        if row.group == group and row.test_error and row.times_chosen:
            return (
                f"{row.test_error.value:.4f} ({row.name}, {speed(row):.2f}x;"
                f" {row.times_chosen.value:.1f} times)"
            )
    return "none as fast"


if __name__ == "__main__":
    print(text(), end="")
