"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from autofr.search.address import ENVIRONMENT

Model = Annotated[str, typer.Option(help="bundled name, local diffusers folder, or hub id")]
Budget = Annotated[str, typer.Option(help="speed-up such as 1.5x, or time per call such as 180ms")]
Space = Annotated[str, typer.Option(help="default, frdiff, direct, or a TOML file")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of everything random")]
Threads = Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0 takes all cores")]
Steps = Annotated[
    int | None,
    typer.Option(min=2, max=1000, help="sampling steps of the teacher; the model's own, or 50"),
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="images per call; the bundled model's own, or 8"),
]
Trials = Annotated[int, typer.Option(min=1, help="trials besides the published rows")]
TimeLimit = Annotated[
    float | None, typer.Option(min=1, help="seconds after which no new trial starts")
]
Out = Annotated[Path | None, typer.Option(help="folder of the run; default results/MODEL-BUDGET")]
Task = Annotated[
    Literal["text2img", "img2img", "inpaint", "upscale"] | None,
    typer.Option(help="the pipeline for this task, over the model's components; default its own"),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        "--prompts",
        help="prompts, a line each; or .jsonl: an object of call arguments per line",
    ),
]
Prompt = Annotated[list[str] | None, typer.Option(help="a prompt to draw; may be repeated")]
Call = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="argument of every call, such as guidance_scale=5"),
]
KeepDtype = Annotated[
    Literal["float16", "bfloat16"] | None, typer.Option(help="store kept tensors in half precision")
]
KeepOnHost = Annotated[bool, typer.Option("--keep-on-host", help="store kept tensors on the host")]
MaxMemory = Annotated[
    str | None, typer.Option(help="most that may be kept on the device, such as 200MB")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="processes that score trials; default this one alone")
]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar=ENVIRONMENT,
        metavar="URL",
        help="PostgreSQL database that workers share: postgresql://USER@HOST/DATABASE",
    ),
]
Study = Annotated[str | None, typer.Option(help="name of the study in the database")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be done, and about how long")
]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable JSON")]


def seeds(seed: int, count: int) -> range:
    """The first seeds that a `--seed` stands for."""
    return range(seed * 1_000_000, seed * 1_000_000 + count)
