"""Laws of memory: what a policy keeps is predicted, bounded and freed."""

from __future__ import annotations

import pytest
import torch
from conftest import make_pipe

from autofr.errors import BudgetError
from autofr.measure import profiling
from autofr.measure.masks import candidate_masks
from autofr.memory import Memory, parse_size, size
from autofr.mix import JUMP, KEY, Constant, HardSigmoid, Table
from autofr.policy import Keep
from autofr.runtime import sampler
from autofr.runtime.families import discover

N, BATCH = 6, 2
POINTS = {"a": 1000, "b": 300, "c": 20}
MASKS = {"large": ("a", "b"), "small": ("c",)}


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("200MB", 200_000_000), ("1.5GiB", 1.5 * 2**30), ("64 kb", 64_000), ("7B", 7)],
)
def test_sizes_are_read_with_their_units(text, bytes_):
    """Decimal and binary units, in either case."""
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "200", "MB", "-1MB", "0MB", "2TB", "1e3MB"])
def test_other_sizes_are_refused(text):
    """The message says what a size looks like."""
    with pytest.raises(BudgetError, match="such as 200MB"):
        parse_size(text)


def test_a_policy_keeps_the_points_of_the_masks_that_it_runs():
    """Every keyframe refreshes all points of the policy's masks, whichever comes next."""
    memory = Memory(POINTS, score=8)
    plain = Constant()
    assert memory.of((KEY, JUMP, KEY), MASKS, plain) == 8
    assert memory.of((KEY, "small", KEY), MASKS, plain) == 8 + 20
    assert memory.of((KEY, "small", "large"), MASKS, plain) == 8 + 1320
    held = HardSigmoid(tau=30, bias=0.9)  # λ = 0 turns the masks into jumps
    assert memory.of((KEY, "small", "large"), MASKS, held) == 8
    two = Table(weights=((), (1.0, 0.0), (), (0.5, 0.3, 0.2)))
    assert memory.of((KEY, "small", KEY, "small"), MASKS, two) == 2 * 8 + 20


def test_half_precision_halves_and_the_host_takes_all_but_the_scores():
    """The ways of storing kept tensors, in bytes on the device."""
    steps = (KEY, "large")
    of = [
        Memory(POINTS, 8, width, keep).of(steps, MASKS, Constant())
        for width, keep in [
            (4, Keep()),
            (4, Keep(dtype="float16")),
            (2, Keep(dtype="bfloat16")),
            (4, Keep(host=True)),
        ]
    ]
    assert of == [1308, 658, 1308, 8]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_scores_are_predicted_as_they_are_held(prediction, dtype):
    """What is held as noise is held in float32, whatever the network gives and the policy keeps."""
    pipe = make_pipe("ddim").to(getattr(torch, dtype))
    pipe.scheduler.register_to_config(prediction_type=prediction)
    masks = candidate_masks(discover(pipe.unet))
    found = profiling.profile(pipe, {}, steps=N, batch=BATCH, seeds=[0, 1])
    steps, keep = (KEY, "frdiff", JUMP, KEY, "frdiff", JUMP), Keep(dtype="bfloat16")
    policy = sampler.compose(
        pipe, "tiny", steps, masks, Constant(), replaces=N, latent_shape=(3, 8, 8), keep=keep
    )
    with sampler.reuse(pipe, policy) as patch:
        sampler.draw(pipe, range(BATCH), N)
    assert patch.run.peak_bytes == found.memory(keep).of(steps, masks, Constant())


def test_what_keeps_too_much_is_refused_with_its_size():
    """The refusal names both sizes."""
    memory = Memory({"a": 3 * 2**20}, 0, limit=2**20)
    with pytest.raises(BudgetError, match=r"3\.0 MiB between steps, more than the 1\.0 MiB"):
        memory.check((KEY, "m"), {"m": ("a",)}, Constant())
    assert [size(n) for n in (3 * 2**20, 2048, 100)] == ["3.0 MiB", "2.0 KiB", "100 B"]


KEEPS = [Keep(), Keep(dtype="float16"), Keep(dtype="bfloat16"), Keep(host=True)]


@pytest.fixture(scope="module")
def profiled():
    """What is measured of the tiny pipe."""
    return profiling.profile(make_pipe(), {}, steps=N, batch=BATCH, seeds=[0, 1])


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", ["frdiff", "branches", "cut0", "cut6"])
def test_the_prediction_is_what_a_run_keeps(pipe, profiled, name, keep):
    """Bytes predicted from a profile are the peak of a real run of that policy, on the device.

    Here the device is the host, so that storing there saves nothing.
    """
    masks = candidate_masks(discover(pipe.unet))
    steps = (KEY, name, JUMP, KEY, name, name)
    policy = sampler.compose(
        pipe, "tiny", steps, masks, Constant(), replaces=N, latent_shape=(3, 8, 8), keep=keep
    )
    with sampler.reuse(pipe, policy) as patch:
        sampler.draw(pipe, range(BATCH), N)
        assert patch.run.kept_bytes == 0
    assert patch.run.peak_bytes == profiled.memory(keep).of(steps, masks, Constant())


def test_a_keyframe_that_mixes_keeps_no_more(pipe, profiled):
    """It mixes with scores that are kept anyway: one more only where its row is the longest."""
    steps = (KEY, KEY, JUMP, JUMP, KEY, KEY)
    rows = [(), (), (0.0, 1.0, 0.5), (0.0, 1.0, 0.5), (), ()]
    kept = []
    for own in ((), (0.9, 0.05, 0.05), (0.9, 0.05, 0.04, 0.01)):
        mix = Table(weights=(*rows[:5], own))
        policy = sampler.compose(pipe, "tiny", steps, {}, mix, replaces=N, latent_shape=(3, 8, 8))
        with sampler.reuse(pipe, policy) as patch:
            sampler.draw(pipe, range(BATCH), N)
        assert patch.run.peak_bytes == profiled.memory().of(steps, {}, mix)
        kept.append(patch.run.peak_bytes // profiled.score_bytes)
    assert kept == [2, 2, 3]


@pytest.mark.parametrize("keep", KEEPS[1:])
def test_storing_kept_tensors_otherwise_changes_little(pipe, keep):
    """Half precision rounds what is reused; the host gives back the very numbers."""
    masks = candidate_masks(discover(pipe.unet))
    steps = (KEY, "branches", JUMP, KEY, "branches", "branches")

    def drawn(keep):
        policy = sampler.compose(
            pipe, "tiny", steps, masks, Constant(), replaces=N, latent_shape=(3, 8, 8), keep=keep
        )
        with sampler.reuse(pipe, policy):
            return sampler.draw(pipe, range(BATCH), N).latents

    plain, stored = drawn(Keep()), drawn(keep)
    distance = float((plain - stored).norm() / plain.norm())
    assert distance == 0 if keep.host else 0 < distance < 2e-2
