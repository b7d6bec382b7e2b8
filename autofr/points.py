"""Reuse points: named places of a denoiser whose result can be kept and reused.

A point is described by *actions* on modules: where its tensor is kept at a keyframe, where the
kept tensor is put back, and which modules need not run then. `patch` carries the actions out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from autofr.errors import ModelError

Keep = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
Restore = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
Skip = Callable[[nn.Module, torch.Tensor], Any]

KINDS = ("conv", "branch", "attn", "stage", "score")
SCORE = "denoiser#score"


@dataclass(frozen=True)
class Point:
    """One reuse point.

    `keep_at`/`keep`: module path and the function (module, input, output) -> tensor kept there.
    `restore_at`/`restore`: module path and (module, input, kept) -> that module's output.
    `skips`: modules that need not run when the point is reused, each with a cheap stand-in.
    """

    name: str
    kind: str
    module: str
    keep_at: str
    restore_at: str
    keep: Keep = field(repr=False, compare=False)
    restore: Restore = field(repr=False, compare=False)
    skips: dict[str, Skip] = field(default_factory=dict, repr=False, compare=False)


class Pipe(Protocol):
    """What the core needs of a diffusers pipeline: components and a call."""

    scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def find_denoiser(pipe: Pipe) -> nn.Module:
    """Return the pipe's U-Net or transformer.

    Raises: ModelError when it has neither, or no scheduler.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            if getattr(pipe, "scheduler", None) is None:
                raise ModelError(f"{type(pipe).__name__} has no scheduler; autofr needs one")
            return module
    raise ModelError(
        f"{type(pipe).__name__} has no denoiser: expected a component `unet` or `transformer`"
    )


def discover(denoiser: nn.Module) -> dict[str, Point]:
    """List the reuse points of a denoiser by name, outermost kinds last.

    Raises: ModelError for a denoiser without any known point; lists the supported classes.
    """
    family = FAMILIES.get(type(denoiser).__name__)
    points = family(denoiser) if family else []
    if not points:
        raise ModelError(
            f"no known reuse points in {type(denoiser).__name__};"
            f" supported denoisers: {', '.join(sorted(FAMILIES))}"
        )
    return {point.name: point for point in points}


def fingerprint(denoiser: nn.Module, points: Iterable[str]) -> str:
    """Hash of class, configuration and point names: equal for equal architectures."""
    config = {k: v for k, v in dict(denoiser.config).items() if not k.startswith("_")}
    text = json.dumps(
        [type(denoiser).__name__, config, sorted(points)], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(denoiser: nn.Module, samples: int = 64) -> str:
    """Hash of a few values of every parameter: tells fine-tuned copies apart, in milliseconds."""
    digest = hashlib.sha256()
    for name, value in denoiser.state_dict().items():
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // samples)][:samples].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


# -- what is kept and put back ------------------------------------------------------------------


def _keep_output(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output


def _return_kept(module: nn.Module, given: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return kept


def _resnet_from_branch(
    module: nn.Module, given: torch.Tensor, branch: torch.Tensor
) -> torch.Tensor:
    if module.upsample is not None:
        given = module.upsample(given)
    elif module.downsample is not None:
        given = module.downsample(given)
    if module.conv_shortcut is not None:
        given = module.conv_shortcut(given)
    return (given + branch) / module.output_scale_factor


def _keep_attention(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output - given / module.rescale_output_factor


def _attention_from_kept(
    module: nn.Module, given: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    return given / module.rescale_output_factor + kept


# -- stand-ins for modules that need not run -----------------------------------------------------


def _skip_same(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    return given


def _skip_empty(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    return given[:, :0]


def _skip_down(module: nn.Module, given: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return given, (given,) * _outputs(module)


def _outputs(down_block: nn.Module) -> int:
    return len(down_block.resnets) + len(down_block.downsamplers or ())


# -- families -------------------------------------------------------------------------------------


def _unet_layers(unet: nn.Module) -> list[Point]:
    points = []
    for path, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            conv, last = f"{path}.conv1", f"{path}.conv2"
            points.append(
                Point(f"{path}#conv", "conv", path, conv, conv, _keep_output, _return_kept)
            )
            points.append(
                Point(
                    f"{path}#branch", "branch", path, last, path, _keep_output, _resnet_from_branch
                )
            )
        elif kind == "Attention" and module.residual_connection:
            points.append(
                Point(
                    f"{path}#attn", "attn", path, path, path, _keep_attention, _attention_from_kept
                )
            )
    return points


def _unet_stages(unet: nn.Module) -> list[Point]:
    """Cut the U-Net before each layer of its up path: everything deeper is skipped.

    A cut at a block's border keeps the previous block's output (`up_blocks.1#stage`); a cut
    inside a block keeps a layer's (`up_blocks.2.resnets.0#stage`). The kept tensor plus the skip
    connections of the shallow layers are all that the rest of the up path needs.
    """
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    if any(block is None or hasattr(block, "skip_conv") for block in blocks):
        return []
    cuts = [(b, n) for b, up in enumerate(unet.up_blocks) for n in range(len(up.resnets))]
    points = []
    for done, (block, layer) in enumerate(cuts):
        skips = _skip_down_path(unet, needed=len(cuts) - done)
        if (block, layer) == (0, 0):
            module = "mid_block"
        elif layer == 0:
            module = f"up_blocks.{block - 1}"
        else:
            module = f"up_blocks.{block}.resnets.{layer - 1}"
        kept_at = module
        if module != "mid_block":
            skips["mid_block"] = _skip_same
        last_skipped = block - 1 if layer == 0 else block
        for above in range(last_skipped):
            skips[f"up_blocks.{above}"] = _skip_same
        if layer > 0:
            attentions = getattr(unet.up_blocks[block], "attentions", None)
            for inner in range(layer):
                skips[f"up_blocks.{block}.resnets.{inner}"] = _skip_empty
                if attentions is not None:
                    skips[f"up_blocks.{block}.attentions.{inner}"] = _skip_same
            if attentions is not None:
                kept_at = f"up_blocks.{block}.attentions.{layer - 1}"
        skips.pop(kept_at, None)
        name = f"{module}#stage"
        points.append(
            Point(name, "stage", module, kept_at, kept_at, _keep_output, _return_kept, skips)
        )
    return points


def _skip_down_path(unet: nn.Module, needed: int) -> dict[str, Skip]:
    """Skip the down path's layers behind the first `needed` skip connections."""
    skips: dict[str, Skip] = {}
    index = 1  # conv_in gives the first
    for b, down in enumerate(unet.down_blocks):
        path = f"down_blocks.{b}"
        if index >= needed:
            skips[path] = _skip_down
            index += _outputs(down)
            continue
        for n in range(len(down.resnets)):
            if index >= needed:
                skips[f"{path}.resnets.{n}"] = _skip_same
                if getattr(down, "attentions", None) is not None:
                    skips[f"{path}.attentions.{n}"] = _skip_same
            index += 1
        for n in range(len(down.downsamplers or ())):
            if index >= needed:
                skips[f"{path}.downsamplers.{n}"] = _skip_same
            index += 1
    return skips


def _unet2d(unet: nn.Module) -> list[Point]:
    return [*_unet_layers(unet), *_unet_stages(unet)]


FAMILIES: dict[str, Callable[[nn.Module], list[Point]]] = {
    "UNet2DModel": _unet2d,
}
