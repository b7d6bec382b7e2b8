"""Profile a pipe on its device: similarity, latency and memory of every point."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from autofr.measure.costs import Costs
from autofr.measure.latency import measure_costs, synchronize
from autofr.measure.profile_file import PointProfile, Profile
from autofr.measure.similarity import OnProgress, measure_similarity
from autofr.mix import JUMP, KEY
from autofr.runtime import halves
from autofr.runtime.families import discover
from autofr.runtime.held import forms
from autofr.runtime.patch import Patch
from autofr.runtime.points import (
    SCORE,
    Given,
    Pipe,
    Point,
    device_of,
    dtype_of,
    find_denoiser,
    fingerprint,
)
from autofr.runtime.recording import record
from autofr.runtime.root import FULL, JUMPED
from autofr.runtime.sampler import draw
from autofr.runtime.start import Starts


def versions() -> dict[str, str]:
    """Versions that a measurement depends on."""
    import diffusers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def device_name(pipe: Pipe) -> str:
    """The device that the denoiser is on, by its product name."""
    device = device_of(pipe)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"cpu ({name})"


def profile(
    pipe: Pipe,
    masks: Mapping[str, Sequence[str]],
    *,
    steps: int,
    batch: int,
    seeds: Sequence[int],
    max_gap: int = 6,
    on_progress: OnProgress | None = None,
) -> Profile:
    """Measure a pipe: similarity over `seeds`, latency of points and masks at `batch`, memory.

    Raises: ModelError for a denoiser without known points; MeasurementError when it gives NaN.
    """
    denoiser = find_denoiser(pipe)
    points = discover(denoiser)
    seeds = seeds[:batch]  # what fits into memory in use fits here
    similarity, kept = measure_similarity(pipe, points, steps, seeds, max_gap, on_progress)
    calls = _first_calls(pipe, steps, batch)
    whole, skippable = _point_seconds(pipe, points, calls[0])
    costs = costs_of(pipe, points | halves.POINTS, masks, steps, batch, calls, on_progress)
    for name, seconds in _stage_seconds(points, masks, costs).items():
        whole[name] = skippable[name] = seconds
    scale = len(calls) * batch / len(seeds)
    return Profile(
        denoiser=type(denoiser).__name__,
        fingerprint=fingerprint(denoiser, points),
        scheduler=type(pipe.scheduler).__name__,
        steps=steps,
        batch=batch,
        device=device_name(pipe),
        dtype=dtype_of(pipe),
        threads=torch.get_num_threads(),
        versions=versions(),
        key_seconds=costs.key,
        jump_seconds=costs.jump,
        fixed_seconds=costs.fixed,
        mask_seconds=costs.masks,
        masks={name: tuple(mask) for name, mask in masks.items()},
        mask_bytes={
            n: round(sum(kept.get(p, 0) for p in mask) * scale) for n, mask in masks.items()
        },
        points=[
            PointProfile(
                name=name,
                kind=point.kind,
                bytes=round(kept[name] * scale),
                whole_seconds=whole.get(name, 0.0),
                skippable_seconds=skippable.get(name, 0.0),
            )
            for name, point in points.items()
        ],
        score_bytes=round(kept[SCORE] * scale * _widened(pipe)),
        similarity=similarity,
    )


def _widened(pipe: Pipe) -> float:
    """How much wider scores are held than they come: as float32 where they are held as noise."""
    width = find_denoiser(pipe).dtype.itemsize
    return max(1.0, 4 / width) if forms(pipe.scheduler) else 1.0


# -- latency --------------------------------------------------------------------------------------


@torch.inference_mode()
def _first_calls(pipe: Pipe, steps: int, batch: int) -> list[Given]:
    """Arguments of the denoiser calls of a pass in the middle of a run: one per guidance branch."""
    with record(pipe, calls=True) as tape:
        draw(pipe, range(batch), Starts(pipe).short(min(steps, 3), steps))
    middle = tape.calls[len(tape.calls) // 2].at
    return [call.given for call in tape.passes()[middle]]


@contextmanager
def _stopwatches(
    modules: Mapping[str, nn.Module], device: torch.device
) -> Iterator[dict[str, list[float]]]:
    """Collect the seconds of each module's forwards inside the block."""
    times: dict[str, list[float]] = {name: [] for name in modules}
    started: dict[str, float] = {}
    handles = []
    for name, module in modules.items():

        def before(*_: object, name: str = name) -> None:
            synchronize(device)
            started[name] = time.perf_counter()

        def after(*_: object, name: str = name) -> None:
            synchronize(device)
            times[name].append(time.perf_counter() - started[name])

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _point_seconds(
    pipe: Pipe,
    points: Mapping[str, Point],
    call: Given,
    rounds: int = 10,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each point's module, and of the part that reuse skips."""
    denoiser = find_denoiser(pipe)
    args, kwargs = call
    timed = {name: p for name, p in points.items() if p.kind != "stage"}
    shortcuts = {
        f"{p.module}.conv_shortcut"
        for p in timed.values()
        if p.kind == "branch"
        and getattr(denoiser.get_submodule(p.module), "conv_shortcut", None) is not None
    }
    paths = {path for p in timed.values() for path in (p.module, p.keep_at, *p.skips)} | shortcuts
    modules = {path: denoiser.get_submodule(path) for path in paths}
    with _stopwatches(modules, device_of(pipe)) as times:
        for _ in range(rounds):
            denoiser(*args, **kwargs)
    median = {n: sorted(values)[len(values) // 2] if values else 0.0 for n, values in times.items()}
    whole: dict[str, float] = {}
    skippable: dict[str, float] = {}
    for name, point in timed.items():
        run = sum(median[path] for path in {*point.skips, point.restore_at})
        whole[name] = max(median[point.module], run)
        if point.kind == "conv":
            skippable[name] = median[point.keep_at]
        elif point.skips:
            skippable[name] = run
        else:
            short = median.get(f"{point.module}.conv_shortcut", 0.0)
            skippable[name] = median[point.module] - (short if point.kind == "branch" else 0.0)
    return whole, skippable


def costs_of(
    pipe: Pipe,
    points: Mapping[str, Point],
    masks: Mapping[str, Sequence[str]],
    steps: int,
    batch: int,
    calls: Sequence[Given] = (),
    on_progress: OnProgress | None = None,
) -> Costs:
    """Measure the parts of a pipe call at this batch, with every mask."""
    denoiser = find_denoiser(pipe)
    args, kwargs = (calls or _first_calls(pipe, steps, batch))[0]
    seeds = range(batch)
    index = {name: i for i, name in enumerate(masks, start=1)}
    patch = Patch(pipe, [[points[p] for p in mask] for mask in masks.values()])
    starts = Starts(pipe)

    def refresh() -> None:
        with patch.keyframe():
            denoiser(*args, **kwargs)

    def evaluate(step: str) -> None:
        # A keyframe keeps nothing here: all masks' points at once would make it dearer than it is.
        with nullcontext() if step == KEY else patch.reduced(index[step]):
            denoiser(*args, **kwargs)

    def whole(steps: Sequence[str]) -> None:
        patch.remove()
        plan = [JUMPED if step != KEY and JUMP in steps else FULL for step in steps]
        try:
            with Patch(pipe, [], plan):
                draw(pipe, seeds, len(steps))
        finally:
            patch.install()

    few = starts.short(2, steps)
    with patch, torch.inference_mode():
        return measure_costs(
            whole,
            evaluate,
            steps,
            [*masks],
            device=device_of(pipe),
            refresh=refresh,
            first=starts,
            few=few,
            on_round=on_progress,
        )


def _stage_seconds(
    points: Mapping[str, Point], masks: Mapping[str, Sequence[str]], costs: Costs
) -> dict[str, float]:
    """What a stage point skips: a keyframe's seconds minus those of its mask."""
    single = {mask[0]: name for name, mask in masks.items() if len(mask) == 1}
    return {
        point: max(0.0, costs.key - costs.masks[single[point]])
        for point, value in points.items()
        if value.kind == "stage" and point in single
    }
