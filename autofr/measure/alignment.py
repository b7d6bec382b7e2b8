"""Alignment of images with their prompts in bundled towers: the stand-in for CLIP score."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autofr.errors import ModelError
from autofr.measure.quality import Encoder, Features, channels_of, load_features
from autofr.runtime.points import Pipe
from autofr.task import Task

WEIGHTS = "alignment.safetensors"
PROJECTION, IMAGE = "text_projection.weight", "image."


class Alignment:
    """Scores images against prompts: 100 max(cos(image, text), 0).

    Hessel et al. 2021, "CLIPScore" (section 3), with torchmetrics' factor. The image tower is an
    `Encoder`; a text's embedding is the pooled output of the pipe's own text encoder, projected.
    Both run on the CPU in float32: what a score says does not depend on where the pipe runs.
    Args: tokenizer and text_encoder, those of the pipe; projection, shape (image tower's channels,
        text encoder's width); name, what to call the towers in reports.
    Raises: ModelError when the projection does not fit, or the text encoder pools nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        image: Encoder,
        projection: torch.Tensor,
        name: str,
    ) -> None:
        width = text_encoder.config.hidden_size
        if tuple(projection.shape) != (image.num_features, width):
            raise ModelError(
                f"a text projection of shape {tuple(projection.shape)}, expected"
                f" ({image.num_features}, {width}): channels of the image tower, width of the"
                " pipe's text encoder"
            )
        self.name = name
        self._tokenizer = tokenizer
        self._text = copy.deepcopy(text_encoder).to("cpu", torch.float32).eval()
        self._projection = projection.detach().float().cpu()
        self._image = copy.deepcopy(image).to("cpu", torch.float32).eval()
        self._known: dict[str, torch.Tensor] = {}
        self.texts([""])  # a text encoder that pools nothing is refused before any work

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Scores (n,) of images (n, 3, 64, 64) in [0, 1], each against its own prompt."""
        seen = torch.cat([self._image(batch.float().cpu()) for batch in images.split(64)])
        cosines = torch.cosine_similarity(seen, self.texts(prompts), dim=1)
        return 100 * cosines.clamp_min(0).double().numpy()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings (n, channels) of prompts; each is read once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        for start in range(0, len(new), 64):
            some = new[start : start + 64]
            self._known.update(zip(some, self._read(some), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    def _read(self, prompts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        pooled = getattr(self._text(tokens.input_ids), "pooler_output", None)
        if pooled is None:
            raise ModelError(
                f"{type(self._text).__name__} gives no pooled output, expected a CLIPTextModel"
            )
        return pooled @ self._projection.T


def save_alignment(folder: Path, image: Encoder, projection: torch.Tensor) -> None:
    """Write the image tower and the text projection beside a model, in half precision."""
    weights = {f"{IMAGE}{name}": value for name, value in image.state_dict().items()}
    weights[PROJECTION] = projection.detach()
    save_file({name: value.half() for name, value in weights.items()}, folder / WEIGHTS)


def load_alignment(folder: Path, pipe: Pipe) -> Alignment | None:
    """Read the towers that lie beside a model; None where there are none, or no text encoder.

    Raises: ModelError when the file is damaged, or made for another text encoder.
    """
    tokenizer, text_encoder = (getattr(pipe, one, None) for one in ("tokenizer", "text_encoder"))
    if tokenizer is None or text_encoder is None or (found := read_towers(folder)) is None:
        return None
    try:
        return Alignment(tokenizer, text_encoder, *found, f"bundled {folder.name} towers")
    except (TypeError, RuntimeError, ValueError) as error:
        raise _damaged(folder, error) from None


def read_towers(folder: Path) -> tuple[Encoder, torch.Tensor] | None:
    """The image tower and the text projection that lie beside a model, if there are any.

    Raises: ModelError when the file is damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        return None
    try:
        state = {name: value.float() for name, value in load_file(path).items()}
        projection = state.pop(PROJECTION)
        image = Encoder(channels_of(projection))
        image.load_state_dict({name.removeprefix(IMAGE): one for name, one in state.items()})
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise _damaged(folder, error) from None
    return image.eval(), projection


def _damaged(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"{folder / WEIGHTS}: damaged, or of another model ({error})")


@dataclass(frozen=True)
class Judge:
    """What a model's images are judged by, besides the teacher's: its features, its alignment."""

    features: Features | None = None
    alignment: Alignment | None = None


NOBODY = Judge()


def load_judge(folder: Path | None, pipe: Pipe) -> Judge:
    """Read what lies beside a model; a task's inputs say which set of the real data is compared.

    Raises: ModelError when a file is damaged.
    """
    if folder is None:
        return NOBODY
    rows = [pipe.row(seed) for seed in range(max(1, pipe.rows))] if isinstance(pipe, Task) else []
    return Judge(load_features(folder, rows), load_alignment(folder, pipe))


def prompts_of(pipe: Pipe, seeds: Sequence[int]) -> list[str] | None:
    """The prompt that each seed is drawn from; None where a seed has none."""
    if not isinstance(pipe, Task):
        return None
    given = [pipe.row(seed).get("prompt") for seed in seeds]
    prompts = [one for one in given if isinstance(one, str) and one]
    return prompts if len(prompts) == len(given) else None
