"""Pictures of a run's page, light and dark: results/report-light.png and results/report-dark.png.

    python benchmarks/screenshots.py results/sd-2x

The whole page, 1200 pixels wide, in 256 colours. Where there is no Chromium, nothing is drawn.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from browser import NAMES, browser, find
from PIL import Image

from autofr.report.page import NAME

RESULTS = Path(__file__).parents[1] / "results"
WIDTH = 1200  # pixels of the page


def take(run: Path, out: Path) -> list[Path]:
    """Draw the page of a run in both themes, and return the paths of the pictures."""
    paths = []
    with tempfile.TemporaryDirectory() as scratch, browser(Path(scratch)) as seen:
        for theme in ("light", "dark"):
            seen.open(run / NAME, WIDTH, dark=theme == "dark")
            path = seen.screenshot(out / f"report-{theme}.png")
            with Image.open(path) as image:
                few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
            few.save(path, optimize=True)
            paths.append(path)
    return paths


def main() -> None:
    """Parse the command line, and say what was drawn or why nothing was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=RESULTS / "ldm4-1.5x")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    given = parser.parse_args()
    if not (given.run / NAME).is_file():
        parser.error(f"{given.run}: no {NAME}; `autofr report {given.run}` writes it")
    if find() is None:
        print(f"skipped: no browser here; looked for {', '.join(NAMES)}")
        return
    for path in take(given.run, given.out):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
