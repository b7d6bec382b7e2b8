"""The zoo: bundled models by name, and loading of anything that diffusers can load."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autofr import reading
from autofr.errors import ModelError, brief

HERE = Path(__file__).parent
WIDE = ("LDMPipeline", "PNDMPipeline", "KarrasVePipeline", "ScoreSdeVePipeline")
"""Pipelines that draw their noise in float32, whatever their network takes."""
PLAIN = ("DDIMPipeline", "DDPMPipeline", "LDMSuperResolutionPipeline")
"""Pipelines that hand their pictures to numpy as they are; it knows no bfloat16."""
DTYPES = ("float32", "float16", "bfloat16")
INDEX = "model_index.json"


INPUTS = {
    "text2img": "prompts.txt",
    "img2img": "img2img.jsonl",
    "inpaint": "inpaint.jsonl",
    "upscale": "upscale.jsonl",
}
"""Files in a model's folder with what it draws for a task when nothing is given."""


STEPS, BATCH = 50, 8
"""Sampling steps and images per call, where neither a command nor a bundled model says more."""


@dataclass(frozen=True)
class Bundled:
    """One bundled model: what it is made of and what it stands for.

    `steps`, `batch` and `call` are those of its calls, where a command gives no others.
    """

    pipeline: str
    summary: str
    steps: int
    stands_for: str
    call: Mapping[str, Any] = field(default_factory=dict)
    batch: int = BATCH

    def folder(self, name: str) -> Path:
        """Where its weights lie."""
        return HERE / name


