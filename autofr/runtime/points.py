"""Reuse points: named places of a denoiser whose result can be kept and reused.

A point is described by *actions* on modules: where its tensor is kept at a keyframe, where the
kept tensor is put back, and which modules need not run then. `patch` carries the actions out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from autofr.errors import ModelError

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's call."""
Keep = Callable[[nn.Module, Given, Any], Any]
Restore = Callable[[nn.Module, Given, Any], Any]
Skip = Callable[[nn.Module, Given], Any]

KINDS = (
    "conv", "branch", "transformer", "attn", "cross", "ff", "block", "stage", "guidance", "score",
)  # fmt: skip
SCORE = "denoiser#score"


@dataclass(frozen=True)
class Point:
    """One reuse point.

    `keep_at`/`keep`: module path and the function (module, arguments, output) -> what is kept.
    `restore_at`/`restore`: module path and (module, arguments, kept) -> that module's output.
    `skips`: modules that need not run when the point is reused, each with a cheap stand-in.
    `enter_at`: where a run of modules begins; `keep` is then given that module's arguments.
    `prepare` rewrites the denoiser's keyword arguments where the point is reused.
    """

    name: str
    kind: str
    module: str
    keep_at: str
    restore_at: str
    keep: Keep = field(repr=False, compare=False)
    restore: Restore = field(repr=False, compare=False)
    skips: Mapping[str, Skip] = field(default_factory=dict, repr=False, compare=False)
    enter_at: str | None = None
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = field(
        default=None, repr=False, compare=False
    )


def first(given: Given) -> Any:
    """The first argument of a call, wherever it stands."""
    args, kwargs = given
    return args[0] if args else next(iter(kwargs.values()))


def sample_of(given: Given) -> Any:
    """The noisy sample among a denoiser's arguments."""
    kwargs = given[1]
    for name in ("sample", "hidden_states", "x"):
        if name in kwargs:
            return kwargs[name]
    return first(given)


def timestep_of(given: Given) -> Any:
    """The timestep among a denoiser's arguments, or None."""
    args, kwargs = given
    return kwargs.get("timestep", args[1] if len(args) > 1 else None)


class Pipe(Protocol):
    """What the core needs of a diffusers pipeline: components and a call."""

    scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def name_of(pipe: Pipe) -> str:
    """The pipeline's class, also behind a `Task`."""
    return type(getattr(pipe, "_pipe", pipe)).__name__


def find_denoiser(pipe: Pipe) -> nn.Module:
    """Return the pipe's U-Net or transformer; of two experts, the one that begins.

    A module wrapped by `torch.compile` is looked through.
    Raises: ModelError when it has neither, or no scheduler.
    """
    for name in ("unet", "transformer", "prior", "decoder"):
        module = getattr(pipe, name, None)
        cascade = type(module).__name__ == "StableCascadeUNet"  # a stage of its own pipeline
        if isinstance(module, nn.Module) and (cascade or name in ("unet", "transformer")):
            if getattr(pipe, "scheduler", None) is None:
                raise ModelError(f"{name_of(pipe)} has no scheduler; autofr needs one")
            return getattr(module, "_orig_mod", module)
    raise ModelError(
        f"{name_of(pipe)} has no denoiser: expected a component `unet` or `transformer`"
    )


def device_of(pipe: Pipe) -> torch.device:
    """Where the pipe computes; an offloaded denoiser waits elsewhere."""
    return getattr(pipe, "_execution_device", None) or find_denoiser(pipe).device


def dtype_of(pipe: Pipe) -> str:
    """The denoiser's type of number, such as `float32`."""
    return str(find_denoiser(pipe).dtype).removeprefix("torch.")


def experts(pipe: Pipe) -> list[nn.Module]:
    """Return the denoiser, and a second one of its class that takes over during a run (Wan 2.2)."""
    denoiser = find_denoiser(pipe)
    second = getattr(pipe, "transformer_2", None)
    second = getattr(second, "_orig_mod", second)
    return [denoiser, second] if type(second) is type(denoiser) else [denoiser]


def fingerprint(denoiser: nn.Module, points: Iterable[str]) -> str:
    """Hash of class, configuration and point names: equal for equal architectures."""
    config = {k: v for k, v in dict(denoiser.config).items() if not k.startswith("_")}
    text = json.dumps(
        [type(denoiser).__name__, config, sorted(points)], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(denoiser: nn.Module, samples: int = 64) -> str:
    """Hash of a few values of every parameter: tells fine-tuned copies apart, in milliseconds.

    Of a parameter that is offloaded, the name alone counts.
    """
    digest = hashlib.sha256()
    for name, value in denoiser.state_dict().items():
        digest.update(name.encode())
        for tensor in value if isinstance(value, tuple) else (value,):  # packed: weight and bias
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                flat = _plain(tensor.detach()).flatten()
                some = flat[:: max(1, len(flat) // samples)][:samples].float().cpu()
                digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    quantised = tensor.is_quantized or type(tensor).__module__.startswith("torchao")
    return tensor.dequantize() if quantised else tensor
