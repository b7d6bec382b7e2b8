"""What can be kept inside one layer: a table of layer classes and the points that each offers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autofr.runtime.points import Given, Point, first

# -- what is kept and put back --------------------------------------------------------------------


def keep_output(module: nn.Module, given: Given, output: Any) -> Any:
    """Keep what the module returned, a tensor or a tuple."""
    return output


def return_kept(module: nn.Module, given: Given, kept: Any) -> Any:
    """Return what was kept instead of running the module."""
    return kept


def _keep_difference(module: nn.Module, given: Given, output: Any) -> torch.Tensor:
    return _tensor(output) - first(given)


def _tensor(output: Any) -> torch.Tensor:
    """The tensor of a module's output, which may be wrapped in a tuple or an output class."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _add_kept(module: nn.Module, given: Given, kept: torch.Tensor) -> torch.Tensor:
    return first(given) + kept


def _add_kept_in_tuple(
    module: nn.Module, given: Given, kept: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (first(given) + kept,)


def _resnet_from_branch(module: nn.Module, given: Given, branch: torch.Tensor) -> torch.Tensor:
    short = first(given)
    if getattr(module, "upsample", None) is not None:
        short = module.upsample(short)
    elif getattr(module, "downsample", None) is not None:
        short = module.downsample(short)
    if module.conv_shortcut is not None:
        short = module.conv_shortcut(short)
    return (short + branch) / getattr(module, "output_scale_factor", 1.0)


def _keep_rescaled(module: nn.Module, given: Given, output: torch.Tensor) -> torch.Tensor:
    return output - first(given) / module.rescale_output_factor


def _add_rescaled(module: nn.Module, given: Given, kept: torch.Tensor) -> torch.Tensor:
    return first(given) / module.rescale_output_factor + kept


def _transformer_from_projection(
    module: nn.Module, given: Given, kept: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Add what the last projection gave: in half precision output - input would round."""
    hidden = first(given)
    if kept.ndim == 3:  # a linear projection's: (batch, height * width, channels)
        kept = kept.transpose(1, 2).reshape(hidden.shape)
    return (hidden + kept,)


# -- layers of U-Nets -----------------------------------------------------------------------------


def _resnet(path: str, module: nn.Module) -> list[Point]:
    conv, last = f"{path}.conv1", f"{path}.conv2"
    return [
        Point(f"{path}#conv", "conv", path, conv, conv, keep_output, return_kept),
        Point(f"{path}#branch", "branch", path, last, path, keep_output, _resnet_from_branch),
    ]


def _attention(path: str, module: nn.Module) -> list[Point]:
    """An attention of a U-Net that adds its own residual; others belong to a transformer block."""
    name = f"{path}#attn"
    if "AddedKV" in type(getattr(module, "processor", None)).__name__:  # adds it unscaled
        return [Point(name, "attn", path, path, path, _keep_difference, _add_kept)]
    if module.residual_connection:
        return [Point(name, "attn", path, path, path, _keep_rescaled, _add_rescaled)]
    return []


def _spatial_transformer(path: str, module: nn.Module) -> list[Point]:
    if not module.is_input_continuous:
        return []
    kept_at = f"{path}.proj_out"
    name = f"{path}#transformer"
    return [
        Point(name, "transformer", path, kept_at, path, keep_output, _transformer_from_projection)
    ]


def _residual(kind: str, in_tuple: bool, path: str, module: nn.Module) -> list[Point]:
    """A module whose output is its first input plus something."""
    put_back = _add_kept_in_tuple if in_tuple else _add_kept
    return [Point(f"{path}#{kind}", kind, path, path, path, _keep_difference, put_back)]


def _kandinsky_branch(path: str, module: nn.Module) -> list[Point]:
    """The chain of inner blocks beside the shortcut."""
    *inner, last = (f"{path}.resnet_blocks.{i}" for i in range(len(module.resnet_blocks)))
    skips = dict.fromkeys(inner, skip_same)
    return [Point(f"{path}#branch", "branch", path, last, last, keep_output, return_kept, skips)]


LAYERS: dict[str, Callable[[str, nn.Module], list[Point]]] = {
    "ResnetBlock2D": _resnet,
    "ResnetBlockCondNorm2D": _resnet,
    "TemporalResnetBlock": _resnet,
    "TemporalConvLayer": partial(_residual, "branch", False),
    "Attention": _attention,
    "KAttentionBlock": partial(_residual, "attn", False),
    "Transformer2DModel": _spatial_transformer,
    "TransformerTemporalModel": partial(_residual, "transformer", True),
    "TransformerSpatioTemporalModel": partial(_residual, "transformer", True),
    "AnimateDiffTransformer3D": partial(_residual, "transformer", False),
    "Kandinsky3ResNetBlock": _kandinsky_branch,
}
"""Layers of U-Nets: class -> the points that one of them offers."""


# -- transformer blocks ---------------------------------------------------------------------------

HIDDEN, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass(frozen=True)
class Block:
    """A transformer block: kinds of its sub-layers, and the streams that run through it.

    `streams` are names of parameters in the order in which the block returns them; one stream
    alone comes back as a tensor. `parallel`: attention and feed-forward share one projection.
    """

    parts: dict[str, str]
    streams: tuple[str, ...] = (HIDDEN,)
    parallel: bool = False


_CROSS = {"attn1": "attn", "attn2": "cross", "ff": "ff"}
_JOINT = {"attn": "attn", "attn2": "attn", "ff": "ff", "ff_context": "ff"}
_COG = {"attn1": "attn", "ff": "ff"}
BLOCKS: dict[str, Block] = {
    "AllegroTransformerBlock": Block(_CROSS),
    "AuraFlowJointTransformerBlock": Block(_JOINT, (TEXT, HIDDEN)),
    "AuraFlowSingleTransformerBlock": Block({"attn": "attn", "ff": "ff"}),
    "BasicTransformerBlock": Block(_CROSS),
    "ChromaSingleTransformerBlock": Block({}, parallel=True),
    "ChromaTransformerBlock": Block(_JOINT, (TEXT, HIDDEN)),
    "CogVideoXBlock": Block(_COG, (HIDDEN, TEXT)),
    "CogView3PlusTransformerBlock": Block(_COG, (HIDDEN, TEXT)),
    "CogView4TransformerBlock": Block(_COG, (HIDDEN, TEXT)),
    "CosmosTransformerBlock": Block(_CROSS),
    "Flux2SingleTransformerBlock": Block({"attn": "attn"}),
    "Flux2TransformerBlock": Block(_JOINT, (TEXT, HIDDEN)),
    "FluxSingleTransformerBlock": Block({}, (TEXT, HIDDEN), parallel=True),
    "FluxTransformerBlock": Block(_JOINT, (TEXT, HIDDEN)),
    "HiDreamBlock": Block(
        {"block.attn1": "attn", "block.ff_i": "ff", "block.ff_t": "ff"}, (HIDDEN, TEXT)
    ),
    "HunyuanDiTBlock": Block(_CROSS),
    "HunyuanVideoSingleTransformerBlock": Block({}, (HIDDEN, TEXT), parallel=True),
    "HunyuanVideoTransformerBlock": Block(_JOINT, (HIDDEN, TEXT)),
    "JointTransformerBlock": Block(_JOINT, (TEXT, HIDDEN)),
    "Kandinsky3AttentionBlock": Block({"attention": "attn", "feed_forward": "ff"}, ()),
    "LTXVideoTransformerBlock": Block(_CROSS),
    "Lumina2TransformerBlock": Block({"attn": "attn", "feed_forward": "ff"}),
    "MochiTransformerBlock": Block(
        {"attn1": "attn", "ff": "ff", "ff_context": "ff"}, (HIDDEN, TEXT)
    ),
    "OmniGenBlock": Block({"self_attn": "attn", "mlp": "ff"}),
    "QwenImageTransformerBlock": Block(
        {"attn": "attn", "img_mlp": "ff", "txt_mlp": "ff"}, (TEXT, HIDDEN)
    ),
    "SD3SingleTransformerBlock": Block({"attn": "attn", "ff": "ff"}),
    "SDCascadeAttnBlock": Block({"attention": "attn"}, ()),
    "SDCascadeResBlock": Block({"channelwise": "branch"}, ()),
    "SanaTransformerBlock": Block(_CROSS),
    "StableAudioDiTBlock": Block(_CROSS),
    "TemporalBasicTransformerBlock": Block(_CROSS, ()),
    "WanTransformerBlock": Block({"attn1": "attn", "attn2": "cross", "ffn": "ff"}),
    "ZImageTransformerBlock": Block({"attention": "attn", "feed_forward": "ff"}, ("x",)),
}
"""Transformer blocks by class; no streams: only the sub-layers are points."""


def sub_layers(path: str, module: nn.Module) -> list[Point]:
    """Sub-layers of a transformer block, each kept before its gate."""
    row = BLOCKS[type(module).__name__]
    points = []
    for part, kind in row.parts.items():
        at = f"{path}.{part}"
        if isinstance(_inner(module, part), nn.Module):
            points.append(Point(f"{at}#{kind}", kind, at, at, at, keep_output, return_kept))
    if row.parallel:
        at = f"{path}.proj_out"
        skips = {f"{path}.attn": _skip_streams, f"{path}.proj_mlp": skip_same}
        name = f"{path}#attn"
        points.append(Point(name, "attn", path, at, at, keep_output, return_kept, skips))
    return points


def _inner(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def run_of_blocks(folder: str, blocks: nn.ModuleList, start: int, stop: int) -> list[Point]:
    """Reuse what blocks `start` to `stop - 1` add to the streams, together as one point."""
    row = BLOCKS.get(type(blocks[start]).__name__)
    streams = row.streams if row else _only_stream(blocks[start])
    if not streams:
        return []
    places = [_place(blocks[start], name) for name in streams]
    enter, end = f"{folder}.{start}", f"{folder}.{stop - 1}"
    span = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
    pass_on = partial(_pass_streams, places)
    return [
        Point(
            f"{folder}.{span}#block",
            "block",
            enter if stop == start + 1 else folder,
            end,
            end,
            partial(_keep_streams, places),
            partial(_add_streams, places),
            {f"{folder}.{i}": pass_on for i in range(start, stop - 1)},
            enter_at=enter if stop > start + 1 else None,
        )
    ]


def _only_stream(block: nn.Module) -> tuple[str, ...]:
    """The first parameter of an unknown block: its hidden states, by universal custom."""
    return tuple(inspect.signature(type(block).forward).parameters)[1:2]


Place = tuple[int, str]
"""Where a stream stands in a block's call: its position, or its name as a keyword."""


def _place(block: nn.Module, stream: str) -> Place:
    names = [*inspect.signature(type(block).forward).parameters]
    return names.index(stream) - 1, stream


def _streams(places: Sequence[Place], given: Given) -> list[Any]:
    """The streams of a call; a block that is given no text has the other stream alone."""
    args, kwargs = given
    found = (kwargs[name] if name in kwargs else args[place] for place, name in places)
    return [stream for stream in found if stream is not None]


def _keep_streams(
    places: Sequence[Place], module: nn.Module, given: Given, output: Any
) -> list[Any]:
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    pairs = zip(outputs, _streams(places, given), strict=True)
    return [None if new is None else new - old for new, old in pairs]


def _add_streams(places: Sequence[Place], module: nn.Module, given: Given, kept: list[Any]) -> Any:
    pairs = zip(_streams(places, given), kept, strict=True)
    return _returned([None if add is None else old + add for old, add in pairs])


def _pass_streams(places: Sequence[Place], module: nn.Module, given: Given) -> Any:
    return _returned(_streams(places, given))


def _returned(streams: list[Any]) -> Any:
    return streams[0] if len(streams) == 1 else tuple(streams)


# -- stand-ins for modules that need not run ------------------------------------------------------


def skip_same(module: nn.Module, given: Given) -> Any:
    """Return the input."""
    return first(given)


def skip_in_tuple(module: nn.Module, given: Given) -> tuple[Any, ...]:
    """Return the input in a tuple."""
    return (first(given),)


def skip_empty(module: nn.Module, given: Given) -> torch.Tensor:
    """Return a tensor without channels: what is concatenated to it is all that counts."""
    return first(given)[:, :0]


def _skip_streams(module: nn.Module, given: Given) -> Any:
    kwargs = given[1]
    found = [kwargs[name] for name in (HIDDEN, TEXT) if kwargs.get(name) is not None]
    return _returned(found)
