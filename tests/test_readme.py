"""Laws of the README's scripts: they run as they stand, on tiny pipelines of the same classes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from folders import SMALL, picture, write
from test_docs import ROOT, blocks

from autofr import zoo
from autofr.measure.calibration import candidate_masks
from autofr.mix import Constant
from autofr.runtime import sampler
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser

TITLE = "Your own pipeline"
TINY = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "black-forest-labs/FLUX.1-dev": "flux",
    "stabilityai/stable-video-diffusion-img2vid-xt": "svd",
}
LARGE = (diffusers.FluxPipeline, diffusers.StableVideoDiffusionPipeline)  # in their default sizes


def scripts() -> list[str]:
    """The Python blocks of the section, one per kind of pipeline."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {TITLE}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f'README.md has no section "{TITLE}"'
    return [code for language, code in blocks(found[1]) if language == "python"]


def write_policy(model: Path, steps: int, path: Path) -> int:
    """Write a policy for a tiny pipeline; returns the forwards that it leaves."""
    pipe = zoo.load(str(model)).pipe
    masks = {"mask": candidate_masks(discover(find_denoiser(pipe)))["frdiff"]}
    names = [("key", "mask", "jump")[step % 3] for step in range(steps)]
    policy = sampler.compose(
        pipe, "tiny", names, masks, Constant(), replaces=steps, latent_shape=(1,)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    policy.save(path)
    return steps - names.count("jump")


def spied(call: Callable[..., Any], calls: list[int], **changes: Any) -> Callable[..., Any]:
    """The method, with its calls noted and some of its arguments changed."""

    @functools.wraps(call)
    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return call(*args, **kwargs | changes)

    return method


@pytest.mark.parametrize("model", TINY)
def test_scripts_for_own_pipelines_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws with its policy: a hub id stands for a tiny folder, a GPU for this machine."""
    (script,) = (code for code in scripts() if model in code)
    folder = write(TINY[model], tmp_path / "model")
    (steps,) = map(int, re.findall(r"num_inference_steps=(\d+)", script))
    (policy,) = re.findall(r'"(\S+\.json)"', script)
    monkeypatch.chdir(tmp_path)
    forwards = write_policy(folder, steps, Path(policy))
    for name in re.findall(r'load_image\("(\S+)"\)', script):
        picture(0).save(name)
    for kind in LARGE:
        monkeypatch.setattr(kind, "__call__", spied(kind.__call__, [], **SMALL))
    kind, calls = type(find_denoiser(zoo.load(str(folder)).pipe)), []
    monkeypatch.setattr(kind, "forward", spied(kind.forward, calls))
    here = script.replace(model, str(folder)).replace('"cuda"', '"cpu"')
    exec(compile(here, "README.md", "exec"), {})
    assert len(calls) == forwards
