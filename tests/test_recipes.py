"""Laws of the recipes' stages: autoencoders, times, texts and denoisers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from conftest import tiny_vae
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_train import pictures, same, seeded, stop_watch

from autofr.errors import UserError
from autofr.zoo import glyphs
from autofr.zoo.recipe import Order
from autofr.zoo.recipes import autoencoder, diffusion, dit, emoji, ldm4, ldm4_sr, sd, text

COLOURS = ("red", "blue", "green", "bright yellow", "dark", "little", "old", "wild")
THINGS = ("automobile", "cat: with joy", "bicycle", "house", "apple", "moon’s face")
NAMES = [f"{colour} {thing}" for colour, thing in itertools.product(COLOURS, THINGS)]
STEPS = 10  # of a training; each takes a second, by the clock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of training are steps."""
    stop_watch(monkeypatch)


def tiny_kl() -> diffusers.AutoencoderKL:
    """f = 4, four latent channels, otherwise `tiny_vae`."""
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        latent_channels=autoencoder.CHANNELS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).eval()


def tiny_dit() -> diffusers.DiTTransformer2DModel:
    """Two blocks, otherwise as `dit`."""
    torch.manual_seed(3)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=autoencoder.CHANNELS,
        out_channels=autoencoder.CHANNELS,
        num_layers=2,
        sample_size=autoencoder.LATENT,
        patch_size=2,
        num_embeds_ada_norm=dit.NOBODY,
    )


def tiny_unet() -> diffusers.UNet2DConditionModel:
    """Two levels, otherwise as `sd`."""
    torch.manual_seed(4)
    return diffusers.UNet2DConditionModel(
        sample_size=autoencoder.LATENT,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=text.WIDTH,
    )


def latents(count: int) -> torch.Tensor:
    """Random latents of `dit` and `sd`."""
    return torch.randn(count, autoencoder.CHANNELS, 16, 16, generator=seeded(1))


# -- ldm4 -----------------------------------------------------------------------------------------


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
        ldm4.standardise(vae, mean, std)
        found = vae.encode(images).latents
        torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.quantize.embedding.weight, (codes - mean) / std)
        patch = vae.quantize.embedding.weight.T.reshape(1, 3, 4, 4)
        torch.testing.assert_close((decoded(found), decoded(patch)), before, atol=1e-4, rtol=1e-4)


def test_the_codebook_is_filled_with_latents() -> None:
    """Each code lies at one of the data's latents, but for a little noise; no two are the same."""
    vae, images = tiny_vae(), pictures(4, 32)
    ldm4.fill_codebook(vae, images, seeded(0))
    with torch.no_grad():
        latents = vae.encode(images).latents.permute(0, 2, 3, 1).reshape(-1, 3)
    codes = vae.quantize.embedding.weight
    nearest = torch.cdist(codes, latents).min(1).values
    assert float(nearest.max()) < 5 * 0.05 * float(latents.std())
    assert len(codes.unique(dim=0)) == 16


def test_views_and_latents_belong_together() -> None:
    """`count` views of each glyph come with their latents; the same seed gives them again."""
    vae, images = tiny_vae(), pictures(3)
    views, latents = ldm4.encode(vae, images, seed=5, count=2, rotate=4.0)
    assert views.shape == (6, 3, 64, 64) and latents.shape == (6, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(views).latents, latents)
    assert torch.equal(ldm4.encode(vae, images, seed=5, count=2, rotate=4.0)[0], views)


def test_the_autoencoder_is_a_stock_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codebook is filled once, also over an interruption, and nothing else stays in it."""
    monkeypatch.setattr(ldm4, "build_autoencoder", lambda: tiny_vae().requires_grad_(True))
    fills, fill = [], ldm4.fill_codebook
    monkeypatch.setattr(ldm4, "fill_codebook", lambda *a: fills.append(1) or fill(*a))
    found = [ldm4.autoencoder(pictures(4), seconds, tmp_path, seed=0) for seconds in (3, 4, 4)]
    assert fills == [1]
    assert all(vae.state_dict().keys() == tiny_vae().state_dict().keys() for vae in found)
    assert same(found[1].state_dict(), found[2].state_dict())
    assert not same(found[0].state_dict(), found[1].state_dict())


# -- the autoencoder of dit and sd ----------------------------------------------------------------


@torch.no_grad()
def test_an_autoencoder_begins_where_another_ended() -> None:
    """It encodes to the other's latents, with narrow variances, and one channel of its own."""
    mine, theirs, images = tiny_kl(), tiny_vae(), pictures(4, 32)
    autoencoder.begin_with(mine, theirs)
    posterior = mine.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean[:, :3], theirs.encode(images).latents)
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.mean, -6.0))
    assert float(posterior.mean[:, 3].std()) > 0.01


