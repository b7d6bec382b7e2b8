"""cache-dit and BudCache: what a run of transformer blocks adds, reused at listed steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autofr.errors import InterchangeError, brief
from autofr.interchange.schedule import Plan, Target, alternating, bits, numbers, reused, shown
from autofr.policy import Policy

Span = tuple[int, int]
"""The first and last block of a run; or Fn and Bn, the blocks computed before and behind it."""

Block = tuple[str, int]
"""A block: the list that it is in, and its place there."""

GROUPS = {
    "AuraFlowTransformer2DModel": (("single_transformer_blocks",),),  # joint blocks always run
    "FluxTransformer2DModel": (("transformer_blocks", "single_transformer_blocks"),),
}
"""Lists of blocks through which cache-dit counts Fn and Bn; of other denoisers each on its own."""

FORECASTS = ("enable_taylorseer", "enable_dmd", "enable_foca")


def read_budcache(data: Any, target: Target) -> Plan:
    """Read the cached steps; at the others all blocks run."""
    if isinstance(data, dict):
        data = data.get("cache_step")
    cached = numbers(data, 'the cached steps, [3, 5, 6] or {"cache_step": [3, 5, 6]}')
    if late := [step for step in cached if step >= target.steps]:
        raise InterchangeError(f"cached step {late[0]}, but {target.steps - 1} is the last step")
    held = {*cached}
    computed = [step not in held for step in range(target.steps)]
    lists = _lists(target)
    return alternating(computed, "stack", _points(lists, _blocks(lists)))


def read_cache_dit(data: Any, target: Target) -> Plan:
    """Read a static mask of steps, in a configuration or alone (Fn = 1, Bn = 0)."""
    alone = {"Fn_compute_blocks": 1, "steps_computation_policy": "static"}
    config = {**alone, "steps_computation_mask": data}
    if isinstance(data, dict):
        config = data.get("cache_config", data)
    if not isinstance(config, dict) or config.get("steps_computation_policy") != "static":
        raise InterchangeError(
            'expected "steps_computation_policy": "static"; otherwise (it is "dynamic" by default)'
            " every run decides for itself what it reuses"
        )
    if config.get("cache_type", "DBCache") != "DBCache":
        raise InterchangeError(f"cache_type {brief(config['cache_type'])}: only DBCache is known")
    if forecasts := [key for key in FORECASTS if config.get(key)]:
        raise InterchangeError(f"{forecasts[0]}: autofr reuses tensors and does not forecast them")
    # Fn is 8 for cache-dit where a configuration does not say it.
    ends = [config.get("Fn_compute_blocks", 8), config.get("Bn_compute_blocks", 0)]
    first, behind = numbers(ends, "whole numbers as Fn_compute_blocks and Bn_compute_blocks")
    if first < 1:
        raise InterchangeError("Fn_compute_blocks: expected 1 or more, got 0")
    mask = config.get("steps_computation_mask")
    computed = bits(mask, target.steps, "steps_computation_mask")
    return alternating(computed, f"F{first}B{behind}", _between(target, first, behind))


def write_cache_dit(policy: Policy, target: Target) -> str:
    """Write a policy that reuses the same blocks of every list at all its reduced steps."""
    computed: list[int] = []
    used: Span | None = None
    for step, mask in reused("cache-dit", policy):
        computed.append(int(not mask))
        if not mask:
            continue
        ends = _ends(mask, target)
        if ends is None or used not in (None, ends):
            raise InterchangeError(
                f"step {step} reuses {shown(mask)}, but cache-dit reuses at all steps the same"
                " blocks of every list: all but the first Fn (1 or more) and the last Bn"
            )
        used = ends
    first, behind = used or (1, 0)
    config = {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": behind,
        "num_inference_steps": len(computed),
        "steps_computation_mask": computed,
        "steps_computation_policy": "static",
    }
    return json.dumps({"cache_config": config})


def _lists(target: Target) -> dict[str, dict[Span, str]]:
    """Points of the denoiser's lists of blocks: list -> (first, last block) -> name."""
    found: dict[str, dict[Span, str]] = {}
    for name, point in target.points.items():
        if point.kind == "block":
            folder, _, span = name.removesuffix("#block").rpartition(".")
            first, _, last = span.partition("-")
            found.setdefault(folder, {})[int(first), int(last or first)] = name
    if not found:
        target.lacks("transformer blocks to reuse together")
    return found


def _blocks(lists: Mapping[str, Mapping[Span, str]]) -> list[Block]:
    return [
        (folder, block)
        for folder, spans in lists.items()
        for block in range(1 + max(last for _, last in spans))
    ]


def _points(lists: Mapping[str, Mapping[Span, str]], blocks: Sequence[Block]) -> tuple[str, ...]:
    """Points that together reuse what some neighbouring blocks of each list add.

    A run that is no point of its own is reused block by block: the sum is the same.
    """
    found: list[str] = []
    for folder, spans in lists.items():
        own = [block for name, block in blocks if name == folder]
        run = spans.get((own[0], own[-1])) if own else None
        found += [run] if run else [spans[block, block] for block in own]
    return tuple(found)


def _groups(target: Target) -> list[list[Block]]:
    """Blocks of the denoiser in the order in which cache-dit counts them."""
    lists = _lists(target)
    groups = GROUPS.get(target.name, [(folder,) for folder in lists])
    return [_blocks({folder: lists[folder] for folder in group}) for group in groups]


def _between(target: Target, first: int, behind: int) -> tuple[str, ...]:
    """Points that reuse all blocks of each group but the first and the last ones."""
    blocks: list[Block] = []
    for group in _groups(target):
        if first + behind > len(group):
            raise InterchangeError(
                f"Fn = {first} and Bn = {behind}, but {group[0][0]} has {len(group)} blocks"
            )
        blocks += group[first : len(group) - behind]
    if not blocks:
        raise InterchangeError(f"Fn = {first} and Bn = {behind} leave no block to reuse")
    return _points(_lists(target), blocks)


def _ends(mask: tuple[str, ...], target: Target) -> Span | None:
    """Fn and Bn of a mask; None where it is not what cache-dit reuses."""
    lists = _lists(target)
    spans = {name: (key, span) for key, found in lists.items() for span, name in found.items()}
    if not spans.keys() >= set(mask):
        return None
    taken = set()
    for folder, (start, last) in (spans[name] for name in mask):
        taken |= {(folder, block) for block in range(start, last + 1)}
    groups = _groups(target)
    for group in groups:
        if places := [place for place, block in enumerate(group) if block in taken]:
            first, behind = places[0], len(group) - 1 - places[-1]
            break
    else:
        return None
    fits = all(first + behind <= len(group) for group in groups)
    wanted = {block for group in groups for block in group[first : len(group) - behind]}
    return (first, behind) if first and fits and wanted == taken else None
