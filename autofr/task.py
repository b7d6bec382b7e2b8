"""Draw from any pipe by seed: which prompt, label or image goes with which seed.

Everything that measures calls a pipe as `pipe(batch_size, num_inference_steps, generator)`. A
`Task` gives that form to pipelines that want prompts, labels or images.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Container, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from autofr.errors import AutofrError, ModelError, TaskError, brief
from autofr.inputs import PROMPTS
from autofr.runtime.points import Pipe, find_denoiser, name_of

Inputs = Sequence[Mapping[str, Any]]
"""One row of call arguments per sample: `{"prompt": "a cat"}`, `{"class_labels": 3}`, ..."""

OWN = ("num_inference_steps", "generator", "output_type", "batch_size", "return_dict")
OPTIONS = {"num_inference_steps": "--steps", "batch_size": "--batch", "generator": "--seed"}
EACH = ("prompt", "negative_prompt", "class_labels")
"""What pipelines take one of for each sample that a call draws, shared or not."""
STARTS = ("image", "mask_image", "control_image")
FROM_VIDEOS = ("VideoToVideo", "Video2Video")
FROM_IMAGES = (
    "Img2Img", "ImageToVideo", "I2V", "Inpaint", "Upscale", "SuperResolution", "Pix2Pix",
    "Depth2Img", "ControlNet",
)  # fmt: skip


class Task:
    """A pipe that is called like an unconditional one: seed s draws row s of `inputs`, in turn.

    Attributes (`unet`, `scheduler`, ...) are those of the pipe; setting one sets it there.
    Args: pipe, any diffusers pipeline; inputs, arguments that differ from sample to sample; call,
        arguments that all calls share (`{"guidance_scale": 5.0}`).
    Raises: TaskError when the pipe's call knows no such argument, or `inputs` is empty; also when
        the first call is refused for what an argument says.
    """

    def __init__(self, pipe: Pipe, inputs: Inputs, call: Mapping[str, Any] | None = None) -> None:
        known = inspect.signature(pipe.__call__).parameters
        given = {name for row in inputs for name in row} | set(call or {})
        unknown = sorted(name for name in given if name not in known or name in OWN)
        if unknown:
            usable = [name for name in known if name not in OWN]
            own = [f"{OPTIONS[name]} sets {name}" for name in unknown if name in OPTIONS]
            meant = [name + _meant(name, usable) for name in unknown]
            takes = f"its call takes {', '.join(usable)}"
            raise TaskError(
                f"{name_of(pipe)} cannot be given {', '.join(meant)}; {', '.join([*own, takes])}"
            )
        if not inputs or any(set(row) != set(inputs[0]) for row in inputs):
            raise TaskError("inputs: expected at least one row, and the same arguments in all rows")
        if _takes_stacks(pipe):
            _check_sizes(pipe, [row["image"] for row in inputs if "image" in row])
        vars(self).update(
            _pipe=pipe,
            _inputs=[dict(row) for row in inputs],
            _call=dict(call or {}),
            _known=frozenset(known),
            _tried=False,
        )

    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        seeds = [g.initial_seed() if g is not None else i for i, g in enumerate(generators)]
        rows = [self.row(seed) for seed in seeds]
        each = {*self._inputs[0], *EACH} & rows[0].keys()
        given: dict[str, Any] = {name: [row[name] for row in rows] for name in each}
        if generator is not None:
            given["generator"] = generators
        if batch_size == 1:  # some pipelines take no lists
            given = {name: values[0] for name, values in given.items()}
        given |= {name: value for name, value in self._call.items() if name not in each}
        if "class_labels" in given:
            given["class_labels"] = np.ravel(given["class_labels"]).tolist()
        if _takes_stacks(self._pipe) and "image" in rows[0]:
            given["image"] = _stacked([row["image"] for row in rows])
        own = {
            "num_inference_steps": num_inference_steps,
            "output_type": output_type,
            "batch_size": batch_size,
        }
        given |= {name: value for name, value in own.items() if name in self._known}
        images = _images(self._pipe(**given) if self._tried else self._first(given))
        vars(self)["_tried"] = True
        return SimpleNamespace(images=images)

    def _first(self, given: Mapping[str, Any]) -> Any:
        """Call the pipe; what it refuses at its first call was asked for."""
        try:
            return self._pipe(**given)
        except AutofrError:
            raise
        except (TypeError, ValueError) as error:
            raise TaskError(f"{name_of(self._pipe)} cannot be called so: {error}") from error

    def __getattr__(self, name: str) -> Any:
        if "_pipe" not in vars(self) or name.startswith("__"):  # a copy in the making asks for some
            raise AttributeError(name)
        return getattr(self._pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._pipe, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._pipe, name)

    @property
    def rows(self) -> int:
        """How many inputs there are; 0 where noise alone tells samples apart."""
        return len(self._inputs) if self._inputs[0] else 0

    @property
    def call(self) -> dict[str, Any]:
        """The arguments that all calls share."""
        return dict(self._call)

    def row(self, seed: int) -> dict[str, Any]:
        """The arguments that a seed is drawn with, shared ones among them."""
        return self._inputs[seed % len(self._inputs)] | self._call

    @property
    def digest(self) -> str:
        """Hash of inputs and shared arguments: runs with other ones are other runs."""
        text = json.dumps([self._inputs, self._call], sort_keys=True, default=_digest)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _meant(name: str, usable: Sequence[str]) -> str:
    """Which argument an unknown one may have been meant for."""
    near = [] if name in OWN else difflib.get_close_matches(name, usable, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def plain(pipe: Pipe) -> dict[str, Any]:
    """Arguments that all calls of a pipe share, without pictures and the like."""
    given = getattr(pipe, "call", {})
    return {name: value for name, value in given.items() if isinstance(value, str | int | float)}


def _digest(value: Any) -> str:
    """Hash of an image or a tensor (or of what prints as itself)."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _images(result: Any) -> np.ndarray:
    """What a pipe drew as (n, h, w, 3) in [0, 1]; the frames of a video stand below one another.

    Raises: TaskError for results that are no pictures (sound).
    """
    for name in ("images", "frames"):
        found = getattr(result, name, None)
        if found is not None:
            break
    else:
        raise TaskError(f"autofr cannot compare what this pipe draws ({type(result).__name__})")
    if isinstance(found, torch.Tensor):
        found = found.float().cpu().numpy()
    pictures = np.asarray(found)
    if pictures.ndim == 5:  # (n, frames, h, w, 3)
        pictures = pictures.reshape(len(pictures), -1, *pictures.shape[3:])
    if pictures.ndim != 4:
        raise TaskError(f"autofr cannot compare results of shape {pictures.shape}")
    return pictures[..., :3] if pictures.shape[-1] >= 3 else np.repeat(pictures, 3, axis=-1)