@torch.no_grad()
def test_a_standardised_posterior_decodes_as_before() -> None:
    """Means become standard, deviations scale along, and the pictures stay."""
    vae, images = tiny_kl(), pictures(8, 32)
    before = vae.encode(images).latent_dist
    pixels = vae.decode(before.mean).sample
    mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
    autoencoder.standardise(vae, mean, std)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std * std.view(-1, 1, 1), before.std, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(after.mean).sample, pixels, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops and whole images are trained on, and a finished training is not repeated."""
    monkeypatch.setattr(autoencoder, "build", tiny_kl)
    seen: list[int] = []
    encode = diffusers.AutoencoderKL.encode
    monkeypatch.setattr(
        diffusers.AutoencoderKL,
        "encode",
        lambda self, images: seen.append(images.shape[-1]) or encode(self, images),
    )
    found = [autoencoder.fit(tiny_vae(), pictures(4), n, tmp_path, seed=0) for n in (5, 5, 6)]
    assert seen == [32, 32, 32, 64, 64, 64]
    assert same(found[0].state_dict(), found[1].state_dict())
    assert not same(found[1].state_dict(), found[2].state_dict())


# -- training of denoisers ------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_times_stay_inside_the_schedule(count: int, steps: int) -> None:
    """Any number of timesteps of any schedule are whole, and exist."""
    times = diffusion.draw_times(count, steps, seeded(count))
    assert times.shape == (count,) and times.dtype == torch.long
    assert int(times.min()) >= 0 and int(times.max()) < steps


def test_half_of_the_times_are_uniform() -> None:
    """The first half is spread evenly; the second is thin at both ends, around 0.45."""
    even, middle = diffusion.draw_times(40_000, 1000, seeded(0)).double().split(20_000)
    assert bool(((even.histc(10, 0, 1000) - 2000).abs() < 200).all())
    assert float(middle.median()) == pytest.approx(450, abs=10)
    ends = middle.histc(10, 0, 1000)[[0, -1]]
    assert bool((ends < 500).all())


def test_each_phase_has_its_own_latents(tmp_path: Path) -> None:
    """A phase's latents are trained on until its share of the time is over, the next one's then."""
    signs = []

    class Line(torch.nn.Conv2d):
        config = SimpleNamespace(out_channels=4)

        def forward(self, noisy: torch.Tensor, timestep: torch.Tensor) -> Any:
            signs.append(float(noisy.mean().sign()))
            return SimpleNamespace(sample=super().forward(noisy))

    phases = [(0.6, torch.full((2, 4, 8, 8), 50.0)), (math.inf, torch.full((3, 4, 8, 8), -50.0))]
    line = Line(4, 4, 1)
    diffusion.denoiser(line, phases, lambda *_: {}, STEPS, tmp_path, seed=0, lr=1e-3)
    assert signs == [1.0] * 6 + [-1.0] * 4


def test_channels_that_are_not_predicted_get_no_noise(tmp_path: Path) -> None:
    """The model reads them as they are, beside noisy latents of the same row."""
    read = []

    class Line(torch.nn.Conv2d):
        config = SimpleNamespace(out_channels=1)

        def forward(self, given: torch.Tensor, timestep: torch.Tensor) -> Any:
            read.append(given)
            return SimpleNamespace(sample=super().forward(given))

    scales = torch.tensor([100, 1, 1])[:, None, None]
    rows = torch.arange(5.0).view(-1, 1, 1, 1).expand(5, 3, 8, 8) * scales
    diffusion.denoiser(Line(3, 1, 1), [(math.inf, rows)], lambda *_: {}, STEPS, tmp_path, 0, 1e-3)
    noisy, beside = torch.cat(read).tensor_split([1], 1)
    rows_read = beside[:, :1, :1, :1]
    assert torch.equal(beside, rows_read.expand_as(beside))
    assert {*rows_read.unique().tolist()} == {*range(5)}
    assert bool((noisy.flatten(1).std(1) > 0).all())
    near = (noisy.mean((1, 2, 3)) / 100).round().flatten()
    assert bool((near <= rows_read.flatten()).all()) and bool((near == rows_read.flatten()).any())


# -- texts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Trained on the names above."""
    return text.build_tokenizer(NAMES)


@given(st.text())
@example("")
@example("\x00\x1f \t\n")
@example("👨‍🌾 ﷺ é́ ﬁ")
@example("a" * 99)
@settings(deadline=None, max_examples=200)
def test_any_text_can_be_encoded(tokenizer: Any, prompt: str) -> None:
    """16 known ids from the start token to the end token, between them none that is unknown."""
    ids = text.encode(tokenizer, [prompt])[0].tolist()
    assert len(ids) == text.TOKENS and all(0 <= one < len(tokenizer) for one in ids)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    inside = [tokenizer.convert_ids_to_tokens(one) for one in tokenizer(prompt).input_ids[1:-1]]
    if not any(special in prompt.lower() for special in (text.START, text.END)):
        assert not {text.START, text.END, None} & {*inside}


