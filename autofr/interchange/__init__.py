"""Schedules of other tools, read as policies of a pipe and written from them.

The formats and their meaning were read in the tools' own repositories: horseee/DeepCache,
Roblox/SmoothCache, AniAggarwal/ecad, vipshop/cache-dit and Westlake-AGI-Lab/BudCache.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autofr import reading
from autofr.errors import InterchangeError
from autofr.interchange import blocks, components, deepcache
from autofr.interchange.schedule import Plan, Target
from autofr.mix import Constant
from autofr.policy import MAX_BYTES, MAX_STEPS, Policy
from autofr.runtime.families import discover
from autofr.runtime.points import Pipe, find_denoiser
from autofr.runtime.sampler import check, compose

READERS: dict[str, Callable[[Any, Target], Plan]] = {
    "deepcache": deepcache.read,
    "smoothcache": components.read_smoothcache,
    "ecad": components.read_ecad,
    "cache-dit": blocks.read_cache_dit,
    "budcache": blocks.read_budcache,
}
"""Kinds of schedules that can be read."""

WRITERS: dict[str, Callable[[Policy, Target], str]] = {
    "deepcache": deepcache.write,
    "cache-dit": blocks.write_cache_dit,
}
"""Kinds of schedules that can be written."""

PICKLE = (
    "a pickle, which can run code when it is loaded, is not read; write what it says as JSON:"
    " python -c \"import json, torch; print(json.dumps(torch.load('FILE.pt', weights_only=True)"
    "['cache_step']))\""
)


def read(
    kind: str,
    source: str | Path,
    pipe: Pipe,
    name: str,
    steps: int,
    latent_shape: tuple[int, ...],
    *,
    nearest: bool = False,
) -> Policy:
    """Read a schedule of another tool as a policy for this pipe.

    Args: kind, one of `READERS`; source, the path of a JSON file, or the text itself; name, that
        of the model; steps, for which the schedule was made; nearest, see below.
    - deepcache: `{"cache_interval": 3, "cache_branch_id": 0}`, or `3,0`.
    - smoothcache: `{"attn1": [1, 0, ...], "ff-3": [...]}`, 1 is computed; a key with a block's
      number goes before one without. `attn` and `mlp`, the names in the original DiT code, are
      `attn1` and `ff` here.
    - ecad: `cache_schedule` with a map of step, block and component; true is computed.
    - cache-dit: a static `steps_computation_mask` (1 is computed), in its configuration or alone
      (then Fn = 1, Bn = 0); what the blocks between Fn and Bn add together is reused.
    - budcache: cached steps, `[3, 5]` or `{"cache_step": [3, 5]}`; what all blocks add is reused.

    Components of SmoothCache and ECAD are refreshed one by one; here tensors are kept at fully
    computed steps only. A schedule that reuses others is refused, or with `nearest` read as the
    policy that computes the fewest components of all in which nothing is older than asked.
    Raises: InterchangeError saying what was expected, or at which step what cannot be expressed.
    """
    if kind not in READERS:
        raise InterchangeError(f"cannot read {kind!r}; known are {', '.join(READERS)}")
    if not 1 <= steps <= MAX_STEPS:
        raise InterchangeError(f"{steps} steps: expected 1 to {MAX_STEPS}")
    denoiser = find_denoiser(pipe)
    target = Target(denoiser, discover(denoiser), steps, nearest)
    try:
        plan, masks = READERS[kind](_parsed(source), target)
    except InterchangeError as error:
        place = f"{source} ({kind})" if isinstance(source, Path) else f"{kind} schedule"
        raise InterchangeError(f"{place}: {reading.printable(str(error), 500)}") from None
    return compose(pipe, name, plan, masks, Constant(), replaces=steps, latent_shape=latent_shape)


def write(kind: str, policy: Policy, pipe: Pipe) -> str:
    """Write a policy as a schedule of another tool, in JSON.

    The pipe says how many blocks there are, which the policy does not know.
    - deepcache: interval and branch.
    - cache-dit: a configuration with a static mask, as its `load_configs` reads it.

    Raises: InterchangeError naming the first step that the tool cannot express, and why;
        PolicyError when the policy is for another pipe.
    """
    if kind not in WRITERS:
        raise InterchangeError(f"cannot write {kind!r}; known are {', '.join(WRITERS)}")
    points = check(pipe, policy)
    return WRITERS[kind](policy, Target(find_denoiser(pipe), points, len(policy.steps)))


def _parsed(source: str | Path) -> Any:
    """Numbers as they are typed (`3,0`, `1110100`) as text, anything else as JSON says it."""
    text = _text(source) if isinstance(source, Path) else source
    if re.fullmatch(r"[0-9\s,]+", text):
        return text
    try:
        return reading.parsed(text)
    except ValueError as error:
        raise InterchangeError(f"not valid JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        data = reading.content(path, MAX_BYTES)
    except OSError as error:
        raise InterchangeError(f"cannot be read ({error.strerror})") from None
    if path.suffix in (".pt", ".pth", ".pkl") or data.startswith((b"PK\x03\x04", b"\x80")):
        raise InterchangeError(PICKLE)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InterchangeError("not a text file in UTF-8") from None
