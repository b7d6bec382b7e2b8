"""Laws of the recipe that trained the bundled models: its loop, images, stages and export."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import ddim, tiny_unet, tiny_vae

from autofr import zoo
from autofr.errors import UserError
from autofr.quality import Encoder, load_features
from autofr.zoo import export, glyphs, loop, train

WORDS = """\
# group: Smileys & Emotion
1F600 ; fully-qualified # 😀 E1.0 grinning face
263A ; unqualified # ☺ E0.6 smiling face
# group: People & Body
1F44B ; fully-qualified # 👋 E0.6 waving hand
1F44B 1F3FB ; fully-qualified # 👋🏻 E1.0 waving hand: light skin tone
1F468 1F3FF 200D 1F33E ; fully-qualified # 👨🏿‍🌾 E4.0 man farmer: dark skin tone
1F468 200D 1F33E ; fully-qualified # 👨‍🌾 E4.0 man farmer
1F3FB ; component # 🏻 E1.0 light skin tone
"""
SECONDS = 10  # of training: as many steps, by the clock below


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every training step takes one second."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


def seeded(seed: int) -> torch.Generator:
    """A generator at its start."""
    return torch.Generator().manual_seed(seed)


def pictures(count: int, side: int = 128) -> torch.Tensor:
    """Random images in [-1, 1]."""
    return 2 * torch.rand(count, 3, side, side, generator=seeded(0)) - 1


# -- the loop -------------------------------------------------------------------------------------


def fit(
    work: Path,
    *,
    start: int = 0,
    seed: int = 0,
    stop: int = 99,
    seconds: float = SECONDS,
    seen: Callable[[int, float, int, torch.nn.Module], None] = lambda *_: None,
    **more: float,
) -> dict[str, torch.Tensor]:
    """Train a line, from weights of `start`, until it is interrupted before step `stop`."""
    torch.manual_seed(start)
    line = torch.nn.Linear(3, 2)

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        seen(step, fraction, generator.initial_seed(), line)
        given = torch.randn(8, 3, generator=generator)
        return (line(given) - given[:, :2]).square().mean()

    done = loop.train("line", line, loss, seconds, work, seed=seed, lr=0.1, save_every=2, **more)
    assert done is line and not line.training
    return {name: value.clone() for name, value in line.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same numbers, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def saved(work: Path) -> dict:
    """The checkpoint."""
    return torch.load(work / "line.pt", weights_only=True)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty work folders."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "other"


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    folders: tuple[Path, Path], stop: int, ema: float
) -> None:
    """The checkpoint holds all that decides the rest: weights, optimiser, average and time."""
    whole, broken = folders
    with pytest.raises(KeyboardInterrupt):
        fit(broken, stop=stop, ema=ema)
    assert (broken / "line.pt").exists() == (stop > 3)  # kept every three steps
    start = 7 if stop > 3 else 0  # where there is a checkpoint, the module's weights do not count
    assert same(fit(broken, start=start, ema=ema), fit(whole, ema=ema))


@pytest.mark.parametrize("when", [2, 3, 4])
def test_a_killed_save_leaves_the_checkpoint_before(
    folders: tuple[Path, Path], when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the process dies while it writes, the old checkpoint is whole, and is resumed."""
    whole, broken = folders
    calls, write = itertools.count(1), torch.save

    def killed(state: dict, path: Path) -> None:
        if next(calls) == when:
            path.write_bytes(b"half a checkpo")
            raise KeyboardInterrupt
        write(state, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        fit(broken)
    assert saved(broken)["step"] == 3 * (when - 1)
    assert same(fit(broken, start=7), fit(whole))


def test_a_seed_decides_the_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The same seed gives the same weights, another one others."""
    one, other = folders
    weights = fit(one, seed=3)
    assert same(weights, fit(other, seed=3))
    assert not same(weights, fit(tmp_path, seed=4))


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    """The same call again only reads the checkpoint; more time trains on from there."""
    weights = fit(tmp_path)
    assert same(fit(tmp_path, start=7, stop=SECONDS), weights)
    steps: list[int] = []
    fit(tmp_path, seconds=SECONDS + 2, seen=lambda step, *_: steps.append(step))
    assert steps == [SECONDS, SECONDS + 1]


def test_the_loss_is_told_the_step_and_the_time_used(tmp_path: Path) -> None:
    """Steps are counted from 0, time is a share, and each step has random numbers of its own."""
    told: list[tuple[int, float]] = []
    seeds: list[int] = []

    def seen(step: int, fraction: float, seed: int, line: torch.nn.Module) -> None:
        assert line.training
        told.append((step, fraction))
        seeds.append(seed)

    fit(tmp_path, seen=seen)
    assert told == [(i, i / SECONDS) for i in range(SECONDS)]
    assert len({*seeds}) == SECONDS


def test_the_average_is_what_is_returned(tmp_path: Path) -> None:
    """With `ema` the weights are the running average of those after each step."""
    path: list[torch.Tensor] = []
    found = fit(tmp_path, ema=0.5, seen=lambda *now: path.append(now[3].weight.detach().clone()))
    end = saved(tmp_path)["module"]["weight"]
    average = path[0]
    for step, weight in enumerate([*path[1:], end], start=1):
        average = torch.lerp(average, weight, 1 - min(0.5, (1 + step) / (10 + step)))
    torch.testing.assert_close(found["weight"], average)
    assert not torch.allclose(average, end)


def test_without_an_average_the_last_weights_are_returned(tmp_path: Path) -> None:
    """What is returned is what the checkpoint holds."""
    assert same(fit(tmp_path), saved(tmp_path)["module"])


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    """It rises to the peak, then falls to the floor, without a jump, and stays there."""
    rates = [loop.learning_rate(i / 1000, 2.0, warmup=0.1, floor=0.05) for i in range(1001)]
    assert rates[0] > 0 and max(rates) == rates[100] == 2.0
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.021
    assert rates[-1] == pytest.approx(0.1)
    assert loop.learning_rate(1.5, 2.0, floor=0.05) == pytest.approx(0.1)


# -- images ---------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """A few lines of emoji-test.txt."""
    path = tmp_path / "emoji-test.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


def test_names_are_read_without_skin_tones(names: Path) -> None:
    """Every fully-qualified emoji is listed with its group, but for its skin-tone variants."""
    found = glyphs.read_names(names)
    assert [glyph.name for glyph in found] == ["grinning face", "waving hand", "man farmer"]
    assert [glyph.text for glyph in found] == ["😀", "👋", "👨‍🌾"]
    assert {glyph.group for glyph in found[1:]} == {"People & Body"}
    assert glyphs.read_names(names, ("Smileys & Emotion",)) == found[:1]


def test_what_is_not_installed_is_named(names: Path, tmp_path: Path) -> None:
    """Without the list of names or the font, the refusal says which package has it."""
    with pytest.raises(UserError, match=r"none\.txt not found.*apt-get install unicode-data"):
        glyphs.read_names(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"none\.ttf not found.*fonts-noto-color-emoji"):
        glyphs.render(glyphs.read_names(names), tmp_path / "none.ttf")


@pytest.mark.skipif(not glyphs.FONT.is_file(), reason="Noto Color Emoji is not installed")
def test_glyphs_are_drawn_on_white(names: Path) -> None:
    """Each glyph is a coloured picture in [-1, 1] whose corners are white."""
    drawn = glyphs.render(glyphs.read_names(names), size=32)
    assert drawn.shape == (3, 3, 32, 32)
    assert -1 <= float(drawn.min()) < 0 and float(drawn.max()) == 1
    assert bool((drawn[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 1).all())


def test_glyphs_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work folder keeps all images; the domain are those of ldm4's groups."""
    groups = ("Food & Drink", "Flags", "Smileys & Emotion")
    every = [glyphs.Glyph("x", group, group) for group in groups]
    images, calls = pictures(3, 8), []
    monkeypatch.setattr(glyphs, "read_names", lambda: every)
    monkeypatch.setattr(glyphs, "render", lambda asked: calls.append(asked) or images.clone())
    for _ in range(2):
        found, domain = train.read_glyphs(tmp_path, "cpu")
        assert float((found - images).abs().max()) <= 0.5 / 127.5 + 1e-6
        assert torch.equal(domain, found[[0, 2]])
    assert calls == [every]


@pytest.mark.parametrize("size", [16, 64])
def test_augmented_images_keep_their_range(size: int) -> None:
    """Views have the size asked for, stay in [-1, 1], and depend on the generator alone."""
    images = pictures(5, 64).sign()
    strong = dict(size=size, rotate=25.0, scale=(0.6, 1.1), shift=0.1)
    views = glyphs.augment(images, seeded(1), **strong)
    assert views.shape == (5, 3, size, size)
    assert float(views.min()) >= -1 - 1e-5 and float(views.max()) <= 1 + 1e-5
    assert torch.equal(views, glyphs.augment(images, seeded(1), **strong))
    assert not torch.equal(views, glyphs.augment(images, seeded(2), **strong))


def test_augmentation_is_on_white_and_may_do_nothing() -> None:
    """Nothing dark comes in from outside; without any motion an image is only shrunk."""
    white = torch.ones(4, 3, 32, 32)
    moved = glyphs.augment(white, seeded(0), size=32, rotate=45.0, scale=(0.5, 0.6), shift=0.3)
    torch.testing.assert_close(moved, white)
    still = glyphs.augment(pictures(2, 32), seeded(0), 16, rotate=0, scale=(1, 1), shift=0)
    small = torch.nn.functional.avg_pool2d(pictures(2, 32), 2)
    torch.testing.assert_close(still, small, atol=1e-4, rtol=0)


# -- stages ---------------------------------------------------------------------------------------


def test_standardised_latents_have_mean_0_and_deviation_1() -> None:
    """The latents are standard, and what they and the codes decode to is what it was."""
    vae, images = tiny_vae(), pictures(8, 32)

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents, force_not_quantize=True).sample

    with torch.no_grad():
        latents, codes = vae.encode(images).latents, vae.quantize.embedding.weight.clone()
        patch = codes.T.reshape(1, 3, 4, 4)
        before = decoded(latents), decoded(patch)
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        train.standardise(vae, mean, std)
        found = vae.encode(images).latents
        torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.quantize.embedding.weight, (codes - mean) / std)
        patch = vae.quantize.embedding.weight.T.reshape(1, 3, 4, 4)
        torch.testing.assert_close((decoded(found), decoded(patch)), before, atol=1e-4, rtol=1e-4)


