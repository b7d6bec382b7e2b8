"""How much every point's tensor changes from step to step, measured in one streamed run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autofr.errors import MeasurementError
from autofr.measure.profile_file import Similarity
from autofr.runtime.guidance import changing
from autofr.runtime.patch import Patch
from autofr.runtime.points import SCORE, Pipe, Point
from autofr.runtime.recording import record
from autofr.runtime.sampler import draw
from autofr.runtime.store import tensors_in

OnProgress = Callable[[int, int], None]


class _Comparison:
    """Holds the last `max_gap` steps' tensors, and compares each new step with them."""

    def __init__(self, names: Sequence[str], steps: int, max_gap: int) -> None:
        empty: list[float | None] = [None] * steps
        self._cosine = {name: [list(empty) for _ in range(max_gap)] for name in names}
        self._change = {name: [list(empty) for _ in range(max_gap)] for name in names}
        self._window: deque[dict[str, Any]] = deque(maxlen=max_gap)
        self.compared: set[int] = set()
        self.bytes: dict[str, int] = {}

    def add(self, step: int, now: dict[str, Any]) -> None:
        """Compare what points keep at a step with the steps before, then remember it."""
        self.compared.add(step)
        for name, kept in now.items():
            self.bytes[name] = sum(tensor.nbytes for tensor in tensors_in(kept))
        for gap, then in enumerate(reversed(self._window), start=1):
            for name, kept in now.items():
                cosine, change = compare(kept, then[name])
                self._cosine[name][gap - 1][step] = cosine
                self._change[name][gap - 1][step] = change
        self._window.append(now)

    def found(self) -> dict[str, Similarity]:
        """Return what was compared so far, by point."""
        return {
            name: Similarity(cosine=self._cosine[name], relative_l1=self._change[name])
            for name in self._cosine
        }


def measure_similarity(
    pipe: Pipe,
    points: Mapping[str, Point],
    steps: int,
    seeds: Sequence[int],
    max_gap: int,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Similarity], dict[str, int]]:
    """Compare every point's tensor (and the score) with those of the `max_gap` steps before it.

    Only `max_gap` steps are held at a time. Of a step with several calls the first one counts.
    Returns: similarity by point, and bytes kept by point at this number of seeds.
    Raises: MeasurementError when the model gives NaN; ModelError when the batch changes on the way.
    """
    comparison = _Comparison([*points, SCORE], steps, max_gap)
    patch = Patch(pipe, [[point] for point in points.values()])
    shapes: list[list[torch.Size]] = []

    def listen(step: int, score: torch.Tensor) -> None:
        shapes.append([tensor.shape for tensor in tensors_in(score)])
        if shapes[-1] != shapes[0]:
            raise changing(pipe)
        if not bool(score.isfinite().all()):
            raise MeasurementError(f"the model returned NaN or infinity at step {step}")
        kept = patch.run.kept.tensors
        now = {name: list(kept[name]) for name in points if kept[name]} | {SCORE: score}
        if step not in comparison.compared:
            comparison.add(step, now)
            if on_progress:
                on_progress(step + 1, steps)

    with patch, patch.keyframe(), record(pipe, on_score=listen):
        draw(pipe, seeds, steps)
    return comparison.found(), comparison.bytes


def compare(now: Any, then: Any) -> tuple[float, float]:
    """Cosine similarity and relative L1 change of two kept values, mean over samples.

    Values are tensors (n, ...), or several of them: then the mean over those.
    """
    pairs = list(zip(tensors_in(now), tensors_in(then), strict=True))
    found = [_compare(a.flatten(1).float(), b.flatten(1).float()) for a, b in pairs]
    cosine, change = (sum(values) / len(pairs) for values in zip(*found, strict=True))
    return round(cosine, 4), round(change, 4)


def _compare(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    cosine = torch.nn.functional.cosine_similarity(a, b).mean()
    change = ((a - b).abs().sum(1) / b.abs().sum(1).clamp_min(1e-12)).mean()
    return float(cosine), float(change)
