"""Laws of tasks: what a pipe is given for a seed, and what is said of arguments that do not fit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from folders import dit, picture, upscaler
from PIL import Image

from autofr.errors import PolicyError, TaskError
from autofr.inputs import parse_call
from autofr.runtime.sampler import draw
from autofr.task import Task, as_task, with_starts


class PromptPipeline:
    """Draws from a prompt, and is strict about one argument."""

    scheduler = None

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error = error

    def __call__(
        self, prompt=None, image=None, num_inference_steps=50, generator=None, height=8,
        output_type="np", negative_prompt=None,
    ):  # fmt: skip
        if negative_prompt is not None and type(negative_prompt) is not type(prompt):
            raise TypeError("`negative_prompt` should be the same type to `prompt`")
        self.calls.append({"prompt": prompt, "image": image})
        if self.error:
            raise self.error
        if height % 8:
            raise ValueError(f"`height` has to be divisible by 8 but is {height}")
        count = len(prompt) if isinstance(prompt, list) else 1
        return SimpleNamespace(images=np.zeros((count, 8, 8, 3)))


class SketchImg2ImgPipeline(PromptPipeline):
    """Starts from a picture, as its name says."""


class SketchVideoToVideoPipeline:
    """Starts from frames."""

    def __call__(self, video=None, prompt=None, num_inference_steps=50, generator=None):
        raise AssertionError


class NoisePipeline:
    """Draws from noise alone."""

    def __call__(self, batch_size=1, num_inference_steps=50, generator=None, eta=0.0):
        raise AssertionError


ROWS = [{"prompt": "a cat"}, {"prompt": "a dog"}]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a picture in it."""
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- pictures -------------------------------------------------------------------------------------


def test_a_picture_in_a_call_is_read(there: Path) -> None:
    """`--call image=cat.png` gives the picture, not its name; other texts stay texts."""
    found = parse_call(["image=cat.png", "mask_image=cat.png", "prompt=cat.png"])
    assert (found["image"].mode, found["mask_image"].mode) == ("RGB", "L")
    assert found["image"].size == (8, 8) and found["prompt"] == "cat.png"


def test_a_picture_in_a_call_that_is_not_there_is_named(there: Path) -> None:
    """The refusal has the option and the file."""
    with pytest.raises(TaskError, match=r"--call image=dog.png: image dog.png cannot be read"):
        parse_call(["image=dog.png"])


def test_a_picture_in_a_call_starts_every_sample(there: Path) -> None:
    """The picture that all calls share is given once for each sample, beside its own prompt."""
    call = parse_call(["image=cat.png"])
    for rows in (ROWS, None):
        pipe = SketchImg2ImgPipeline()
        as_task(pipe, rows, call)(batch_size=2)
        (asked,) = pipe.calls
        assert len(asked["prompt"]) == 2 and asked["image"] == [call["image"]] * 2


def test_what_a_pipe_starts_from_is_asked_for() -> None:
    """Pictures are files of the inputs; videos are never read from files, so none is suggested."""
    with pytest.raises(TaskError, match=r'starts from image: .*"image": "cat.png"'):
        as_task(SketchImg2ImgPipeline())
    with pytest.raises(TaskError, match=r"starts from a video.*autofr.Task\(pipe") as error:
        as_task(SketchVideoToVideoPipeline())
    assert ".png" not in str(error.value)


# -- super resolution -----------------------------------------------------------------------------


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_small_picture_is_given_as_the_pipeline_itself_would() -> None:
    """For sides that it leaves alone: the pipeline on the picture draws what the task draws."""
    pipe, rows = upscaler(), [{"image": picture(seed).resize((32, 32))} for seed in range(2)]
    found = as_task(pipe, rows)(batch_size=2, num_inference_steps=2, generator=generators(2))
    for image, row, generator in zip(found.images, rows, generators(2), strict=True):
        alone = pipe(row["image"], 1, 2, generator=generator, output_type="np").images[0]
        assert image.shape == (64, 64, 3) and np.allclose(image, alone, atol=1e-5)


