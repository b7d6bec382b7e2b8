"""Laws of exported models: every recipe trains one on, and what it writes is complete; inputs."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, tiny_vae
from conftest import tiny_unet as tiny_unconditional
from PIL import Image
from test_recipes import NAMES, tiny_dit, tiny_kl, tiny_unet
from test_train import pictures, same, stop_watch

from autofr import zoo
from autofr.errors import ModelError, UserError
from autofr.inputs import read_inputs
from autofr.measure.alignment import load_alignment, save_alignment
from autofr.measure.quality import Encoder, Features, Reference, load_features, save_features
from autofr.task import as_task
from autofr.zoo import export, glyphs, train
from autofr.zoo.recipe import Order, Trained, load_module
from autofr.zoo.recipes import diffusion, dit, emoji, inputs, ldm4, ldm4_sr, sd, text

KINDS = {
    "ldm4": "LDMPipeline",
    "dit": "DiTPipeline",
    "sd": "StableDiffusionPipeline",
    "ldm4-sr": "LDMSuperResolutionPipeline",
}
PARTS = {
    "ldm4": ("unet", "vqvae"),
    "dit": ("transformer", "vae"),
    "sd": ("unet", "vae"),
    "ldm4-sr": ("unet", "vqvae"),
}
GLYPHS_OF = {"ldm4": 9, "dit": 15, "sd": 12, "ldm4-sr": 13}  # that it is trained on
CHANNELS = 8  # of features: sets need more images than this
PLACES = {  # group: a subgroup of it that `dit` or `sd` draws
    "Smileys & Emotion": "cat-face",
    "Animals & Nature": "animal-mammal",
    "Food & Drink": "food-fruit",
    "Travel & Places": "sky & weather",
    "Symbols": "zodiac",
}
GLYPHS = [
    glyphs.Glyph("x", name, *list(PLACES.items())[number % len(PLACES)])
    for number, name in enumerate(NAMES[:15])
]


def pipe_of(kind: str) -> Any:
    """A tiny pipeline of a recipe's kind, with random weights."""
    torch.manual_seed(5)
    if kind == "ldm4":
        return make_pipe()
    if kind == "ldm4-sr":
        return ldm4_sr.build_pipe(tiny_unconditional(beside=3), tiny_vae())
    if kind == "dit":
        return dit.build_pipe(tiny_dit(), tiny_kl())
    tokenizer = text.build_tokenizer(NAMES)
    read = text.Reader(tokenizer, text.build_text_encoder(tokenizer))
    return sd.build_pipe(tiny_unet(), tiny_kl(), read)


def write(kind: str, folder: Path) -> Path:
    """What a recipe of this kind is told to train on."""
    pipe_of(kind).save_pretrained(folder)
    torch.manual_seed(6)
    whole = Reference.of(torch.randn(20, CHANNELS))
    save_features(folder, Features(Encoder(CHANNELS), whole, "tiny"))
    if kind == "sd":
        projection = torch.nn.Linear(text.WIDTH, text.WIDTH, bias=False)
        save_alignment(folder, Encoder(text.WIDTH), projection.weight)
    (folder / "expected.json").write_text('{"recipe": {"minutes": 7}}')
    return folder


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Few samples, few glyphs of noise, and a clock by which a training step takes a second."""
    stop_watch(patch)
    for name, value in {"SAMPLES": 20, "BATCH": 10, "FEW": 10}.items():
        patch.setattr(export, name, value)
    for recipe in (ldm4, dit, sd, ldm4_sr):
        patch.setattr(recipe, "STEPS", 2)
    patch.setattr(emoji, "COUNT", 4)
    patch.setattr(ldm4_sr, "COUNT", 1)
    patch.setattr(glyphs, "read_names", lambda: GLYPHS)
    patch.setattr(glyphs, "render", lambda asked: pictures(len(asked), 64))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in seconds."""
    prepare(monkeypatch)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a kind that is trained on; it is only read."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(kind, tmp_path_factory.mktemp("start") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="module", params=KINDS)
