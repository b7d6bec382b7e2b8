"""What two policies do differently, in words and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from autofr.errors import RunFolderError
from autofr.memory import size
from autofr.mix import JUMP, KEY
from autofr.policy import Interval, Measured, Policy
from autofr.report.html import render
from autofr.report.policy_chart import OFF, does, mix, strip
from autofr.report.svg import drawing, mark, rect
from autofr.report.wording import count, duration, percent, times

MOST_PLACES = 12  # of steps that are named in words


def words(one: Policy, other: Policy) -> list[str]:
    """Say what differs, a sentence each; A is the first policy, B the second."""
    if one.digest == other.digest:
        return ["Both policies do the same at every step.", *_measured(one, other)]
    return [*_setting(one, other), *_steps(one, other), *_mix(one, other), *_measured(one, other)]


def rows(one: Policy, other: Policy) -> list[list[str]]:
    """The two policies side by side, header first."""
    return [["", "A", "B"], *([*line] for line in _facts(one, other))]


def _facts(one: Policy, other: Policy) -> Iterator[tuple[str, str, str]]:
    both = (one, other)
    steps = [does(policy) for policy in both]
    for name, values in {
        "model": [f"{p.model.name} ({p.model.denoiser})" for p in both],
        "scheduler": [p.sampler.scheduler for p in both],
        "steps": [f"{len(p.steps)} for a call of {p.sampler.replaces}" for p in both],
        "full steps": [str(s.count(KEY)) for s in steps],
        "steps with a mask": [str(_masked(p)) for p in both],
        "jumps": [str(s.count(JUMP)) for s in steps],
        "mix": [p.mix.kind.replace("_", " ").replace("table", "fitted table") for p in both],
        "digest": [p.digest for p in both],
    }.items():
        yield name, values[0], values[1]
    if not (one.measured or other.measured):
        return
    a, b = (_numbers(policy.measured) for policy in both)
    for name in {**a, **b}:
        yield name, a.get(name, "not measured"), b.get(name, "not measured")


def _numbers(measured: Measured | None) -> dict[str, str]:
    """What was measured, in words by name."""
    if measured is None:
        return {}
    found = {
        "speed-up": times(measured.speedup),
        "time per call": duration(measured.policy_seconds),
        "error of final latents": percent(measured.trajectory_error),
        "PSNR": f"{measured.psnr:.1f} dB",
        "memory kept": size(measured.kept_bytes),
    }
    found |= {one.title: f"{one.policy:.2f} against {one.teacher:.2f}" for one in measured.judged}
    return found | {"measured on": _conditions(measured)}


def _conditions(measured: Measured) -> str:
    return f"{measured.device}, {measured.dtype}, batch {measured.batch}, seeds {measured.seeds}"


# -- sentences ------------------------------------------------------------------------------------


def _setting(one: Policy, other: Policy) -> list[str]:
    """What the policies are for, where that is not the same."""
    pairs = {
        "model": (one.model.fingerprint, other.model.fingerprint),
        "scheduler": (one.sampler.scheduler, other.sampler.scheduler),
        "steps of a call": (one.sampler.replaces, other.sampler.replaces),
        "guidance": (one.sampler.guidance, other.sampler.guidance),
        "number type": (one.sampler.dtype, other.sampler.dtype),
        "how kept tensors are stored": (_kept(one), _kept(other)),
    }
    ours, theirs = one.sampler.config, other.sampler.config
    pairs |= {
        f"scheduler's {name}": (ours.get(name), theirs.get(name))
        for name in {**ours, **theirs}
        if name in ours and name in theirs  # older versions say less of the scheduler
    }
    return [f"Another {name}: A {a}, B {b}." for name, (a, b) in pairs.items() if a != b]


def _kept(policy: Policy) -> str:
    return f"{policy.keep.dtype or 'as they are'}{', on the host' if policy.keep.host else ''}"


def _counted(policy: Policy) -> str:
    steps = does(policy)
    total = len(steps) - steps.count(OFF)
    return (
        f"computes {steps.count(KEY)} of {count(total, 'step')} in full, reuses a part at"
        f" {_masked(policy)} and leaves out {steps.count(JUMP)}"
    )


def _masked(policy: Policy) -> int:
    """At how many steps a mask is used."""
    return sum(step in policy.masks for step in does(policy))


def _steps(one: Policy, other: Policy) -> list[str]:
    found = [f"A {_counted(one)}; B {_counted(other)}."]
    where = changed(one, other)
    if where is None:
        return [*found, "They have not the same number of steps: these cannot be compared singly."]
    if where:
        total = len(one.steps)
        found.append(
            f"They do different things at {len(where)} of {total} steps: {_places(where)}."
        )
    ours, theirs = (_used(policy) for policy in (one, other))
    for name, mine, rest in (("A", ours, theirs), ("B", theirs, ours)):
        alone = [mask for points, mask in mine.items() if points not in rest]
        if alone:
            found.append(f"Only {name} uses {', '.join(alone)}.")
    return found


def _used(policy: Policy) -> dict[frozenset[str], str]:
    """Masks that some step uses: their points, and what they are called."""
    steps = does(policy)
    return {
        frozenset(
            points
        ): f"{name} ({points[0] if len(points) == 1 else count(len(points), 'point')})"
        for name, points in policy.masks.items()
        if name in steps
    }


def changed(one: Policy, other: Policy) -> list[int] | None:
    """Steps at which the policies do different things; None if they are not of one length.

    What a mask is called does not count, only its points.
    """
    if len(one.steps) != len(other.steps):
        return None
    return [i for i, (a, b) in enumerate(zip(_acts(one), _acts(other), strict=True)) if a != b]


def _acts(policy: Policy) -> list[object]:
    return [frozenset(policy.masks[s]) if s in policy.masks else s for s in does(policy)]


def _places(indices: Sequence[int]) -> str:
    """`1–3, 7 and 9`, cut where there are many."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    said = [f"{a}" if a == b else f"{a}–{b}" for a, b in runs[:MOST_PLACES]]
    return ", ".join(said) + (" and more" if runs[MOST_PLACES:] else "")


