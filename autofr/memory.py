"""What a policy keeps between steps, in bytes: the method's stated cost (FRDiff, section 6)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autofr.errors import BudgetError
from autofr.mix import KEY, Mix, executed, mix_row
from autofr.policy import AS_IS, Keep

_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kKmMgG]i?)?[bB]\s*$")
_UNITS = {"k": 10**3, "ki": 2**10, "m": 10**6, "mi": 2**20, "g": 10**9, "gi": 2**30}


def parse_size(text: str) -> int:
    """Read `200MB`, `1.5GiB` or `4096B` as bytes.

    Raises: BudgetError saying what was expected.
    """
    match = _SIZE.match(text)
    if not match or float(match[1]) <= 0:
        raise BudgetError(f"--max-memory {text!r}: expected a size such as 200MB or 1.5GiB")
    return int(float(match[1]) * _UNITS.get((match[2] or "").lower(), 1))


def size(count: int) -> str:
    """Bytes as B, KiB or MiB."""
    if count < 2**10:
        return f"{count} B"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"


@dataclass(frozen=True)
class Memory:
    """Bytes that points keep, by name, and one keyframe's scores, for all guidance branches.

    `limit` is the most that a policy may keep on the device; `width` is the bytes of one number of
    the denoiser. Scores are kept as they are held, whatever `keep` says of the points' tensors.
    """

    points: Mapping[str, int]
    score: int
    width: int = 4
    keep: Keep = AS_IS
    limit: int | None = None

    def of(self, steps: Sequence[str], masks: Mapping[str, Sequence[str]], mix: Mix) -> int:
        """Bytes that a policy keeps on the device: its points' tensors and its scores.

        A keyframe refreshes the points of every mask that some step uses; what is stored on the
        host does not count.
        """
        rows = [mix_row(step, mix, i, len(steps)) for i, step in enumerate(steps)]
        runs = set(map(executed, steps, rows)) - {KEY}
        used = {point for name in runs & set(masks) for point in masks[name]}
        share = 0.0 if self.keep.host else min(1.0, 2 / self.width) if self.keep.dtype else 1.0
        tensors = self.tensors(used)
        older = max([1, *(len(row) - 1 for row in rows)])
        return round(share * tensors) + older * self.score

    def tensors(self, points: Iterable[str]) -> int:
        """Bytes of what points keep, as they are; a guidance branch keeps the scores alone."""
        return sum(self.points.get(point, 0) for point in points)

    def fits(self, steps: Sequence[str], masks: Mapping[str, Sequence[str]], mix: Mix) -> bool:
        """Whether a policy keeps no more than the limit."""
        return self.limit is None or self.of(steps, masks, mix) <= self.limit

    def check(self, steps: Sequence[str], masks: Mapping[str, Sequence[str]], mix: Mix) -> None:
        """Refuse a policy that keeps more than the limit.

        Raises: BudgetError saying how much it would keep.
        """
        if not self.fits(steps, masks, mix):
            assert self.limit is not None
            raise BudgetError(
                f"it would keep {size(self.of(steps, masks, mix))} between steps, more than the"
                f" {size(self.limit)} of --max-memory"
            )