def test_the_codebook_is_filled_with_latents() -> None:
    """Each code lies at one of the data's latents, but for a little noise; no two are the same."""
    vae, images = tiny_vae(), pictures(4, 32)
    train.fill_codebook(vae, images, seeded(0))
    with torch.no_grad():
        latents = vae.encode(images).latents.permute(0, 2, 3, 1).reshape(-1, 3)
    codes = vae.quantize.embedding.weight
    nearest = torch.cdist(codes, latents).min(1).values
    assert float(nearest.max()) < 5 * 0.05 * float(latents.std())
    assert len(codes.unique(dim=0)) == 16


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_times_stay_inside_the_schedule(count: int, steps: int) -> None:
    """Any number of timesteps of any schedule are whole, and exist."""
    times = train.draw_times(count, steps, seeded(count))
    assert times.shape == (count,) and times.dtype == torch.long
    assert int(times.min()) >= 0 and int(times.max()) < steps


def test_half_of_the_times_are_uniform() -> None:
    """The first half is spread evenly; the second is thin at both ends, around 0.45."""
    even, middle = train.draw_times(40_000, 1000, seeded(0)).double().split(20_000)
    assert bool(((even.histc(10, 0, 1000) - 2000).abs() < 200).all())
    assert float(middle.median()) == pytest.approx(450, abs=10)
    ends = middle.histc(10, 0, 1000)[[0, -1]]
    assert bool((ends < 500).all())


