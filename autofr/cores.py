"""Which CPU cores this process may use."""

from __future__ import annotations

import os


def usable() -> list[int]:
    """Their numbers, in order."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]