def exported(
    request: pytest.FixtureRequest,
    start: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """What the command line writes after two steps of training; named after the recipe."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        where = {"work": folder / "work", "out": folder}
        train.main(request.param, minutes=2 / 60, init=start(request.param), threads=1, **where)
    return folder / request.param


def expected(folder: Path) -> dict[str, Any]:
    """The scores of an exported folder."""
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def inputs_of(kind: str) -> list[dict[str, Any]]:
    """Inputs of one set of the real data, or a small picture."""
    if kind == "ldm4-sr":
        return [{"image": pictures(1, 16)[0]}]
    return [{"class_labels": 1}] if kind == "dit" else [{"prompt": GLYPHS[1].name}]


def test_an_exported_model_loads_and_draws(exported: Path) -> None:
    """The folder is the stock pipeline, and gives pictures for what it was trained on."""
    pipe = zoo.load(str(exported)).pipe
    assert type(pipe).__name__ == KINDS[exported.name]
    inputs = None if exported.name == "ldm4" else inputs_of(exported.name)
    drawn = as_task(pipe, inputs)(num_inference_steps=2, batch_size=2, output_type="np").images
    assert drawn.shape[0] == 2 and drawn.shape[-1] == 3
    if exported.name == "dit":
        assert pipe.get_label_ids(list(dit.CLASSES)) == list(range(len(dit.CLASSES)))


def test_its_scores_are_numbers(exported: Path) -> None:
    """Every score is finite; the recipe says what was trained, and what went before."""
    found = expected(exported)

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [one for part in value.values() for one in numbers(part)]
        return [value] if isinstance(value, int | float) else []

    assert all(map(math.isfinite, numbers(found)))
    assert found["samples"] == 20 and found["steps"] == 2
    assert {name for name in found if name.startswith("fid_")} >= {
        "fid_teacher", "fid_autoencoder", "fid_real_sample", "fid_two_halves",
    }  # fmt: skip
    assert found["recipe"]["after"] == {"minutes": 7}
    assert found["recipe"]["seconds"] == {"denoiser": 2.0}
    assert found["recipe"]["glyphs"] == GLYPHS_OF[exported.name]


def test_the_curve_ends_with_what_is_exported(exported: Path) -> None:
    """A moment on the way is scored besides the end, whose weights are those that lie there."""
    assert [point["minutes"] for point in expected(exported)["curve"]] == [0.0, 0.0]
    (checkpoint,) = (exported.parent / "work").glob(f"{exported.name}-*/denoiser.pt")
    saved = torch.load(checkpoint, weights_only=True)
    found = getattr(zoo.load(str(exported)).pipe, PARTS[exported.name][0]).state_dict()
    for name, value in saved["averaged"].items():
        assert torch.equal(found[name], value.half().float())


def test_its_card_has_no_gaps(exported: Path) -> None:
    """All numbers are filled in, and classes are named as they are."""
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "{" not in card and "}" not in card
    assert f"{expected(exported)['parameters']:,} parameters" in card
    if exported.name == "dit":
        assert re.findall(r"(\d) (\w+)", card.split("Classes, ")[1].split("A tenth")[0]) == [
            (str(number), name) for number, name in enumerate(dit.CLASSES)
        ]


def test_its_features_know_the_sets(exported: Path) -> None:
    """Inputs of one set are compared with the real images of it, others with all."""
    whole = load_features(exported)
    assert whole is not None and whole.encoder.num_features == CHANNELS
    if exported.name in ("ldm4", "ldm4-sr"):
        glyph_count = 9 if exported.name == "ldm4" else 15 - GLYPHS_OF["ldm4-sr"]
        assert whole.reference.count == glyph_count * ldm4.MILD["count"]
        return
    count = emoji.COUNT * expected(exported)["recipe"]["glyphs"]
    assert whole.reference.count == count
    part = load_features(exported, inputs_of(exported.name))
    assert part is not None and part.reference.count == emoji.COUNT * 3
    sets = expected(exported)["fid_by_set"]
    assert sum(one["samples"] for one in sets.values()) == 20
    assert part.name.endswith("animals" if exported.name == "dit" else "Animals & Nature")


def test_alignment_lies_beside_what_reads_prompts(exported: Path) -> None:
    """Its towers load with the pipe's own text encoder, and scored what was exported."""
    found = load_alignment(exported, zoo.load(str(exported)).pipe)
    assert (found is not None) == (exported.name == "sd")
    if found is not None:
        assert found(pictures(1, 64) / 2 + 0.5, ["red apple"]).shape == (1,)
        wanted = {"alignment_teacher", "alignment_real", "alignment_shuffled"}
        assert wanted <= expected(exported).keys()
        rows = read_inputs(exported / "inpaint.jsonl")
        assert rows[0].keys() == {"prompt", "image", "mask_image"}


def test_small_pictures_lie_beside_what_makes_them_large(exported: Path) -> None:
    """Searches read them; the drawing is compared with interpolation and the autoencoder."""
    assert (exported / "upscale.jsonl").is_file() == (exported.name == "ldm4-sr")
    if exported.name == "ldm4-sr":
        rows = read_inputs(exported / "upscale.jsonl", exported)
        assert len(rows) == 24 and {row["image"].size for row in rows} == {(16, 16)}
        wanted = {"psnr_teacher", "psnr_bicubic", "psnr_autoencoder", "fid_bicubic"}
        assert wanted <= expected(exported).keys()


def test_only_the_denoiser_is_trained_on(exported: Path, start: Callable[[str], Path]) -> None:
    """Autoencoder, text tower, tokenizer and features stay, so that scores keep their meaning."""
    before, after = (zoo.load(str(one)).pipe for one in (start(exported.name), exported))
    denoiser, autoencoder = PARTS[exported.name]
    halved = [getattr(pipe, autoencoder).half().state_dict() for pipe in (before, after)]
    assert same(*halved)
    states = [getattr(pipe, denoiser).half().state_dict() for pipe in (before, after)]
    assert not same(*states)
    kept, found = load_features(start(exported.name)), load_features(exported)
    assert kept is not None and found is not None
    assert same(kept.encoder.state_dict(), found.encoder.state_dict())
    if exported.name == "sd":
        assert same(*(pipe.text_encoder.half().state_dict() for pipe in (before, after)))
        assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        *((kind, "features.safetensors") for kind in KINDS),
        *((kind, f"{part}/config.json") for kind in KINDS for part in PARTS[kind]),
        ("sd", "alignment.safetensors"),
    ],
)
def test_an_incomplete_folder_is_not_trained_on(
    kind: str, missing: str, start: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is missing is named before any training."""
    shutil.copytree(start(kind), tmp_path / "init")
    (tmp_path / "init" / missing).unlink()
    where = {"work": tmp_path / "work", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=Path(missing.removesuffix("/config.json")).stem):
        train.main(kind, init=tmp_path / "init", threads=1, **where)
    assert not list(tmp_path.rglob("denoiser.pt")) and not (tmp_path / "out").exists()


def test_a_folder_of_another_recipe_is_not_trained_on(
    start: Callable[[str], Path], tmp_path: Path
) -> None:
    """What `dit` trains is no `sd`, and the other way round."""
    for kind, other in (("dit", "sd"), ("sd", "dit"), ("sd", "ldm4"), ("ldm4", "sd")):
        with pytest.raises(UserError, match=str(start(other))):
            train.main(kind, init=start(other), work=tmp_path, out=tmp_path / "out", threads=1)
    assert not list(tmp_path.rglob("denoiser.pt")) and not (tmp_path / "out").exists()


def test_a_set_of_few_images_is_not_exported(tmp_path: Path) -> None:
    """A set with no more images than channels is refused before anything is written."""
    trained = Trained(
        pipe_of("dit"),
        Encoder(CHANNELS),
        pictures(3 * CHANNELS, 64),
        seconds={},
        glyphs=1,
        steps=2,
        inputs=[{"class_labels": 0}],
        argument="class_labels",
        sets={"many": [0], "few": [1]},
        labels=[0] * 2 * CHANNELS + [1] * CHANNELS,
    )
    with pytest.raises(ModelError, match="set 'few' has 8 images, expected more than its 8"):
        export.export(tmp_path / "dit", "dit", trained, {})
    assert not any(tmp_path.iterdir())


def test_a_perfect_drawing_has_no_error() -> None:
    """PSNR ends at 100 dB: for the originals themselves, and where interpolation finds them."""
    flat, noise = torch.full((3, 3, 64, 64), 0.5), pictures(3, 64) / 2 + 0.5
    features = Features(Encoder(CHANNELS), Reference.of(torch.randn(20, CHANNELS)), "tiny")
    for originals, plain in ((flat, True), (noise, False)):
        small = [{"image": one} for one in ldm4_sr.shrink(originals * 2 - 1)]
        trained = Trained(
            pipe_of("ldm4-sr"), Encoder(CHANNELS), originals, {}, glyphs=1, steps=2, inputs=small
        )
        with torch.no_grad():
            found = export._restored(trained, originals, features, originals)
            worse = export._restored(trained, originals, features, originals * 0.9)
        assert found["psnr_teacher"] == 100 > worse["psnr_teacher"]
        assert (found["psnr_bicubic"] == 100) == plain and found["psnr_autoencoder"] < 100


def test_a_module_is_loaded_as_if_new(start: Callable[[str], Path], tmp_path: Path) -> None:
    """In float32, and without the note of where it lay."""
    kind = type(tiny_kl())
    module = load_module(kind, start("dit") / "vae")
    assert same(module.state_dict(), tiny_kl().state_dict()) and not module.training
    module.half().save_pretrained(tmp_path / "half")
    again = load_module(kind, tmp_path / "half")
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    again.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_checkpoints_lie_by_name(tmp_path: Path) -> None:
    """A folder is made when it is asked for, and found again."""
    order = Order(1.0, "cpu", 0, tmp_path / "deep" / "work")
    assert order.folder("dit") == order.folder("dit") == tmp_path / "deep" / "work" / "dit"
    assert order.folder("dit").is_dir()


def test_what_is_trained_on_has_checkpoints_of_its_own(
    start: Callable[[str], Path], tmp_path: Path
) -> None:
    """A finished training is not taken for that of its weights; the same weights resume."""
    shutil.copytree(start("dit"), tmp_path / "same")
    shutil.copytree(start("dit"), tmp_path / "other")
    tiny_dit().half().save_pretrained(tmp_path / "other" / "transformer")
    inits = (None, start("dit"), tmp_path / "same", tmp_path / "other")
    first, known, again, other = (
        Order(1.0, "cpu", 0, tmp_path / "work", init).folder("dit") for init in inits
    )
    assert known == again and len({first, known, other}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_go_on_at_half_the_rate(
    kind: str, start: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average begins with them: at the full rate it would lose what they know."""
    rates: list[float] = []
    monkeypatch.setattr(
        diffusion, "denoiser", lambda model, *given: rates.append(given[-1]) or model
    )
    recipe = {"ldm4": ldm4, "dit": dit, "sd": sd, "ldm4-sr": ldm4_sr}[kind]
    recipe.run(Order(1.0, "cpu", 0, tmp_path, start(kind)))
    assert rates == [recipe.RATE / 2] and Order(1.0, "cpu", 0, tmp_path).rate(1.0) == 1


def test_towers_that_are_trained_on_lie_on_the_device(
    start: Callable[[str], Path], tmp_path: Path
) -> None:
    """The denoiser reads what they say there."""
    _, towers = sd._towers(
        Order(1.0, "meta", 0, tmp_path, start("sd")), emoji.Domain([], torch.empty(0))
    )
    assert {value.device.type for value in towers.parameters()} == {"meta"}


# -- inputs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def domain() -> list[glyphs.Glyph]:
    """Nine glyphs in four subgroups, one of which is alone in its own."""
    places = ["a", "b", "a", "a", "b", "d", "c", "a", "d"]
    return [glyphs.Glyph("x", NAMES[i], "", place) for i, place in enumerate(places)]


def test_inputs_are_read_as_searches_read_them(domain: list[glyphs.Glyph], tmp_path: Path) -> None:
    """Prompts are names; every row has its picture of 64x64 pixels, and a mask with a hole."""
    found = inputs.files(domain, pictures(9), seed=0)
    assert found == inputs.files(domain, pictures(9), seed=0)
    assert found != inputs.files(domain, pictures(9), seed=1)
    for path, content in found.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    names = {glyph.name for glyph in domain}
    prompts, turned, filled = (
        read_inputs(tmp_path / name) for name in ("prompts.txt", "img2img.jsonl", "inpaint.jsonl")
    )
    assert len(prompts) == len(turned) == len(filled) == 9
    assert {row["prompt"] for row in prompts} == {row["prompt"] for row in filled} == names
    assert {row["prompt"] for row in turned} == names
    for row in [*turned, *filled]:
        assert row["image"].size == (64, 64) and np.ptp(np.asarray(row["image"])) > 0
    for row in filled:
        assert row["mask_image"].mode == "L" and row["mask_image"].size == (64, 64)
        assert {*np.unique(np.asarray(row["mask_image"]))} == {0, 255}
    assert all(Image.open(io.BytesIO(v)).mode in "RGBL" for k, v in found.items() if "png" in k)


def test_small_pictures_are_read_as_they_were(tmp_path: Path) -> None:
    """One row for each, in order, to the nearest of 256 levels; no more than a search asks for."""
    given = pictures(inputs.PICTURES + 3, 16)
    (tmp_path / "inputs").mkdir()
    for path, content in inputs.small(given).items():
        (tmp_path / path).write_bytes(content)
    rows = read_inputs(tmp_path / "upscale.jsonl", tmp_path)
    assert len(rows) == inputs.PICTURES == len([*tmp_path.glob("inputs/*.png")])
    for row, wanted in zip(rows, given, strict=False):
        read = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(read, wanted, atol=0.5 / 127, rtol=0)


def test_a_picture_is_turned_into_another_of_its_subgroup(domain: list[glyphs.Glyph]) -> None:
    """Never into itself, but where it is alone."""
    place = {glyph.name: glyph.subgroup for glyph in domain}
    found = inputs.files(domain, pictures(9), seed=0)
    lines = [found[name].decode().splitlines() for name in ("img2img.jsonl", "inpaint.jsonl")]
    for turned, filled in zip(
        *[[json.loads(line) for line in some] for some in lines], strict=True
    ):
        assert turned["image"] == filled["image"]
        assert place[turned["prompt"]] == place[filled["prompt"]]
        alone = place[turned["prompt"]] == "c"
        assert (turned["prompt"] == filled["prompt"]) == alone
