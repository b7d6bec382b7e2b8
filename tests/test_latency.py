"""Laws of budgets, timing and costs, on a clock that the tests turn by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.errors import BudgetError, MeasurementError
from autofr.measure import latency
from autofr.measure.costs import Costs, parse_budget
from autofr.measure.latency import measure_costs, paired, seconds, synchronize

laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)
durations = st.floats(1e-6, 1e3)


class Clock:
    """Stands in for the module `time`; calls advance it by what they are said to take."""

    def __init__(self):
        self.now = self.busy = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.busy

    def takes(self, amount, busy=None):
        self.now += amount
        self.busy += amount if busy is None else busy


@pytest.fixture
def clock(monkeypatch):
    """A clock at rest, in place of the machine's."""
    one = Clock()
    monkeypatch.setattr(latency, "time", one)
    return one


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "speedup", "duration"),
    [
        ("1.5x", 1.5, None), (" 2x ", 2, None), ("1.25 x", 1.25, None), ("1e1x", 10, None),
        ("180ms", None, 0.18), ("0.18s", None, 0.18), (".5s", None, 0.5), ("2e2 ms", None, 0.2),
    ],
)  # fmt: skip
def test_budgets_are_read(text, speedup, duration):
    """A budget is a speed-up or a time per call; it remembers how it was written."""
    budget = parse_budget(text)
    assert (budget.speedup, budget.seconds) == (speedup, pytest.approx(duration))
    assert budget.text == text.strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5x", "above 1x"), ("1x", "above 1x"), ("1.0x", "above 1x"), ("1000x", "below 1000x"),
        ("1e400x", "below 1000x"), ("0ms", "a time must be above 0"), ("0s", "must be above 0"),
        ("1.5", "did you mean 1.5x"), ("2", "did you mean 2x"), ("abc", "expected a speed-up"),
        ("", "expected a speed-up"), ("-1ms", "expected"), ("-2x", "expected"),
        ("1.5X", "expected"), ("1,5x", "expected"), ("nanx", "expected"), ("infs", "expected"),
        ("1.5x2x", "expected"), ("1.5 x faster", "expected"), ("1..5x", "expected"),
    ],
)  # fmt: skip
def test_bad_budgets_say_what_was_expected(text, message):
    """Anything else is a BudgetError that repeats the text and gives the rule or the way out."""
    with pytest.raises(BudgetError, match=message) as error:
        parse_budget(text)
    assert repr(text) in str(error.value)


@laws
@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_a_budget_error(text):
    """No text raises anything but BudgetError."""
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert (budget.speedup is None) != (budget.seconds is None)
    assert budget.speedup is None or budget.speedup > 1
    assert budget.seconds is None or budget.seconds > 0


@laws
@given(st.floats(1.001, 999), durations)
def test_a_speedup_and_its_seconds_agree(speedup, teacher):
    """The seconds of a speed-up, given as a budget in seconds, are the same speed-up."""
    asked = parse_budget(f"{speedup!r}x")
    target = asked.seconds_of(teacher)
    assert asked.speedup_over(teacher) == pytest.approx(speedup)
    assert parse_budget(f"{target!r}s").speedup_over(teacher) == pytest.approx(speedup)
    assert parse_budget(f"{1000 * target!r}ms").seconds_of(teacher) == pytest.approx(target)


def test_a_budget_that_is_met_already_is_refused():
    """A time per call that the teacher keeps is an error that says what it takes."""
    with pytest.raises(BudgetError, match="already takes only 150 ms"):
        parse_budget("180ms").seconds_of(0.15)
    assert parse_budget("180ms").seconds_of(0.2) == pytest.approx(0.18)


# -- costs ---------------------------------------------------------------------------------------

steps_of = st.lists(st.sampled_from(["key", "jump", "m"]), max_size=12)


@laws
@given(durations, durations, durations, durations, steps_of, steps_of)
def test_costs_add_up(key, jump, mask, fixed, some, more):
    """A call costs its fixed part once and every step by its name; order does not matter."""
    costs = Costs(key, jump, fixed, {"m": mask})
    both = costs.of_call(some + more)
    assert both == pytest.approx(costs.of_call(some) + costs.of_call(more) - fixed)
    assert both == pytest.approx(costs.of_call(more + some))
    assert costs.of_call(some) == pytest.approx(fixed + sum(map(costs.of_step, some)))
    assert costs.teacher(len(some)) == pytest.approx(costs.of_call(["key"] * len(some)))


def test_an_unknown_step_has_no_cost():
    """A mask that was not timed is an error, not free."""
    with pytest.raises(KeyError):
        Costs(1, 0, 0, {}).of_call(["key", "m"])


@laws
@given(
    *[st.floats(0.01, 10)] * 2,
    st.floats(0, 0.01),
    st.floats(0.01, 0.99),
    st.integers(3, 60),
    st.sampled_from([0, 0, 1, 5]),
)
def test_measured_costs_are_the_parts_of_the_call(network, fixed, jump, share, steps, left_out):
    """On a machine whose calls are a sum of parts, measuring recovers every part.

    Steps that a call leaves out cost nothing, and the first one that runs is computed.
    """
    clock = Clock()
    part = {"key": network + jump, "jump": jump}
    steps += left_out

    def call(names):
        clock.takes(fixed + sum(part[name] for name in ["key", *names[left_out + 1 :]]))

    def evaluate(name):
        clock.takes(network if name == "key" else share * network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "time", clock)
        costs = measure_costs(
            call, evaluate, steps, ["m"], first=lambda steps: left_out, few=2 + left_out
        )
    assert costs.teacher(steps) == pytest.approx(fixed + (steps - left_out) * (network + jump))
    assert costs.key == pytest.approx(network + jump)
    assert costs.jump == pytest.approx(jump, abs=1e-9)
    assert costs.fixed == pytest.approx(fixed, abs=1e-9)
    assert costs.masks == {"m": pytest.approx(share * network + jump)}


