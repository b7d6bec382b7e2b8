"""Search spaces: which axes a search varies and their ranges, read from TOML files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from autofr import reading
from autofr.errors import SpaceError, brief

FamilyName = Literal["sigmoid", "hard_sigmoid", "linear", "cosine", "step", "constant"]
MixName = Literal["fit1", "fit2", FamilyName]
MaskFamily = Literal["all", "jump", "cuts", "jump+cuts", "jump+branches", "jump+frdiff", "frdiff"]
SHIPPED = ("default", "frdiff", "direct")
MAX_BYTES = 64 * 1024


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"expected [lowest, highest], got {list(span)}")
    return span


_Ordered = AfterValidator(_ordered)
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0)]
Span = Annotated[tuple[_Finite, _Finite], _Ordered]
Taus = Annotated[tuple[_Positive, _Finite], _Ordered]
_Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[_Share, _Share], _Ordered]
_Most = Annotated[int, Field(le=1000)]
Counts = Annotated[tuple[Annotated[int, Field(ge=0)], _Most], _Ordered]
Ones = Annotated[tuple[Annotated[int, Field(ge=1)], _Most], _Ordered]
Intervals = Annotated[tuple[Annotated[int, Field(ge=2)], _Most], _Ordered]
Title = Annotated[str, Field(max_length=100)]


class Axes(_Value):
    """What every space varies: how scores are mixed."""

    tau: Taus = (5.0, 60.0)
    bias: Span = (0.0, 0.8)
    mix: tuple[MixName, ...] = Field(min_length=1)


class PlannedAxes(Axes):
    """What varies around the planner."""

    steps: tuple[Annotated[float, Field(gt=0.1, le=1)], ...] = Field((1.0,), min_length=1)
    max_gap: Ones = (3, 8)
    masks: tuple[MaskFamily, ...] = Field(("all",), min_length=1)
    tilt: Span = (0.0, 0.0)
    phase: Span = (0.0, 0.0)
    agreement: Shares = (1.0, 1.0)
    first: Ones = (1, 1)
    last: Counts = (0, 0)
    rollouts: Counts = (0, 0)


class UniformAxes(Axes):
    """What the paper varies."""

    interval: Intervals = (2, 12)
    mix: tuple[FamilyName, ...] = Field(min_length=1)


class DirectAxes(Axes):
    """Which kinds of points get a bit per block."""

    groups: tuple[Literal["conv", "branch", "attn"], ...] = ("conv", "branch", "attn")
    mix: tuple[FamilyName, ...] = Field(min_length=1)


class Planned(_Value):
    """Settings of the planner are searched (`default.toml`)."""

    name: Title
    kind: Literal["planned"]
    axes: PlannedAxes


class Uniform(_Value):
    """Interval, τ and b are searched (`frdiff.toml`)."""

    name: Title
    kind: Literal["uniform"]
    axes: UniformAxes


class Direct(_Value):
    """Keyframes, mask bits, τ and b are searched (`direct.toml`)."""

    name: Title
    kind: Literal["direct"]
    axes: DirectAxes


Space = Planned | Uniform | Direct
_KINDS: dict[str, type[Space]] = {"planned": Planned, "uniform": Uniform, "direct": Direct}


def shipped_folder() -> Path:
    """Folder of the shipped spaces: in the wheel, or the checkout's."""
    inside = Path(__file__).parents[1] / "search_spaces"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "search_spaces"


def load_space(name: str) -> Space:
    """Read a shipped space by name, or a TOML file by path.

    Raises: SpaceError naming the file and the field.
    """
    path = shipped_folder() / f"{name}.toml" if name in SHIPPED else Path(name)
    try:
        fields = reading.toml(path, MAX_BYTES)
    except (FileNotFoundError, IsADirectoryError):
        raise SpaceError(
            f"no search space {brief(name)}: give a TOML file, or one of {', '.join(SHIPPED)}"
        ) from None
    except OSError as error:
        raise SpaceError(f"space {brief(name)}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SpaceError(f"{path}: not valid TOML ({error})") from None
    given = fields.get("kind")
    kind = _KINDS.get(given) if isinstance(given, str) else None
    if kind is None:
        raise SpaceError(f"{path}: kind is {brief(given)}, expected one of {', '.join(_KINDS)}")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise SpaceError(f"{path}: {reading.objections(error)}") from None


def largest_gap(space: Space) -> int:
    """How many steps after a keyframe calibration has to reach."""
    return space.axes.max_gap[1] if isinstance(space, Planned) else 1
