"""Cuts of a U-Net (`stage` points): everything deeper than a cut need not run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from autofr.runtime.layers import skip_empty, skip_in_tuple, skip_same
from autofr.runtime.points import Given, Point, Skip, first

_IN_TUPLE = ("Transformer2DModel", "TransformerSpatioTemporalModel")
_WITHIN = ("resnets", "attentions")  # blocks of these lists alone can be cut between layers


def stages(unet: nn.Module) -> list[Point]:
    """Cut the U-Net before each layer of its up path: everything deeper is skipped.

    A cut at a block's border keeps the previous block's output (`up_blocks.1#stage`); a cut
    inside a block keeps a layer's (`up_blocks.2.resnets.0#stage`). The kept tensor plus the skip
    connections of the shallow layers are all that the rest of the up path needs. U-Nets whose
    blocks pass on other skip connections than one per layer and sampler have no cuts.
    """
    blocks = [*unet.down_blocks, getattr(unet, "mid_block", None), *unet.up_blocks]
    if any(block is None or not _regular(block) for block in blocks):
        return []
    layers = [len(up.resnets) for up in unet.up_blocks]
    points = []
    for block, up in enumerate(unet.up_blocks):
        for layer in range(layers[block] if _divisible(up) else 1):
            needed = sum(layers[block:]) - layer
            points.append(_cut(unet, block, layer, needed))
    return points


def _regular(block: nn.Module) -> bool:
    odd = hasattr(block, "skip_conv") or type(block).__name__.startswith("K")
    return hasattr(block, "resnets") and not odd


def _divisible(block: nn.Module) -> bool:
    lists = {name for name, child in block.named_children() if isinstance(child, nn.ModuleList)}
    return lists <= {*_WITHIN, "upsamplers", "downsamplers"}


def _cut(unet: nn.Module, block: int, layer: int, needed: int) -> Point:
    """Cut before a layer of an up block; the rest needs the first `needed` skip connections."""
    skips = _skip_down_path(unet, needed)
    if (block, layer) == (0, 0):
        module = "mid_block"
    elif layer == 0:
        module = f"up_blocks.{block - 1}"
    else:
        module = f"up_blocks.{block}.resnets.{layer - 1}"
    kept_at = module
    if module != "mid_block":
        skips["mid_block"] = _skip_with_copy
    for above in range(block - 1 if layer == 0 else block):
        skips[f"up_blocks.{above}"] = skip_same
    attentions = getattr(unet.up_blocks[block], "attentions", None)
    for inner in range(layer):
        skips[f"up_blocks.{block}.resnets.{inner}"] = skip_empty
        if attentions is not None:
            skips[f"up_blocks.{block}.attentions.{inner}"] = _skip_attention(attentions[inner])
            kept_at = f"up_blocks.{block}.attentions.{inner}"
    skips.pop(kept_at, None)
    return Point(
        f"{module}#stage", "stage", module, kept_at, kept_at, _keep_copy, _return_copy, skips,
        prepare=partial(_without_residuals, needed, frozenset(skips)),
    )  # fmt: skip


def _keep_copy(module: nn.Module, given: Given, output: Any) -> Any:
    return _copied(output)


def _return_copy(module: nn.Module, given: Given, kept: Any) -> Any:
    return _copied(kept)


def _skip_with_copy(module: nn.Module, given: Given) -> Any:
    """The input is a skip connection too, which what runs above still needs unchanged."""
    return _copied(first(given))


def _copied(value: Any) -> Any:
    """A copy, since the blocks above a cut may change what they are given (FreeU scales it)."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _skip_attention(module: nn.Module) -> Skip:
    return skip_in_tuple if type(module).__name__ in _IN_TUPLE else skip_same


def _skip_down_path(unet: nn.Module, needed: int) -> dict[str, Skip]:
    """Skip the down path's layers behind the first `needed` skip connections."""
    skips: dict[str, Skip] = {}
    index = 1  # conv_in gives the first
    for b, down in enumerate(unet.down_blocks):
        path = f"down_blocks.{b}"
        if index >= needed:
            skips[path] = _skip_down
        elif _divisible(down):
            attentions = getattr(down, "attentions", None)
            for n in range(len(down.resnets)):
                if index + n >= needed:
                    skips[f"{path}.resnets.{n}"] = skip_same
                    if attentions is not None:
                        skips[f"{path}.attentions.{n}"] = _skip_attention(attentions[n])
            for n in range(len(down.downsamplers or ())):
                if index + len(down.resnets) + n >= needed:
                    skips[f"{path}.downsamplers.{n}"] = skip_same
        index += _outputs(down)
    return skips


def _skip_down(module: nn.Module, given: Given) -> tuple[Any, tuple[Any, ...]]:
    hidden = first(given)
    return hidden, (hidden,) * _outputs(module)


def _outputs(down_block: nn.Module) -> int:
    return len(down_block.resnets) + len(down_block.downsamplers or ())


def _without_residuals(
    needed: int, skipped: frozenset[str], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Replace what side networks add to skipped places: stand-ins have other shapes."""
    changed = dict(kwargs)
    if down := kwargs.get("down_block_additional_residuals"):
        changed["down_block_additional_residuals"] = tuple(
            residual if index < needed else residual.new_zeros(())
            for index, residual in enumerate(down)
        )
    middle = kwargs.get("mid_block_additional_residual")
    if middle is not None and "mid_block" in skipped:
        changed["mid_block_additional_residual"] = middle.new_zeros(())
    if inner := kwargs.get("down_intrablock_additional_residuals"):
        changed["down_intrablock_additional_residuals"] = [
            residual.new_zeros(()) if f"down_blocks.{index}" in skipped else residual
            for index, residual in enumerate(inner)
        ]
    return changed
