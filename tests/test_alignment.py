"""Laws of alignment: a cosine of two towers, the pipe's own text encoder, prompts by seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from folders import FAMILIES, WIDTH, dit, picture, sd, t5, t5_tokenizer
from safetensors.torch import load_file, save_file
from test_policy import MEASURED, policy

from autofr.cli import console
from autofr.errors import ModelError
from autofr.hub_card import card
from autofr.measure.alignment import (
    PROJECTION,
    WEIGHTS,
    Judge,
    load_alignment,
    load_judge,
    prompts_of,
    save_alignment,
)
from autofr.measure.quality import Encoder
from autofr.policy import Interval, TextAlignment
from autofr.task import Task, as_task

CHANNELS = 6
PROMPTS = ["a red bicycle", "two dogs", "a red bicycle"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A tiny Stable Diffusion, which is only read here."""
    return sd()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded noise in [0, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def towers(folder: Path, channels: int = CHANNELS, width: int = WIDTH) -> tuple[Encoder, Any]:
    """Write random towers; returns them as they come back, rounded to half precision.

    With this sign noise is more like the tests' prompts than unlike them.
    """
    torch.manual_seed(0)
    image = Encoder(channels).eval().half().float()
    projection = -torch.randn(channels, width).half().float()
    save_alignment(folder, image, projection)
    return image, projection


def embed(pipe: Any, projection: torch.Tensor, prompt: str) -> torch.Tensor:
    """The embedding of a prompt, by the pipe's own encoding of it."""
    states: list[torch.Tensor] = []
    hook = pipe.text_encoder.register_forward_hook(
        lambda module, args, output: states.append(output.pooler_output)
    )
    pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    hook.remove()
    return projection @ states[0][0]


# -- the score ------------------------------------------------------------------------------------


def test_the_score_is_a_cosine_in_percent(pipe: Any, tmp_path: Path) -> None:
    """100 times the cosine of image and prompt as the pipe itself encodes it; negative ones are 0.

    Each image is scored against its own prompt, which may stand there twice.
    """
    image, projection = towers(tmp_path)
    alignment = load_alignment(tmp_path, pipe)
    assert alignment is not None and alignment.name == f"bundled {tmp_path.name} towers"
    images = noise(3, 3, 64, 64)
    with torch.no_grad():
        seen = image(images)
        read = torch.stack([embed(pipe, projection, prompt) for prompt in PROMPTS])
    cosines = torch.nn.functional.cosine_similarity(seen, read).double().numpy()
    found = alignment(images, PROMPTS)
    np.testing.assert_allclose(found, 100 * np.maximum(cosines, 0), rtol=1e-4, atol=1e-4)
    save_alignment(tmp_path, image, -projection)
    other = load_alignment(tmp_path, pipe)
    assert other is not None
    np.testing.assert_allclose(
        other(images, PROMPTS), 100 * np.maximum(-cosines, 0), rtol=1e-4, atol=1e-4
    )
    assert (found > 0).all()


def test_batches_and_order_do_not_matter(pipe: Any, tmp_path: Path) -> None:
    """An image has the score that it has alone, whatever stands beside it."""
    towers(tmp_path)
    alignment = load_alignment(tmp_path, pipe)
    assert alignment is not None
    images = noise(70, 3, 64, 64)
    prompts = [f"{index} cats" for index in range(70)]
    found = alignment(images, prompts)
    assert found.shape == (70,) and (found > 0).all() and len(set(found)) == 70
    np.testing.assert_allclose(alignment(images[65:66], prompts[65:66]), found[65:66], rtol=1e-4)
    np.testing.assert_allclose(alignment(images.flip(0), prompts[::-1]), found[::-1], rtol=1e-4)


def test_a_prompt_is_read_once(pipe: Any, tmp_path: Path) -> None:
    """Texts are kept: teacher and policy are scored against the same embeddings."""
    towers(tmp_path)
    alignment = load_alignment(tmp_path, pipe)
    assert alignment is not None
    read: list[int] = []
    alignment._text.register_forward_hook(lambda module, args, output: read.append(len(args[0])))
    for _ in range(2):
        alignment(noise(3, 3, 64, 64), PROMPTS)
    assert read == [2]


def test_the_pipe_stays_as_it_is_and_its_type_does_not_count(tmp_path: Path) -> None:
    """A pipe in half precision keeps it; its scores are those in full precision."""
    towers(tmp_path)
    full, half = sd(), sd().to(torch.float16)
    full.text_encoder.half().float()  # rounded alike
    scores = [load_alignment(tmp_path, one) for one in (full, half)]
    assert scores[0] is not None and scores[1] is not None
    images = noise(3, 3, 64, 64)
    found = [score(images, PROMPTS) for score in scores]
    assert (found[0] > 0).all()
    np.testing.assert_array_equal(*found)
    assert half.text_encoder.dtype == torch.float16


# -- the file -------------------------------------------------------------------------------------


def test_only_pipes_with_texts_and_towers_have_an_alignment(pipe: Any, tmp_path: Path) -> None:
    """Without the file there is none; nor where the pipe has no text encoder."""
    assert load_alignment(tmp_path, pipe) is None
    towers(tmp_path)
    assert load_alignment(tmp_path, pipe) is not None
    assert load_alignment(tmp_path, Task(pipe, [{"prompt": "a cat"}])) is not None
    assert load_alignment(tmp_path, make_pipe()) is None
    assert load_alignment(tmp_path, dit()) is None


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Damage that changes the tensors of the file."""

    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a truncated file": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("version https://git-lfs"),
    "no projection": changed(lambda tensors: tensors.pop(PROJECTION)),
    "a projection of no shape": changed(lambda t: t.update({PROJECTION: torch.tensor(1.0)})),
    "a layer missing": changed(lambda tensors: tensors.pop("image.layers.0.weight")),
    "another text width": changed(lambda t: t.update({PROJECTION: torch.ones(CHANNELS, 7)})),
    "fewer channels than the image tower": changed(
        lambda t: t.update({PROJECTION: torch.ones(CHANNELS - 1, WIDTH)})
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_towers_are_refused(pipe: Any, tmp_path: Path, case: str) -> None:
    """A file that does not hold everything, or does not fit the pipe, is a ModelError naming it."""
    towers(tmp_path)
    DAMAGE[case](tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="damaged, or of another model") as error:
        load_alignment(tmp_path, pipe)
    assert str(tmp_path / WEIGHTS) in str(error.value)


def test_another_text_encoder_is_refused_with_both_sizes(tmp_path: Path, pipe: Any) -> None:
    """The refusal says which shape the pipe's text encoder asks for."""
    towers(tmp_path, width=2 * WIDTH)
    with pytest.raises(ModelError, match=rf"\(6, {2 * WIDTH}\), expected \(6, {WIDTH}\)"):
        load_alignment(tmp_path, pipe)


def test_a_text_encoder_that_pools_nothing_is_refused_at_once(tmp_path: Path) -> None:
    """A T5 encoder has no embedding of a whole text; that is said before anything is drawn."""
    towers(tmp_path)
    pipe = SimpleNamespace(tokenizer=t5_tokenizer(), text_encoder=t5())
    with pytest.raises(ModelError, match="T5EncoderModel gives no pooled output"):
        load_alignment(tmp_path, pipe)


# -- prompts by seed ------------------------------------------------------------------------------


def test_each_seed_has_the_prompt_that_it_is_drawn_from(pipe: Any) -> None:
    """Seeds take prompts in turn; one that all calls share is the prompt of every seed."""
    rows = [{"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": "a fox"}]
    assert prompts_of(Task(pipe, rows), [4, 0, 5]) == ["a dog", "a cat", "a fox"]
    shared = as_task(pipe, [{"negative_prompt": "blurred"}], {"prompt": "a cat"})
    assert prompts_of(shared, [0, 7]) == ["a cat", "a cat"]


def test_inputs_with_pictures_carry_prompts_too(pipe: Any) -> None:
    """Image-to-image and inpainting have a prompt beside their pictures."""
    import diffusers

    pictures = {"image": picture(0), "mask_image": picture(1)}
    painter = diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe)
    rows = [{"prompt": "a cat"} | pictures, {"prompt": "a dog"} | pictures]
    assert prompts_of(as_task(painter, rows), [0, 1, 2]) == ["a cat", "a dog", "a cat"]


