"""The policy: one complete, immutable JSON value that says how to sample faster."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator

from autofr import files, reading, retiming
from autofr.errors import PolicyError
from autofr.mix import (
    JUMP,
    KEY,
    MAX_WEIGHT,
    Constant,
    Finite,
    Mix,
    Positive,
    Table,
    Value,
    mix_row,
)

MAX_BYTES = 4 * 2**20
MAX_STEPS = 10_000
MAX_POINTS = 10_000
"""Of one mask."""
MAX_NAME = 200
"""Characters in the name of a point or a mask."""


def _printable(value: Any) -> Any:
    return reading.printable(value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_printable)]
"""Told and never compared by its characters: what cannot be printed is replaced."""
Name = Annotated[str, Field(max_length=MAX_NAME, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Names = Annotated[tuple[Name, ...], FailFast()]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]

Guidance = Literal["none", "batched", "split"]
"""One branch; several in one call of the denoiser; or a call for each."""


def of_guidance(point: str) -> bool:
    """Whether a point is a branch of the guidance, not a place in the denoiser."""
    return "#guidance" in point


class Model(Value):
    """Which denoiser the policy is for."""

    name: Text
    denoiser: Text
    fingerprint: Text
    weights: Text | None = None


class Sampler(Value):
    """How that denoiser is sampled.

    `num_inference_steps` is the length of `steps`; `replaces` is the teacher's step count: a call
    that asks for it gets this policy too.
    """

    scheduler: Text
    config: dict[Text, Text | Whole | Finite | bool | None]
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    replaces: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    prediction_type: Text
    guidance: Guidance = "none"
    latent_shape: Annotated[tuple[Whole, ...], FailFast()]
    dtype: Text


class Keep(Value):
    """How kept tensors are stored: in another dtype, on the host, or (by default) as they are."""

    dtype: Literal["float16", "bfloat16"] | None = None
    host: bool = False


AS_IS = Keep()


class Interval(Value):
    """A measured value with its 95 % interval."""

    value: Finite
    low: Finite
    high: Finite


class Fid(Value):
    """FID of teacher and policy on the same seeds, and their difference, in named features."""

    features: Text
    teacher: Finite
    policy: Finite
    difference: Interval

    @property
    def title(self) -> str:
        """What is measured, and in what."""
        return f"FID in {self.features}"


class TextAlignment(Value):
    """Alignment of images and prompts, teacher's and policy's on the same seeds, in named towers.

    100 max(cos, 0), mean over the samples.
    """

    towers: Text
    teacher: Finite
    policy: Finite
    difference: Interval

    @property
    def title(self) -> str:
        """What is measured, and in what."""
        return f"alignment with prompts in {self.towers}"


class Measured(Value):
    """What was measured when the policy was chosen, with the protocol.

    `fid` is None where the model has no feature extractor, `alignment` where it has no towers for
    it or the samples no prompts; `kept_bytes` is the most that was kept between two steps;
    predictions are None where they were made for another device, batch, type or call;
    `skipped_steps` are the first ones that no call ran, as it started from a picture (None where
    all ran, or an older version did not say).
    """

    speedup: Interval
    teacher_seconds: Positive
    policy_seconds: Positive
    predicted_speedup: Positive | None = None
    batch: Count
    device: Text
    dtype: Text
    threads: Count
    versions: dict[Text, Text]
    samples: Count
    seeds: Text
    fid: Fid | None = None
    alignment: TextAlignment | None = None
    trajectory_error: Interval
    psnr: Finite
    low_frequency_error: Finite
    high_frequency_error: Finite
    kept_bytes: Bytes
    predicted_bytes: Bytes | None = None
    skipped_steps: Count | None = None

    @property
    def judged(self) -> list[Fid | TextAlignment]:
        """What was measured of the images without looking at the teacher's."""
        return [one for one in (self.fid, self.alignment) if one is not None]


