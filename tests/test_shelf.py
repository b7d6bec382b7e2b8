"""Laws of the shelf: a run is given what fits it, whole, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_decode import calibration
from test_report import make_profile
from test_search import SPACE, settings, tiny_pipe

from autofr.measure.costs import parse_budget
from autofr.policy import Keep
from autofr.search.folder import STATE, spec_of
from autofr.search.shelf import shared

PIPE = tiny_pipe("ldm")
FAR = SPACE.model_copy(update={"axes": SPACE.axes.model_copy(update={"max_gap": (2, 5)})})
WHOLE = ["calibration-6.npz", "profile.json"]


@contextmanager
def run(folder: Path, shelf: Path | None, **changes: Any) -> Iterator[Path]:
    """A run in a folder of its own; gives the folder of what it keeps."""
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    asked = settings(**changes)
    with shared(shelf, folder, PIPE, asked, spec_of(PIPE, asked)):
        yield folder / STATE


def measure(own: Path, steps: int = 12) -> None:
    """Leave a profile and a calibration in a run's folder."""
    make_profile(steps=steps).save(own / "profile.json")
    calibration(6).save(own / "calibration-6.npz")


def names(own: Path) -> list[str]:
    return sorted(path.name for path in own.iterdir())


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A shelf with what one run has measured."""
    with run(tmp_path / "first", tmp_path / "shelf") as own:
        measure(own)
    return tmp_path / "shelf"


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": parse_budget("2x")},
        {"trials": 99, "time_limit": 9.0, "command": "another"},
        {"keep": Keep(dtype="float16"), "max_memory": 10**6},
    ],
    ids=["budget", "trials", "memory"],
)
def test_a_run_of_another_budget_is_given_everything(
    shelf: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Profile and calibration depend on neither budget nor trials nor the memory allowed."""
    with run(tmp_path / "second", shelf, **changes) as own:
        assert names(own) == WHOLE
        for name in WHOLE:
            assert (own / name).read_bytes() == (tmp_path / "first" / STATE / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"steps": 7}, {"batch": 3}, {"seed": 1}, {"inputs": "abc"}, {"inputs_count": 3}],
    ids=str,
)
def test_a_run_of_another_protocol_is_given_nothing(
    shelf: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Whatever a measurement depends on is part of its place."""
    with run(tmp_path / "second", shelf, **changes) as own:
        assert names(own) == []


def test_a_space_that_reaches_further_is_calibrated_anew(shelf: Path, tmp_path: Path) -> None:
    """The profile is the same, the calibration is of another reach; both are kept."""
    with run(tmp_path / "second", shelf, space=FAR) as own:
        assert names(own) == ["profile.json"]
        calibration(6, 5).save(own / "calibration-6.npz")
    for name, space in (("third", FAR), ("fourth", SPACE)):
        with run(tmp_path / name, shelf, space=space) as own:
            source = tmp_path / ("second" if space is FAR else "first") / STATE
            there = (source / "calibration-6.npz").read_bytes()
            assert (own / "calibration-6.npz").read_bytes() == there


@pytest.mark.parametrize("name", ["profile.json", "ground.json", "gap-3/calibration-6.npz"])
def test_what_is_damaged_is_measured_again(shelf: Path, tmp_path: Path, name: str) -> None:
    """Half a file is given to nobody, and is replaced by the next run that measures."""
    (path,) = shelf.glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with run(tmp_path / "second", shelf) as own:
        assert names(own) == []
        measure(own, steps=9)
    with run(tmp_path / "third", shelf) as own:
        assert names(own) == WHOLE
        second = tmp_path / "second" / STATE / "profile.json"
        assert (own / "profile.json").read_bytes() == second.read_bytes()


def test_a_calibration_stays_with_its_profile(shelf: Path, tmp_path: Path) -> None:
    """A run that has measured a profile itself is given no calibration of another, and leaves none.

    Which masks are calibrated goes by the profile's times.
    """
    (tmp_path / "second" / STATE).mkdir(parents=True)
    make_profile(steps=9).save(tmp_path / "second" / STATE / "profile.json")
    with run(tmp_path / "second", shelf) as own:
        assert names(own) == ["profile.json"]
        calibration(7).save(own / "calibration-7.npz")
    with run(tmp_path / "third", shelf) as own:
        assert names(own) == WHOLE


def test_a_run_that_fails_leaves_what_it_measured(tmp_path: Path) -> None:
    """The measurement was right, whatever came after it."""
    with pytest.raises(ZeroDivisionError), run(tmp_path / "first", tmp_path / "shelf") as own:
        measure(own)
        raise ZeroDivisionError
    with run(tmp_path / "second", tmp_path / "shelf") as own:
        assert names(own) == WHOLE


def test_without_a_shelf_nothing_is_shared(tmp_path: Path) -> None:
    """A search on its own writes into its own folder only; a shelf that fails costs nothing."""
    with run(tmp_path / "first", None) as own:
        measure(own)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    (tmp_path / "file").touch()
    with run(tmp_path / "first", tmp_path / "file") as own:
        assert names(own) == WHOLE
