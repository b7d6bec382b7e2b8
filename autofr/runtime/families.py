"""Which points a denoiser has: a table of families, and what is found by structure elsewhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from torch import nn

from autofr.errors import ModelError
from autofr.runtime.cuts import stages
from autofr.runtime.layers import BLOCKS, LAYERS, run_of_blocks, sub_layers
from autofr.runtime.points import Point

_log = logging.getLogger("autofr")


def _layers(denoiser: nn.Module, *folders: str) -> list[Point]:
    """Points of every known layer below some modules of the denoiser."""
    points = []
    for path, module in denoiser.named_modules():
        kind = type(module).__name__
        if not path.startswith(folders):
            continue
        if kind in LAYERS:
            points += LAYERS[kind](path, module)
        elif kind in BLOCKS:
            points += sub_layers(path, module)
    return points


def _unet(denoiser: nn.Module) -> list[Point]:
    return [*_layers(denoiser, "down_blocks", "mid_block", "up_blocks"), *stages(denoiser)]


def _transformer(*folders: str, runs: bool = True) -> Callable[[nn.Module], list[Point]]:
    """Points of a transformer whose blocks are in these lists.

    Besides sub-layers and single blocks: runs of blocks to the end of their list, from the second
    block on (as first-block caches do), and from a quarter, half and three quarters.
    """

    def points(denoiser: nn.Module) -> list[Point]:
        found = _layers(denoiser, *(f"{folder}." for folder in folders))
        for folder in folders:
            blocks = getattr(denoiser, folder)
            n = len(blocks)
            spans = [(i, i + 1) for i in range(n)]
            if runs:
                starts = sorted({0, 1, n // 4, n // 2, 3 * n // 4})
                spans += [(start, n) for start in starts if n - start > 1]
            for start, stop in spans:
                found += run_of_blocks(folder, blocks, start, stop)
        return found

    return points


FAMILIES: dict[str, Callable[[nn.Module], list[Point]]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet,
    "UNetSpatioTemporalConditionModel": _unet,
    "UNet3DConditionModel": _unet,
    "I2VGenXLUNet": _unet,
    "UNetMotionModel": _unet,
    "Kandinsky3UNet": _unet,
    "StableCascadeUNet": _unet,
    "DiTTransformer2DModel": _transformer("transformer_blocks"),
    "PixArtTransformer2DModel": _transformer("transformer_blocks"),
    "SD3Transformer2DModel": _transformer("transformer_blocks"),
    "FluxTransformer2DModel": _transformer("transformer_blocks", "single_transformer_blocks"),
    "Flux2Transformer2DModel": _transformer("transformer_blocks", "single_transformer_blocks"),
    "ChromaTransformer2DModel": _transformer("transformer_blocks", "single_transformer_blocks"),
    "AuraFlowTransformer2DModel": _transformer(
        "joint_transformer_blocks", "single_transformer_blocks"
    ),
    "SanaTransformer2DModel": _transformer("transformer_blocks"),
    "Lumina2Transformer2DModel": _transformer("layers"),
    "HunyuanDiT2DModel": _transformer("blocks"),
    "QwenImageTransformer2DModel": _transformer("transformer_blocks"),
    "ZImageTransformer2DModel": _transformer("layers"),
    "CogView3PlusTransformer2DModel": _transformer("transformer_blocks"),
    "CogView4Transformer2DModel": _transformer("transformer_blocks"),
    "HiDreamImageTransformer2DModel": _transformer("double_stream_blocks", "single_stream_blocks"),
    "StableAudioDiTModel": _transformer("transformer_blocks"),
    "OmniGenTransformer2DModel": _transformer("layers"),
    "WanTransformer3DModel": _transformer("blocks"),
    "LTXVideoTransformer3DModel": _transformer("transformer_blocks"),
    "CogVideoXTransformer3DModel": _transformer("transformer_blocks"),
    "HunyuanVideoTransformer3DModel": _transformer(
        "transformer_blocks", "single_transformer_blocks"
    ),
    "MochiTransformer3DModel": _transformer("transformer_blocks"),
    # Spatial and temporal blocks take turns, with a change of layout between them: no runs.
    "LatteTransformer3DModel": _transformer(
        "transformer_blocks", "temporal_transformer_blocks", runs=False
    ),
    "AllegroTransformer3DModel": _transformer("transformer_blocks"),
    "CosmosTransformer3DModel": _transformer("transformer_blocks"),
}


def discover(denoiser: nn.Module) -> dict[str, Point]:
    """List the reuse points of a denoiser by name, outermost kinds last.

    A class that is in no table is searched for repeated blocks, with a notice in the log.
    Raises: ModelError for a denoiser without any point; lists the supported classes.
    """
    name = type(denoiser).__name__
    family = FAMILIES.get(name)
    points = family(denoiser) if family else _by_structure(denoiser)
    if not points:
        raise ModelError(
            f"no known reuse points in {name}; supported denoisers: {', '.join(sorted(FAMILIES))}"
        )
    if family is None:
        _notice(name, len(points))
    return {point.name: point for point in points}


def _by_structure(denoiser: nn.Module) -> list[Point]:
    """Points of a class that is in no table: known layers, and lists of equal blocks."""
    if hasattr(denoiser, "up_blocks"):
        return _layers(denoiser, "down_blocks", "mid_block", "up_blocks")
    repeated = [
        name
        for name, module in denoiser.named_children()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
    ]
    return _transformer(*repeated, runs=False)(denoiser)


@functools.cache
def _notice(name: str, count: int) -> None:
    _log.warning(
        "%s is in no table of autofr: %d points were found by structure; check that an"
        " all-reused policy still draws before you trust one",
        name,
        count,
    )
