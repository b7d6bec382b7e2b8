"""Image quality: bundled features, FID by torchmetrics, errors to the teacher."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from autofr.errors import ModelError


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


def load_features(folder: Path) -> Features | None:
    """Read the extractor and reference that lie beside a model, if there are any.

    Raises: ModelError when the files are damaged.
    """
    weights, statistics = folder / "features.safetensors", folder / "reference.safetensors"
    if not (weights.is_file() and statistics.is_file()):
        return None
    try:
        state = {name: value.float() for name, value in load_file(weights).items()}
        real = load_file(statistics)
        encoder = Encoder(len(state["head.bias"]))
        encoder.load_state_dict(state)
        reference = Reference(real["mean"], real["covariance"], int(real["count"]))
        if reference.covariance.shape != (encoder.num_features, len(reference.mean)):
            raise ValueError("features and reference differ in size")
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: the feature files are damaged ({error})") from None
    return Features(
        encoder.eval().requires_grad_(False), reference, f"bundled {folder.name} features"
    )


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
) -> tuple[float, float, float]:
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
    return value, float(2 * value - high), float(2 * value - low)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """Relative L2 error of each sample: |found - wanted| / |wanted|, shape (n,)."""
    error = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
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


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of per-sample values with its 95 % bootstrap interval."""
    from scipy.stats import bootstrap

    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    result = bootstrap(
        (values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    )
    return mean, float(result.confidence_interval.low), float(result.confidence_interval.high)
