"""Draw from any pipe by seed: which prompt, label or image goes with which seed.

Everything that measures calls a pipe as `pipe(batch_size, num_inference_steps, generator)`. A
`Task` gives that form to pipelines that want prompts, labels or images.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import json
import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autofr import reading
from autofr.errors import AutofrError, ModelError, TaskError, brief
from autofr.runtime.points import Pipe, find_denoiser, name_of

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 16 * 2**20
MOST_PICTURE_BYTES = 64 * 2**20
MOST_PIXELS = 64 * 2**20
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Inputs = Sequence[Mapping[str, Any]]
"""One row of call arguments per sample: `{"prompt": "a cat"}`, `{"class_labels": 3}`, ..."""

OWN = ("num_inference_steps", "generator", "output_type", "batch_size", "return_dict")
OPTIONS = {"num_inference_steps": "--steps", "batch_size": "--batch", "generator": "--seed"}
EACH = ("prompt", "negative_prompt", "class_labels")
"""What pipelines take one of for each sample that a call draws, shared or not."""
STARTS = ("image", "mask_image", "control_image")
FROM_VIDEOS = ("VideoToVideo", "Video2Video")
FROM_IMAGES = (
    "Img2Img", "ImageToVideo", "I2V", "Inpaint", "Upscale", "Pix2Pix", "Depth2Img", "ControlNet",
)  # fmt: skip
PROMPTS = (
    "a red bicycle leaning against a white wall",
    "portrait of an old fisherman, soft light",
    "a bowl of ramen on a wooden table, top view",
    "snowy mountains at sunrise",
    "a small robot watering a plant",
    "a watercolor painting of a fox in a forest",
    "the skyline of a city at night, seen from a bridge",
    "a close-up of a bee on a sunflower",
    "an empty library with tall windows",
    "two sailing boats on a calm lake",
    "a pencil sketch of a lighthouse",
    "a slice of strawberry cake on a blue plate",
    "a grey cat asleep on a stack of books",
    "an astronaut riding a horse in the desert",
    "a market street after the rain",
    "a green vase with dried flowers, studio photo",
)


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
    """Hash of an image (or of what prints as itself)."""
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
    if "batch_size" in known:
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


def read_inputs(path: Path, root: Path | None = None) -> list[dict[str, Any]]:
    """Read a file of inputs: a prompt per line, or (`.jsonl`) a JSON object of call arguments.

    Arguments whose name says image are paths, relative to the file; in a `root` if one is given.
    Raises: TaskError naming the line.
    """
    try:
        lines = reading.content(path, MOST_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise TaskError(f"--inputs {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise TaskError(f"--inputs {path}: not a text file in UTF-8") from None
    texts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise TaskError(f"--inputs {path}: empty; expected a prompt per line")
    if path.suffix.lower() != ".jsonl":
        return [{"prompt": line} for _, line in texts]
    return [_row(path, number, line, root) for number, line in texts]


def _row(path: Path, number: int, line: str, root: Path | None) -> dict[str, Any]:
    try:
        row = _finite(reading.parsed(line))
    except ValueError as error:
        raise TaskError(f"--inputs {path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not row:
        raise TaskError(
            f"--inputs {path}, line {number}: expected an object of call arguments such as"
            ' {"prompt": "a cat"}'
        )
    where = f"--inputs {path}, line {number}"
    return {name: _value(where, path.parent, name, value, root) for name, value in row.items()}


def _finite(value: Any) -> Any:
    """A value of JSON as it is.

    Raises: ValueError for NaN and infinity, which no file of ours can say.
    """
    try:
        json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _value(where: str, folder: Path, name: str, value: Any, root: Path | None = None) -> Any:
    """The value of an argument: the picture itself, where its name says that it is one."""
    if "image" not in name or not isinstance(value, str):
        return value
    place = folder / value
    what = f"{where}: {reading.printable(name, 80)} {reading.printable(str(place), 200)}"
    if root is not None and not reading.inside(root, place):
        raise TaskError(f"{what} leads out of {root}")
    try:
        return _picture(place).convert("L" if "mask" in name else "RGB")
    except Exception as error:  # each decoder has errors of its own
        raise TaskError(f"{what} cannot be read ({reading.printable(str(error), 300)})") from None


def _picture(place: Path) -> Image:
    """Open a picture of one of the usual kinds; others may start programs (EPS).

    Raises: OSError for one that is too large, or is none; ValueError.
    """
    import PIL.Image

    packed = reading.content(place, MOST_PICTURE_BYTES)
    found = PIL.Image.open(io.BytesIO(packed), formats=PICTURES)
    if math.prod(found.size) > MOST_PIXELS:
        raise OSError(f"{found.width} x {found.height} pixels; {MOST_PIXELS} are the most")
    return found


def _argument(pair: str, text: str) -> Any:
    try:
        value = reading.parsed(text)
    except ValueError:
        return text
    try:
        return _finite(value)
    except ValueError as error:
        raise TaskError(f"--call {brief(pair)}: expected numbers of JSON ({error})") from None


def parse_call(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` pairs; values are JSON, or text where they are not.

    Arguments whose name says image are paths, relative to the working directory.
    Raises: TaskError for a pair without a name or a value, or a picture that cannot be read.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not name or not mark or not text:
            raise TaskError(f"--call {brief(pair)}: expected NAME=VALUE, such as guidance_scale=5")
        value = _argument(pair, text)
        found[name] = _value(f"--call {reading.printable(pair, 80)}", Path(), name, value)
    return found
