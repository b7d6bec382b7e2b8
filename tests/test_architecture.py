"""Laws about who may import whom, read from the source of every file in the package.

Imports count wherever they stand: at the top, inside a function, behind `TYPE_CHECKING`, or as a
literal name given to `import_module`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "autofr"

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRIES = {"__init__", "__main__"}  # these stand outside: nothing imports them


def read_ranks() -> dict[str, dict[str, int]]:
    """Package -> name in it -> its rank from the bottom, as import-linter is told them."""
    ranks = {}
    for contract in SETTINGS["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers":
            rows = reversed(contract["layers"])
            (package,) = contract["containers"]
            ranks[package] = {n: rank for rank, row in enumerate(rows) for n in row.split(" | ")}
    return ranks


RANKS = read_ranks()

# Dependency -> the only files that may import it.
DOORS = {
    "diffusers.hooks": {"runtime.hooks"},
    "diffusers.HookRegistry": {"runtime.hooks"},
    "optuna": {"search.database", "search.ledger", "search.queue", "search.shared"},
    "matplotlib": {"report.canvas", "report.notes", "report.pictures", "report.profile_pictures"},
    "typer": {
        "cli.app",
        "cli.drawing",
        "cli.models",
        "cli.options",
        "cli.policies",
        "cli.results",
        "cli.searching",
        "cli.tuning",
        "cli.worker",
        "zoo.train",
    },
    "huggingface_hub": {"hub_place"},
    "jinja2": {"report.html"},
}
LIGHT = {"errors", "inputs", "mix", "policy", "policy_file", "retiming"}
HEAVY = {"torch", "diffusers", "optuna", "matplotlib"}


def imported_names(source: str, package: str) -> set[str]:
    """Return every dotted name that a file imports; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                parents = package.split(".")
                base = parents[: len(parents) - node.level + 1] if node.level else []
                base += [node.module] if node.module else []
                names |= {".".join([*base, alias.name]) for alias in node.names}
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called),
                args=[ast.Constant(value=str(name)), *_],
            ) if called in ("import_module", "__import__"):
                names.add(name)
    return names


def is_under(name: str, parent: str) -> bool:
    """Say whether a dotted name is `parent` or something inside it."""
    return name == parent or name.startswith(parent + ".")


def read_package() -> dict[str, set[str]]:
    """Return file name (`policy`, `zoo.train`) -> dotted names that the file imports."""
    imports = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join(parts[:-1])
        name = ".".join(parts[1:]).removesuffix(".__init__")
        imports[name] = imported_names(path.read_text(encoding="utf-8"), package)
    return imports


IMPORTS = read_package()


def part_of(name: str, package: str) -> str:
    """Return which part of `package` a dotted name is in; the package itself is `__init__`."""
    part = name.removeprefix(package).split(".")[1:2]
    return part[0] if part and part[0] in RANKS[package] else "__init__"


def parts_used(file: str, package: str = "autofr") -> set[str]:
    """Return the parts of `package` that a file imports."""
    return {part_of(name, package) for name in IMPORTS[file] if is_under(name, package)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import optuna.trial as t", "optuna.trial"),
        ("def f():\n    import optuna", "optuna"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import optuna", "optuna"),
        ("from diffusers import hooks", "diffusers.hooks"),
        ("from . import quality", "autofr.zoo.quality"),
        ("from ..policy import Policy", "autofr.policy.Policy"),
        ("import importlib\nimportlib.import_module('optuna')", "optuna"),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: str) -> None:
    """The reader that all laws below rely on sees late, relative and dynamic imports."""
    assert expected in imported_names(source, "autofr.zoo")


@pytest.mark.parametrize("package", RANKS)
def test_every_file_has_a_layer(package: str) -> None:
    """A new file is given a place in the layers before it is used."""
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    files = {
        path.stem
        for path in folder.iterdir()
        if (path / "__init__.py").is_file() or path.suffix == ".py"
    }
    assert files - ENTRIES == RANKS[package].keys()


@pytest.mark.parametrize("package", RANKS)
def test_a_file_imports_only_from_lower_layers(package: str) -> None:
    """Data flows one way: no file imports from its own layer, a higher one or the package."""
    ranks, inside = RANKS[package], package.removeprefix("autofr").removeprefix(".")
    wrong = [
        f"{file} imports {other}"
        for file in IMPORTS
        if is_under(file, inside) or not inside
        if (layer := part_of(f"autofr.{file}", package)) not in ENTRIES
        for other in parts_used(file, package) - {layer}
        if other == "__init__" or ranks[other] >= ranks[layer]
    ]
    assert wrong == []


def test_only_the_entries_import_the_zoo() -> None:
    """Everything but the command line takes a pipe, whoever made it."""
    users = {file for file in IMPORTS if "zoo" in parts_used(file) and file.split(".")[0] != "zoo"}
    assert users <= {"cli.models", "cli.policies", "loading", "__init__"}


def test_the_zoo_needs_only_readers_and_what_judges_images() -> None:
    """The bundled models are made and loaded without the machinery that searches them."""
    used = {name for file in IMPORTS if file.split(".")[0] == "zoo" for name in parts_used(file)}
    assert used <= {"zoo", "errors", "files", "reading", "measure"}


@pytest.mark.parametrize("dependency", DOORS)
def test_a_dependency_has_one_door(dependency: str) -> None:
    """Each dependency that may change under us is imported by its own files only."""
    users = {f for f, names in IMPORTS.items() if any(is_under(n, dependency) for n in names)}
    assert users <= DOORS[dependency]


def test_errors_and_policies_are_light() -> None:
    """A policy file can be read and checked without torch, diffusers or Optuna."""
    wrong = {file: {n for n in IMPORTS[file] if n.split(".")[0] in HEAVY} for file in LIGHT}
    assert wrong == {file: set() for file in LIGHT}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import autofr"),
        ("-c", "import autofr.policy_file"),
        ("-m", "autofr", "--help"),
    ],
    ids=["package", "policy", "help"],
)
def test_light_entries_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    """Importing the package, reading a policy and asking for help load no heavy dependency."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "autofr" in loaded
    assert loaded & HEAVY == set()
