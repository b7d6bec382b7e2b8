"""Write a trained model as a diffusers folder: weights, features, reference, card, expectations."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from autofr.measure.alignment import Alignment, save_alignment
from autofr.measure.quality import Features, Reference, Sets, psnr, save_features
from autofr.zoo.recipe import Trained

SAMPLES = 512
FEW = 128  # of every moment of the training
BATCH = 64
CARDS = Path(__file__).parent / "cards"


@torch.no_grad()
def export(folder: Path, name: str, trained: Trained, recipe: dict[str, Any]) -> None:
    """Save fp16 safetensors in diffusers' layout, and measure what the model is expected to score.

    `name` is that of the bundled model, and of its card.
    """
    modules = [
        part for part in trained.pipe.components.values() if isinstance(part, torch.nn.Module)
    ]
    towers = [trained.towers] if trained.towers is not None else []
    for module in (*modules, trained.encoder, *towers):
        module.cpu().eval().half().float()  # what is measured below is what is shipped
    trained.pipe.set_progress_bar_config(disable=True)
    real = (trained.views.cpu() / 2 + 0.5).clamp(0, 1)
    unnamed = Features(trained.encoder, Reference(torch.zeros(0), torch.zeros(0), 0), "")
    embedded = unnamed(real)
    features = Features(trained.encoder, Reference.of(embedded), "bundled")
    sets = _sets(trained, embedded)
    drawn = _draw(trained, SAMPLES)
    scores = _measure(trained, features, real, embedded, drawn)
    if sets is not None:
        scores["fid_by_set"] = _by_set(trained, sets, features, embedded, drawn)
    if trained.towers is not None:
        scores |= _aligned(trained, trained.towers, real, drawn)
    if trained.originals is not None:
        scores |= _restored(trained, trained.originals.cpu() / 2 + 0.5, features, drawn)
    if trained.moments:
        scores["curve"] = _curve(trained, features, drawn)
    about = {"recipe": recipe, "date": time.strftime("%Y-%m-%d")}
    _write(folder, name, trained, features, sets, scores | about)


def _sets(trained: Trained, embedded: torch.Tensor) -> Sets | None:
    """The named sets of the views, whose features are `embedded`."""
    if not trained.sets:
        return None
    parts = {
        name: (values, embedded[[label in values for label in trained.labels]])
        for name, values in trained.sets.items()
    }
    return Sets.of(trained.argument, parts)


def _asked(trained: Trained, row: int) -> dict[str, Any]:
    """What the sample number `row` is drawn from."""
    return dict(trained.inputs[row % len(trained.inputs)]) if trained.inputs else {}


def _part(trained: Trained, *names: str) -> torch.nn.Module:
    """The component that goes by one of these names."""
    parts = trained.pipe.components
    return next(parts[name] for name in names if name in parts)


def _draw(trained: Trained, count: int) -> torch.Tensor:
    """Draw images (count, 3, h, w) in [0, 1] of fixed seeds, from the inputs in turn."""
    drawn = []
    for start in range(0, count, BATCH):
        numbers = range(start, start + BATCH)
        rows = [_asked(trained, number) for number in numbers]
        given = {name: _together([row[name] for row in rows]) for name in rows[0]}
        images = trained.pipe(
            **(given or {"batch_size": BATCH}),
            **trained.call,
            num_inference_steps=trained.steps,
            generator=[torch.Generator().manual_seed(10**6 + number) for number in numbers],
            output_type="np",
        ).images
        drawn.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(drawn)


def _together(values: list[Any]) -> Any:
    """What one call is given of an argument: pictures as one tensor."""
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values


def _measure(
    trained: Trained,
    features: Features,
    real: torch.Tensor,
    embedded: torch.Tensor,
    drawn: torch.Tensor,
) -> dict[str, Any]:
    """Score samples and reconstructions against `real` images, whose features are `embedded`."""
    vae, denoiser = _part(trained, "vae", "vqvae"), _part(trained, "unet", "transformer")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    some, middle = order[:SAMPLES], len(real) // 2
    again = torch.cat([vae(batch * 2 - 1).sample / 2 + 0.5 for batch in real[some].split(BATCH)])
    half = Features(features.encoder, Reference.of(embedded[order[:middle]]), "half")
    return {
        "features": "bundled features (64-d); not comparable with Inception FID",
        "samples": SAMPLES,
        "steps": trained.steps,
        "call": dict(trained.call),
        "fid_teacher": round(features.fid(features(drawn)), 3),
        "fid_autoencoder": round(features.fid(features(again.clamp(0, 1))), 3),
        "fid_real_sample": round(features.fid(embedded[some]), 3),
        "fid_two_halves": round(half.fid(embedded[order[middle:]]), 4),
        "autoencoder_l1": round(float((again - real[some]).abs().mean()) * 2, 4),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
    }


def _curve(trained: Trained, features: Features, drawn: torch.Tensor) -> list[dict[str, float]]:
    """FID of the first `FEW` samples at every moment of the training, and at its end."""
    denoiser = _part(trained, "unet", "transformer")
    end = {name: value.clone() for name, value in denoiser.state_dict().items()}
    found = []
    for seconds, weights in trained.moments:
        denoiser.load_state_dict(weights)
        found.append((seconds, _draw(trained, FEW)))
    denoiser.load_state_dict(end)
    found.append((trained.seconds["denoiser"], drawn[:FEW]))
    return [
        {"minutes": round(seconds / 60, 1), "fid": round(features.fid(features(images)), 3)}
        for seconds, images in found
    ]


def _by_set(
    trained: Trained, sets: Sets, features: Features, embedded: torch.Tensor, drawn: torch.Tensor
) -> dict[str, dict[str, float]]:
    """FID of each set's samples, and of as many real images: what so few score at best."""
    asked = [_asked(trained, number)[trained.argument] for number in range(len(drawn))]
    found = {}
    for name, values in sets.values.items():
        its = Features(features.encoder, sets.references[name], name)
        mine = drawn[[value in values for value in asked]]
        theirs = embedded[[label in values for label in trained.labels]]
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(len(theirs), generator=generator)[: len(mine)]
        found[name] = {
            "samples": len(mine),
            "teacher": round(its.fid(its(mine)), 2),
            "real": round(its.fid(theirs[some]), 2),
        }
    return found