BUNDLED = {
    "ldm4": Bundled(
        pipeline="LDMPipeline",
        summary="emoji, 64x64, latents 3x16x16, unconditional, DDIM",
        steps=50,
        stands_for="LDM-4 (CelebA-HQ)",
    ),
    "dit": Bundled(
        pipeline="DiTPipeline",
        summary="emoji by group, 64x64, latents 4x16x16, class-conditional, DDIM",
        steps=30,
        batch=4,
        stands_for="DiT-XL/2 (ImageNet)",
        call={"guidance_scale": 2.0},
    ),
    "sd": Bundled(
        pipeline="StableDiffusionPipeline",
        summary="emoji by name, 64x64, latents 4x16x16, text-conditional, DDIM",
        steps=30,
        batch=4,
        stands_for="Stable Diffusion 1.5",
        call={"guidance_scale": 3.0},
    ),
    "ldm4-sr": Bundled(
        pipeline="LDMSuperResolutionPipeline",
        summary="emoji from 16x16 to 64x64, latents 3x16x16, DDIM",
        steps=50,
        stands_for="LDM-SR (x4)",
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A pipe with the name that policies carry, and the folder with its features, if any.

    `call`, `steps` and `batch` are those of its calls where no others are given; `task` is what the
    pipe was turned to, if it was made for another.
    """

    pipe: Any
    name: str
    folder: Path | None
    call: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    steps: int = STEPS
    batch: int = BATCH

    @property
    def title(self) -> str:
        """What folders of results are called after."""
        return f"{self.name}-{self.task}" if self.task else self.name


def installed() -> dict[str, Bundled]:
    """The bundled models whose weights are in this installation."""
    return {name: model for name, model in BUNDLED.items() if _is_pipeline(model.folder(name))}


def tasks(name: str) -> list[str]:
    """The tasks for which a bundled model has inputs of its own."""
    folder = BUNDLED[name].folder(name)
    return [task for task, file in INPUTS.items() if (folder / file).is_file()]


def expected(name: str) -> dict[str, Any]:
    """The scores that a bundled model's teacher is expected to have."""
    path = BUNDLED[name].folder(name) / "expected.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load(model: str, device: str = "cpu", dtype: str = "float32") -> Loaded:
    """Load a bundled name, a local diffusers folder, or a hub id (`owner/name`).

    Raises: ModelError when there is no such model, the hub cannot be reached, the files are
        damaged, or the pipeline cannot be drawn from on this device or in this type.
    """
    import torch

    check(model, device, dtype)
    name, source, folder = _resolve(model)
    pipe = _from_pretrained(source, getattr(torch, dtype), model)
    pipe.set_progress_bar_config(disable=True)
    _check_dtype(type(pipe).__name__, dtype)
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device}: {error}") from None
    if model not in BUNDLED:
        return Loaded(pipe, name, folder)
    own = BUNDLED[model]
    return Loaded(pipe, name, folder, own.call, steps=own.steps, batch=own.batch)


def check(model: str, device: str = "cpu", dtype: str = "float32") -> None:
    """Refuse what `load` would refuse, as far as that is known without reading weights.

    Raises: ModelError when there is no such model, device or type, or they do not go together.
    """
    if dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    folder = _resolve(model)[2]
    check_device(device)
    if folder:
        _check_dtype(_class_name(folder), dtype)


def _class_name(folder: Path) -> str:
    """The pipeline's class, as its folder says it."""
    try:
        index = reading.parsed(reading.content(folder / INDEX, reading.OWN).decode("utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({_first_line(error)})") from None


def _resolve(model: str) -> tuple[str, str, Path | None]:
    if model in BUNDLED:
        folder = BUNDLED[model].folder(model)
        if not _is_pipeline(folder):
            raise ModelError(f"the bundled model {model} is missing from this installation")
        return model, str(folder), folder
    path = Path(model)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        if not _is_pipeline(path):
            raise ModelError(
                f"{path} is no diffusers pipeline folder: it has no model_index.json"
                " (write one with pipe.save_pretrained)"
            )
        return path.resolve().name, str(path), path
    if model.count("/") == 1 and not os.path.exists(path) and not model.startswith((".", "/")):
        return model, model, None
    near = difflib.get_close_matches(model.lower(), installed(), n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ModelError(
        f"no model {brief(model)}{hint} Bundled: {', '.join(installed())}. Or give a local"
        " diffusers folder (./my-pipeline, as written by pipe.save_pretrained) or a hub id"
        " (owner/name)."
    )


def _is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or does not see here.

    Raises: ModelError.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ModelError(f"--device {device}: no such device; cpu or cuda is expected") from None
    there = torch.accelerator.current_accelerator(check_available=True)
    if kind not in ("cpu", there.type if there else "cpu"):
        what = "GPU" if kind == "cuda" else "such device"
        raise ModelError(f"--device {device}: torch {torch.__version__} sees no {what} here")
    count = torch.accelerator.device_count() if kind != "cpu" else 1
    if (torch.device(device).index or 0) >= count:
        raise ModelError(f"--device {device}: torch sees {count} of these here, counted from 0")


def _check_dtype(pipeline: str, dtype: str) -> None:
    why = ""
    if dtype != "float32" and pipeline in WIDE:
        why = f"draws its noise in float32, which a {dtype} network does not take"
    elif dtype == "bfloat16" and pipeline in PLAIN:
        why = "hands bfloat16 pictures to numpy, which does not take them"
    if why:
        raise ModelError(f"--dtype {dtype}: {pipeline} of diffusers {why}; give --dtype float32")


def _from_pretrained(source: str, dtype: Any, model: str) -> Any:
    import logging

    # diffusers logs advice about accelerate and torchvision that users of this tool do not need.
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    local = Path(source).is_dir()
    if _needs_transformers(Path(source) / INDEX):
        quieten_transformers()
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, local_files_only=local)
    except Exception as error:
        if local:
            raise ModelError(f"{source}: cannot be loaded ({_first_line(error)})") from None
        raise ModelError(
            f"{model}: not found in the local cache, and the hub cannot be reached or does not"
            f" have it ({_first_line(error)}). Bundled models need no download:"
            f" {', '.join(installed())}; a local diffusers folder works too."
        ) from None


def _needs_transformers(index: Path) -> bool:
    """Whether a folder is loaded with transformers: it takes seconds to import."""
    return index.is_file() and "transformers" in index.read_text(encoding="utf-8")


def quieten_transformers() -> None:
    """Turn off what transformers logs for others: advice about torchvision, bars of its own."""
    try:
        from transformers.utils import logging as theirs
    except ImportError:  # diffusers says what is missing
        return
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
