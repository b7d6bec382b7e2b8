"""SmoothCache and ECAD: computed or reused, for each sub-layer of each transformer block.

There every sub-layer keeps what it last computed. Here all tensors are of the last fully computed
step, so that a decision for each sub-layer has to be turned into keyframes and masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autofr.errors import InterchangeError, brief
from autofr.interchange.schedule import Plan, Target, bits, check_count, shown
from autofr.mix import KEY

ORIGINAL = {"attn1": "attn", "ff": "mlp"}
"""Names of sub-layers in diffusers -> in the original DiT code, which SmoothCache serves too."""

PARTS = {
    "attn1": "attn1", "attn2": "attn2", "ff": "ff",
    "full_attn": "attn", "full_ff": "ff", "full_ff_context": "ff_context",
    "single_attn": "proj_out", "single_proj_mlp": "proj_out", "single_proj_out": "proj_out",
}  # fmt: skip
"""Components of ECAD (PixArt, FLUX) -> sub-layers; of a single block, autofr keeps `proj_out`."""

INNER = ("single_attn", "single_proj_mlp")  # what single_proj_out is computed from
SHAPE = '{"cache_schedule": {"schedule": {step: {block: {component: true or false}}}}}'


def read_smoothcache(data: Any, target: Target) -> Plan:
    """Read a list of 0 and 1 for each kind of sub-layer, or for one of a numbered block."""
    if not isinstance(data, dict) or not data:
        raise InterchangeError(f'expected {{"attn1": [1, 0, ...], ...}}, got {brief(data)}')
    lists = {key: bits(value, target.steps, key) for key, value in data.items()}
    computed: dict[str, Sequence[bool]] = {}
    meant: dict[str, None] = {}
    for module, name in _sub_layers(target).items():
        place = re.fullmatch(r".+\.(\d+)\.(?:\w+\.)*([A-Za-z_]\w*)", module)
        if place is None:  # not inside a numbered block
            continue
        block, part = place.groups()
        parts = dict.fromkeys([part, ORIGINAL.get(part, part)])
        keys = [*(f"{part}-{block}" for part in parts), *parts]
        meant |= dict.fromkeys(keys)
        if found := [key for key in keys if key in lists]:
            computed[name] = lists[found[0]]
    if unknown := [key for key in lists if key not in meant]:
        known = [key for key in meant if "-" not in key]
        if not known:
            target.lacks("sub-layers of transformer blocks")
        raise InterchangeError(
            f"this {target.name} has no component {unknown[0]!r}; it has {', '.join(known)}, alone"
            f" or with the number of a block ({known[0]}-0)"
        )
    return _plan(computed, target)


def read_ecad(data: Any, target: Target) -> Plan:
    """Read a map of step, block and component, as ECAD's schedule files have it."""
    schedule = data.get("cache_schedule") if isinstance(data, dict) else None
    table = schedule.get("schedule") if isinstance(schedule, dict) else None
    if not isinstance(table, dict) or not all(re.fullmatch(r"[0-9]{1,5}", key) for key in table):
        raise InterchangeError(f"expected {SHAPE}, got {brief(data)}")
    rows = {int(step): row for step, row in table.items()}
    check_count(len(rows), target.steps, "schedule")
    modules = _sub_layers(target)
    computed: dict[str, list[bool]] = {}
    for step in range(target.steps):
        for module, now in _said(step, rows.get(step), target):
            if module not in modules:
                target.lacks(f"sub-layer {module}, which step {step} speaks of")
            computed.setdefault(modules[module], [True] * target.steps)[step] = now
    if silent := [module for module, name in modules.items() if name not in computed]:
        raise InterchangeError(
            f"it says nothing of {shown(silent)}: it is for another model than this {target.name}"
        )
    return _plan(computed, target)


def _sub_layers(target: Target) -> dict[str, str]:
    """Sub-layers of transformer blocks: path of the module -> name of the point."""
    kinds = ("attn", "cross", "ff")
    return {point.keep_at: name for name, point in target.points.items() if point.kind in kinds}