def _aligned(
    trained: Trained, towers: torch.nn.ModuleDict, real: torch.Tensor, drawn: torch.Tensor
) -> dict[str, float]:
    """Mean alignment of samples, of real images, and of samples with each other's prompts."""
    pipe = trained.pipe
    weights = towers["projection"].weight
    score = Alignment(pipe.tokenizer, pipe.text_encoder, towers["image"], weights, "bundled")
    prompts = [_asked(trained, number)["prompt"] for number in range(len(drawn))]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:SAMPLES].tolist()
    named = [trained.labels[row] for row in order]
    return {
        "alignment_teacher": round(float(score(drawn, prompts).mean()), 2),
        "alignment_real": round(float(score(real[order], named).mean()), 2),
        "alignment_shuffled": round(float(score(drawn, prompts[1:] + prompts[:1]).mean()), 2),
    }


def _restored(
    trained: Trained, originals: torch.Tensor, features: Features, drawn: torch.Tensor
) -> dict[str, float]:
    """How near what is drawn of small pictures is to their `originals` (n, 3, h, w) in [0, 1].

    Beside it, of the same pictures: cubic interpolation, and the autoencoder's limit.
    """
    numbers = range(len(drawn))
    wanted = originals[[number % len(originals) for number in numbers]].clamp(0, 1)
    small = _together([_asked(trained, number)["image"] for number in numbers]).cpu() / 2 + 0.5
    cubic = F.interpolate(small, wanted.shape[-2:], mode="bicubic").clamp(0, 1)
    vae = _part(trained, "vae", "vqvae")
    again = torch.cat([vae(batch * 2 - 1).sample / 2 + 0.5 for batch in wanted.split(BATCH)])
    return {
        "fid_bicubic": round(features.fid(features(cubic)), 3),
        "fid_autoencoder": round(features.fid(features(again.clamp(0, 1))), 3),
        "fid_real_sample": round(features.fid(features(wanted)), 3),
        "psnr_teacher": round(psnr(drawn, wanted), 2),
        "psnr_bicubic": round(psnr(cubic, wanted), 2),
        "psnr_autoencoder": round(psnr(again.clamp(0, 1), wanted), 2),
    }


def _write(
    folder: Path,
    name: str,
    trained: Trained,
    features: Features,
    sets: Sets | None,
    expected: dict[str, Any],
) -> None:
    """Write the pipeline, the extractor with its references, the expectations and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    trained.pipe.to(torch.float16).save_pretrained(folder)
    trained.pipe.to(torch.float32)
    save_features(folder, features, sets)
    if trained.towers is not None:
        save_alignment(folder, trained.towers["image"], trained.towers["projection"].weight)
    for path, content in trained.files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.format(**expected), encoding="utf-8")
