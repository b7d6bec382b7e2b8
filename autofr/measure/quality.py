"""Image quality: bundled features, FID by torchmetrics, errors to the teacher."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autofr import reading
from autofr.errors import ModelError
from autofr.policy import Interval

WEIGHTS, STATISTICS, SETS = "features.safetensors", "reference.safetensors", "sets.json"


class Encoder(nn.Module):
    """Small convolutional feature extractor for 64x64 images: the offline stand-in for Inception.

    Input (n, 3, 64, 64) in [0, 1]; output (n, channels).
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for wide, wider in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(wide, wider, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.SiLU(),
                nn.Conv2d(wider, wider, 3, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 4, channels)
        self.num_features = channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(2 * images - 1)
        return self.head(nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1))


@dataclass(frozen=True)
class Reference:
    """Feature statistics of the real data: mean (d), covariance (d, d), number of images."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int

    @classmethod
    def of(cls, features: torch.Tensor) -> Reference:
        """Statistics of features (n, d)."""
        features = features.double()
        return cls(features.mean(0), features.T.cov(), len(features))


@dataclass(frozen=True)
class Features:
    """A feature extractor with its reference statistics, and what to call it in reports."""

    encoder: nn.Module
    reference: Reference
    name: str

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, d) of images (n, 3, h, w) in [0, 1]."""
        device = next(self.encoder.parameters()).device
        batches = (self.encoder(batch.to(device)).cpu() for batch in images.split(64))
        return torch.cat(list(batches))

    def fid(self, features: torch.Tensor) -> float:
        """Fréchet distance of features (n, d) to the reference."""
        return _frechet(self.reference, Reference.of(features))


class _Listed(BaseModel):
    """The file that says which values of an argument belong to which set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    argument: Literal["class_labels", "prompt"]
    sets: dict[str, Annotated[list[int | str], Field(min_length=1)]]


@dataclass(frozen=True)
class Sets:
    """Named sets of the real data: the values of an argument that ask for them, their statistics.

    Raises: ModelError where a set has no more images than channels: its covariance has no full
        rank, and distances to it say little.
    """

    argument: str
    values: Mapping[str, Sequence[int | str]]
    references: Mapping[str, Reference]

    def __post_init__(self) -> None:
        for name, one in self.references.items():
            if one.count <= len(one.mean):
                raise ModelError(
                    f"set {name!r} has {one.count} images, expected more than its"
                    f" {len(one.mean)} channels: join it with another, or give more images"
                )

    @classmethod
    def of(
        cls, argument: str, parts: Mapping[str, tuple[Sequence[int | str], torch.Tensor]]
    ) -> Sets:
        """Sets from (values, features (n, d) of their images) by name."""
        values = {name: list(asked) for name, (asked, _) in parts.items()}
        references = {name: Reference.of(features) for name, (_, features) in parts.items()}
        return cls(argument, values, references)

    def smallest(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Name of the set of fewest values that has all that rows of call arguments ask for."""
        given = [row.get(self.argument) for row in rows]
        asked = [one for value in given for one in (value if isinstance(value, list) else [value])]
        fitting = {
            name: len(values)
            for name, values in self.values.items()
            if asked and all(one in values for one in asked)
        }
        return min(fitting, key=fitting.__getitem__, default=None)


