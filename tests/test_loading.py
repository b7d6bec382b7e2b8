"""Laws of what a command draws from: the task's pipeline, the model's own inputs, and defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from folders import PROMPTS, SIZE, picture, write
from PIL import Image
from test_search import tiny_pipe
from transformers.utils import logging

from autofr import zoo
from autofr.errors import TaskError
from autofr.loading import load, task_of
from autofr.runtime.sampler import draw

PICTURES = 3


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with inputs of its own for every task."""
    folder = write("sd", tmp_path_factory.mktemp("models") / "tiny")
    (folder / "prompts.txt").write_text("red apple\nblue car\n", encoding="utf-8")
    mask = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    mask[:SIZE] = 255
    (folder / "inputs").mkdir()
    Image.fromarray(mask).save(folder / "inputs" / "mask.png")
    rows = []
    for index in range(PICTURES):
        picture(index).save(folder / "inputs" / f"{index}.png")
        rows.append({"prompt": f"cat {index}", "image": f"inputs/{index}.png"})
    filled = [{**row, "mask_image": "inputs/mask.png"} for row in rows]
    for name, lines in (("img2img", rows), ("inpaint", filled)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without inputs."""
    return write("sd", tmp_path_factory.mktemp("models") / "bare")


def rows_of(pipe: Any) -> list[dict[str, Any]]:
    """What the first seeds are drawn with."""
    return [pipe.row(seed) for seed in range(pipe.rows)]


# -- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind", "title"),
    [
        (None, diffusers.StableDiffusionPipeline, "tiny"),
        ("text2img", diffusers.StableDiffusionPipeline, "tiny"),
        ("img2img", diffusers.StableDiffusionImg2ImgPipeline, "tiny-img2img"),
        ("inpaint", diffusers.StableDiffusionInpaintPipeline, "tiny-inpaint"),
    ],
)
def test_a_task_turns_the_pipeline(sd: Path, task: Any, kind: type, title: str) -> None:
    """The sibling is over the same components, has the folder's rows, and draws from them."""
    found = load(str(sd), threads=1, task=task)
    assert type(found.pipe._pipe) is kind and (found.name, found.title) == ("tiny", title)
    rows = rows_of(found.pipe)
    if task in (None, "text2img"):
        assert rows == [{"prompt": "red apple"}, {"prompt": "blue car"}]
    else:
        assert [row["prompt"] for row in rows] == ["cat 0", "cat 1", "cat 2"]
        assert [np.array_equal(row["image"], picture(i)) for i, row in enumerate(rows)] == [
            True
        ] * 3
        assert all(("mask_image" in row) == (task == "inpaint") for row in rows)
    assert draw(found.pipe, [0, 1], 2).images.isfinite().all()


@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint", "upscale"])
def test_a_pipeline_without_siblings_is_refused(tmp_path: Path, task: Any) -> None:
    """What diffusers has no such pipeline for is named."""
    tiny_pipe("ldm").save_pretrained(tmp_path / "tiny")
    with pytest.raises(TaskError, match=f"--task {task}: .*LDMPipeline"):
        load(str(tmp_path / "tiny"), threads=1, task=task)


@pytest.mark.parametrize("task", [None, "upscale"])
def test_small_pictures_are_the_upscalers_own(tmp_path: Path, task: Any) -> None:
    """Super resolution is a pipeline's own task: its folder's pictures are drawn from, in turn."""
    folder = write("upscaler", tmp_path / "tiny")
    picture(4).save(folder / "small.png")
    (folder / "upscale.jsonl").write_text('{"image": "small.png"}\n', encoding="utf-8")
    found = load(str(folder), threads=1, task=task)
    assert found.title == "tiny"
    assert [np.array_equal(row["image"], picture(4)) for row in rows_of(found.pipe)] == [True]
    assert draw(found.pipe, [0, 1], 2).images.isfinite().all()
    for other in ("text2img", "img2img"):
        with pytest.raises(TaskError, match=f"--task {other}: .*LDMSuperResolutionPipeline"):
            load(str(folder), threads=1, task=other)


def test_another_pipeline_is_looked_for_without_notices(tmp_path: Path) -> None:
    """Diffusers imports pipelines that this one does not need, and transformers with them."""
    folder = write("upscaler", tmp_path / "tiny")
    logging.set_verbosity_warning()
    with pytest.raises(TaskError, match="starts from image"):
        load(str(folder), threads=1)
    assert logging.get_verbosity() == logging.WARNING
    with pytest.raises(TaskError, match="--task img2img"):
        load(str(folder), threads=1, task="img2img")
    assert logging.get_verbosity() == logging.ERROR


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (diffusers.LDMPipeline, "text2img"),
        (diffusers.LDMSuperResolutionPipeline, "upscale"),
        (diffusers.StableDiffusionUpscalePipeline, "upscale"),
        (diffusers.IFImg2ImgSuperResolutionPipeline, "img2img"),
        (diffusers.StableDiffusionInpaintPipeline, "inpaint"),
    ],
)
def test_a_name_says_what_a_pipeline_is_for(kind: type, task: str) -> None:
    """What it starts from goes before how large its images are."""
    assert task_of(kind.__new__(kind)) == task


