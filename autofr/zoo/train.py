"""The recipes that trained the bundled models: `python -m autofr.zoo.train ldm4`.

Every stage resumes from its checkpoint under `--work`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from autofr.errors import AutofrError, UserError
from autofr.zoo import check_device
from autofr.zoo.recipe import Order
from autofr.zoo.recipes import dit, ldm4, ldm4_sr, sd

RECIPES = {"ldm4": ldm4.run, "dit": dit.run, "sd": sd.run, "ldm4-sr": ldm4_sr.run}


def main(
    model: Annotated[str, typer.Argument(help="name of the bundled model to train")],
    minutes: Annotated[
        float, typer.Option(help="training time: all stages of ldm4, the denoiser of the others")
    ] = 120,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    work: Annotated[Path, typer.Option(help="checkpoints; the same folder resumes")] = Path("work"),
    out: Annotated[Path, typer.Option(help="folder of the exported pipeline")] = Path(
        "work/export"
    ),
    init: Annotated[
        Path | None, typer.Option(help="exported folder whose denoiser is trained on")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of every stage")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train a bundled model and export it as a diffusers folder with its scores."""
    if model not in RECIPES:
        raise typer.BadParameter(f"no recipe for {model!r}; recipes: {', '.join(RECIPES)}")
    check_device(device)
    from autofr.zoo.export import export

    after = {} if init is None else {"after": _recipe_of(init)}
    torch.set_num_threads(threads)
    trained = RECIPES[model](Order(minutes, device, seed, work, init))
    recipe: dict[str, Any] = dict(minutes=minutes, device=device, seed=seed)
    recipe |= {"glyphs": trained.glyphs, "seconds": dict(trained.seconds)} | after
    export(out / model, model, trained, recipe)
    typer.echo(json.dumps(recipe))


def _recipe_of(folder: Path) -> Any:
    """The recipe that an exported folder was made by.

    Raises: UserError when it does not say.
    """
    path = folder / "expected.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--init {folder}: expected a folder that a recipe exported; the recipe in its"
            f" expected.json cannot be read ({type(error).__name__}: {error})"
        ) from None


def command() -> None:
    """Run the command line; what the user can change is said in one line."""
    try:
        typer.run(main)
    except AutofrError as error:
        print(f"autofr: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    command()