def test_small_pictures_are_one_for_each_sample() -> None:
    """A batch takes one picture a seed, of a size that the pipeline alone shrinks to nothing."""
    task = as_task(upscaler(), [{"image": picture(seed)} for seed in range(2)])
    both = task(batch_size=3, num_inference_steps=2, generator=generators(3)).images
    tensors = [{"image": torch.from_numpy(np.array(picture(seed))) / 127.5 - 1} for seed in (0, 1)]
    tensors = [{"image": row["image"].permute(2, 0, 1)} for row in tensors]
    same = as_task(task._pipe, tensors)(3, 2, generators(3)).images
    assert both.shape == (3, 32, 32, 3) and np.array_equal(both, same)
    shared = as_task(task._pipe, None, {"image": picture(1)})(3, 2, generators(3)).images
    assert np.array_equal(shared[1], both[1]) and not np.array_equal(shared[0], both[0])


def test_other_pictures_are_other_inputs() -> None:
    """A tensor is told from another by all of its values, not by those that are printed."""
    one, other = torch.zeros(2, 3, 64, 64)
    other[1, 32, 32] = 1
    first, second = (Task(upscaler(), [{"image": image}]).digest for image in (one, other))
    assert first == Task(upscaler(), [{"image": one.clone()}]).digest != second


def test_images_stand_beside_what_they_start_from() -> None:
    """The picture comes first, every pixel as many times as needed; noise alone stays alone."""
    images = torch.rand(3, 3, 32, 32)
    found = with_starts(Task(upscaler(), [{"image": picture(0)}]), [0, 1, 2], images)
    assert torch.equal(found[1::2], images)
    start = torch.from_numpy(np.array(picture(0)) / 255).permute(2, 0, 1).float()
    wanted = start.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(found[0::2], wanted.expand(3, 3, 32, 32))
    film = with_starts(Task(upscaler(), [{"image": picture(0)}]), [0], torch.rand(1, 3, 96, 32))
    torch.testing.assert_close(film[0, :, :32], wanted)  # beside the first of three frames
    assert bool((film[0, :, 32:] == 1).all())
    for pipe in (NoisePipeline(), Task(PromptPipeline(), ROWS)):
        assert with_starts(pipe, [0, 1, 2], images) is images


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([picture(0), picture(0).resize((32, 16))], "16x16, 32x16 pixels: expected one size"),
        ([picture(0).resize((17, 16))], "17x16 pixels: .* sides multiples of 2; resize"),
        ([3], "image: expected a picture, received 3"),
        ([torch.zeros(1, 3, 16, 16)], r"expected a tensor \(3, h, w\), received \(1, 3, 16, 16\)"),
        ([], 'starts from image: .*"image": "cat.png"'),
    ],
    ids=["sizes", "odd", "number", "batch", "none"],
)
def test_pictures_that_cannot_be_made_larger_are_refused(images: list[Any], said: str) -> None:
    """What the U-Net cannot take, or not in one call, is said before any call."""
    with pytest.raises(TaskError, match=said):
        as_task(upscaler(), [{"image": image} for image in images])


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option"),
    [("num_inference_steps", "--steps"), ("batch_size", "--batch"), ("generator", "--seed")],
)
@pytest.mark.parametrize("kind", [PromptPipeline, NoisePipeline])
def test_what_an_option_sets_is_answered_with_it(kind: Any, name: str, option: str) -> None:
    """Arguments that autofr gives itself are refused with the option for them."""
    with pytest.raises(TaskError, match=f"{option} sets {name}"):
        as_task(kind(), None, {name: 20})


def test_what_a_pipe_refuses_at_its_first_call_was_asked_for() -> None:
    """A bad value of an argument is an error of the user, with the pipe's name and its words."""
    pipe = Task(PromptPipeline(), ROWS, {"height": 9})
    with pytest.raises(TaskError, match=r"PromptPipeline .*divisible by 8 but is 9") as error:
        pipe()
    assert isinstance(error.value.__cause__, ValueError)


