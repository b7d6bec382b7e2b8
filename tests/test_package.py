"""Laws about what a user receives: the wheel, the sdist, and the versions that were tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
METADATA = f"autofr-{PROJECT['project']['version']}.dist-info"


def build(source: Path, kind: str, out: Path) -> Path:
    """Build `source` with the installed hatchling (no isolation, no network)."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.iterdir()
    return built


def files_under(folder: Path) -> set[str]:
    """Return the relative names of the files in a folder that belong to the project."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder) for path in paths)
    return {name.as_posix() for name in names if "__pycache__" not in name.parts}


def names_of(requirements: list[str]) -> set[str]:
    """Return the bare distribution names of a list of requirements."""
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of the files in a wheel built from the checkout."""
    with zipfile.ZipFile(build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_whole_package(wheel: set[str]) -> None:
    """Every file of the package reaches the wheel, weights and data included."""
    assert {f"autofr/{name}" for name in files_under(ROOT / "autofr")} - wheel == set()


def test_wheel_is_typed(wheel: set[str]) -> None:
    """Type checkers may read the annotations of an installed autofr."""
    assert "autofr/py.typed" in wheel


def test_wheel_holds_the_search_spaces(wheel: set[str]) -> None:
    """The search spaces, which stand outside the package folder, are installed inside it."""
    spaces = {f"autofr/search_spaces/{path.name}" for path in ROOT.glob("search_spaces/*.toml")}
    assert spaces
    assert spaces <= wheel


@pytest.mark.skipif(not (ROOT / "autofr/zoo/ldm4").exists(), reason="ldm4 is not bundled yet")
def test_wheel_holds_the_weights(wheel: set[str]) -> None:
    """The bundled model works from an installed wheel, with no download."""
    weights = {f"autofr/zoo/{n}" for n in files_under(ROOT / "autofr/zoo") if "safetensors" in n}
    assert any(name.startswith("autofr/zoo/ldm4/") for name in weights)
    assert weights <= wheel


def test_wheel_holds_nothing_else(wheel: set[str]) -> None:
    """Tests, results and other folders of the checkout are not installed."""
    assert {name.split("/")[0] for name in wheel} == {"autofr", METADATA}


def test_wheel_from_the_sdist_equals_the_wheel(wheel: set[str], tmp_path: Path) -> None:
    """Nothing gets lost on the way through the source distribution."""
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(build(source, "wheel", tmp_path / "wheel")) as archive:
        assert set(archive.namelist()) == wheel


def test_constraints_pin_every_direct_dependency() -> None:
    """The tested version of each dependency and development tool is written down, exactly."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if "==" not in pin] == []
    project = PROJECT["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    binaries = {"psycopg-binary"}  # what the extra psycopg[binary] brings along
    assert names_of(pins) - binaries == names_of(project["dependencies"] + extras)


def test_dev_extra_equals_dev_group() -> None:
    """Old and new ways to install the development tools install the same ones."""
    extra = PROJECT["project"]["optional-dependencies"]["dev"]
    assert extra == PROJECT["dependency-groups"]["dev"]