def test_without_a_prompt_for_every_seed_there_are_none(pipe: Any) -> None:
    """Class labels, noise alone and empty prompts have nothing to be aligned with."""
    assert prompts_of(make_pipe(), [0, 1]) is None
    assert prompts_of(Task(dit(), FAMILIES["dit"].inputs), [0, 1]) is None
    assert prompts_of(Task(pipe, [{"prompt": "a cat"}, {"prompt": ""}]), [0, 1]) is None


# -- what judges a model's images -----------------------------------------------------------------


def test_a_model_without_files_has_no_judge(pipe: Any, tmp_path: Path) -> None:
    """Neither a bare folder nor a model from the hub says what to judge by."""
    assert load_judge(tmp_path, pipe) == load_judge(None, pipe) == Judge()


def test_a_judge_has_what_lies_beside_the_model(pipe: Any, tmp_path: Path) -> None:
    """Features and towers are independent of one another."""
    towers(tmp_path)
    found = load_judge(tmp_path, as_task(pipe))
    assert found.features is None and found.alignment is not None


# -- what is printed ------------------------------------------------------------------------------


def test_alignment_is_printed_where_it_was_measured() -> None:
    """`show`, `evaluate` and the card of a policy name the towers, both scores and the interval."""
    found = TextAlignment(
        towers="bundled sd towers",
        teacher=61.25,
        policy=61.125,
        difference=Interval(value=-0.125, low=-0.25, high=0.0625),
    )
    aligned = MEASURED.model_copy(update={"alignment": found})
    (line,) = (line for line in console.words(policy(measured=aligned)) if "towers" in line)
    assert line == (
        "alignment 61.125 against 61.250 (bundled sd towers); difference -0.125 (-0.250 to +0.062)"
    )
    rows = dict(console.measured_rows(aligned))
    assert rows["alignment with prompts in bundled sd towers"] == "61.12 (teacher 61.25)"
    assert rows["alignment difference"] == "-0.125 (-0.25 to 0.0625)"
    page = card(policy(measured=aligned), "hub:alice/fast")
    assert "alignment with prompts in bundled sd towers, without / with | 61.250 / 61.125" in page
    for told in (
        "\n".join(console.words(policy(measured=MEASURED))),
        str(console.measured_rows(MEASURED)),
        card(policy(measured=MEASURED), "hub:alice/fast"),
    ):
        assert "alignment" not in told
