"""Laws of retiming: the same policy for another step count."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import MEASURED, PROVENANCE, policies, policy, sampler
from typer.testing import CliRunner

from autofr.cli.policies import app
from autofr.errors import PolicyError, UserError
from autofr.mix import Sigmoid, Table
from autofr.policy import Policy
from autofr.policy_file import load, loads

laws = settings(deadline=None, max_examples=200, derandomize=True, database=None)
MASKS = {"m": ("a#conv",), "n": ("b#attn", "a#conv")}


@st.composite
def plans(draw: st.DrawFn) -> Policy:
    """A policy as long as real ones, with λ(t) or a table that reaches back any number of keys."""
    kinds = st.sampled_from(["key", "jump", "m", "n"])
    steps = ("key", *draw(st.lists(kinds, max_size=40)))
    replaces = draw(st.integers(max(1, len(steps) // 2), 2 * len(steps)))
    rows: list[tuple[float, ...]] = []
    for index, step in enumerate(steps):
        keys = steps[:index].count("key")
        kept = draw(st.integers(int(step == "jump"), min(keys, 16)))
        first = 0.0 if step == "jump" else 0.5
        plain = step == "key" and not kept
        rows.append(() if plain else (first, *(1.0 + k for k in range(kept))))
    mix = draw(st.sampled_from([Sigmoid(), Table(weights=tuple(rows))]))
    return policy(
        steps, MASKS, mix=mix, sampler=sampler(len(steps), replaces=replaces), measured=MEASURED
    )


counts = st.integers(1, 120)


@laws
@given(st.one_of(policies(), plans()))
def test_retiming_to_the_same_count_changes_nothing(one: Policy) -> None:
    """Only what was measured, and where it comes from, are gone."""
    same = one.model_copy(update={"measured": None, "provenance": None})
    assert one.retime(one.sampler.replaces) == same
    assert one.retime(one.sampler.replaces).digest == one.digest


def test_weights_that_fall_together_stay_within_bounds() -> None:
    """Two keyframes become one: where their weights add up to too large a one, that is said."""
    rows = ((), (), *[(0.0, 600.0, 600.0)] * 2)
    one = policy(("key", "key", "jump", "jump"), MASKS, mix=Table(weights=rows))
    with pytest.raises(PolicyError, match="cannot retime to 2 steps: weights of keyframes"):
        one.retime(2)


@laws
@given(st.one_of(policies(), plans()), counts)
def test_a_retimed_policy_is_a_policy(one: Policy, steps: int) -> None:
    """It reads as a valid file, of the asked count, with the old masks, and is not measured."""
    later = one.retime(steps)
    assert loads(later.model_dump_json()) == later
    assert later.sampler.replaces == steps
    ratio = steps * len(one.steps) / one.sampler.replaces
    assert abs(len(later.steps) - ratio) <= 0.5
    assert later.steps[0] == "key"
    assert later.masks == one.masks and set(later.steps) <= set(one.steps)
    assert later.measured is None and later.provenance is None
    assert later.model == one.model


@laws
@given(plans(), counts)
def test_retiming_twice_is_retiming_once(one: Policy, steps: int) -> None:
    """The retimed policy is its own retimed policy."""
    assert one.retime(steps).retime(steps) == one.retime(steps)


@laws
@given(plans(), counts)
def test_the_share_of_keyframes_stays(one: Policy, steps: int) -> None:
    """As many of the new steps are computed as of the old ones, to within one step."""
    later = one.retime(steps)
    share = len(one.keyframes) / len(one.steps)
    assert abs(len(later.keyframes) - share * len(later.steps)) <= 1


@laws
@given(plans(), counts)
def test_keyframes_stay_where_they_were(one: Policy, steps: int) -> None:
    """The same part of all keyframes has passed at the same place, to the nearest step."""
    later = one.retime(steps)
    ends, scale = [*one.keyframes, len(one.steps)], len(later.steps) / len(one.steps)
    for index, key in enumerate(later.keyframes):
        passed = index * len(one.steps) // len(later.steps)
        assert ends[passed] * scale - 0.5 <= key <= ends[passed + 1] * scale + 0.5


@laws
@given(plans(), counts)
def test_weights_keep_their_sum(one: Policy, steps: int) -> None:
    """Each row is an old one of the same kind of step, shortened at most, with the same sum."""
    later = one.retime(steps)
    if isinstance(one.mix, Table):
        old = {(step, one.weights(i)[:1], sum(one.weights(i))) for i, step in enumerate(one.steps)}
        for i, step in enumerate(later.steps):
            row = later.weights(i)
            assert (step, row[:1], sum(row)) in old
    else:
        assert later.mix == one.mix


def repeated(pattern: str, times: int) -> Policy:
    """A policy of equal intervals: K key, J jump, m mask."""
    names = {"K": "key", "J": "jump", "m": "m"}
    return policy(tuple(names[letter] for letter in pattern * times), MASKS)


@pytest.mark.parametrize("pattern", ["K", "KJ", "Kmm", "KJmJ", "KJJmm"])
@pytest.mark.parametrize(("times", "later"), [(6, 12), (12, 6), (4, 6), (10, 15), (9, 6)])
def test_equal_intervals_stay_as_they_are(pattern: str, times: int, later: int) -> None:
    """More steps are more intervals of the same kind, not longer ones."""
    one = repeated(pattern, times)
    assert one.retime(later * len(pattern)).steps == repeated(pattern, later).steps


@pytest.mark.parametrize("count", [12, 16, 30, 48])
def test_dense_keyframes_stay_dense(count: int) -> None:
    """Where every step was computed every step is; where there were long gaps there are."""
    steps = ("key",) * 6 + ("key", "m", "m", "m", "m", "m") * 3
    later = policy(steps, MASKS).retime(count).keyframes
    quarter = count // 4
    assert later[:quarter] == tuple(range(quarter))
    assert all(b - a >= 4 for a, b in pairwise(later[quarter:]))


def test_weights_of_missing_keyframes_go_to_the_oldest() -> None:
    """Two keyframes are all that an interval has behind it where it copies one with more."""
    rows = ((), (0.0, 1.0), (), (0.5, 0.75, -0.25), (), (0.0, 1.5, -0.25, -0.25), (), (1.0,))
    steps = ("key", "jump", "key", "m", "key", "jump", "key", "m")
    later = policy(steps, MASKS, mix=Table(weights=rows)).retime(4)
    assert later.steps == ("key", "jump", "key", "jump")
    assert later.mix == Table(weights=((), (0.0, 1.0), (), (0.0, 1.5, -0.5)))


def test_a_keyframe_that_mixes_follows_what_it_corrects() -> None:
    """Twice as many steps: each copy of an interval is followed by the row that came after it."""
    rows = ((), (0.0, 1.0), (0.9, 0.1), (0.0, 1.5, -0.5), (0.8, 0.3, -0.1), (0.0, 2.0, -1.0))
    one = policy(("key", "jump") * 3, MASKS, mix=Table(weights=rows))
    later = one.retime(12)
    assert later.steps == ("key", "jump") * 6
    found = [later.weights(i) for i in range(0, 12, 2)]
    # The last interval of the old policy has nothing after it, so its first copy has not either.
    assert found == [(), (0.9, 0.1), (0.9, 0.1), (0.8, 0.3, -0.1), (0.8, 0.3, -0.1), ()]
    fewer = policy(("key", "key", "jump", "key"), MASKS, mix=Table(
        weights=((), (), (0.0, 1.0), (0.7, 0.5, -0.2))
    )).retime(2)  # fmt: skip
    assert [len(fewer.weights(i)) <= i + 1 for i in range(2)] == [True, True]


def test_a_shorter_policy_stays_shorter() -> None:
    """Four steps in the place of eight are three in the place of six."""
    one = policy(("key", "m", "key", "m"), MASKS, sampler=sampler(4, replaces=8))
    later = one.retime(6)
    assert (later.sampler.num_inference_steps, later.sampler.replaces) == (3, 6)


@pytest.mark.parametrize("steps", [0, -1, 10_001])
def test_impossible_counts_are_refused(steps: int) -> None:
    """The message says which counts there are, and what was asked."""
    with pytest.raises(PolicyError, match=f"cannot retime to {steps} steps: expected 1 to 10000"):
        policy().retime(steps)


def test_a_policy_out_of_bounds_is_refused() -> None:
    """The policy's own length has the same limits as a call's."""
    long = policy(("key", "m", "m", "m"), MASKS, sampler=sampler(4, replaces=1))
    with pytest.raises(PolicyError, match="which takes 4 for a call of 1"):
        long.retime(2_501)
    short = policy(("key",), {}, sampler=sampler(1, replaces=40))
    with pytest.raises(PolicyError, match="which takes 1 for a call of 40"):
        short.retime(19)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_writes_what_the_method_gives(tmp_path: Path) -> None:
    """`autofr retime` is `Policy.retime` between two files."""
    one = policy(measured=MEASURED, provenance=PROVENANCE)
    one.save(tmp_path / "a.json")
    words = ["retime", str(tmp_path / "a.json"), "--steps", "9", "--out", str(tmp_path / "b.json")]
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ran.exit_code == 0 and "9 steps for a call of 9" in ran.output
    assert load(tmp_path / "b.json") == one.retime(9)


def test_the_command_refuses_a_place_that_is_none(tmp_path: Path) -> None:
    """A folder as the file to write, or a file in a file, is refused before anything is read."""
    (tmp_path / "a.json").touch()
    for out in (tmp_path, tmp_path / "a.json" / "b.json"):
        words = ["retime", "nowhere.json", "--steps", "9", "--out", str(out)]
        with pytest.raises(UserError, match=r"expected the name of a file|cannot write there"):
            CliRunner().invoke(app, words, catch_exceptions=False)