def as_task(
    pipe: Pipe, inputs: Inputs | None = None, call: Mapping[str, Any] | None = None
) -> Pipe:
    """Return a pipe that can be called by seeds: the pipe itself if it can, else a `Task`.

    Without inputs, prompts of our own or the class labels are drawn from: those that the pipe
    names, or all. An image to start from may stand in `call`; every sample is then given it.
    Raises: TaskError when the pipe needs more than that (an image to start from).
    """
    known = inspect.signature(pipe.__call__).parameters
    call = dict(call or {})
    if "batch_size" in known and not _takes_stacks(pipe):
        if inputs:
            raise TaskError(f"{name_of(pipe)} draws from noise alone: it takes no inputs")
        return Task(pipe, [{}], call) if call else pipe
    starts = {name: call.pop(name) for name in STARTS if name in call}
    rows = inputs or _drawn(pipe, known) or ([{}] if starts else [])
    found = Task(pipe, [{**row, **starts} for row in rows], call) if rows else None
    _check_starts(pipe, known, {*starts, *(inputs[0] if inputs else ())})
    if found is None:
        raise TaskError(
            f"autofr does not know what {name_of(pipe)} draws from: give --inputs, a file with a"
            f" JSON object per line; its call takes {', '.join(known)}"
        )
    return found


