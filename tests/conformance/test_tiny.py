"""The tiny video models and U-Nets are what the conformance suite takes them for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from tiny import Tiny
from tiny_unet import UNET
from tiny_video import BLOCKS, VIDEO
from torch import nn

BOTH = VIDEO | UNET
each = pytest.mark.parametrize("name", BOTH)
video = pytest.mark.parametrize("name", VIDEO)
unet = pytest.mark.parametrize("name", UNET)
CHANNEL_AXES = {"CogVideoXTransformer3DModel": 2, "LTXVideoTransformer3DModel": 2}  # else 1


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs)[0]


def parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Sub-layers of a block, those in lists one by one."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", module) for inner, module in parts(child))
        elif any(True for _ in child.parameters()):
            yield name, child


def dead(model: nn.Module, tiny: Tiny, blocks: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Name the sub-layers that can change without a change of the output."""
    inputs, generator = tiny.inputs(0, 0.5, 1), torch.Generator().manual_seed(0)
    found = []
    before = output(model, inputs)
    for block_name, block in blocks:
        for name, part in parts(block):
            kept = [parameter.data.clone() for parameter in part.parameters()]
            for parameter in part.parameters():  # by a factor, which leaves a zero what it is
                change = torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter * (1 + 0.3 * change)
            if torch.allclose(output(model, inputs), before, atol=1e-4):
                found.append(f"{block_name}.{name}")
            for parameter, value in zip(part.parameters(), kept, strict=True):
                parameter.data = value
    return found


def levels(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Down, mid and up blocks of a U-Net; some have no mid block."""
    found = [
        (f"{field}.{index}", block)
        for field in ("down_blocks", "up_blocks")
        for index, block in enumerate(model.get_submodule(field))
    ]
    mid = getattr(model, "mid_block", None)
    return found if mid is None else [*found, ("mid_block", mid)]


@each
def test_builds_the_same_model_twice(name: str) -> None:
    """Building is deterministic: float32, eval mode, below two million parameters."""
    one, other = BOTH[name].build(), BOTH[name].build()
    assert type(one).__name__ == name.split()[0]
    assert not any(module.training for module in one.modules())
    assert sum(parameter.numel() for parameter in one.parameters()) < 2e6
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
    values, same = one.state_dict(), other.state_dict()
    assert [key for key in values if not torch.equal(values[key], same[key])] == []


@each
def test_latent_is_the_first_argument_and_alone_depends_on_the_seed(name: str) -> None:
    """A seed changes the latent, under the name of the class, and nothing else."""
    inputs, others = (BOTH[name].inputs(seed, 0.5, 2) for seed in (0, 1))
    first = next(iter(inspect.signature(BOTH[name].build().forward).parameters))
    assert next(iter(inputs)) == first
    assert [key for key in inputs if repr(inputs[key]) != repr(others[key])] == [first]


@each
def test_output_follows_the_latent_and_the_time(name: str) -> None:
    """Another latent or another time gives another output; the same gives the same."""
    tiny = BOTH[name]
    model = tiny.build()
    first = output(model, tiny.inputs(0, 0.3, 1))
    assert torch.equal(output(model, tiny.inputs(0, 0.3, 1)), first)
    for seed, time in ((1, 0.3), (0, 0.7)):
        assert not torch.allclose(output(model, tiny.inputs(seed, time, 1)), first, atol=1e-3)


@video
def test_output_is_finite_and_of_the_shape_of_the_latent_of_a_video(name: str) -> None:
    """The output has the shape of the latent, with the class's own number of channels."""
    model = VIDEO[name].build()
    for batch in (1, 2):
        inputs = VIDEO[name].inputs(0, 0.5, batch)
        shape = list(next(iter(inputs.values())).shape)
        shape[CHANNEL_AXES.get(name, 1)] = model.config.out_channels or model.config.in_channels
        result = output(model, inputs)
        assert result.isfinite().all()
        assert list(result.shape) == shape


@unet
def test_output_is_finite_and_of_the_shape_of_the_latent_of_a_unet(name: str) -> None:
    """The output has the shape of the latent, with the class's own number of channels."""
    model = UNET[name].build()
    axis = 2 if name == "UNetSpatioTemporalConditionModel" else 1
    for batch in (1, 2):
        inputs = UNET[name].inputs(0, 0.5, batch)
        shape = list(inputs["sample"].shape)
        shape[axis] = model.config.get("out_channels", shape[axis])
        result = output(model, inputs)
        assert result.isfinite().all()
        assert list(result.shape) == shape


@video
def test_no_block_is_dead_of_a_video(name: str) -> None:
    """Each sub-layer of each repeated block changes the output."""
    model = VIDEO[name].build()
    blocks = [
        (f"{field}.{index}", block)
        for field in BLOCKS[name]
        for index, block in enumerate(model.get_submodule(field))
    ]
    assert min(len(model.get_submodule(field)) for field in BLOCKS[name]) >= 2
    assert dead(model, VIDEO[name], blocks) == []


@unet
def test_no_block_is_dead_of_a_unet(name: str) -> None:
    """Each sub-layer of each down, mid and up block changes the output."""
    model = UNET[name].build()
    assert len(model.down_blocks) >= 2
    assert dead(model, UNET[name], levels(model)) == []