def _mix(one: Policy, other: Policy) -> list[str]:
    where = changed(one, other)
    if where is None:
        return []
    worst, at = 0.0, 0
    for i in sorted({*range(len(one.steps))} - {*where}):
        ours, theirs = one.weights(i), other.weights(i)
        longest = max(len(ours), len(theirs))
        pairs = zip(_padded(ours, longest), _padded(theirs, longest), strict=True)
        apart = max((abs(a - b) for a, b in pairs), default=0.0)
        if apart > worst:
            worst, at = apart, i
    if worst < 5e-4:
        return []
    return [
        f"Where they do the same, weights of the mix differ by at most {worst:.3f} (step {at})."
    ]


def _padded(row: Sequence[float], length: int) -> list[float]:
    return [*row, *[0.0] * (length - len(row))]


def _measured(one: Policy, other: Policy) -> list[str]:
    a, b = one.measured, other.measured
    if a is None or b is None:
        missing = " and ".join(n for n, m in (("A", a), ("B", b)) if m is None)
        return [f"Nothing was measured of {missing}: `autofr evaluate` does that."]
    found = []
    if _conditions(a) != _conditions(b) or a.threads != b.threads:
        found.append("They were measured under different conditions: compare numbers with care.")
    found.append(_apart("speed-up", a.speedup, b.speedup, times(a.speedup), times(b.speedup)))
    errors = a.trajectory_error, b.trajectory_error
    found.append(_apart("error of the final latents", *errors, *map(percent, errors)))
    return found


def _apart(what: str, a: Interval, b: Interval, said_a: str, said_b: str) -> str:
    """Which is higher, or that the intervals overlap."""
    if a.low > b.high or b.low > a.high:
        more, said, less = ("A", said_a, said_b) if a.value > b.value else ("B", said_b, said_a)
        return f"{more} has the higher {what}: {said} against {less}."
    return f"No clear difference in {what}: A {said_a}, B {said_b}; the intervals overlap."


# -- page -----------------------------------------------------------------------------------------


def write(one: Policy, other: Policy, names: tuple[str, str], path: Path) -> None:
    """Write the page that shows two policies beside each other.

    Raises: RunFolderError when it cannot be written.
    """
    known = list({**_used(one), **_used(other)})
    text = render(
        "compare",
        title=f"{names[0]} and {names[1]}",
        names=names,
        words=words(one, other),
        policies=[
            (n, p, strip(p, known=known), mix(p)) for n, p in zip("AB", (one, other), strict=True)
        ],
        marks=_marks(one, other),
        rows=rows(one, other),
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot write the page ({error.strerror})") from None


def _marks(one: Policy, other: Policy) -> Element | None:
    """A mark at every step at which the policies do different things; None without any."""
    where, n = changed(one, other), len(one.steps)
    if not where:
        return None
    root = drawing((0, 0, n, 1), f"{count(len(where), 'step')} differ", "marks", stretch=True)
    ours, theirs = does(one), does(other)
    for i in where:
        cell = mark(root, f"step {i}: A {ours[i]}, B {theirs[i]}")
        rect(cell, (i + 0.1, 0, 0.8, 1), "changed")
    return root
