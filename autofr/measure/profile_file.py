"""What a profile says, and its file; `profiling` measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autofr import files, reading
from autofr.errors import damaged
from autofr.measure.costs import Costs
from autofr.memory import Memory
from autofr.policy import AS_IS, Keep

FILE = "profile.json"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Similarity(_Value):
    """Similarity of a point's tensor at a step to the one `gap` steps before, mean over samples.

    `cosine[gap - 1][step]` and `relative_l1[gap - 1][step]` (sum |a - b| / sum |b|, as in the
    paper's figure); None where step < gap.
    """

    cosine: list[list[float | None]]
    relative_l1: list[list[float | None]]


class PointProfile(_Value):
    """One point: bytes kept (by all guidance branches at this batch), seconds of its module and of
    the part that reuse skips, per call of the denoiser.
    """

    name: str
    kind: str
    bytes: int
    whole_seconds: float
    skippable_seconds: float


class Profile(_Value):
    """What was measured of a pipe on a device; `autofr_profile` is the format's version."""

    autofr_profile: Literal[1] = 1
    denoiser: str
    fingerprint: str
    scheduler: str
    steps: int
    batch: int
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    key_seconds: float
    jump_seconds: float
    fixed_seconds: float
    mask_seconds: dict[str, float]
    masks: dict[str, tuple[str, ...]]
    mask_bytes: dict[str, int]
    points: list[PointProfile]
    score_bytes: int = 0
    similarity: dict[str, Similarity]

    @property
    def first(self) -> int:
        """The step at which its calls began: later than 0 where they start from a picture.

        The step after it is the first that there was one to compare with.
        """
        change = next(iter(self.similarity.values())).relative_l1[0] if self.similarity else []
        return next((step - 1 for step, value in enumerate(change) if value is not None), 0)

    @property
    def costs(self) -> Costs:
        """Seconds of the parts of a call."""
        return Costs(self.key_seconds, self.jump_seconds, self.fixed_seconds, self.mask_seconds)

    def memory(self, keep: Keep = AS_IS, limit: int | None = None) -> Memory:
        """What policies would keep, if stored so."""
        if self.device.startswith("cpu"):  # there the host is the device
            keep = keep.model_copy(update={"host": False})
        import torch  # a report reads profiles without it

        points = {point.name: point.bytes for point in self.points}
        width = getattr(torch, self.dtype).itemsize
        return Memory(points, self.score_bytes, width, keep, limit)

    def save(self, path: Path) -> None:
        """Write the JSON file, atomically."""
        files.write(path, self.model_dump_json() + "\n")


def load(path: Path) -> Profile:
    """Read what `Profile.save` wrote.

    Raises: RunFolderError when the file is damaged or of another version.
    """
    try:
        return Profile.model_validate_json(reading.content(path, reading.OWN))
    except (OSError, ValidationError):
        raise damaged(path) from None
