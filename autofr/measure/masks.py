"""Which masks a search may use: the published ones and the cuts of the network, if worth timing."""

from __future__ import annotations

from collections.abc import Mapping

from autofr.measure.costs import Costs
from autofr.runtime import halves
from autofr.runtime.points import Point

Masks = Mapping[str, tuple[str, ...]]
GUIDANCE = "guidance"
"""Name of the mask that computes one guidance branch."""


def candidate_masks(
    points: Mapping[str, Point], branch: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Name the masks worth calibrating: the published ones and the nested cuts of the network.

    U-Nets: `frdiff` (first convolutions and attention or spatial transformers), `branches`
    (residual branches and the same), `attn`, and one `cut` per `stage` point (DeepCache).
    Transformers: `frdiff` (all sub-layers), `attn`, `cross`, `ff`, and one `run` per run of
    blocks to the end of its list. Both: `guidance`, where `branch` of a batched one can be
    computed alone.
    """
    by_kind: dict[str, list[str]] = {}
    for name, point in points.items():
        by_kind.setdefault(point.kind, []).append(name)
    attention = by_kind.get("transformer", []) + _outside_transformers(points)
    found = {"attn": attention}
    convs, branches = by_kind.get("conv", []), by_kind.get("branch", [])
    if convs or branches:
        found |= {"frdiff": [*convs, *attention], "branches": [*branches, *attention]}
    else:
        found |= {kind: by_kind.get(kind, []) for kind in ("cross", "ff")}
        found["frdiff"] = [*attention, *found["cross"], *found["ff"]]
    found |= {f"cut{depth}": [name] for depth, name in enumerate(by_kind.get("stage", []))}
    runs = [name for name in by_kind.get("block", []) if points[name].enter_at is not None]
    found |= {f"run{index}": [name] for index, name in enumerate(runs)}
    if branch is not None:
        found[GUIDANCE] = [[*halves.POINTS][branch]]
    return {name: tuple(mask) for name, mask in found.items() if mask}


def _outside_transformers(points: Mapping[str, Point]) -> list[str]:
    """Attention that no spatial transformer of the list contains."""
    outer = tuple(f"{p.module}." for p in points.values() if p.kind == "transformer")
    attention = [name for name, point in points.items() if point.kind == "attn"]
    return [name for name in attention if not (outer and name.startswith(outer))]


def worth_calibrating(masks: Masks, costs: Costs) -> dict[str, tuple[str, ...]]:
    """Leave out masks that save too little, and cuts that cost nearly the same as a deeper one.

    Each mask costs about `max_gap` reduced runs to calibrate; what is left still spans the range.
    """
    kept, cheapest = {}, costs.key
    for name, points in masks.items():
        single_cut = len(points) == 1 and points[0].endswith("#stage")
        if costs.masks[name] > 0.85 * costs.key:
            continue
        if single_cut and costs.masks[name] > cheapest - 0.06 * costs.key:
            continue
        if single_cut:
            cheapest = costs.masks[name]
        kept[name] = points
    return kept
