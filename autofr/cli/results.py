"""Commands on what was found: a policy in words, the report of a run or of many, a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autofr import hub
from autofr.cli import console, places
from autofr.cli.options import Json
from autofr.errors import RunFolderError

if TYPE_CHECKING:
    from autofr.search.result import Result

app = typer.Typer()

Policy = Annotated[Path, typer.Argument(help="policy file, or hub:owner/name@revision")]


@app.command()
def show(policy: Policy, as_json: Json = False) -> None:
    """Say in words what a policy does and what was measured.

    Example: `autofr show results/ldm4-1.5x/policy.json`
    """
    found = hub.read(policy)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    typer.echo("\n".join(console.words(found)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a finished search, or of many")],
) -> None:
    """Write the tables, plots and page of a finished search again; over many, an index page.

    The page, `report.html`, is one file that needs no network.

    Example: `autofr report results/ldm4-1.5x`
    """
    runs = [] if (folder / "result.json").exists() else sorted(folder.glob("*/result.json"))
    if runs:
        _index(folder, [path.parent for path in runs])
        return
    from autofr.report import page
    from autofr.report import report as reporting

    result = reporting.load_result(folder)
    profile = reporting.load_profile(folder)
    paths = reporting.write(result, folder, profile, None, None)
    paths.append(page.write(result, folder, profile))
    typer.echo(reporting.headline(result))
    typer.echo("Wrote " + ", ".join(path.name for path in paths))


def _index(folder: Path, runs: list[Path]) -> None:
    """Write the page of every run, and the index over them; what cannot be read is named there."""
    from autofr.report import page
    from autofr.report import report as reporting

    found: dict[str, Result | str] = {}
    for run in runs:
        try:
            result = reporting.load_result(run)
            page.write(result, run, reporting.load_profile(run))
            found[run.name] = result
            typer.echo(f"{run.name}: {reporting.headline(result)}")
        except RunFolderError as error:
            found[run.name] = str(error)
            typer.echo(f"{run.name}: cannot be read: {error}")
    typer.echo(f"Wrote {page.write_index(found, folder)}")


@app.command()
def compare(
    first: Policy,
    second: Policy,
    out: Annotated[Path, typer.Option(help="HTML file")] = Path("compare.html"),
) -> None:
    """Say what two policies do differently, and write a page that shows it.

    Example: `autofr compare results/ldm4-1.5x/policy.json results/ldm4-3x/policy.json`
    """
    places.file(out, ".html")
    one, other = hub.read(first), hub.read(second)
    from autofr.report import differences

    typer.echo(f"A  {first}\nB  {second}\n")
    typer.echo("\n".join(differences.words(one, other)))
    differences.write(one, other, (str(first), str(second)), out)
    typer.echo(f"Wrote {out}")
