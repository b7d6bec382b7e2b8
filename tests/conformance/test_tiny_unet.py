"""The tiny U-Nets are what the conformance suite takes them for."""

from __future__ import annotations

import inspect

import pytest
import torch
from test_tiny_video import dead, output
from tiny_unet import UNET
from torch import nn

each = pytest.mark.parametrize("name", UNET)


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
    one, other = UNET[name].build(), UNET[name].build()
    assert type(one).__name__ == name.split()[0]
    assert not any(module.training for module in one.modules())
    assert sum(parameter.numel() for parameter in one.parameters()) < 2e6
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
    values, same = one.state_dict(), other.state_dict()
    assert [key for key in values if not torch.equal(values[key], same[key])] == []


@each
def test_latent_is_the_first_argument_and_alone_depends_on_the_seed(name: str) -> None:
    """A seed changes the latent, under the name of the class, and nothing else."""
    inputs, others = (UNET[name].inputs(seed, 0.5, 2) for seed in (0, 1))
    first = next(iter(inspect.signature(UNET[name].build().forward).parameters))
    assert next(iter(inputs)) == first
    assert [key for key in inputs if repr(inputs[key]) != repr(others[key])] == [first]


@each
def test_output_is_finite_and_of_the_shape_of_the_latent(name: str) -> None:
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


@each
def test_output_follows_the_latent_and_the_time(name: str) -> None:
    """Another latent or another time gives another output; the same gives the same."""
    tiny = UNET[name]
    model = tiny.build()
    first = output(model, tiny.inputs(0, 0.3, 1))
    assert torch.equal(output(model, tiny.inputs(0, 0.3, 1)), first)
    for seed, time in ((1, 0.3), (0, 0.7)):
        assert not torch.allclose(output(model, tiny.inputs(seed, time, 1)), first, atol=1e-3)


@each
def test_no_block_is_dead(name: str) -> None:
    """Each sub-layer of each down, mid and up block changes the output."""
    model = UNET[name].build()
    assert len(model.down_blocks) >= 2
    assert dead(model, UNET[name], levels(model)) == []
