"""Commands on policy files: another step count, and the schedules of other tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autofr import files
from autofr.cli import places
from autofr.cli.options import Model
from autofr.errors import InterchangeError
from autofr.hub import read as load_policy
from autofr.policy import Policy

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer()

File = Annotated[Path, typer.Argument(help="policy file, or hub:owner/name@revision")]
Out = Annotated[Path, typer.Option(help="policy file to write")]
Steps = Annotated[int, typer.Option(min=1, help="sampling steps that a call asks for")]
Readable = Literal["deepcache", "smoothcache", "ecad", "cache-dit", "budcache"]
Writable = Literal["deepcache", "cache-dit"]


@app.command()
def retime(policy: File, steps: Steps, out: Out) -> None:
    """Write the same policy for calls of another step count; what it is worth there is unmeasured.

    Example: `autofr retime results/ldm4-1.5x/policy.json --steps 30 --out policy-30.json`
    """
    places.file(out)
    found = load_policy(policy).retime(steps)
    found.save(out)
    typer.echo(f"{_summary(found)} -> {out}; `autofr evaluate` says what it is worth")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="JSON file, or what it would say, such as 3,0")],
    kind: Annotated[Readable, typer.Option("--from", help="the tool that it is a schedule of")],
    steps: Steps,
    out: Out,
    model: Model = "ldm4",
    nearest: Annotated[
        bool, typer.Option("--nearest", help="approximate a schedule that has no exact policy")
    ] = False,
) -> None:
    """Write a schedule of another tool as a policy for a model.

    Example: `autofr import 3,0 --from deepcache --model ldm4 --steps 50 --out deepcache.json`
    """
    places.file(out)
    from autofr import interchange, zoo
    from autofr.runtime.points import find_denoiser

    loaded = zoo.load(model)
    given = source if re.fullmatch(r"[0-9\s,]+|\s*[\[{].*", source, re.DOTALL) else Path(source)
    shape = _latent_shape(find_denoiser(loaded.pipe))
    found = interchange.read(kind, given, loaded.pipe, loaded.name, steps, shape, nearest=nearest)
    found.save(out)
    typer.echo(f"{_summary(found)} -> {out}; `autofr evaluate` says what it is worth")


@app.command()
def export(
    policy: File,
    kind: Annotated[Writable, typer.Option("--to", help="the tool to write a schedule of")],
    model: Model = "ldm4",
    out: Annotated[Path | None, typer.Option(help="file to write; printed without")] = None,
) -> None:
    """Write a policy as a schedule of another tool, if that can express it.

    Example: `autofr export deepcache.json --to deepcache --model ldm4`
    """
    if out:
        places.file(out)
    found = load_policy(policy)
    from autofr import interchange, zoo

    try:
        text = interchange.write(kind, found, zoo.load(model).pipe)
    except InterchangeError as error:
        raise InterchangeError(f"{policy}: {error}") from None
    if out is None:
        typer.echo(text)
        return
    files.write(out, text + "\n")
    typer.echo(f"{_summary(found)}, for {kind} -> {out}")


def _summary(policy: Policy) -> str:
    """How many steps there are, and how many of them are computed."""
    sampler = policy.sampler
    return (
        f"{len(policy.keyframes)} keyframes among {sampler.num_inference_steps} steps for a call of"
        f" {sampler.replaces}"
    )


def _latent_shape(denoiser: nn.Module) -> tuple[int, ...]:
    """Channels and sides of the latents, as far as the denoiser's configuration says them."""
    size = denoiser.config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size or []
    return (denoiser.config["in_channels"], *sides)


@app.command()
def push(
    policy: File,
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if missing")],
    private: Annotated[bool, typer.Option("--private", help="make it a private one")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to push to; made if missing")] = None,
) -> None:
    """Publish a policy with its model card; the command that made it is published too.

    Logs in as `hf auth login` left it, or with HF_TOKEN.

    Example: `autofr push results/ldm4-1.5x/policy.json me/ldm4-1.5x`
    """
    from autofr import hub

    place = hub.push(policy, repository, private=private, revision=revision)
    typer.echo(f'Published: autofr.apply(pipe, "{place}")')
