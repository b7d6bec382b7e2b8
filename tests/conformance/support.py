"""Writes `docs/support.md` from the registry and the models that the suite really runs.

python tests/conformance/support.py > docs/support.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from laws import ALL
from test_loops import PREDICTING, SOLVED, SOLVERS

from autofr.measure.masks import candidate_masks
from autofr.runtime.families import FAMILIES, discover
from autofr.runtime.points import KINDS

HEAD = """\
# What is supported, and what is tested of it

Written by `python tests/conformance/support.py > docs/support.md`; a test fails when it is out of
date. Every row is a tiny, randomly initialised model of the real class, on which
`tests/conformance/` checks the laws below. Random weights show that the mechanism is right; they
say nothing about how much quality reuse costs.

Laws of every point: a keyframe is bit-identical to the bare model; at equal input and time reuse is
the identity (relative error below 1e-4 in float32); elsewhere it computes less and shows its age.
Laws of every run: an all-keyframe policy is bit-identical; the calls made are the calls planned; a
second run equals the first; nothing is kept after it; removal leaves every module as it was.

## Denoisers

| class | tested as | kinds of points | masks that a search tries |
|---|---|---|---|
"""
SOLVER_HEAD = """
A class that is in no row is searched for repeated blocks, with a notice in the log; where there are
none it is refused.

## Solvers

What reuse means under each of them is in [solvers.md](solvers.md). The laws of every run hold with
each solver on {classes}; with the predictions named below on `UNet2DModel`.

| solver | class | predictions |
|---|---|---|
"""


def text() -> str:
    """The whole page."""
    lines = [HEAD]
    for family in sorted(FAMILIES):
        variants = [name for name in ALL if name.split()[0] == family]
        points = discover(ALL[variants[0]].build())
        kinds = [kind for kind in KINDS if any(p.kind == kind for p in points.values())]
        masks = candidate_masks(points)
        runs = [name for name in masks if name.rstrip("0123456789") not in ("cut", "run")]
        nested = len(masks) - len(runs)
        tried = ", ".join([*runs, *([f"{nested} nested"] if nested else [])])
        tested = ", ".join(name.partition(" ")[2] or "plain" for name in variants)
        lines.append(f"| `{family}` | {tested} | {', '.join(kinds)} | {tried} |\n")
    classes = ", ".join(f"`{name.split()[0]}`" for name in SOLVED)
    lines.append(SOLVER_HEAD.format(classes=classes))
    for name, make in SOLVERS.items():
        first = "velocity" if "FlowMatch" in name else "noise"
        known = {"v_prediction": "v", "sample": "clean sample"}
        others = [known[kind] for solver, kind in PREDICTING if solver == name]
        predictions = ", ".join([first, *others])
        lines.append(f"| {name} | `{type(make()).__name__}` | {predictions} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(text())