def test_names_are_read_back(tokenizer: Any) -> None:
    """Its names are whole after decoding, and shorter than their letters."""
    ids = tokenizer(NAMES).input_ids
    assert [tokenizer.decode(one, skip_special_tokens=True) for one in ids[:1]] == NAMES[:1]
    assert max(map(len, ids)) <= text.TOKENS


def test_a_tokenizer_is_the_same_every_time(tokenizer: Any, tmp_path: Path) -> None:
    """Building it again, and saving it, give the same ids: the text tower was trained on them."""
    even = ["".join(letters) for letters in itertools.product("stkm", "aeiou", "xyz")]
    first, *others = (text.build_tokenizer(even).get_vocab() for _ in range(3))
    assert others == [first, first]  # where all pairs are equally frequent, too
    again = text.build_tokenizer(NAMES)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    prompts = [*NAMES, "", "Qué — ⚡", "wild horses, " * 9]
    for other in (again, loaded):
        assert other.get_vocab() == tokenizer.get_vocab()
        assert torch.equal(text.encode(other, prompts), text.encode(tokenizer, prompts))
    assert loaded.model_max_length == text.TOKENS


@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_towers_that_are_not_all_there_are_named(tokenizer: Any, name: str, tmp_path: Path) -> None:
    """Half a folder is refused with what is missing, before a library looks for it elsewhere."""
    text.build_text_encoder(tokenizer).save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"--init .*no {name}, expected a folder that a recipe"):
        text.load(tmp_path)


def test_prompts_are_some_words_of_the_name() -> None:
    """In their order, at least one, with synonyms; about half of the time all of them."""
    synonyms = {other: word for word, other in text.SYNONYMS.items()}
    words = ["old", "automobile", "red", "wild", "cat", "with", "bicycle", "moon"]
    generator, whole = seeded(0), 0
    for _ in range(400):
        found = text.vary("Old automobile: red, wild cat with bicycle moon", generator).split()
        plain, left = [synonyms.get(word, word) for word in found], iter(words)
        assert found and all(word in left for word in plain)
        assert not {"automobile", "bicycle"} <= {*found} or not {"car", "bike"} & {*found}
        whole += plain == words
    assert 160 < whole < 260
    assert {text.vary("bicycle", generator) for _ in range(50)} == {"bicycle", "bike"}


# -- dit ------------------------------------------------------------------------------------------


def test_the_classes_share_no_subgroup() -> None:
    """Each subgroup is of one class, known to the autoencoder, and found again."""
    for label, subgroups in enumerate(dit.CLASSES.values()):
        assert {dit.class_of(subgroup) for subgroup in subgroups} == {label}
    every = [subgroup for subgroups in dit.CLASSES.values() for subgroup in subgroups]
    assert len(every) == len({*every})


@pytest.mark.skipif(not glyphs.NAMES.is_file(), reason="Unicode's names are not installed")
@pytest.mark.parametrize("wanted", [itertools.chain(*dit.CLASSES.values()), sd.SUBGROUPS])
def test_subgroups_are_unicodes(wanted: Any) -> None:
    """What a model draws exists, and the autoencoder is trained on it."""
    every = glyphs.read_names()
    known = {g.subgroup for g in every if g.group in glyphs.LDM4_GROUPS} | {*emoji.SUBGROUPS}
    assert {*wanted} <= known <= {g.subgroup for g in every}


@torch.no_grad()
def test_a_new_transformer_predicts_nothing() -> None:
    """A model of 8 to 12 blocks and 10 to 20 M parameters, whose blocks start as no change."""
    model = dit.build().eval()
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 20e6
    assert 8 <= len(model.transformer_blocks) <= 12
    labels = torch.tensor([0, dit.NOBODY])
    found = model(latents(2), timestep=torch.tensor([3, 900]), class_labels=labels).sample
    assert found.shape == (2, 4, 16, 16) and not found.any()


def test_a_tenth_of_the_labels_are_left_out(tmp_path: Path) -> None:
    """In all blocks of a step at once; the others are those of the rows."""
    model, read = tiny_dit(), []
    for block in model.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table
        table.register_forward_pre_hook(lambda _, given: read.append(given[0].clone()))
    dit.fit(model, latents(5), torch.tensor([4, 4, 2, 2, 2]), STEPS, tmp_path, seed=0)
    labels = torch.stack(read).view(STEPS, -1, 32)  # the last layer asks the first block's, too
    assert labels.shape[1] == 3 and bool((labels == labels[:, :1]).all())
    assert {*labels.unique().tolist()} == {2, 4, dit.NOBODY}
    assert 0.05 < float((labels == dit.NOBODY).float().mean()) < 0.16


