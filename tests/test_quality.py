"""Laws of image quality: Fréchet distance, paired differences, and errors to the teacher."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_pipe
from folders import dit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autofr.errors import ModelError
from autofr.measure.alignment import load_judge
from autofr.measure.quality import (
    Encoder,
    Features,
    Reference,
    Sets,
    _frechet,
    band_errors,
    fid_difference,
    load_features,
    psnr,
    relative_error,
    save_features,
    trimmed_mean,
)
from autofr.policy import Interval
from autofr.task import as_task

laws = settings(deadline=None, max_examples=30, derandomize=True, database=None)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features_of(reference):
    """Features that are the images themselves, flattened."""
    return Features(torch.nn.Linear(1, 1), reference, "test")


# -- FID -----------------------------------------------------------------------------------------


@laws
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_distance_is_a_symmetric_one(seed, size):
    """Equal statistics have distance 0, others more, and the order does not matter."""
    one = Reference.of(noise(50, size, seed=seed) @ noise(size, size, seed=seed + 1))
    two = Reference.of(noise(40, size, seed=seed + 2) + 1)
    scale = float(one.covariance.trace() + two.covariance.trace())
    assert _frechet(one, one) == pytest.approx(0, abs=1e-6 * scale)
    assert _frechet(one, two) == pytest.approx(_frechet(two, one), rel=1e-6)
    assert _frechet(one, two) > 0


variances = st.lists(st.floats(0.01, 4), min_size=3, max_size=3)
means = st.lists(st.floats(-3, 3), min_size=3, max_size=3)


@laws
@given(means, means, variances, variances, st.integers(2, 10**5), st.integers(2, 10**5))
def test_the_distance_of_diagonal_gaussians(m, n, v, w, some, many):
    """Σ (m - n)² + Σ (√v - √w)², whatever the numbers of images."""
    one, two = (
        Reference(torch.tensor(mean).double(), torch.diag(torch.tensor(var)).double(), count)
        for mean, var, count in ((m, v, some), (n, w, many))
    )
    shift = sum((a - b) ** 2 for a, b in zip(m, n, strict=True))
    spread = sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(v, w, strict=True))
    assert _frechet(one, two) == pytest.approx(shift + spread, rel=1e-4, abs=1e-4)


def test_statistics_are_mean_and_covariance():
    """`Reference.of` agrees with numpy in double precision."""
    some = noise(30, 4) * 3 + 100
    found = Reference.of(some)
    np.testing.assert_allclose(found.mean, some.double().numpy().mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(some.double().numpy().T))
    assert found.count == 30 and found.covariance.dtype == torch.float64


def test_fid_is_the_distance_to_the_reference():
    """Features of the real data themselves are at 0; worse ones are further away."""
    real = noise(200, 3)
    features = features_of(Reference.of(real))
    assert features.fid(real) == pytest.approx(0, abs=1e-6)
    assert features.fid(real) < features.fid(real + 0.2) < features.fid(real + 0.4)


def test_equal_features_differ_by_nothing():
    """The paired difference of equal features is 0 with an interval of no width."""
    some, features = noise(24, 3), features_of(Reference.of(noise(50, 3, seed=1)))
    assert fid_difference(features, some, some, 8) == Interval(value=0, low=0, high=0)


def test_the_difference_has_the_sign_of_the_harm():
    """Worse features are positive with their whole interval, better ones negative; seeds pair."""
    features = features_of(Reference.of(noise(200, 3)))
    good, bad = noise(64, 3, seed=1), noise(64, 3, seed=1) + 0.5
    found = fid_difference(features, good, bad, 40)
    assert 0 < found.low <= found.value <= found.high
    assert found.value == pytest.approx(features.fid(bad) - features.fid(good))
    assert fid_difference(features, bad, good, 40).high < 0
    assert fid_difference(features, good, bad, 40) == found  # resampling is seeded


# -- the extractor -------------------------------------------------------------------------------


def write(folder, sets=None, channels=4):
    """Feature files as they lie beside a model: half-precision weights, reference statistics."""
    torch.manual_seed(0)
    encoder = Encoder(channels).eval()
    with torch.no_grad():
        real = encoder(torch.rand(16, 3, 64, 64))
    one = Reference.of(real)
    save_features(folder, Features(encoder, one, "unnamed"), sets)
    return encoder, one


def test_feature_files_load(tmp_path):
    """What was written beside the model comes back, named after the folder."""
    encoder, one = write(tmp_path)
    found = load_features(tmp_path)
    assert found.name == f"bundled {tmp_path.name} features"
    assert found.reference.count == 16 and torch.equal(found.reference.mean, one.mean.float())
    images = torch.rand(70, 3, 64, 64)
    given = found(images)
    assert given.shape == (70, 4) and not given.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(given, encoder(images), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found(images[:3]), given[:3])  # batches do not matter


def test_a_model_without_feature_files_has_none(tmp_path):
    """Both files are needed."""
    assert load_features(tmp_path) is None
    write(tmp_path)
    (tmp_path / "reference.safetensors").unlink()
    assert load_features(tmp_path) is None


PARTS = {
    "food": (["pizza", "bread", "apple"], noise(9, 4)),
    "fruit": (["apple", "pear"], noise(8, 4, seed=1)),
    "animals": (["cat", "dog", "bee"], noise(7, 4, seed=2)),
}
ASKED = {
    "one value of one set": (["cat"], "animals"),
    "all values of a set": (["pizza", "bread", "apple", "pizza"], "food"),
    "a value of two sets": (["apple"], "fruit"),  # the smaller one
    "values that only the larger has": (["apple", "bread"], "food"),
    "values of two sets": (["pear", "cat"], None),
    "a value of none": (["cat", "robot"], None),
    "no rows": ([], None),
}


@pytest.mark.parametrize("case", ASKED)
def test_the_smallest_set_that_has_all_inputs_is_the_reference(tmp_path, case):
    """Samples are compared with real images of their own kind, and their name says so."""
    _, whole = write(tmp_path, Sets.of("prompt", PARTS))
    asked, name = ASKED[case]
    found = load_features(tmp_path, [{"prompt": prompt, "height": 64} for prompt in asked])
    wanted = Reference.of(PARTS[name][1]) if name else whole
    assert found.reference.count == wanted.count
    assert torch.equal(found.reference.mean, wanted.mean.float())
    assert torch.equal(found.reference.covariance, wanted.covariance.float())
    assert found.name == f"bundled {tmp_path.name} features" + (f", {name}" if name else "")


def test_labels_name_their_set_as_well(tmp_path):
    """Class labels are numbers, alone or in a list; rows that lack them are compared with all."""
    write(tmp_path, Sets.of("class_labels", {"food": ([2, 5], noise(9, 4))}))
    for rows, name in (
        ([{"class_labels": 2}, {"class_labels": 5}], ", food"),
        ([{"class_labels": [2, 5]}], ", food"),
        ([{"class_labels": [2, 3]}], ""),
        ([{"class_labels": 2}, {"prompt": "a pizza"}], ""),
        ([{}], ""),
    ):
        found = load_features(tmp_path, rows)
        assert found.name == f"bundled {tmp_path.name} features{name}"


def test_inputs_of_a_task_choose_the_reference(tmp_path):
    """What all calls share and what each seed draws choose alike, in the task's own words."""
    write(tmp_path, Sets.of("class_labels", {"food": ([2, 5], noise(9, 4))}))
    pipe = dit()
    for task, name in (
        (as_task(pipe, [{"class_labels": 2}, {"class_labels": 5}]), ", food"),
        (as_task(pipe, call={"class_labels": 2}), ", food"),
        (as_task(pipe), ""),
        (make_pipe(), ""),
    ):
        assert load_judge(tmp_path, task).features.name.endswith(f" features{name}")


