"""What the benchmark scripts share: loading, the protocol's facts, writing results."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from autofr import zoo
from autofr.measure.profiling import device_name, versions
from autofr.task import as_task

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"


def load(model: str, threads: int) -> Any:
    """The pipe, with an explicit number of threads."""
    torch.set_num_threads(threads)
    return zoo.load(model).pipe


def random_dit() -> Any:
    """A DiT-S/2-like pipe with random weights: its times are real, its pictures are not."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8,
        num_layers=12, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4,
    )  # fmt: skip
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return as_task(pipe)


def write(name: str, pipe: Any, command: str, rows: list[dict[str, Any]], note: str) -> None:
    """Write NAME.json and NAME.md with the protocol beside the rows."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    facts = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "device": device_name(pipe),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = json.dumps({"protocol": facts, "note": note, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(result + "\n", encoding="utf-8")
    head = " | ".join(rows[0])
    lines = [f"# {name}", "", note, "", f"| {head} |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    lines += ["", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    (RESULTS / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
