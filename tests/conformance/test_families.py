"""Laws of every supported denoiser class, on a tiny model of it."""

from __future__ import annotations

import pytest
from laws import ALL, counted, distance, patched, points_of, score, state

from autofr.measure.masks import candidate_masks
from autofr.runtime.families import FAMILIES, discover

each = pytest.mark.parametrize("name", ALL)
EQUAL = 1e-4  # float32: kept differences are added again

# Points that may be reused unnoticed: the model drops what they give behind its last block, or
# (the cross-attention of SVD, on a single token) it does not depend on the latents.
AGELESS = {
    "QwenImageTransformer2DModel": "txt_mlp#ff",
    "UNetSpatioTemporalConditionModel": "attn2#cross",
}


def test_every_family_is_tested() -> None:
    """The table of families and the tiny models name the same classes."""
    assert {name.split()[0] for name in ALL} == set(FAMILIES)


@each
def test_points_are_named_by_place_and_kind(name: str) -> None:
    """Every point's modules exist, and its name says where it is and what it is."""
    model, points = points_of(name)
    assert points
    paths = {path for path, _ in model.named_modules()}
    for point_name, point in points.items():
        assert point_name == point.name and point_name.endswith(f"#{point.kind}")
        assert {point.module, point.keep_at, point.restore_at, *point.skips} <= paths
        assert point.enter_at is None or point.enter_at in paths


@each
def test_every_point_keeps_the_laws(name: str) -> None:
    """A keyframe gives the bare model's bits; at its input and time any point is reused unnoticed.

    At another one reuse shows its age, and computes less than a full call (one point of each kind
    is counted).
    """
    model, points = points_of(name)
    inputs, later = ALL[name].inputs(0, 0.6, 1), ALL[name].inputs(1, 0.5, 1)
    bare = score(model, inputs)
    moved, full = counted(model, later)
    patch = patched(model, [[point] for point in points.values()])
    with patch.keyframe():
        assert distance(score(model, inputs), bare) == 0
    far, fresh, works = {}, set(), {}
    for index, (point, value) in enumerate(points.items(), start=1):
        with patch.reduced(index):
            far[point] = distance(score(model, inputs), bare)
            if value.kind in works:
                reused = score(model, later)
            else:
                reused, works[value.kind] = counted(model, later)
        if distance(reused, moved) < 1e-6:
            fresh.add(point)
    assert {point: d for point, d in far.items() if d > EQUAL} == {}
    assert {kind: work for kind, work in works.items() if work >= full} == {}
    assert [point for point in fresh if not point.endswith(AGELESS.get(name, "never"))] == []


@each
def test_candidate_masks_hold_together(name: str) -> None:
    """Each mask worth trying is the identity at equal input, and saves what its points save."""
    model, points = points_of(name)
    inputs = ALL[name].inputs(0, 0.5, 1)
    masks = candidate_masks(points)
    whole, full = counted(model, inputs)
    patch = patched(model, [[points[p] for p in mask] for mask in masks.values()])
    with patch.keyframe():
        score(model, inputs)
    for index, mask in enumerate(masks, start=1):
        with patch.reduced(index):
            reused, work = counted(model, inputs)
        assert distance(reused, whole) < EQUAL, mask
        assert work < full, mask


@each
def test_removal_leaves_nothing(name: str) -> None:
    """After removal every module is as it was, and draws the same bits."""
    model, points = points_of(name)
    inputs = ALL[name].inputs(0, 0.5, 2)
    bare, before = score(model, inputs), state(model)
    patch = patched(model, [[point] for point in points.values()])
    with patch.keyframe():
        score(model, inputs)
    patch.remove()
    assert state(model) == before
    assert patch.run.kept_bytes == 0
    assert distance(score(model, inputs), bare) == 0


@pytest.mark.parametrize("name", ["UNet2DConditionModel sd", "SanaTransformer2DModel"])
def test_a_class_in_no_table_is_searched_by_structure(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A look-alike of another name has the layers of its blocks as points, with a notice."""
    model, known = points_of(name)
    model.__class__ = type(f"My{type(model).__name__}", (type(model),), {})
    found = discover(model)
    assert found and set(found) <= set(known)
    assert f"My{name.split()[0]} is in no table" in caplog.text
    inputs = ALL[name].inputs(0, 0.5, 1)
    patch = patched(model, [list(found.values())])
    with patch.keyframe():
        whole = score(model, inputs)
    with patch.reduced(1):
        assert distance(score(model, inputs), whole) < EQUAL