# -- sd -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_denoiser_begins_as_that_of_ldm4() -> None:
    """Where that has no attention both predict the same, whatever is read and in channel four."""
    torch.manual_seed(0)
    mine, theirs = sd.build().eval(), ldm4.build_denoiser().eval()
    for name, weight in theirs.named_parameters():
        if ".to_out." in name:
            weight.zero_()
    sd.begin_with(mine, theirs)
    noisy, time = latents(1), torch.tensor([500])
    words = torch.randn(2, 1, 16, text.WIDTH, generator=seeded(2))
    found = mine(noisy, time, encoder_hidden_states=words[0]).sample
    wanted = theirs(noisy[:, :3], time).sample
    torch.testing.assert_close(found[:, :3], wanted, atol=1e-4, rtol=1e-4)
    assert not found[:, 3].any() and bool(wanted.any())
    noisy[:, 3] = 7.0
    assert torch.equal(mine(noisy, time, encoder_hidden_states=words[1]).sample, found)


def test_the_text_tower_stays_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    """The denoiser alone is trained; a tenth of its prompts are empty, others are of the names."""
    torch.manual_seed(0)
    read, prompts = text.Reader(tokenizer, text.build_text_encoder(tokenizer)), []

    class Noted(text.Reader):
        def __call__(self, given: list[str]) -> torch.Tensor:
            prompts.extend(given)
            return read(given)

    before = {name: value.clone() for name, value in read.encoder.state_dict().items()}
    unet, start = tiny_unet(), tiny_unet().state_dict()
    noted = Noted(tokenizer, read.encoder)
    sd.fit(unet, latents(2), ["red apple", "blue apple"], noted, STEPS, tmp_path, seed=0)
    assert same(before, read.encoder.state_dict()) and not same(start, unet.state_dict())
    assert {*prompts} == {"", "red", "blue", "apple", "red apple", "blue apple"}
    assert 0.05 < prompts.count("") / len(prompts) < 0.16


# -- ldm4-sr --------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_upscaler_reads_latents_and_a_picture() -> None:
    """A model of about 2 M parameters, of six channels to three."""
    model = ldm4_sr.build().eval()
    assert 1.8e6 < sum(p.numel() for p in model.parameters()) < 2.2e6
    found = model(torch.randn(2, 6, 16, 16, generator=seeded(0)), torch.tensor([3, 900])).sample
    assert found.shape == (2, 3, 16, 16)


def test_latents_and_small_pictures_are_of_the_same_views() -> None:
    """The last three channels are the mean pixels of what the first three encode."""
    vae, images = tiny_vae(), pictures(3, 64)
    found = ldm4_sr.encode(vae, images, 1, 2)
    assert found.shape == (6, 6, 16, 16)
    for seed, part in enumerate(found.split(3), 2):
        views, wanted = ldm4.encode(vae, images, seed, 1)
        assert torch.equal(part[:, :3], wanted)
        means = views.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5))
        torch.testing.assert_close(part[:, 3:], means)
    assert not torch.equal(found[:3], found[3:])


def test_every_tenth_emoji_is_kept_for_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The denoiser sees none of them; what is asked for is theirs alone, each in turn."""
    trained_on: list[torch.Tensor] = []

    def denoiser(model: Any, phases: Any, *_: Any) -> Any:
        trained_on.extend(pairs for _, pairs in phases)
        return model

    number = torch.arange(21).view(-1, 1, 1, 1)
    ink = torch.where(number % 10 == 0, 1 - 0.01 * number, -1.0)
    monkeypatch.setattr(diffusion, "denoiser", denoiser)
    monkeypatch.setattr(ldm4_sr, "COUNT", 2)
    monkeypatch.setattr(glyphs, "read_names", lambda: [glyphs.Glyph("x", "x", "", "")] * 21)
    monkeypatch.setattr(glyphs, "render", lambda asked: ink.expand(-1, 3, 64, 64))
    found = ldm4_sr.run(Order(1.0, "cpu", 0, tmp_path))
    (pairs,) = trained_on
    assert len(pairs) == 2 * found.glyphs == 36
    assert bool((pairs[:, 3:].mean((1, 2, 3)) < 0).all())  # black, with a white rim
    assert len(found.inputs) == len(found.views) == 36 and found.originals is not None
    for some in (found.originals, torch.stack([row["image"] for row in found.inputs])):
        levels = some.amin((1, 2, 3)).view(-1, 3).sort(1).values
        wanted = torch.tensor([0.8, 0.9, 1.0]).expand_as(levels)
        torch.testing.assert_close(levels, wanted, atol=0.01, rtol=0)  # rendered as bytes
