"""Laws of what trained the bundled models: the loop, the images and the command line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from autofr.errors import UserError
from autofr.zoo import glyphs, loop, train
from autofr.zoo.recipes import ldm4

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
RECIPES = ["ldm4", "dit", "sd", "ldm4-sr"]
SECONDS = 10  # of training: as many steps, by the clock below


def stop_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put in a clock by which every training step takes one second."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of training are steps."""
    stop_watch(monkeypatch)


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
    calls, replace = itertools.count(1), Path.replace

    def killed(part: Path, path: Path) -> Path:
        if next(calls) == when:
            part.write_bytes(b"half a checkpo")
            raise KeyboardInterrupt
        return replace(part, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
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


def test_kept_moments_come_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they were trained: a device that is not here any more is no failure."""
    load = torch.load

    def elsewhere(path: Path, map_location: str | None = None, **more: Any) -> Any:
        return load(path, map_location=map_location or "meta", **more)

    monkeypatch.setattr(torch, "load", elsewhere)
    torch.save({"seconds": 1.0, "weights": {"a": torch.ones(2)}}, tmp_path / "line-1.pt")
    ((seconds, weights),) = loop.kept(tmp_path, "line")
    assert seconds == 1.0 and torch.equal(weights["a"], torch.ones(2))


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
    every = [glyphs.Glyph("x", group, group, "") for group in groups]
    images, calls = pictures(3, 8), []
    monkeypatch.setattr(glyphs, "read_names", lambda: every)
    monkeypatch.setattr(glyphs, "render", lambda asked: calls.append(asked) or images.clone())
    for _ in range(2):
        found, domain = ldm4.read_glyphs(tmp_path, "cpu")
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


# -- the command line -----------------------------------------------------------------------------


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    """The refusal names the recipes there are, before anything is made."""
    assert list(train.RECIPES) == RECIPES
    with pytest.raises(
        typer.BadParameter, match="no recipe for 'ldm5'; recipes: ldm4, dit, sd, ldm4-sr"
    ):
        train.main("ldm5", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("said", [None, "{", "[]", "{}"])
def test_what_no_recipe_exported_is_not_trained_on(
    name: str, said: str | None, tmp_path: Path
) -> None:
    """A folder that does not say what it was trained by is refused before any work."""
    if said is not None:
        (tmp_path / "expected.json").write_text(said)
    with pytest.raises(UserError, match=r"--init .* expected a folder that a recipe exported"):
        train.main(name, work=tmp_path / "work", init=tmp_path)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "recipes: ldm4, dit, sd, ldm4-sr"),
        (["ldm4", "--init", "nowhere"], "autofr: --init nowhere: expected a folder"),
        (["dit", "--device", "nonsense"], "autofr: --device nonsense: no such device; cpu or cuda"),
    ],
    ids=["recipe", "init", "device"],
)
def test_refusals_are_no_tracebacks(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the user can change is said on stderr, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as stop:
        train.command()
    shown = capsys.readouterr()
    assert stop.value.code == 2 and not shown.out
    assert said in shown.err and "Traceback" not in shown.err
    assert not any(tmp_path.iterdir())
