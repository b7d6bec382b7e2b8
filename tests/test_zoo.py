"""Laws of loading: bundled names, local folders, hub ids, and what is refused."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from folders import picture, write
from test_search import STEPS, tiny_pipe

from autofr import zoo
from autofr.errors import ModelError
from autofr.loading import load
from autofr.measure.quality import load_features
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser, name_of
from autofr.runtime.sampler import draw

KINDS = {
    "ldm4": {"conv", "branch", "attn", "stage"},
    "dit": {"attn", "ff", "block"},
    "sd": {"conv", "branch", "transformer", "attn", "cross", "ff", "stage"},
    "ldm4-sr": {"conv", "branch", "attn", "stage"},
}
bundled = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in zoo.installed(), reason=f"{name} is not bundled in this checkout"
            ),
        )
        for name in zoo.BUNDLED
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe("ldm").save_pretrained(path)
    return path


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Host names that were looked up; none can be."""
    names: list[Any] = []

    def lookup(host: Any, *_: Any, **__: Any) -> None:
        names.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return names


# -- bundled models -------------------------------------------------------------------------------


@bundled
def test_a_bundled_model_loads_by_its_name(name: str, called: list[Any]) -> None:
    """A bundled model needs no network, is what the registry says, and draws."""
    loaded = load(name, threads=1)
    assert (loaded.name, loaded.folder) == (name, zoo.HERE / name)
    assert name_of(loaded.pipe) == zoo.BUNDLED[name].pipeline
    assert {point.kind for point in discover(find_denoiser(loaded.pipe)).values()} == KINDS[name]
    assert next(find_denoiser(loaded.pipe).parameters()).dtype == torch.float32
    assert bool(draw(loaded.pipe, [0], 2).images.isfinite().all())
    assert called == []


@bundled
def test_a_bundled_model_has_its_features_and_expectations(name: str) -> None:
    """The extractor, its reference and the teacher's scores lie beside the weights."""
    scores = zoo.expected(name)
    assert scores["fid_teacher"] > 0 and scores["parameters"] > 0
    features = load_features(zoo.HERE / name)
    assert features is not None and name in features.name
    assert features(torch.rand(2, 3, 64, 64)).shape == (2, len(features.reference.mean))


def test_the_registry_says_what_each_model_is() -> None:
    """Every row is complete, and no name can be mistaken for a path or a hub id."""
    for name, model in zoo.BUNDLED.items():
        assert "/" not in name and not name.startswith(".")
        assert model.pipeline.endswith("Pipeline") and hasattr(diffusers, model.pipeline)
        assert model.summary and model.stands_for and model.steps > 1
        call = inspect.signature(getattr(diffusers, model.pipeline).__call__)
        assert {*model.call} <= {*call.parameters}
        assert name in KINDS


def test_a_bundled_model_that_is_not_installed_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its weights a bundled name is refused, and has no expectations."""
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    for name in zoo.BUNDLED:
        with pytest.raises(ModelError, match=f"{name} is missing from this installation"):
            zoo.load(name)
        assert zoo.expected(name) == {} and zoo.tasks(name) == []
    assert zoo.installed() == {}


def test_the_tasks_of_a_bundled_model_are_those_it_has_inputs_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for a task in the model's folder is what makes it one."""
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    (tmp_path / "sd").mkdir()
    for name in ("model_index.json", "inpaint.jsonl", "prompts.txt"):
        (tmp_path / "sd" / name).write_text("{}", encoding="utf-8")
    assert [*zoo.installed()] == ["sd"]
    assert zoo.tasks("sd") == ["text2img", "inpaint"]


# -- local folders --------------------------------------------------------------------------------


def test_a_local_folder_loads_as_it_was_saved(folder: Path, called: list[Any]) -> None:
    """A saved pipe draws the same after loading, takes its folder's name, and stays offline."""
    loaded = zoo.load(str(folder))
    assert (loaded.name, loaded.folder) == ("tiny", folder)
    again, before = draw(loaded.pipe, [3], STEPS), draw(tiny_pipe("ldm"), [3], STEPS)
    assert torch.equal(again.images, before.images)
    assert called == []


