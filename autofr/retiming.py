"""Which steps of a policy another step count copies; `Policy.retime` says why."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def nearest(number: int, divisor: int) -> int:
    """The integer nearest to a fraction, halves upwards."""
    return (2 * number + divisor) // (2 * divisor)


def _stretch(keys: Sequence[int], old: int, new: int) -> list[int]:
    """Keyframes among `new` steps, as far apart as those among `old` are at the same place."""
    ends = [*keys, old]
    found = []
    for index in range(-(-len(keys) * new // old)):
        interval, rest = divmod(index * old, new)
        place = ends[interval] * new + (ends[interval + 1] - ends[interval]) * rest
        if (key := nearest(place, old)) < new:
            found.append(key)
    return found


def sources(keys: Sequence[int], old: int, new: int) -> list[int]:
    """Which of `old` steps each of `new` steps copies, keyframes from keyframes."""
    lengths = [end - key for key, end in pairwise([*keys, old])]
    reduced = [interval for interval, length in enumerate(lengths) if length > 1]
    found = []
    for index, (key, end) in enumerate(pairwise([*_stretch(keys, old, new), new])):
        interval = index * old // new
        found.append(keys[interval])
        if end - key > 1 and lengths[interval] == 1:  # nothing to copy there: the nearest that has
            interval = min(reduced, key=lambda one: abs(one - interval))
        for gap in range(1, end - key):
            like = nearest(gap * lengths[interval], end - key)
            found.append(keys[interval] + min(max(1, like), lengths[interval] - 1))
    return found


def rows(
    weights: Sequence[tuple[float, ...]], keyframes: Sequence[int], sources: Sequence[int]
) -> tuple[Any, ...]:
    """Rows of a table for the steps that copy `sources`, cut to the keyframes before.

    A keyframe has the row of the one that came after what the step before it copies.
    """
    rows: list[tuple[float, ...]] = []
    known, keys = {*keyframes}, 0
    for index, source in enumerate(sources):
        row = weights[source]
        if source in known:
            after = bisect_right(keyframes, sources[index - 1]) if index else len(keyframes)
            row = weights[keyframes[after]] if after < len(keyframes) else ()
        rows.append(row if len(row) <= keys + 1 else (*row[:keys], sum(row[keys:])))
        keys += source in known
    return tuple(rows)
