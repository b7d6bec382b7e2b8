"""The tiny image models are what the conformance suite takes them for."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_image import BLOCKS, IMAGE
from torch import nn

each = pytest.mark.parametrize("name", IMAGE)
WITH_VARIANCE = {"DiTTransformer2DModel", "PixArtTransformer2DModel", "HunyuanDiT2DModel"}


def tensor(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(value) if isinstance(value, list) else value


def predict(name: str, model: nn.Module, seed: int = 0, time: float = 0.5) -> torch.Tensor:
    with torch.no_grad():
        return tensor(model(**IMAGE[name].inputs(seed, time, 2))[0])


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@each
def test_build_gives_the_same_small_model_every_time(name: str) -> None:
    """Two builds are equal in weights and output, frozen, and below a million parameters."""
    one, other = IMAGE[name].build(), IMAGE[name].build()
    assert type(one).__name__ == name.split()[0]
    assert not one.training and not any(value.requires_grad for value in one.parameters())
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert torch.equal(predict(name, one), predict(name, other))
    assert sum(value.numel() for value in one.parameters()) < 1_000_000


@each
def test_latent_is_the_first_argument_and_alone_depends_on_the_seed(name: str) -> None:
    """A seed changes the latent, under the name of the class, and nothing else."""
    inputs, others = (IMAGE[name].inputs(seed, 0.5, 2) for seed in (0, 1))
    first = next(iter(inspect.signature(IMAGE[name].build().forward).parameters))
    assert next(iter(inputs)) == first
    assert [key for key in inputs if not same(inputs[key], others[key])] == [first]


@each
@pytest.mark.parametrize("batch", [1, 3])
def test_output_is_finite_and_has_the_shape_of_the_latent(name: str, batch: int) -> None:
    """Only classes with a learned variance return twice the channels."""
    inputs = IMAGE[name].inputs(0, 0.5, batch)
    shape = list(tensor(next(iter(inputs.values()))).shape)
    if name in WITH_VARIANCE:
        shape[1] *= 2
    with torch.no_grad():
        output = tensor(IMAGE[name].build()(**inputs)[0])
    assert list(output.shape) == shape
    assert output.isfinite().all()


@each
def test_output_depends_on_latent_and_time(name: str) -> None:
    """The same call gives the same output; another latent or time, another."""
    model = IMAGE[name].build()
    output = predict(name, model)
    assert torch.equal(output, predict(name, model))
    assert not torch.allclose(output, predict(name, model, seed=1), atol=1e-3)
    assert not torch.allclose(output, predict(name, model, time=0.7), atol=1e-3)


@each
def test_no_repeated_block_is_dead(name: str) -> None:
    """Other weights in any block change the output."""
    model = IMAGE[name].build()
    output = predict(name, model)
    for path in BLOCKS[name]:
        blocks = model.get_submodule(path)
        assert len(blocks) >= 2
        for block in blocks:
            kept = [value.clone() for value in block.parameters()]
            for value in block.parameters():
                value.mul_(1.2)
            assert not torch.allclose(output, predict(name, model), atol=1e-3)
            for value, old in zip(block.parameters(), kept, strict=True):
                value.copy_(old)
    assert torch.equal(output, predict(name, model))


def test_the_blocks_of_every_model_are_named() -> None:
    """`BLOCKS` has a row for every row of `IMAGE`."""
    assert list(BLOCKS) == list(IMAGE)
