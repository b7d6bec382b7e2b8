"""Failures of other caching tools, reproduced with the tools themselves on tiny random pipelines.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -c constraints.txt torch
    /tmp/peers/bin/pip install -c constraints.txt -e . transformers
    /tmp/peers/bin/pip install --no-deps DeepCache==0.1.1 cache-dit==1.5.3 dit-smoothcache==0.1.1
    /tmp/peers/bin/python benchmarks/peers.py

An environment of its own, so that ours has no tool in it that we do not need. A failure is a
function that says in equal words what was expected and what happened; where the two agree it could
not be reproduced, and where the tool is not installed it is skipped. Each names the test in
tests/test_peer_failures.py that states what autofr does instead.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any
from unittest import mock

import peer_failures as on
import torch
from diffusers import hooks
from peer_pipes import (
    Outcome,
    UNetPipe,
    after_an_error,
    again,
    dit,
    dit_pipe,
    flux,
    pixart,
    restored,
    words,
)
from protocol import write


@dataclass(frozen=True)
class Failure:
    """A failure of a tool, by its name on PyPI; `law` is the test of what autofr does instead."""

    tool: str
    what: str
    law: str
    run: Callable[[], Outcome]


DC, SC, CD, HF = "DeepCache", "dit-smoothcache", "cache-dit", "diffusers"
STAGES, COUNTS = "test_stages_of_a_solver_step_run_together", "test_another_step_count_is_refused"
AGAIN, ERRORS = "test_a_second_generation_equals_the_first", "test_an_error_leaves_nothing_behind"
ANY, NOTHING = "test_every_kind_of_denoiser_is_accelerated", "test_a_mask_of_no_point_is_refused"
RESTORED, TWICE = "test_removing_restores_every_bit", "test_applying_again_replaces_the_policy"
BATCH, IDLE = "test_the_batch_may_change_between_calls", "test_what_is_applied_has_an_effect"
CONTEXT, BRANCHES = "test_no_cache_context_is_needed", "test_guidance_branches_are_kept_apart"

FAILURES = (
    Failure(DC, "Heun: a step is found by the first match of a repeated timestep", STAGES,
            lambda: on.deepcache_under("HeunDiscreteScheduler")),
    Failure(DC, "PNDM: likewise, at its Runge-Kutta steps", STAGES,
            lambda: on.deepcache_under("PNDMScheduler")),
    Failure(DC, "KDPM2: second stages are never computed", STAGES,
            lambda: on.deepcache_under("KDPM2DiscreteScheduler")),
    Failure(DC, "the timestep given as a keyword", "test_a_timestep_may_be_a_keyword",
            on.deepcache_keyword),
    Failure(DC, "steps that are not evenly spaced (skip_mode)",
            "test_keyframes_need_not_be_evenly_spaced", on.deepcache_mode),
    Failure(DC, "a transformer instead of a U-Net", ANY,
            lambda: ("runs", words(lambda: on.deepcache(dit_pipe()), "runs"))),
    Failure(DC, "a run that begins at another step than the one before reuses its features",
            "test_a_run_from_the_middle_begins_with_a_keyframe", on.deepcache_middle),
    Failure(DC, "enabled twice", TWICE, on.deepcache_twice),
    Failure(DC, "two calls per step (guidance) share one store",
            BRANCHES, on.deepcache_split),
    Failure(DC, "a batch that shrinks during a run", "test_the_batch_may_change_during_a_run",
            on.deepcache_batch),
    Failure(DC, "FreeU scales what is kept, again at every step (branch 3)",
            "test_what_is_kept_is_not_changed_in_place", on.deepcache_freeu),
    Failure(DC, "features are held after the run", "test_nothing_is_held_after_a_run",
            on.deepcache_memory),
    Failure(DC, "a run after an error", ERRORS, lambda: after_an_error(UNetPipe(), on.deepcache)),
    Failure(DC, "the pipe after disabling", RESTORED,
            lambda: restored(UNetPipe(), on.deepcache, lambda tool: tool.disable())),
    Failure(SC, "the second generation is not accelerated",
            "test_a_second_generation_is_accelerated_too", on.smoothcache_second),
    Failure(SC, "a line is printed for each call of a layer", "test_a_run_prints_nothing",
            on.smoothcache_prints),
    Failure(SC, "a schedule of feed-forward layers", "test_feed_forward_layers_are_reused_too",
            lambda: on.smoothcache_components({"ff": on.EVERY_SECOND})),
    Failure(SC, "a schedule of a component that there is not", NOTHING,
            lambda: on.smoothcache_components({"attention": on.EVERY_SECOND})),
    Failure(SC, "20-step schedule at 10 steps", COUNTS, lambda: on.smoothcache_steps(10)),
    Failure(SC, "20-step schedule at 30 steps", COUNTS, lambda: on.smoothcache_steps(30)),
    Failure(SC, "a U-Net", ANY, lambda: on.smoothcache_nothing(UNetPipe().unet)),
    Failure(SC, "Flux, which has other blocks", ANY, lambda: on.smoothcache_nothing(flux())),
    Failure(SC, "enabled twice, disabled once", TWICE, on.smoothcache_twice),
    Failure(SC, "Heun: its schedule is of calls, not of steps", STAGES, on.smoothcache_under_heun),
    Failure(SC, "a run after an error", ERRORS,
            lambda: after_an_error(dit_pipe(), lambda pipe: on.smoothcache(pipe.transformer))),
    Failure(SC, "schedules cannot be made with the wheel", "test_calibration_is_a_value",
            on.smoothcache_calibrator),
    Failure(SC, "the pipe after disabling", RESTORED,
            lambda: restored(dit_pipe(), lambda pipe: on.smoothcache(pipe.transformer),
                             lambda tool: tool.disable())),
    Failure(CD, "20-step mask at 10 steps", COUNTS, lambda: on.cache_dit_steps(10)),
    Failure(CD, "20-step mask at 30 steps", COUNTS, lambda: on.cache_dit_steps(30)),
    Failure(CD, "Heun: its mask is of calls, not of steps", STAGES, on.cache_dit_under_heun),
    Failure(CD, "a static mask that reuses all blocks (Fn = 0)",
            "test_all_blocks_may_be_reused", on.cache_dit_all_blocks),
    Failure(CD, "a U-Net", ANY, on.cache_dit_unet),
    Failure(CD, "Fn = 8, the default, of eight blocks", NOTHING, on.cache_dit_no_block),
    Failure(CD, "its defaults at 20 steps of 12 blocks with random weights", IDLE,
            on.cache_dit_defaults),
    Failure(CD, "a second configuration is ignored", TWICE, on.cache_dit_twice),
    Failure(CD, "on the transformer alone: a second generation reuses features of the first",
            AGAIN, on.cache_dit_module),
    Failure(CD, "a run after an error", ERRORS, lambda: after_an_error(dit_pipe(), on.cache_dit)),
    Failure(CD, "the pipe after disabling", RESTORED,
            lambda: restored(dit_pipe(), on.cache_dit, on.cache_dit_off)),
    Failure(HF, "TaylorSeer: default patterns on DiT", NOTHING,
            lambda: on.taylorseer_defaults(dit())),
    Failure(HF, "TaylorSeer: default patterns on PixArt", NOTHING,
            lambda: on.taylorseer_defaults(pixart())),
    Failure(HF, "TaylorSeer: default patterns on a U-Net", NOTHING,
            lambda: on.taylorseer_defaults(UNetPipe().unet)),
    Failure(HF, "TaylorSeer: a second generation with DiT", AGAIN,
            lambda: again(dit_pipe(), on.taylorseer)),
    Failure(HF, "first-block cache: DiTPipeline sets no context", CONTEXT,
            lambda: on.no_context(on.first_block)),
    Failure(HF, "first-block cache: a U-Net", ANY,
            lambda: ("runs", words(lambda: on.first_block(UNetPipe().unet), "runs"))),
    Failure(HF, "first-block cache: another batch in the next call", BATCH, on.first_block_batch),
    Failure(HF, "first-block cache: Flux.2 (issue 14280)", ANY,
            lambda: on.on_flux2(hooks.FirstBlockCacheConfig(threshold=0.5))),
    Failure(HF, "MagCache: Flux.2 (issue 14351)", ANY,
            lambda: on.on_flux2(hooks.MagCacheConfig(mag_ratios=[1.0] * 2, num_inference_steps=2,
                                                     retention_ratio=0.0))),
    Failure(HF, "MagCache: what calibration finds is printed", "test_calibration_is_a_value",
            on.magcache_calibration),
    Failure(HF, "MagCache: a U-Net", ANY, on.magcache_unet),
    Failure(HF, "MagCache: ratios for 20 steps at 10 steps", COUNTS, lambda: on.magcache_steps(10)),
    Failure(HF, "MagCache: ratios for 20 steps at 30 steps", COUNTS, lambda: on.magcache_steps(30)),
    Failure(HF, "MagCache: a second generation of 10 steps", AGAIN,
            lambda: again(dit_pipe(), on.magcache, steps=10)),
    Failure(HF, "MagCache: a run after an error", ERRORS,
            lambda: after_an_error(dit_pipe(), on.magcache)),
    Failure(HF, "MagCache: two calls per step (guidance) share one store outside a context",
            BRANCHES, on.magcache_split),
    Failure(HF, "MagCache: another batch after an error", BATCH, on.magcache_batch),
    Failure(HF, "attention broadcast: a second generation of 20 steps with DiT", AGAIN,
            lambda: again(dit_pipe(), on.broadcast)),
    Failure(HF, "attention broadcast: a second generation of 21 steps with DiT", AGAIN,
            lambda: again(dit_pipe(), on.broadcast, steps=21)),
    Failure(HF, "FasterCache: DiT", ANY, lambda: on.faster_cache(dit_pipe())),
    Failure(HF, "FasterCache: a U-Net", ANY, lambda: on.faster_cache(UNetPipe())),
    Failure(HF, "SeaCache: DiT", IDLE, on.seacache_dit),
    Failure(HF, "SeaCache: a U-Net", ANY,
            lambda: ("runs", words(lambda: on.seacache(UNetPipe().unet), "runs"))),
    *(Failure(HF, f"{name} has no `enable_cache`", ANY, partial(on.no_mixin, name))
      for name in ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel",
                   "PixArtTransformer2DModel")),
)  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Show nothing of what tools print and log, and list what they warn of."""
    warned: list[str] = []

    def note(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warned.append(record.getMessage())

    with (
        mock.patch.object(logging.Logger, "callHandlers", note),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield warned


def row_of(failure: Failure) -> dict[str, Any]:
    """Try one failure."""
    try:
        tool = f"{failure.tool} {metadata.version(failure.tool)}"
    except metadata.PackageNotFoundError:
        row = {"tool": failure.tool, "case": failure.what, "expected": "", "happened": ""}
        return {**row, "reproduced": "skipped", "said": "", "autofr": failure.law}
    with quiet() as warned:
        try:
            expected, happened = failure.run()
        except Exception as error:  # another version of the tool
            expected, happened = "can be tried", f"{type(error).__name__}: {error}"
    failed = expected != happened
    said = "an error" if "Error: " in happened else "a warning" if warned else "nothing"
    return {
        "tool": tool,
        "case": failure.what,
        "expected": expected,
        "happened": happened,
        "reproduced": "yes" if failed else "no",
        "said": said if failed else "",
        "autofr": failure.law,
    }


def main() -> None:
    """Try every failure and write the table."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [row_of(failure) for failure in FAILURES]
    made = [row["reproduced"] for row in rows]
    silent = sum(row["said"] == "nothing" for row in rows)
    note = (
        f"{len(rows)} cases with the tools as they are installed, on tiny random pipelines:"
        f" {made.count('yes')} failures were reproduced, {silent} of them without an error or a"
        f" logged warning; {made.count('no')} were not reproduced, {made.count('skipped')} were"
        " skipped (not installed). X is a call of the denoiser whose inner layers ran, a dot one"
        " where they were reused. The last column names the test of what autofr does instead."
        " Not tried: the code of FRDiff, ECAD, TeaCache, Learning-to-Cache and Model-Optimizer's"
        " example, which are no packages, and BudCache, which needs CUDA and large weights."
    )
    write("peers", UNetPipe(), "python benchmarks/peers.py", rows, note)


if __name__ == "__main__":
    main()