class Provenance(Value):
    """Where the policy comes from; `call` are the plain arguments that all its calls were given."""

    autofr: Text
    command: Text
    call: dict[Text, Text | bool | Whole | Finite] = Field(default_factory=dict)
    space: Text
    study: Text
    trials: Whole
    seconds: Finite
    date: Text


class Policy(Value):
    """Keyframes, masks and mix of every step of one sampler of one denoiser.

    `steps[i]` is "key", "jump" or the name of a mask; `masks` maps a name to the points reused.
    """

    autofr_policy: Literal[1] = 1
    model: Model
    sampler: Sampler
    masks: dict[Name, Annotated[Names, Field(max_length=MAX_POINTS)]]
    steps: Annotated[Names, Field(max_length=MAX_STEPS)]
    mix: Mix = Constant()
    keep: Keep = Keep()
    measured: Measured | None = None
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        n = self.sampler.num_inference_steps
        if len(self.steps) != n:
            raise ValueError(
                f"steps: {len(self.steps)} entries, but sampler.num_inference_steps is {n}"
            )
        if self.steps[0] != KEY:
            raise ValueError(f'steps[0]: must be "key", got "{self.steps[0]}"')
        known = {KEY, JUMP, *self.masks}
        for reserved in (KEY, JUMP):
            if reserved in self.masks:
                raise ValueError(f'masks: "{reserved}" is a reserved name')
        for i, step in enumerate(self.steps):
            if step not in known:
                some = ", ".join(sorted(known)[:8]) + (", ..." if len(known) > 8 else "")
                raise ValueError(f'steps[{i}]: no mask "{step}"; known: {some}')
        for name, points in self.masks.items():
            if not points:
                raise ValueError(f'masks["{name}"]: no points')
            if sum(map(of_guidance, points)) > 1:
                raise ValueError(f'masks["{name}"]: more than one guidance branch to compute alone')
        if isinstance(self.mix, Table):
            self._check_table(self.mix)
        self._check_guidance()
        return self

    def _check_table(self, table: Table) -> None:
        if len(table.weights) != len(self.steps):
            raise ValueError(
                f"mix.weights: {len(table.weights)} rows, but there are {len(self.steps)} steps"
            )
        keys = 0
        for i, (step, row) in enumerate(zip(self.steps, table.weights, strict=True)):
            if step == KEY:
                self._check_keyframe(i, row, keys)
                keys += 1
            elif len(row) < 1 or len(row) - 1 > keys:
                raise ValueError(
                    f"mix.weights[{i}]: {len(row)} weights, expected 1 to {keys + 1}"
                    " (reduced score, then one per keyframe so far)"
                )
            elif step == JUMP and row[0] != 0:
                raise ValueError(f"mix.weights[{i}]: a jump starts with 0, got {row[0]}")
            elif row[0] == 0 and len(row) < 2:
                raise ValueError(f"mix.weights[{i}]: 0 alone is no mix; it needs a keyframe's")

    def _check_guidance(self) -> None:
        """At steps that compute one guidance branch, weights are those of that branch and of what
        the other one added to it at keyframes: no λ(t) says them.
        """
        halved = self.halved
        for i, step in enumerate(self.steps if halved else ()):
            row = self.weights(i)
            if (
                step in halved
                and row != (1.0,)
                and (len(row) < 2 or row[0] == 0 or not isinstance(self.mix, Table))
            ):
                raise ValueError(
                    f'steps[{i}]: "{step}" reuses a guidance branch: its mix is a constant 1, or a'
                    " row of a table with a weight other than 0 and at least one more"
                )

    @staticmethod
    def _check_keyframe(i: int, row: tuple[float, ...], before: int) -> None:
        if row and not before:
            raise ValueError(f"mix.weights[{i}]: the row of a keyframe with none before is empty")
        if row and (not 2 <= len(row) <= before + 1 or row[0] == 0):
            raise ValueError(
                f"mix.weights[{i}]: the row of a keyframe is empty, or a weight other than 0 and"
                f" 1 to {before} more, one per keyframe before"
            )

    @property
    def keyframes(self) -> tuple[int, ...]:
        """Indices of the fully computed steps."""
        return tuple(i for i, step in enumerate(self.steps) if step == KEY)

    @property
    def halved(self) -> frozenset[str]:
        """Masks that compute one guidance branch."""
        return frozenset(name for name, mask in self.masks.items() if any(map(of_guidance, mask)))

    def weights(self, step: int) -> tuple[float, ...]:
        """Mix of a step; see `mix_row`."""
        return mix_row(self.steps[step], self.mix, step, len(self.steps))

    @property
    def digest(self) -> str:
        """Hash of what the policy does (not of its name, measurements or provenance)."""
        used = {name: sorted(self.masks[name]) for name in set(self.steps) & set(self.masks)}
        behaviour = {
            "fingerprint": self.model.fingerprint,
            "sampler": self.sampler.model_dump(mode="json"),
            "steps": [sorted(used[s]) if s in used else s for s in self.steps],
            "weights": [[round(w, 6) for w in self.weights(i)] for i in range(len(self.steps))],
        }
        if self.keep != Keep():
            behaviour["keep"] = self.keep.model_dump(mode="json")
        return hashlib.sha256(json.dumps(behaviour, sort_keys=True).encode()).hexdigest()[:16]

    def retime(self, steps: int) -> Policy:
        """Return the same policy for calls of another step count; it is not measured there.

        Keyframes are as many steps apart as they were at the same place of the trajectory (r =
        step / steps, as in λ(t)): their share stays, to within one step, and with it the speed-up.
        Each interval between keyframes copies the old one in which its keyframe falls, step for
        step by the place in it, with the fitted weights: these extrapolate over the distance of
        keyframes, so that they do not depend on how long a step is. A keyframe that mixes makes up
        for what came before it, and so follows the copy of that. A weight of a keyframe that is
        not there yet goes to the oldest that is. λ(t) is a function of r and stays as it is.
        A call for `steps` gets a policy that is longer or shorter than that by the same factor as
        now. Retiming to the present count changes nothing but `measured` and `provenance`.
        Raises: PolicyError for a step count that no policy can have, or where weights that become
            one are too large a one.
        """
        count = retiming.nearest(steps * len(self.steps), self.sampler.replaces)
        if not 1 <= steps <= MAX_STEPS or not 1 <= count <= MAX_STEPS:
            raise PolicyError(
                f"cannot retime to {steps} steps: expected 1 to {MAX_STEPS}, for the call and for"
                f" the policy, which takes {len(self.steps)} for a call of {self.sampler.replaces}"
            )
        sources = retiming.sources(self.keyframes, len(self.steps), count)
        changes: dict[str, Any] = {
            "sampler": Sampler(
                **dict(self.sampler) | {"num_inference_steps": count, "replaces": steps}
            ),
            "steps": tuple(self.steps[source] for source in sources),
            "measured": None,
            "provenance": None,
        }
        if isinstance(self.mix, Table):
            rows = retiming.rows(self.mix.weights, self.keyframes, sources)
            if any(abs(weight) > MAX_WEIGHT for row in rows for weight in row):
                raise PolicyError(
                    f"cannot retime to {steps} steps: weights of keyframes that would fall together"
                    f" add up to more than {MAX_WEIGHT:g}"
                )
            changes["mix"] = Table(weights=rows)
        return Policy(**dict(self) | changes)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, atomically.

        Raises: PolicyError when it is too large to be read again.
        """
        content = (self.model_dump_json(indent=1) + "\n").encode()
        if len(content) > MAX_BYTES:
            raise PolicyError(f"a policy of {len(content)} bytes; {MAX_BYTES} are the most")
        files.write(Path(path), content)
