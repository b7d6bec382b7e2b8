"""What every recipe is given and what it makes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autofr.errors import UserError
from autofr.measure.quality import Encoder


@dataclass(frozen=True)
class Order:
    """What is asked for: minutes of training on a device, a seed, and where checkpoints lie.

    `init` is an exported folder to begin with, where the recipe knows one.
    """

    minutes: float
    device: str
    seed: int
    work: Path
    init: Path | None = None

    def folder(self, name: str) -> Path:
        """Where the checkpoints of one model, or of what several share, lie; made when needed.

        Whatever is trained on has a folder of its own: else the checkpoint of the training before
        would be resumed, and be taken for finished.
        """
        path = self.work / (name if self.init is None else f"{name}-after-{_digest(self.init)}")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def rate(self, peak: float) -> float:
        """The learning rate of a denoiser: half of a recipe's where trained weights go on."""
        return peak if self.init is None else peak / 2

    def draws(self) -> int:
        """The seed of a denoiser's steps: where trained weights go on, no step is drawn twice."""
        return self.seed if self.init is None else self.seed + int(_digest(self.init), 16)


@dataclass(frozen=True)
class Trained:
    """A stock pipeline with all that its score is measured against.

    Args: views, real images (n, 3, 64, 64) in [-1, 1]; seconds, what each stage was trained for;
        steps, of sampling; inputs, call arguments row by row, drawn from in turn; call, arguments
        of every call; argument, the name in `inputs` whose values the sets are made of; sets, its
        values by name of the set; labels, that argument's value for each view; towers, of the
        alignment score; originals (inputs, 3, 64, 64) in [-1, 1], the pictures that inputs are
        small copies of; files, more to lie beside the weights, by name; moments of the denoiser's
        training (seconds, weights), whose scores show whether more of it would help.
    """

    pipe: Any
    encoder: Encoder
    views: torch.Tensor
    seconds: Mapping[str, float]
    glyphs: int
    steps: int
    inputs: Sequence[Mapping[str, Any]] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    argument: str = ""
    sets: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    labels: Sequence[Any] = ()
    towers: torch.nn.ModuleDict | None = None
    originals: torch.Tensor | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    moments: Sequence[tuple[float, Mapping[str, torch.Tensor]]] = ()


def _digest(folder: Path) -> str:
    """Hash of the weights that lie in a folder's parts."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def load_module(kind: Any, folder: Path) -> torch.nn.Module:
    """Load a module in float32, without the note of its folder that would be exported again.

    Raises: UserError when there is none of this kind.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not found, expected the {kind.__name__} that a recipe exported")
    saved = kind.from_pretrained(folder)
    module = kind.from_config({k: v for k, v in saved.config.items() if k != "_name_or_path"})
    module.load_state_dict(saved.float().state_dict())
    return module.eval()