def test_masks_are_measured_against_the_keyframes_around_them(clock):
    """A machine that grows steadily slower while masks are timed does not change their ratio."""
    slow = 1.0

    def evaluate(name):
        nonlocal slow
        clock.takes(slow if name == "key" else 0.25 * slow)
        slow += 0.01

    costs = measure_costs(lambda names: clock.takes(names.count("key")), evaluate, 4, ["a", "b"])
    assert costs.key == pytest.approx(1)
    assert costs.masks == {name: pytest.approx(0.25) for name in "ab"}


def test_costs_are_never_negative(clock):
    """Noise that makes an idle call slower than a full one gives zeros, not negative seconds."""
    rng = np.random.default_rng(0)
    costs = measure_costs(
        lambda names: clock.takes(rng.uniform(1, 2)), lambda name: clock.takes(1.0), 3, ["m"]
    )
    assert min(costs.key, costs.jump, costs.fixed, costs.masks["m"]) >= 0 and costs.key > 0


def test_rounds_are_reported(clock):
    """Progress names every round."""
    seen = []
    measure_costs(
        lambda names: clock.takes(len(names)), lambda name: clock.takes(1), 3, ["m"],
        rounds=4, on_round=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# -- pairs ---------------------------------------------------------------------------------------


def test_a_steady_ratio_is_found(clock):
    """Two calls of known length give their ratio, after the fewest pairs."""
    found = paired(lambda: clock.takes(3.0), lambda: clock.takes(2.0, busy=1.0), min_pairs=5)
    assert found.ratio.value == found.ratio.low == found.ratio.high == pytest.approx(1.5)
    assert (found.first_seconds, found.second_seconds) == (pytest.approx(3), pytest.approx(2))
    assert found.pairs == 5
    assert found.cpu_ratio == pytest.approx(3)


@laws
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10), st.floats(0, 0.5))
def test_the_interval_holds_the_value(seed, ratio, noise):
    """However noisy the calls, low ≤ value ≤ high, and the value lies among the single ratios."""
    clock, rng = Clock(), np.random.default_rng(seed)
    taken = []

    def call(length):
        taken.append(length * math.exp(noise * rng.normal()))
        clock.takes(taken[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "time", clock)
        found = paired(lambda: call(ratio), lambda: call(1.0), max_pairs=8)
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert 6 <= found.pairs <= 8 and len(taken) == 2 * (found.pairs + 1)
    spread = math.log(max(taken) / min(taken))
    assert abs(math.log(found.ratio.value)) <= spread + 1e-9


def test_the_order_alternates_and_before_is_told(clock):
    """Every call is announced as 0 or 1; after a warm-up pair the order turns each time."""
    log = []
    paired(lambda: clock.takes(1.0), lambda: clock.takes(2.0), before=log.append, min_pairs=4)
    assert log == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0]


def test_before_is_not_timed(clock):
    """What prepares a call is no part of its time."""
    found = paired(
        lambda: clock.takes(1.0), lambda: clock.takes(1.0), before=lambda which: clock.takes(which)
    )
    assert found.ratio.value == pytest.approx(1)


def test_a_steady_drift_cancels(clock):
    """A machine that slows down at a steady rate leaves the ratio as it is."""
    speed = SimpleNamespace(now=1.0)

    def call(length):
        clock.takes(length * speed.now)
        speed.now *= 1.02

    found = paired(lambda: call(3.0), lambda: call(2.0), min_pairs=10)
    assert found.ratio.value == pytest.approx(1.5, rel=1e-3)


def test_pairs_stop_at_the_limits(clock):
    """Noise that never settles ends at the number of pairs or at the time, whichever is first."""
    rng = np.random.default_rng(0)

    def call():
        clock.takes(rng.uniform(1, 10))

    widths = []
    many = paired(call, call, max_pairs=9, max_seconds=1e9, on_pair=lambda *w: widths.append(w))
    assert many.pairs == 9 and [pairs for pairs, _ in widths] == [6, 7, 8, 9]
    assert all(width > 0.03 for _, width in widths)
    assert paired(call, call, max_seconds=0).pairs == 6


def test_a_call_that_takes_no_time_is_refused(clock):
    """A clock that stands still gives an error and not an infinite ratio."""
    with pytest.raises(MeasurementError, match="no measurable time"):
        paired(lambda: clock.takes(1.0), lambda: None)


def test_seconds_is_the_time_of_one_call(clock):
    """`seconds` calls once and returns what the clock says."""
    assert seconds(lambda: clock.takes(0.25)) == 0.25


@pytest.mark.parametrize(
    ("device", "waits"), [("cpu", []), ("cuda:1", ["cuda:1"]), ("mps", ["mps"]), ("xpu", ["xpu"])]
)
def test_every_accelerator_is_waited_for(monkeypatch, device, waits):
    """Whatever kind of device it is, its work is done before a clock is read."""
    seen = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda where: seen.append(str(where)))
    synchronize(device)
    assert seen == waits


def test_a_call_of_one_step_has_no_parts() -> None:
    """Where nothing can be reused the costs are refused, not divided by zero."""
    with pytest.raises(MeasurementError, match="one step has nothing to reuse"):
        measure_costs(lambda steps: None, lambda step: None, 1, [])