def test_a_local_folder_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is found from where the user is, with or without a slash at its end."""
    monkeypatch.chdir(folder.parent)
    assert {zoo.load(name).name for name in ("tiny", "./tiny", "tiny/")} == {"tiny"}
    monkeypatch.chdir(folder)
    assert zoo.load(".").name == "tiny"


def test_a_loaded_pipe_keeps_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawing shows no progress bar of its own: autofr tells the progress."""
    loaded = zoo.load(str(folder))
    capsys.readouterr()
    draw(loaded.pipe, [0], 2)
    assert capsys.readouterr() == ("", "")


def test_weights_come_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    """`dtype` is that of the denoiser's weights."""
    tiny_pipe("ddim").save_pretrained(tmp_path / "tiny")
    pipe = zoo.load(str(tmp_path / "tiny"), dtype="float16").pipe
    assert draw(pipe, [0], 2).latents.isfinite().all()
    assert {value.dtype for value in pipe.unet.parameters()} == {torch.float16}


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lmd4", "ldm", "LDM4"])
def test_a_near_name_is_offered(name: str) -> None:
    """A slip of the hand is answered with the name that was meant."""
    with pytest.raises(
        ModelError, match=rf"no model '{name}'; did you mean ldm4( or .*)?\? Bundled: ldm4"
    ):
        zoo.load(name)


@pytest.mark.parametrize("name", ["qqq", "./nowhere", "/nowhere/at/all", "a/b/c", "../x"])
def test_what_is_no_name_folder_or_id_is_answered_with_all_three(
    name: str, called: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal says how each kind of model is given, and asks no hub for a path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as refusal:
        zoo.load(name)
    said = str(refusal.value)
    assert f"no model {name!r}. Bundled: ldm4" in said
    assert "./my-pipeline" in said and "owner/name" in said
    assert called == []


def test_a_file_is_no_model(folder: Path) -> None:
    """A file inside a model's folder is not taken for a hub id."""
    with pytest.raises(ModelError, match="no model"):
        zoo.load(str(folder / "model_index.json"))


def test_a_folder_without_an_index_is_no_pipeline(folder: Path) -> None:
    """A component's folder is not a pipeline's."""
    with pytest.raises(ModelError, match=r"has no model_index\.json .*save_pretrained"):
        zoo.load(str(folder / "unet"))


@pytest.mark.parametrize(
    "error", [OSError("We couldn't connect to the hub\nto load this"), ConnectionError("refused")]
)
def test_an_unreachable_hub_names_what_needs_none(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the hub's client raises, the refusal is one line that names the bundled models."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(ModelError) as refusal:
        zoo.load("someone/some-model")
    said = str(refusal.value)
    assert said.startswith("someone/some-model: not found in the local cache")
    assert "the hub cannot be reached" in said and "ldm4" in said and "\n" not in said


@pytest.mark.parametrize(
    ("kind", "dtype"), [("ldm", "float16"), ("ldm", "bfloat16"), ("ddim", "bfloat16")]
)
def test_half_precision_is_refused_where_diffusers_cannot(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    """LDMPipeline gives its network float32 noise; DDIMPipeline gives numpy its pictures."""
    tiny_pipe(kind).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ModelError, match=f"--dtype {dtype}: {kind.upper()}Pipeline .*float32"):
        zoo.load(str(tmp_path / "tiny"), dtype=dtype)


def test_super_resolution_hands_its_pictures_to_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So half precision is float16 alone."""
    monkeypatch.chdir(tmp_path)
    picture(0).save("small.png")
    folder = str(write("upscaler", tmp_path / "tiny"))
    with pytest.raises(ModelError, match=r"--dtype bfloat16: LDMSuperResolutionPipeline .*numpy"):
        zoo.load(folder, dtype="bfloat16")
    pipe = load(folder, dtype="float16", threads=1, call=["image=small.png"]).pipe
    assert draw(pipe, [0], 2).images.isfinite().all()


@pytest.mark.parametrize("device", ["xpu", "meta"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    """Only what computes here, and can be waited for, is taken."""
    with pytest.raises(ModelError, match=f"--device {device}: .* sees no such device here"):
        zoo.load(str(folder), device=device)


def test_an_unknown_type_or_device_is_refused(folder: Path) -> None:
    """What can be asked for is said."""
    with pytest.raises(ModelError, match="--dtype int8: expected one of float32, float16"):
        zoo.load(str(folder), dtype="int8")
    with pytest.raises(ModelError, match="--device abacus: no such device"):
        zoo.load(str(folder), device="abacus")