def _check_starts(pipe: Pipe, known: Mapping[str, Any], given: Container[str]) -> None:
    """Refuse a pipe whose images to start from are not all given.

    Raises: TaskError saying how they are.
    """
    name = name_of(pipe)
    if "video" in known and "video" not in given and any(word in name for word in FROM_VIDEOS):
        raise TaskError(
            f"{name} starts from a video, which the command line does not read: search from"
            " Python, with autofr.Task(pipe, [{'video': frames}])"
        )
    missing = [
        start
        for start, parameter in known.items()
        if start in STARTS and start not in given and _needed(pipe, parameter)
    ]
    if missing:
        row = {"prompt": "a cat"} if "prompt" in known else {}
        row |= {start: "cat.png" for start in missing}
        raise TaskError(
            f"{name} starts from {' and '.join(missing)}: give --inputs, a file with a JSON object"
            f" per line such as {json.dumps(row)}"
        )


def with_starts(pipe: Pipe, seeds: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, h, w) in [0, 1] of seeds, each after the picture it starts from, if any.

    The picture is as large as fits, with white below it or beside it: of a video, whose frames
    stand below one another, it is beside the first.
    """
    rows = [pipe.row(seed) for seed in seeds] if isinstance(pipe, Task) else [{}]
    if any("image" not in row for row in rows):
        return images
    starts = [_fitted(_tensor(row["image"]) / 2 + 0.5, *images.shape[-2:]) for row in rows]
    return torch.stack([torch.stack(starts), images.float().cpu()], 1).flatten(0, 1)


def _fitted(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A picture (3, h, w) in [0, 1] as large as fits into (3, height, width), the rest white."""
    scale = min(height / picture.shape[1], width / picture.shape[2])
    high, wide = (max(1, round(side * scale)) for side in picture.shape[1:])
    found = F.interpolate(picture[None], (high, wide))[0]
    return F.pad(found, (0, width - wide, 0, height - high), value=1.0)


# -- super resolution -----------------------------------------------------------------------------


def _takes_stacks(pipe: Pipe) -> bool:
    """Whether a call takes its pictures as one tensor, and a single one in no other form."""
    return "LDMSuperResolution" in name_of(pipe)


def _check_sizes(pipe: Pipe, pictures: Sequence[Any]) -> None:
    """Refuse pictures that the denoiser cannot be given, or not together.

    Raises: TaskError saying which sizes it can.
    """
    sizes = sorted({tuple(_tensor(picture).shape[1:]) for picture in pictures})
    levels = len(find_denoiser(pipe).config.get("block_out_channels", [1]))
    sides = 2 ** (levels - 1)
    if len(sizes) > 1 or any(side % sides for size in sizes for side in size):
        said = ", ".join(f"{width}x{height}" for height, width in sizes[:4])
        raise TaskError(
            f"{name_of(pipe)} cannot be given pictures of {said} pixels: expected one size, its"
            f" sides multiples of {sides}; resize them"
        )


def _tensor(picture: Any) -> torch.Tensor:
    """A picture as (3, h, w) in [-1, 1]; a tensor is one.

    Raises: TaskError for what is no picture.
    """
    if isinstance(picture, torch.Tensor):
        if picture.ndim != 3:
            raise TaskError(f"image: expected a tensor (3, h, w), received {(*picture.shape,)}")
        return picture
    if not hasattr(picture, "convert"):
        raise TaskError(f"image: expected a picture, received {brief(picture)}")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


def _stacked(pictures: Sequence[Any]) -> torch.Tensor:
    """Pictures of one size as one tensor (n, 3, h, w) in [-1, 1]."""
    return torch.stack([_tensor(picture) for picture in pictures])


def _drawn(pipe: Pipe, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is drawn when nothing is given: all class labels, or prompts of our own."""
    if "class_labels" in known:
        return [{"class_labels": label} for label in _labels(pipe)]
    return [{"prompt": prompt} for prompt in PROMPTS] if "prompt" in known else []


def _needed(pipe: Pipe, parameter: inspect.Parameter) -> bool:
    """Whether a call without this image would fail; signatures alone do not always say it."""
    required = parameter.default is inspect.Parameter.empty
    return required or any(word in name_of(pipe) for word in FROM_IMAGES)


def _labels(pipe: Pipe) -> Sequence[int]:
    """The classes that the pipe names, or as many as the denoiser has."""
    named = getattr(pipe, "labels", None)
    if named:
        return sorted({*named.values()})
    config = find_denoiser(pipe).config
    for name in ("num_embeds_ada_norm", "num_class_embeds"):
        if config.get(name):
            return range(int(config[name]))
    raise ModelError("the denoiser's configuration does not say how many classes it has")