def test_views_and_latents_belong_together() -> None:
    """`count` views of each glyph come with their latents; the same seed gives them again."""
    vae, images = tiny_vae(), pictures(3)
    views, latents = train.encode(vae, images, seed=5, count=2, rotate=4.0)
    assert views.shape == (6, 3, 64, 64) and latents.shape == (6, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(views).latents, latents)
    assert torch.equal(train.encode(vae, images, seed=5, count=2, rotate=4.0)[0], views)


def test_the_autoencoder_is_a_stock_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codebook is filled once, also over an interruption, and nothing else stays in it."""
    monkeypatch.setattr(train, "build_autoencoder", lambda: tiny_vae().requires_grad_(True))
    fills, fill = [], train.fill_codebook
    monkeypatch.setattr(train, "fill_codebook", lambda *a: fills.append(1) or fill(*a))
    found = [train.autoencoder(pictures(4), seconds, tmp_path, seed=0) for seconds in (3, 4, 4)]
    assert fills == [1]
    assert all(vae.state_dict().keys() == tiny_vae().state_dict().keys() for vae in found)
    assert same(found[1].state_dict(), found[2].state_dict())
    assert not same(found[0].state_dict(), found[1].state_dict())


# -- export ---------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model as the recipe exports it."""
    for name, value in {"SAMPLES": 4, "BATCH": 2, "STEPS": 2}.items():
        monkeypatch.setattr(export, name, value)
    torch.manual_seed(2)
    modules = tiny_unet(), tiny_vae(), ddim(), Encoder()
    export.export(tmp_path / "tiny", *modules, pictures(6, 64), {"minutes": 1})
    return tmp_path / "tiny"