def test_a_set_has_more_images_than_channels():
    """A covariance of fewer has no full rank: such a set is refused when it is made."""
    Sets.of("prompt", {"food": (["pizza"], noise(5, 4))})
    with pytest.raises(ModelError, match="'food' has 4 images, expected more than its 4 channels"):
        Sets.of("prompt", {"food": (["pizza"], noise(4, 4))})


def test_features_without_sets_leave_none_behind(tmp_path):
    """A model that is written again does not keep the sets of the one before."""
    write(tmp_path, Sets.of("prompt", PARTS))
    write(tmp_path)
    assert load_features(tmp_path, [{"prompt": "cat"}]).name.endswith(" features")


def broken(name, change):
    def damage(folder):
        path = folder / name
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def cut(folder):
    path = folder / "features.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def listed(folder, **changes):
    path = folder / "sets.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "a truncated file": cut,
    "an empty file": lambda folder: (folder / "reference.safetensors").write_bytes(b""),
    "text": lambda folder: (folder / "features.safetensors").write_text("version https://git-lfs"),
    "no mean": broken("reference.safetensors", lambda t: t.pop("mean")),
    "no count": broken("reference.safetensors", lambda t: t.pop("count")),
    "no head": broken("features.safetensors", lambda t: t.pop("head.bias")),
    "a layer missing": broken("features.safetensors", lambda t: t.pop("layers.0.weight")),
    "a layer of another size": broken(
        "features.safetensors", lambda t: t.update({"layers.0.weight": torch.zeros(2, 2)})
    ),
    "sets that are not JSON": lambda folder: (folder / "sets.json").write_text("{"),
    "sets of nothing known": lambda folder: listed(folder, argument="height"),
    "a set without values": lambda folder: listed(folder, sets={"food": []}),
    "a set without statistics": lambda folder: listed(folder, sets={"drinks": ["tea"]}),
    "a set of too few images": broken(
        "reference.safetensors", lambda t: t.update({"food/count": torch.tensor(4)})
    ),
    "a set of another size": broken(
        "reference.safetensors", lambda t: t.update({"food/mean": torch.zeros(5)})
    ),
    "statistics of another size": broken(
        "reference.safetensors",
        lambda t: t.update(mean=torch.zeros(5), covariance=torch.eye(5)),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_feature_files_are_refused(tmp_path, case):
    """A file that does not hold everything is a ModelError that names the folder."""
    write(tmp_path, Sets.of("prompt", PARTS))
    DAMAGE[case](tmp_path)
    with pytest.raises(ModelError, match="feature files are damaged") as error:
        load_features(tmp_path)
    assert str(tmp_path) in str(error.value)


# -- errors to the teacher -----------------------------------------------------------------------


@laws
@given(st.floats(0.001, 0.5))
def test_psnr_of_a_constant_shift(shift):
    """An error of d everywhere has -20 log10 d decibels."""
    images = torch.rand(2, 3, 8, 8) / 2
    assert psnr(images + shift, images) == pytest.approx(-20 * math.log10(shift), abs=1e-2)


def test_psnr_is_a_mean_over_images_with_a_ceiling():
    """Images count alike, and equal ones have 100 dB instead of infinity."""
    images = torch.full((2, 1, 4, 4), 0.5)
    assert psnr(images, images) == pytest.approx(100)
    shifted = images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(shifted, images) == pytest.approx(30, abs=1e-3)


@laws
@given(st.integers(0, 1000), st.floats(0.01, 10), st.floats(0.1, 100))
def test_relative_errors_are_per_sample_and_scale_free(seed, share, scale):
    """A sample that is off by a share of itself has that error, whatever its scale."""
    wanted = noise(3, 2, 4, 4, seed=seed)
    found = wanted * torch.tensor([1.0, 1 + share, 1 - share]).view(3, 1, 1, 1)
    errors = relative_error(scale * found, scale * wanted)
    assert errors == pytest.approx([0, share, share], rel=1e-3, abs=1e-6)


def waves():
    """A slow sine and a checkerboard, 16 x 16."""
    x = torch.arange(16)
    sine = torch.sin(2 * math.pi * x / 16).expand(16, 16)
    board = ((x[:, None] + x) % 2) * 2.0 - 1
    return sine, board


def test_bands_separate_low_and_high():
    """A slow sine is low-frequency error only, a checkerboard high-frequency error only."""
    wanted = noise(2, 3, 16, 16)
    sine, board = waves()
    low, high = band_errors(wanted + 0.1 * sine, wanted)
    assert low > 0.01 and high < 1e-6
    low, high = band_errors(wanted + 0.1 * board, wanted)
    assert low < 1e-6 and high > 0.01


def test_bands_leave_the_mean_out():
    """A change of brightness is in neither band, and equal images have no error."""
    wanted = noise(2, 3, 16, 16)
    assert band_errors(wanted + 0.3, wanted) == pytest.approx((0, 0), abs=1e-6)
    assert band_errors(wanted, wanted) == (0, 0)


def test_bands_measure_relative_energy():
    """Twice the image has an error of 1 in both bands; each band is relative to its own energy."""
    wanted = noise(2, 3, 16, 16)
    assert band_errors(2 * wanted, wanted) == pytest.approx((1, 1), rel=1e-6)
    sine, board = waves()
    image = (sine + 0.1 * board).expand(1, 1, 16, 16)
    found = (1.5 * sine + 0.12 * board).expand(1, 1, 16, 16)
    assert band_errors(found, image) == pytest.approx((0.5, 0.2), rel=1e-4)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_a_typical_value_has_no_ear_for_the_largest(values):
    """The largest eighth counts for nothing, however large it is; few values all count."""
    ordered = sorted(values)
    few = len(values) // 8
    kept = ordered[: len(values) - few]
    assert trimmed_mean(np.array(values)) == pytest.approx(np.mean(kept))
    wild = np.array(kept + [1e9] * few)
    assert trimmed_mean(wild) == trimmed_mean(np.array(values))