def _said(step: int, row: Any, target: Target) -> Iterator[tuple[str, bool]]:
    """Modules that a step of an ECAD schedule speaks of, and whether they are computed."""
    if not isinstance(row, dict) or not all(isinstance(parts, dict) for parts in row.values()):
        raise InterchangeError(f"step {step}: expected {SHAPE}")
    for block, parts in row.items():
        single = block.startswith("single_")
        folder = "single_transformer_blocks" if single else "transformer_blocks"
        for part, now in parts.items():
            if part not in PARTS or not isinstance(now, bool):
                raise InterchangeError(
                    f"step {step}, block {block}: {part} = {brief(now)}; expected true or false for"
                    f" {', '.join(PARTS)}"
                )
            if part not in INNER:
                yield f"{folder}.{block.removeprefix('single_')}.{PARTS[part]}", now
            elif step and not now and parts.get("single_proj_out") and not target.nearest:
                raise InterchangeError(
                    f"step {step}, block {block}: {part} is reused to compute single_proj_out, but"
                    " autofr keeps of such a block what single_proj_out gives; nearest=True"
                    " computes both"
                )


# -- keyframes and masks --------------------------------------------------------------------------


def _plan(computed: Mapping[str, Sequence[bool]], target: Target) -> Plan:
    """Turn a decision for each point and step into keyframes and masks."""
    names, everything = [*computed], (1 << len(computed)) - 1
    rows = [
        sum(1 << bit for bit, name in enumerate(names) if computed[name][step])
        for step in range(target.steps)
    ]
    rows[0] = everything  # both tools compute what they have not kept yet
    if not target.nearest:
        _check_exact(rows, names, everything)
    masks = [
        tuple(name for bit, name in enumerate(names) if row >> bit & 1)
        for row in freshest(rows, everything)
    ]
    labels = _labels(masks, {name: target.points[name].keep_at for name in names})
    plan = [labels[mask] if mask else KEY for mask in masks]
    return plan, {label: mask for mask, label in labels.items()}


def _check_exact(rows: Sequence[int], names: Sequence[str], everything: int) -> None:
    """Refuse a schedule that reuses what was not computed at the last full step.

    `rows`: what each step computes, a bit for each name.
    Raises: InterchangeError naming step and point.
    """
    key, since = 0, 0  # the last full step, and what has been computed after it
    for step, row in enumerate(rows):
        if row == everything:
            key, since = step, 0
            continue
        if stale := since & ~row:
            bit = (stale & -stale).bit_length() - 1
            made = max(i for i in range(step) if rows[i] >> bit & 1)
            raise InterchangeError(
                f"step {step} reuses {names[bit]} as computed at step {made}, but autofr keeps"
                f" tensors at fully computed steps only, and step {key} is the last of these;"
                " nearest=True (--nearest) reads the cheapest policy that reuses nothing older"
            )
        since |= row


def freshest(rows: Sequence[int], everything: int) -> list[int]:
    """What each step reuses (a bit for each name; 0 is a keyframe) if nothing is older than asked.

    After keyframe k a step may reuse what the schedule has not computed since k: there it is at
    least as old. The keyframes with the fewest computations in all are a shortest path. Those of a
    schedule that can be expressed are its full steps: its computations are needed in any case.
    """
    steps = len(rows)
    cost, follows = [0] * (steps + 1), [steps] * (steps + 1)
    for key in reversed(range(steps)):
        spent, since = everything.bit_count(), 0
        options = []
        for end in range(key + 1, steps + 1):
            options.append((spent + cost[end], -end))
            since |= rows[end] if end < steps else everything
            if since == everything:  # what reuses nothing is a keyframe
                break
            spent += since.bit_count()
        cost[key], last = min(options)
        follows[key] = -last
    reused: list[int] = []
    while len(reused) < steps:
        key, since = len(reused), 0
        reused.append(0)
        for row in rows[key + 1 : follows[key]]:
            since |= row
            reused.append(everything & ~since)
    return reused


def _labels(masks: Sequence[tuple[str, ...]], modules: Mapping[str, str]) -> dict[Any, str]:
    """Name masks by their parts (`attn1+ff`) if they reuse these in every block, else by number."""
    parts = {name: module.rpartition(".")[2] for name, module in modules.items()}
    found: dict[Any, str] = {}
    for mask in dict.fromkeys(filter(None, masks)):
        own = dict.fromkeys(parts[name] for name in mask)
        whole = len(mask) == sum(part in own for part in parts.values())
        found[mask] = "+".join(own) if whole else f"mask{len(found) + 1}"
    return found
