"""Does reuse survive other solvers? Each solver is its own teacher, at the same predicted cost.

    python benchmarks/solvers.py --model ldm4

FRDiff was shown on DDIM; its readers asked whether a solver with memory, DPM-Solver++ above all,
tolerates scores that were not all evaluated. For every solver: the same number of steps with every
second score held, with FRDiff's features reused, planned at 1.5x and at 2x, and the plain floor of
fewer steps; errors of the final latents to that solver's own full run. Solvers that draw noise are
left out: LDMPipeline gives their noise no generator, so that two runs differ anyhow.
"""

from __future__ import annotations

import argparse
from typing import Any

import diffusers
from protocol import load, write

from autofr.measure import profiling
from autofr.measure.calibration import calibrate
from autofr.measure.masks import candidate_masks, worth_calibrating
from autofr.mix import JUMP, Constant
from autofr.plan import baselines, correction
from autofr.plan.choices import Rule
from autofr.plan.planner import plan
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser
from autofr.runtime.sampler import compose
from autofr.search.decode import family
from autofr.search.evaluate import Evaluator, solver

SOLVERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", 50, {}),
    "Euler": ("EulerDiscreteScheduler", 50, {"timestep_spacing": "trailing"}),
    "Heun": ("HeunDiscreteScheduler", 25, {"timestep_spacing": "trailing"}),
    "PNDM": ("PNDMScheduler", 50, {"skip_prk_steps": True, "timestep_spacing": "trailing"}),
    "DPM-Solver++ 2M Karras": ("DPMSolverMultistepScheduler", 25, {"use_karras_sigmas": True}),
    "DPM-Solver++ 2S": ("DPMSolverSinglestepScheduler", 25, {}),
    "DEIS": ("DEISMultistepScheduler", 25, {}),
    "UniPC": ("UniPCMultistepScheduler", 25, {"timestep_spacing": "trailing"}),
}
SPEEDUPS = (1.5, 2.0)


def rows_of(pipe: Any, name: str, steps: int, seeds: list[int], batch: int) -> dict[str, Any]:
    """Errors of each schedule for the solver that the pipe has."""
    points = discover(find_denoiser(pipe))
    masks = candidate_masks(points)
    costs = profiling.costs_of(pipe, points, masks, steps, batch)
    few = worth_calibrating(masks, costs)
    evaluator = Evaluator(pipe, seeds, steps, batch, fine_seeds=1)
    shape = tuple(evaluator.teacher.latents.shape[1:])

    def error(draft: Any) -> str:
        policy = compose(
            pipe, "ldm4", draft.steps, masks, draft.mix, replaces=steps, latent_shape=shape
        )
        if draft.group == "planned":
            policy = correction.correct(pipe, policy, path)
        found = evaluator.score(policy).error
        return f"{found.value:.4f} ({costs.teacher(steps) / draft.seconds(costs):.2f}x)"

    calibration_seeds = list(range(8))
    table = calibrate(pipe, calibration_seeds, steps, few)
    path = correction.trajectory(pipe, calibration_seeds, steps)
    rule = Rule(masks=family("all", few))
    row: dict[str, Any] = {"solver": name, "steps": steps}
    jump = baselines.uniform("jump", "frdiff", steps, 2, JUMP, Constant(value=1.0))
    row["every second score held"] = error(jump)
    row["FRDiff M=2"] = error(baselines.frdiff(steps, 2))
    for speedup in SPEEDUPS:
        found = plan(table, costs, rule, costs.teacher(steps) / speedup)
        draft = baselines.Draft(f"planned {speedup}x", "planned", found.steps, found.mix)
        row[f"planned {speedup:g}x"] = error(draft)
        affordable = int((costs.teacher(steps) / speedup - costs.fixed) / costs.key)
        row[f"fewer steps {speedup:g}x"] = error(baselines.fewer_steps(max(2, affordable)))
    return row


def main() -> None:
    """Measure every solver."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ldm4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    pipe = load(args.model, args.threads)
    seeds = list(range(100_000, 100_000 + args.samples))
    rows = []
    for name, (kind, steps, options) in SOLVERS.items():
        scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
        with solver(pipe, scheduler):
            rows.append(rows_of(pipe, name, steps, seeds, args.batch))
        print(rows[-1], flush=True)
    command = f"python benchmarks/solvers.py --model {args.model} --samples {args.samples}"
    note = (
        "Relative error of the final latents to the same solver's full run (predicted speed-up"
        f" beside it), {args.samples} validation seeds, batch {args.batch}; planned policies are"
        " calibrated and corrected on 8 other seeds."
    )
    write("solvers", pipe, command, rows, note)


if __name__ == "__main__":
    main()