def test_an_exported_model_loads_with_its_features(exported: Path) -> None:
    """The folder is a pipeline with features, reference, expectations, and a card without gaps."""
    loaded = zoo.load(str(exported))
    assert type(loaded.pipe).__name__ == "LDMPipeline"
    features = load_features(exported)
    assert features is not None and features.reference.count == 6
    expected = json.loads((exported / "expected.json").read_text())
    assert expected["samples"] == 4 and expected["recipe"] == {"minutes": 1}
    scores = [value for name, value in expected.items() if name.startswith("fid_")]
    assert len(scores) == 4 and all(map(math.isfinite, scores))
    assert "{" not in (exported / "README.md").read_text(encoding="utf-8")


def test_an_exported_denoiser_is_trained_on(exported: Path, tmp_path: Path) -> None:
    """Training on changes the denoiser; autoencoder and features stay what they were."""
    before = zoo.load(str(exported)).pipe
    trained = train.train_on(exported, pictures(1), 2 / 60, tmp_path, seed=0)
    assert trained.seconds == {"denoiser": 2.0}
    assert not same(trained.unet.state_dict(), before.unet.state_dict())
    assert same(trained.vae.state_dict(), before.vqvae.state_dict())
    kept = load_features(exported)
    assert kept is not None and same(trained.encoder.state_dict(), kept.encoder.state_dict())


def test_what_cannot_be_trained_is_refused(exported: Path, tmp_path: Path) -> None:
    """An unknown recipe, and a folder without features, are refused before any training."""
    with pytest.raises(typer.BadParameter, match="no recipe for 'ldm5'; recipes: ldm4"):
        train.main("ldm5", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    (exported / "features.safetensors").unlink()
    with pytest.raises(typer.BadParameter, match=r"no features\.safetensors beside the weights"):
        train.train_on(exported, pictures(1), 1, tmp_path, seed=0)
