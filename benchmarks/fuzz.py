"""Feed every reader damaged files for a while, and count what is read badly.

    python benchmarks/fuzz.py --seconds 60

The readers, their files and the law are those of tests/test_fuzz.py: a value or one clear error,
within a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings
from protocol import write

from autofr.errors import AutofrError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_fuzz as fuzz

OPTIONS = settings(
    deadline=None,
    max_examples=500,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)


def row_of(name: str, inputs: st.SearchStrategy[bytes], seconds: float) -> dict[str, Any]:
    """Outcomes of one reader over random inputs, until the time is up."""
    found: Counter[str] = Counter()
    slowest = 0.0
    ends = time.monotonic() + seconds

    @OPTIONS
    @given(inputs)
    def feed(data: bytes) -> None:
        nonlocal slowest
        if time.monotonic() > ends:
            return
        began = time.process_time()
        try:
            read = fuzz.outcome(name, data, folder)
            found["refused" if isinstance(read, AutofrError) else "read"] += 1
        except BaseException as error:
            found["crashes"] += 1
            print(f"{name}: {type(error).__name__}: {error}\n  {data[:300]!r}", file=sys.stderr)
        slowest = max(slowest, time.process_time() - began)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        while time.monotonic() < ends:
            feed()
    return {
        "reader": name,
        "inputs": sum(found.values()),
        **{kind: found[kind] for kind in ("read", "refused", "crashes")},
        "slowest, ms of CPU": round(1000 * slowest, 1),
    }


def main() -> None:
    """Give every reader an equal share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = {name: st.binary() | fuzz.damaged(fuzz.SEEDS[name]) for name in fuzz.FILES}
    for name in ("policy", "smoothcache", "ecad", "cache-dit", "budcache"):
        inputs[name] |= fuzz.altered(fuzz.SEEDS[name][0])
    for name, seeds in fuzz.SEEDS.items():  # whatever loads late is loaded before anything counts
        with tempfile.TemporaryDirectory() as place:
            fuzz.outcome(name, seeds[0], Path(place))
    each = args.seconds / len(inputs)
    rows = [row_of(name, one, each) for name, one in inputs.items()]
    note = (
        "Every reader, fed random and damaged files: a value, or one clear error within a second."
    )
    write(
        "fuzz", fuzz.pipe(True), f"python benchmarks/fuzz.py --seconds {args.seconds:g}", rows, note
    )


if __name__ == "__main__":
    main()
