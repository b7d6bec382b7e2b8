"""The report as one self-contained page, `report.html`, and an index over runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autofr import files
from autofr.errors import RunFolderError
from autofr.measure.profile_file import Profile
from autofr.memory import size
from autofr.policy import Measured
from autofr.report import before_after, front, policy_chart, profile_charts, result_charts
from autofr.report.html import data_url, render
from autofr.report.report import final_rows, headline, protocol_rows, rival_rows, table, told
from autofr.report.svg import MARKERS
from autofr.report.wording import duration, exact, percent, times, wanted_speedup
from autofr.search.result import Result

NAME = "report.html"
TRIALS = "trials.csv"
SAMPLES = "samples.png"  # what runs of older versions have instead of strips


def write(result: Result, folder: Path, profile: Profile | None) -> Path:
    """Write `report.html` from a result and what else its folder has: trials and images.

    Raises: RunFolderError when the folder cannot be written, or a file in it is damaged.
    """
    text = run_page(result, profile, folder)
    return _put(folder / NAME, text)


def run_page(result: Result, profile: Profile | None, folder: Path) -> str:
    """The page of a run."""
    result = told(result, profile)
    trials = result_charts.load_trials(folder / TRIALS)
    shares = profile_charts.shares(profile) if profile else None
    return render(
        "report",
        result=result,
        measured=result.policy.measured,
        title=title(result),
        headline=headline(result),
        verdict=verdict(result),
        tiles=tiles(result.policy.measured) if result.policy.measured else [],
        images=before_after.load(folder),
        samples=_samples(folder),
        errors=result_charts.panel(front.errors(result)),
        fids=result_charts.panel(front.fids(result)),
        legend=[(look, MARKERS[look.marker]) for look in front.legend(result)],
        predicted=front.predicted(result),
        strip=policy_chart.strip(result.policy, shares),
        mix=policy_chart.mix(result.policy),
        heat=profile_charts.heat_map(profile) if profile else None,
        setting=profile_charts.setting(profile) if profile else "",
        bars=profile_charts.bars(profile, result.policy) if profile else [],
        masks=profile_charts.mask_rows(profile, result.policy) if profile else [],
        points=profile_charts.point_rows(profile) if profile else [],
        frequency=frequency(result.policy.measured) if result.policy.measured else [],
        trials=trials,
        history=result_charts.history(trials),
        table=table(result),
        final=final_rows(result),
        rivals=rival_rows(result),
        protocol=protocol_rows(result),
    )


def write_index(runs: Mapping[str, Result | str], folder: Path) -> Path:
    """Write `index.html` over runs: a result by its folder's name, or why it cannot be read.

    Raises: RunFolderError when the folder cannot be written.
    """
    shown = [_entry(name, found) for name, found in sorted(runs.items())]
    return _put(folder / "index.html", render("index", title=str(folder.name), runs=shown))


def _put(path: Path, text: str) -> Path:
    try:
        files.write(path, text)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot write the page ({error.strerror})") from None
    return path


# -- parts ----------------------------------------------------------------------------------------


def title(result: Result) -> str:
    """What was gained, in a few words."""
    measured = result.policy.measured
    if measured is None:
        row = next(row for row in result.rows if row.name == result.chosen)
        return f"{result.model}: {row.predicted_speedup:.2f}x predicted"
    if measured.speedup.low <= 1:
        return f"{result.model}: no measurable gain"
    return f"{result.model}, {measured.speedup.value:.2f} times as fast"


def verdict(result: Result) -> tuple[str, str]:
    """Whether the budget is met, as a class of the style sheet and in words."""
    measured, wanted = result.policy.measured, wanted_speedup(result)
    if not measured or not wanted:
        return "open", f"budget {result.budget}, not measured"
    if measured.speedup.low >= wanted:
        return "met", f"budget {result.budget} met"
    return "missed", f"budget {result.budget} not met"


def tiles(measured: Measured) -> list[dict[str, Any]]:
    """The numbers that matter most: what, value, and what to read it against."""
    found: list[dict[str, Any]] = [
        {
            "what": "Time per call",
            "value": duration(measured.policy_seconds),
            "note": f"instead of {duration(measured.teacher_seconds)}, batch {measured.batch}",
            "share": min(1.0, measured.policy_seconds / measured.teacher_seconds),
        },
        {
            "what": "Latents differ by",
            "value": percent(exact(measured.trajectory_error.value)),
            "note": f"95 % interval {_range(percent(measured.trajectory_error))} %",
        },
        {
            "what": "Images agree to",
            "value": f"{measured.psnr:.1f} dB",
            "note": "PSNR to the unaccelerated images",
        },
    ]
    for one in measured.judged:
        change = one.difference
        found.append(
            {
                "what": one.title,
                "value": f"{one.policy:.2f}",
                "note": f"unaccelerated {one.teacher:.2f}; difference {change.value:+.3f}"
                f" ({change.low:+.3f} to {change.high:+.3f})",
            }
        )
    memory = {
        "what": "Memory kept",
        "value": size(measured.kept_bytes),
        "note": "between steps, at most",
    }
    return [*found, memory]


def _range(words: str) -> str:
    """What stands in brackets."""
    return words[words.find("(") + 1 :].rstrip(")") if "(" in words else "of no width"


def frequency(measured: Measured) -> list[tuple[str, float]]:
    """Relative errors of the images by frequency, each of its own band's energy."""
    return [
        ("coarse shapes (low frequencies)", measured.low_frequency_error),
        ("fine detail (high frequencies)", measured.high_frequency_error),
    ]


def _samples(folder: Path) -> str:
    path = folder / SAMPLES
    try:
        return data_url(path.read_bytes()) if path.is_file() else ""
    except OSError as error:
        raise RunFolderError(f"{path}: cannot read ({error.strerror})") from None


def _entry(name: str, found: Result | str) -> dict[str, Any]:
    """One run of the index."""
    if isinstance(found, str):
        return {"name": name, "reason": found}
    measured = found.policy.measured
    return {
        "name": name,
        "reason": "",
        "link": f"{quote(name)}/{NAME}",
        "title": title(found),
        "verdict": verdict(found),
        "speedup": times(measured.speedup) if measured else "not measured",
        "error": percent(measured.trajectory_error) if measured else "–",
        "headline": headline(found),
        "strip": policy_chart.strip(found.policy),
        "device": f"{found.device}, batch {found.batch}, {found.steps} steps",
        "date": found.date,
    }