def test_what_goes_wrong_later_is_shown_as_it_is() -> None:
    """After a call that went well an error is no longer the arguments': it comes out itself."""
    inner = PromptPipeline()
    pipe = Task(inner, ROWS)
    pipe()
    inner.error = TypeError("a defect")
    with pytest.raises(TypeError, match=r"^a defect$"):
        pipe()


@pytest.mark.parametrize("error", [PolicyError("another step count"), RuntimeError("no memory")])
def test_other_errors_of_a_first_call_are_left_alone(error: Exception) -> None:
    """What autofr itself refuses, and what is no matter of arguments, keeps its class."""
    with pytest.raises(type(error), match=f"^{error}$"):
        Task(PromptPipeline(error), ROWS)()


# -- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))],
    ids=["copy", "deepcopy", "pickle"],
)  # fmt: skip
def test_a_task_can_be_copied(copied: Any) -> None:
    """A copy is a task that draws the same rows."""
    task = Task(PromptPipeline(), ROWS, {"height": 16})
    again = copied(task)
    assert type(again) is Task and again is not task
    assert again.rows == 2 and again.digest == task.digest
    assert again(batch_size=2).images.shape == (2, 8, 8, 3)


def test_a_pipe_that_copies_itself_is_copied_within_its_task() -> None:
    """How a pipe is copied is the pipe's business, but what is copied here is the task."""

    class OwnPipeline(PromptPipeline):
        def __deepcopy__(self, memo: Any) -> OwnPipeline:
            return OwnPipeline()

    task = Task(OwnPipeline(), ROWS)
    again = copy.deepcopy(task)
    assert type(again) is Task and again.scheduler is None
    assert again._pipe is not task._pipe


def test_rows_are_counted() -> None:
    """Rows that say nothing are none: all samples differ by their noise alone."""
    assert Task(PromptPipeline(), ROWS).rows == 2
    assert as_task(NoisePipeline(), None, {"eta": 1.0}).rows == 0


def test_a_seed_has_its_row_and_what_is_shared() -> None:
    """`row` is what a seed is drawn with; a shared argument goes before the row's own."""
    task = Task(PromptPipeline(), [{"prompt": "a cat"}, {"prompt": "a dog"}], {"height": 16})
    assert task.row(3) == {"prompt": "a dog", "height": 16}
    shared = Task(PromptPipeline(), ROWS, {"prompt": "a fox"})
    assert shared.row(0)["prompt"] == shared.row(1)["prompt"] == "a fox"


def test_a_shared_prompt_is_that_of_every_sample() -> None:
    """A batch is as large as it was asked for, though its samples have one prompt."""
    task = as_task(PromptPipeline(), None, {"prompt": "a cat"})
    assert len(task(batch_size=3).images) == 3 and len(task(batch_size=1).images) == 1
    assert [call["prompt"] for call in task.calls] == [["a cat"] * 3, "a cat"]


def test_a_shared_negative_prompt_is_that_of_every_sample() -> None:
    """Stable Diffusion takes as many of them as prompts, or refuses."""
    task = as_task(PromptPipeline(), ROWS, {"negative_prompt": "blurry"})
    assert [len(task(batch_size=count).images) for count in (3, 1)] == [3, 1]


@pytest.mark.parametrize("label", [2, [2]])
def test_a_shared_label_is_that_of_every_sample(label: Any) -> None:
    """The images are those that a row with this label gives."""
    shared, rows = as_task(dit(), None, {"class_labels": label}), Task(dit(), [{"class_labels": 2}])
    found, wanted = (draw(task, [0, 1, 2], 2).images for task in (shared, rows))
    assert len(found) == 3 and torch.equal(found, wanted)


def test_attributes_that_nobody_has_are_missing() -> None:
    """Names that neither task nor pipe has are missing attributes, also while a copy is made."""
    assert not hasattr(Task.__new__(Task), "_pipe")
    assert not hasattr(Task(PromptPipeline(), ROWS), "unet")
    assert Task(PromptPipeline(), ROWS).calls == []