# -- inputs ---------------------------------------------------------------------------------------


def test_prompts_get_the_models_own_pictures_in_turn(sd: Path, tmp_path: Path) -> None:
    """A file of prompts says nothing of pictures: the model's are taken in turn."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"dog {index}\n" for index in range(PICTURES + 1)), encoding="utf-8")
    rows = rows_of(load(str(sd), threads=1, task="inpaint", inputs=file).pipe)
    assert [row["prompt"] for row in rows] == [f"dog {index}" for index in range(PICTURES + 1)]
    for index, row in enumerate(rows):
        assert np.array_equal(row["image"], picture(index % PICTURES))
        assert row["mask_image"].mode == "L"


def test_what_is_given_goes_before_the_models_own(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a picture, a picture of all calls, and prompts are taken as they are."""
    picture(7).save(tmp_path / "own.png")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "dog", "image": "own.png"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for given in ({"inputs": file}, {"call": ["image=own.png"]}, {"prompts": ["dog"]}):
        found = load(str(sd), threads=1, task="img2img", **given)
        first = rows_of(found.pipe)[0]
        assert np.array_equal(first["image"], picture(0 if "prompts" in given else 7)), given
        assert first["prompt"] == ("cat 0" if "call" in given else "dog")


def test_prompts_may_stand_in_the_command(sd: Path, tmp_path: Path) -> None:
    """They are drawn in turn; a file beside them is refused."""
    assert rows_of(load(str(sd), threads=1, prompts=["a", "b"]).pipe) == [
        {"prompt": "a"}, {"prompt": "b"},
    ]  # fmt: skip
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n", encoding="utf-8")
    with pytest.raises(TaskError, match="--prompt and --inputs"):
        load(str(sd), threads=1, prompts=["a"], inputs=file)


def test_pictures_that_nobody_has_are_asked_for(bare: Path, tmp_path: Path) -> None:
    """Without rows of its own a model starts from nothing: with prompts alone or without any."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n", encoding="utf-8")
    for inputs in (None, file):
        with pytest.raises(TaskError, match=r"starts from image and mask_image: give --inputs"):
            load(str(bare), threads=1, task="inpaint", inputs=inputs)


def test_rows_that_the_pipeline_does_not_take_are_left_alone(tmp_path: Path) -> None:
    """Prompts in the folder of a pipeline that draws from noise are not for it."""
    folder = tmp_path / "tiny"
    tiny_pipe("ldm").save_pretrained(folder)
    (folder / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    assert not hasattr(load(str(folder), threads=1).pipe, "_inputs")


# -- defaults -------------------------------------------------------------------------------------


def test_arguments_of_a_bundled_model_can_be_overridden(
    sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls have its own arguments, but for those that are given."""
    monkeypatch.setattr(zoo.Bundled, "folder", lambda self, name: sd)
    own = zoo.BUNDLED["sd"].call
    assert own["guidance_scale"] > 1
    assert load("sd", threads=1).pipe._call == own
    given = load("sd", threads=1, task="img2img", call=["guidance_scale=7", "strength=0.5"])
    assert given.pipe._call == {"guidance_scale": 7, "strength": 0.5}
    assert (given.name, given.title) == ("sd", "sd-img2img")
    assert load(str(sd), threads=1).pipe._call == {}


def test_classes_are_those_that_the_pipeline_names(tmp_path: Path) -> None:
    """Of a denoiser's thousand embeddings those with a label are drawn; without labels all."""
    folder = write("dit", tmp_path / "tiny")
    assert load(str(folder), threads=1).pipe.rows == 1000
    index = folder / "model_index.json"
    labels = {"id2label": {"2": "food, drink", "0": "face", "5": "flag"}}  # as in DiT-XL's own
    index.write_text(json.dumps(json.loads(index.read_text()) | labels), encoding="utf-8")
    found = load(str(folder), threads=1)
    assert rows_of(found.pipe) == [{"class_labels": label} for label in (0, 2, 5)]


def test_inputs_of_other_models_stay_theirs(bare: Path) -> None:
    """Without any inputs, prompts of our own are drawn."""
    rows = rows_of(load(str(bare), threads=1).pipe)
    assert len(rows) > len(PROMPTS) and {*rows[0]} == {"prompt"}
