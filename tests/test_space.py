"""Laws of search spaces: what a file may say."""

from __future__ import annotations

import pytest

from autofr.errors import SpaceError
from autofr.search.space import (
    MAX_BYTES,
    SHIPPED,
    Direct,
    Planned,
    Uniform,
    largest_gap,
    load_space,
)


@pytest.mark.parametrize(
    ("name", "kind"), [("default", Planned), ("frdiff", Uniform), ("direct", Direct)]
)
def test_shipped_spaces_load(name, kind):
    """The shipped spaces are valid and carry their own names."""
    space = load_space(name)
    assert isinstance(space, kind) and space.name == name and name in SHIPPED


def write(tmp_path, kind="planned", **axes):
    """A space file with the given axes, TOML values as text."""
    axes.setdefault("mix", '["constant"]')
    lines = [f"{name} = {value}" for name, value in axes.items() if value is not None]
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\nkind = "{kind}"\n[axes]\n' + "\n".join(lines))
    return str(path)


def test_own_spaces_load_by_path(tmp_path):
    """A user's file is read by its path; what it leaves out has a default; ints are numbers."""
    space = load_space(write(tmp_path, tau="[5, 60]", mix='["fit2", "linear"]', max_gap="[2, 9]"))
    assert isinstance(space, Planned) and space.name == "mine"
    assert space.axes.tau == (5.0, 60.0) and space.axes.masks == ("all",)
    assert largest_gap(space) == 9
    assert largest_gap(load_space("frdiff")) == largest_gap(load_space("direct")) == 1


def test_a_choice_of_two_step_counts_is_no_range(tmp_path):
    """Step counts are choices: they may be listed in any order."""
    space = load_space(write(tmp_path, steps="[1.0, 0.5]"))
    assert space.axes.steps == (1.0, 0.5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (dict(colour="1"), "axes.colour: "),
        (dict(mix=None), "axes.mix: "),
        (dict(mix="[]"), "axes.mix: "),
        (dict(mix='["magic"]'), "axes.mix.0: "),
        (dict(mix="3"), "axes.mix: "),
        (dict(tau="[60.0, 5.0]"), r"axes.*expected \[lowest, highest\], got \[60.0, 5.0\]"),
        (dict(max_gap="[6, 3]"), r"axes.*expected \[lowest, highest\], got \[6, 3\]"),
        (dict(tau="[5.0]"), "axes.tau"),
        (dict(tau="[1.0, 2.0, 3.0]"), "axes.tau"),
        (dict(tau='["a", 3.0]'), "axes.tau.0: "),
        (dict(tau="[0.0, 60.0]"), "axes.tau.0: "),
        (dict(tau="[5.0, inf]"), "axes.tau.1: "),
        (dict(bias="[nan, 0.5]"), "axes.bias.0: "),
        (dict(phase="[-inf, 0.5]"), "axes.phase.0: "),
        (dict(max_gap="[0, 3]"), "axes.max_gap.0: "),
        (dict(max_gap="[1, 1001]"), "axes.max_gap.1: "),
        (dict(kind="uniform", interval="[2, 1001]"), "axes.interval.1: "),
        (dict(max_gap="[1.5, 3]"), "axes.max_gap.0: "),
        (dict(first="[0, 3]"), "axes.first.0: "),
        (dict(last="[-1, 3]"), "axes.last.0: "),
        (dict(rollouts="[-1, 3]"), "axes.rollouts.0: "),
        (dict(steps="[0.0]"), "axes.steps.0: "),
        (dict(steps="[1.5]"), "axes.steps.0: "),
        (dict(steps="[]"), "axes.steps: "),
        (dict(masks="[]"), "axes.masks: "),
        (dict(masks='["some"]'), "axes.masks.0: "),
        (dict(kind="uniform", interval="[1, 3]"), "axes.interval.0: "),
        (dict(kind="uniform", interval="[5, 3]"), "axes.*lowest"),
        (dict(kind="uniform", max_gap="[2, 3]"), "axes.max_gap: "),
        (dict(kind="uniform", mix='["linear", "fit2"]'), "axes.mix.1: "),
        (dict(kind="direct", mix='["fit1"]'), "axes.mix.0: "),
        (dict(kind="direct", mix='["magic"]'), "axes.mix.0: "),
        (dict(kind="direct", groups='["stage"]'), "axes.groups.0: "),
    ],
)
def test_bad_axes_are_named(tmp_path, axes, message):
    """An axis that is unknown, out of range or upside down is a SpaceError that names it."""
    with pytest.raises(SpaceError, match=message) as error:
        load_space(write(tmp_path, **axes))
    assert "mine.toml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        ("", "kind is None, expected one of planned, uniform, direct"),
        ('name = "a"\nkind = "planed"', "kind is 'planed', expected one of planned"),
        ("name = 'a'\nkind = 3", "kind is 3"),
        ("kind = 'direct'\n[axes]\nmix = ['constant']", "name: "),
        ("name = 'a'\nkind = 'direct'", "axes: "),
        ("name = 'a'\nkind = 'direct'\naxes = 3", "axes: "),
        ("name = 'a'\nkind = 'direct'\nseed = 3\n[axes]\nmix = ['constant']", "seed: "),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    """A file that is not TOML, or without a known kind, is a SpaceError that names it."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SpaceError, match=message) as error:
        load_space(str(path))
    assert str(path) in str(error.value)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SpaceError, match=r"larger than 0\.0625 MiB"):
        load_space(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpaceError, match="not valid TOML"):
        load_space(str(path))


def test_a_missing_space_lists_the_shipped_ones(tmp_path):
    """An unknown name says what there is."""
    for name in ("defualt", str(tmp_path), str(tmp_path / "none.toml")):
        with pytest.raises(SpaceError, match="one of default, frdiff, direct"):
            load_space(name)