def save_features(folder: Path, features: Features, sets: Sets | None = None) -> None:
    """Write the extractor (in half precision) and its statistics beside a model."""
    weights = {name: value.half() for name, value in features.encoder.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    every = {"": features.reference}
    every |= {f"{name}/": one for name, one in sets.references.items()} if sets else {}
    statistics = {}
    for prefix, one in every.items():
        statistics[f"{prefix}mean"] = one.mean.float()
        statistics[f"{prefix}covariance"] = one.covariance.float()
        statistics[f"{prefix}count"] = torch.tensor(one.count)
    save_file(statistics, folder / STATISTICS)
    (folder / SETS).unlink(missing_ok=True)
    if sets:
        listed = _Listed.model_validate({"argument": sets.argument, "sets": sets.values})
        (folder / SETS).write_text(listed.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_features(folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> Features | None:
    """Read the extractor and reference that lie beside a model, if there are any.

    `rows` are the call arguments in use: the smallest set of the real data that has all their
    values is the reference, else the whole.
    Raises: ModelError when the files are damaged.
    """
    if not ((folder / WEIGHTS).is_file() and (folder / STATISTICS).is_file()):
        return None
    try:
        state = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
        encoder = Encoder(channels_of(state["head.bias"]))
        encoder.load_state_dict(state)
        whole, sets = _statistics(folder, encoder.num_features)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: the feature files are damaged ({error})") from None
    called, reference = f"bundled {folder.name} features", whole
    if sets and (name := sets.smallest(rows)) is not None:
        called, reference = f"{called}, {name}", sets.references[name]
    return Features(encoder.eval().requires_grad_(False), reference, called)


def channels_of(weight: torch.Tensor) -> int:
    """How many channels an encoder has whose head has this bias, or this many rows.

    Raises: ValueError for more than one would have: so large a network is not even built.
    """
    count = weight.shape[0] if weight.ndim else 0
    if not 1 <= count <= 4096:
        raise ValueError(f"{count} channels, expected 1 to 4096")
    return count


def _statistics(folder: Path, channels: int) -> tuple[Reference, Sets | None]:
    """Statistics of all real data and of its named sets."""
    real = load_file(folder / STATISTICS)

    def one(prefix: str) -> Reference:
        mean, covariance = real[f"{prefix}mean"], real[f"{prefix}covariance"]
        if mean.shape != (channels,) or covariance.shape != (channels, channels):
            raise ValueError("features and reference differ in size")
        return Reference(mean, covariance, int(real[f"{prefix}count"]))

    if not (folder / SETS).is_file():
        return one(""), None
    listed = _Listed.model_validate_json(reading.content(folder / SETS, reading.OWN))
    references = {name: one(f"{name}/") for name in listed.sets}
    return one(""), Sets(listed.argument, listed.sets, references)


class _AsGiven(nn.Module):
    """Hands features through, so that torchmetrics' FID works on precomputed ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features = channels

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _frechet(real: Reference, fake: Reference) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsGiven(len(real.mean)))
    for name, statistics in (("real", real), ("fake", fake)):
        mean, count = statistics.mean.double(), statistics.count
        outer = statistics.covariance.double() * (count - 1) + count * torch.outer(mean, mean)
        setattr(metric, f"{name}_features_sum", mean * count)
        setattr(metric, f"{name}_features_cov_sum", outer)
        setattr(metric, f"{name}_features_num_samples", torch.tensor(count))
    metric.orig_dtype = torch.float64
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
        return float(metric.compute())


def fid_difference(
    features: Features, teacher: torch.Tensor, policy: torch.Tensor, resamples: int = 300
) -> Interval:
    """FID(policy) - FID(teacher) with its 95 % paired bootstrap interval.

    Both feature tensors (n, d) come from the same seeds, and each resample draws the same rows
    of both, so that what the images have in common cancels. The interval is the basic bootstrap's:
    resampled FIDs are biased upwards, their spread is what counts.
    """
    rng = np.random.default_rng(0)
    value = features.fid(policy) - features.fid(teacher)
    draws = []
    for _ in range(resamples):
        rows = torch.from_numpy(rng.integers(len(teacher), size=len(teacher)))
        draws.append(features.fid(policy[rows]) - features.fid(teacher[rows]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value=value, low=float(2 * value - high), high=float(2 * value - low))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """Relative L2 error of each sample: |found - wanted| / |wanted|, shape (n,).

    0 where both are 0: a sample of which inpainting draws nothing.
    """
    size = wanted.flatten(1).norm(dim=1).clamp_min(1e-12)
    error = (found - wanted).flatten(1).norm(dim=1) / size
    return error.double().cpu().numpy()


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio (dB) of images (n, c, h, w) in [0, 1]."""
    mse = (found - wanted).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * mse.log10()).mean())


def band_errors(
    found: torch.Tensor, wanted: torch.Tensor, cut: float = 0.25
) -> tuple[float, float]:
    """Relative error below and above `cut` x Nyquist, as in the paper's frequency analysis.

    Images (n, c, h, w). Returns (low, high): energy of the difference in the band over the energy
    of `wanted` in that band, square rooted. The mean (frequency 0) is left out of the energy.
    """
    spectrum = torch.fft.fft2(wanted.double())
    difference = torch.fft.fft2((found - wanted).double())
    fy = torch.fft.fftfreq(wanted.shape[-2]).abs()[:, None]
    fx = torch.fft.fftfreq(wanted.shape[-1]).abs()[None]
    radius = (fx.square() + fy.square()).sqrt() / 0.5
    bands = ((radius > 0) & (radius <= cut), radius > cut)
    low, high = (
        float(
            (difference[..., b].abs().square().sum() / spectrum[..., b].abs().square().sum()).sqrt()
        )
        for b in bands
    )
    return low, high


def trimmed_mean(values: np.ndarray) -> float:
    """Mean of per-sample values without the largest eighth of them (none of fewer than eight).

    The few samples whose drawing changes carry a mean, and say nothing of other samples.
    """
    kept = np.sort(values)[: len(values) - len(values) // 8]
    return float(kept.mean())
