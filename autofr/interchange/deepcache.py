"""DeepCache: one cut of the U-Net at a fixed interval, as two numbers."""

from __future__ import annotations

import json
from typing import Any

from autofr.errors import InterchangeError, brief
from autofr.interchange.schedule import Plan, Target, alternating, numbers, reused, shown
from autofr.policy import Policy

SHAPE = 'two whole numbers, {"cache_interval": 3, "cache_branch_id": 0} or 3,0'


def read(data: Any, target: Target) -> Plan:
    """Read interval and branch; `skip_mode` is "uniform", the only one that DeepCache has."""
    if isinstance(data, dict):
        if data.get("skip_mode", "uniform") != "uniform":
            raise InterchangeError(f'skip_mode {brief(data["skip_mode"])}: only "uniform" is known')
        data = [data.get("cache_interval"), data.get("cache_branch_id", 0)]
    found = numbers(data, SHAPE)
    if len(found) != 2 or found[0] < 1:
        raise InterchangeError(f"expected {SHAPE}, got {brief(data)}")
    interval, branch = found
    known = branches(target)
    if branch not in known:
        ids = ", ".join(map(str, known))
        raise InterchangeError(f"this {target.name} has no branch {branch}; it has {ids}")
    computed = [step % interval == 0 for step in range(target.steps)]
    return alternating(computed, f"branch{branch}", (known[branch],))


def write(policy: Policy, target: Target) -> str:
    """Write a policy that reuses one cut between evenly spaced keyframes."""
    ids = {point: branch for branch, point in reversed(branches(target).items())}
    interval = [*policy.keyframes, len(policy.steps)][1]
    used: int | None = None
    for step, mask in reused("DeepCache", policy):
        if bool(mask) == (step % interval == 0):
            now = "reuses" if mask else "computes everything"
            raise InterchangeError(
                f"step {step} {now}, but DeepCache computes everything at steps 0, {interval},"
                f" {2 * interval} and so on, and at no other"
            )
        if not mask:
            continue
        branch = ids.get(mask[0]) if len(mask) == 1 else None
        if branch is None:
            raise InterchangeError(
                f"step {step} reuses {shown(mask)}, which no branch of DeepCache does"
            )
        if used not in (None, branch):
            raise InterchangeError(
                f"step {step} reuses branch {branch}, the steps before it branch {used}, but"
                " DeepCache has one for all steps"
            )
        used = branch
    return json.dumps({"cache_interval": interval, "cache_branch_id": used or 0})


def branches(target: Target) -> dict[int, str]:
    """Points by DeepCache's branch id.

    Branch 3 B + l computes at every step the last l + 1 layers of the B-th up block from the end,
    everything behind them, and the down layers whose skip connections these get: our cut before
    those layers. (It counts three layers per block, whatever the block has.)
    Raises: InterchangeError when the denoiser has no cuts.
    """
    found = {}
    ups = [*enumerate(getattr(target.denoiser, "up_blocks", ()))]
    for back, (block, up) in enumerate(reversed(ups)):
        layers = len(getattr(up, "resnets", ()))
        for last in range(3):
            if ahead := max(0, layers - 1 - last):  # layers of the block that are not computed
                module = f"up_blocks.{block}.resnets.{ahead - 1}"
            else:
                module = f"up_blocks.{block - 1}" if block else "mid_block"
            if f"{module}#stage" in target.points:
                found[3 * back + last] = f"{module}#stage"
    if not found:
        target.lacks("cuts")
    return found
