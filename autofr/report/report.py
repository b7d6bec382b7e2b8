"""Tell what a search found: one table, one Markdown page, the pictures and `result.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from autofr import files, reading
from autofr.errors import RunFolderError
from autofr.measure import profile_file
from autofr.measure.profile_file import Profile
from autofr.memory import size
from autofr.policy import Interval, Measured
from autofr.report.front import LOOKS
from autofr.report.wording import count, duration, exact, percent, speedup_of, times, wanted_speedup
from autofr.search.result import Result

if TYPE_CHECKING:
    from torch import Tensor


def headline(result: Result) -> str:
    """Say in one sentence what was gained and what it cost."""
    measured = result.policy.measured
    if measured is None:
        row = next(row for row in result.rows if row.name == result.chosen)
        return (
            f"{result.model} is predicted to take {1 / row.predicted_speedup:.0%} of its time"
            f" ({row.predicted_speedup:.2f}x, not measured); its latents differ from the"
            f" unaccelerated ones by {percent(exact(row.error.value))}."
        )
    per = "per image" if measured.batch == 1 else f"per batch of {measured.batch} images"
    speedup = measured.speedup
    vain = ": no measurable gain" if speedup.low <= 1 <= speedup.high else ""
    return (
        f"{result.model} now takes {duration(measured.policy_seconds)} {per} instead of"
        f" {duration(measured.teacher_seconds)} ({speedup.value:.2f}x, 95 % interval"
        f" {speedup.low:.2f}–{speedup.high:.2f}{vain}); its latents differ from the unaccelerated"
        f" ones by {percent(exact(measured.trajectory_error.value))}"
        f"{_judged(measured)}."
    )


def _judged(measured: Measured) -> str:
    """What FID and alignment say of the images, in brackets."""
    said = [
        f"{one.title} {one.policy:.2f} against {one.teacher:.2f}: {_differs(one.difference)}"
        for one in measured.judged
    ]
    return f" ({'; '.join(said)})" if said else ""


def _differs(change: Interval) -> str:
    """Say `no measurable difference` only where the interval of the difference contains 0."""
    verdict = "no measurable difference"
    if not change.low <= 0 <= change.high:
        word = "higher" if change.low > 0 else "lower"
        low, high = sorted((abs(change.low), abs(change.high)))
        verdict = f"{word} by {abs(change.value):.2g}, 95 % interval {low:.2g}–{high:.2g}"
    return verdict


def table(result: Result, predicted: str = "{} (predicted)") -> list[list[str]]:
    """Compare all rows, header first; `predicted` formats speed-ups that were not measured."""
    head = ["name", "group", "solver", "steps", "network calls", "speed-up", "error to teacher"]
    lines = [[*head, "error to reference", f"FID ({result.features})"]]
    order = list(LOOKS)
    for row in sorted(result.rows, key=lambda row: (order.index(row.group), speedup_of(row).value)):
        guess = predicted.format(f"{row.predicted_speedup:.2f}x")
        line = [
            row.name,
            row.group if row.candidate else "another solver",
            row.solver,
            str(row.steps),
            f"{row.network_calls:g}",
            times(row.speedup) if row.speedup else "1" if row.group == "teacher" else guess,
            percent(row.error),
            percent(row.reference_error),
            "–" if row.fid is None else f"{row.fid:.2f}",
        ]
        lines.append(line)
    return lines if result.features else [line[:-1] for line in lines]


# -- files ----------------------------------------------------------------------------------------

BEFORE_AFTER = {
    "samples.png": "The same seeds: teacher, policy, and their difference times 5",
    "grid.png": "More images drawn with the policy",
    "pareto.png": "FID and error to the teacher against speed-up",
    "policy.png": "What every step does, and how the scores are mixed",
}
PROFILE = {
    "similarity.png": "How much every point changes from one step to the next",
    "latency.png": "Where the time goes",
    "gaps.png": "How long a kept tensor stays good",
}
LEGEND = """\
The chosen policy is in bold. Speed-ups are of the whole call: measured, with a 95 % interval, or
*predicted* (italics). Errors are the relative L2 distance of the final latents on validation
seeds, to the teacher and to the reference ({reference}). {fid}Rows marked
"another solver" change the solver itself, so they draw other images; they are shown for comparison
and are no candidates."""
USAGE = """\
```python
import autofr

autofr.apply(pipe, "policy.json")  # pipe: your {pipeline}
result = pipe(*your_arguments, num_inference_steps={steps})
```"""


def markdown(result: Result, folder: Path) -> None:
    """Write `report.md` into the folder; it shows the pictures that lie there."""
    lines = table(result, "*{}*")
    for line in lines[1:]:
        line[0] = f"**{line[0]}**" if line[0] == result.chosen else line[0]
    fid = f"FID compares within this table only: {result.features}. " if result.features else ""
    sections = {
        f"# {result.model}, budget {result.budget}": [headline(result), _verdict(result)],
        "## Before and after": _links(folder, BEFORE_AFTER),
        "## Remarks": ["\n".join(f"- {remark}" for remark in result.remarks)],
        "## Results": [_rows(lines), LEGEND.format(reference=result.reference, fid=fid)],
        "## The chosen policy on test seeds": [
            _rows(final_rows(result)),
            _rows(rival_rows(result)),
        ],
        "## How to use it": [USAGE.format(pipeline=result.pipeline, steps=result.steps)],
        "## The profile": _links(folder, PROFILE),
        "## Protocol": [_rows(protocol_rows(result)), f"```sh\n{result.command}\n```"],
    }
    parts = [[head, *filter(None, body)] for head, body in sections.items() if any(body)]
    text = "\n\n".join("\n\n".join(part) for part in parts)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")


def _links(folder: Path, pictures: Mapping[str, str]) -> list[str]:
    there = {name: text for name, text in pictures.items() if (folder / name).is_file()}
    return [f"![{text}]({name})\n\n*{text}.*" for name, text in there.items()]


def _rows(lines: Sequence[Sequence[str]]) -> str:
    """Markdown table, header first."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*rows[:1], "|" + " --- |" * len(lines[0]), *rows[1:]]) if rows else ""


def _verdict(result: Result) -> str:
    measured, wanted = result.policy.measured, wanted_speedup(result)
    if not measured or not wanted:
        return ""
    met = "met" if measured.speedup.low >= wanted else "**not met**"
    return (
        f"The budget {result.budget} is {met}: the lower end of the measured speed-up is"
        f" {measured.speedup.low:.3f}x, and {wanted:.3f}x was asked for."
    )


def final_rows(result: Result) -> list[list[str]]:
    """Numbers of the chosen policy on seeds that were used for nothing else."""
    measured = result.policy.measured
    if measured is None:
        return []
    judged: list[list[str]] = []
    for one in measured.judged:
        change = one.difference
        judged += [
            [f"{one.title}, teacher", f"{one.teacher:.2f}"],
            [f"{one.title}, policy", f"{one.policy:.2f}"],
            [
                f"{one.title}, difference",
                f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
            ],
        ]
    return [
        [f"{measured.samples} samples, seeds {measured.seeds}", "value (95 % interval)"],
        [
            "speed-up",
            times(measured.speedup) + _predicted(measured.predicted_speedup, "{:.2f}x".format),
        ],
        ["time per call, teacher", duration(measured.teacher_seconds)],
        ["time per call, policy", duration(measured.policy_seconds)],
        *judged,
        ["error of final latents to the teacher", percent(measured.trajectory_error)],
        ["PSNR to the teacher's images", f"{measured.psnr:.1f} dB"],
        ["error at low frequencies", percent(exact(measured.low_frequency_error))],
        ["error at high frequencies", percent(exact(measured.high_frequency_error))],
        [
            "memory kept between steps",
            size(measured.kept_bytes) + _predicted(measured.predicted_bytes, size),
        ],
    ]


def rival_rows(result: Result) -> list[list[str]]:
    """The choice and its nearest rivals on the test seeds; nothing in results of older versions."""
    lines = [
        [
            row.name,
            times(row.speedup) if row.speedup else f"{row.predicted_speedup:.2f}x",
            percent(row.test_error),
            times(row.times_chosen, unit="") if row.times_chosen else "–",
        ]
        for row in sorted(result.rows, key=lambda row: row.group != "chosen")
        if row.test_error
    ]
    head = ["test seeds", "speed-up", "error to teacher", "times the policy's"]
    return [head, *lines] if lines else []


def _predicted(value: Any, write: Callable[[Any], str]) -> str:
    return "" if value is None else f"; predicted {write(value)}"


def protocol_rows(result: Result) -> list[list[str]]:
    """How the numbers were made."""
    policy = result.policy
    stages = [f"{name} {seconds:.0f} s" for name, seconds in result.stage_seconds.items()]
    return [
        ["what", "value"],
        ["pipeline", f"{result.pipeline}, {policy.model.denoiser}, {policy.sampler.scheduler}"],
        ["teacher", count(result.steps, "step")],
        ["device", f"{result.device}, {result.dtype}, {count(result.threads, 'thread')}"],
        ["batch", str(result.batch)],
        ["versions", ", ".join(f"{name} {text}" for name, text in result.versions.items())],
        ["seeds", "; ".join(f"{name} {text}" for name, text in result.seeds.items())],
        ["features of FID", result.features or "none"],
        ["reference", result.reference],
        [
            "search",
            f"{count(result.trials, 'trial')}, {count(result.duplicates, 'duplicate')} among them",
        ],
        ["time of each stage", ", ".join(stages)],
        ["policy", policy.digest],
        ["date", result.date],
    ]


def write(
    result: Result,
    folder: Path,
    profile: Profile | None,
    teacher_images: Tensor | None,
    policy_images: Tensor | None,
) -> list[Path]:
    """Write `result.json`, the pictures and `report.md` into a folder, and return their paths.

    Raises: RunFolderError when the folder cannot be written.
    """
    from autofr.report import pictures  # matplotlib, which a page does without
    from autofr.report.profile_pictures import profile_pictures

    result = told(result, profile)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("result.json", "pareto.png", "policy.png")]
        files.write(paths[0], result.model_dump_json(indent=1) + "\n")
        pictures.pareto(result, paths[1])
        pictures.policy_strip(result.policy, paths[2])
        if teacher_images is not None and policy_images is not None:
            title = f"{result.model}: the same seeds without and with the policy"
            paths.append(folder / "samples.png")
            pictures.samples(teacher_images, policy_images, paths[-1], title)
            if len(policy_images) > pictures.SHOWN:
                paths.append(folder / "grid.png")
                pictures.grid(policy_images, paths[-1])
        if profile is not None:
            paths += profile_pictures(profile, folder)
        markdown(result, folder)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot write the report ({error.strerror})") from None
    return [*paths, folder / "report.md"]


def told(result: Result, profile: Profile | None) -> Result:
    """A result of an older version, told by its profile which steps of a call did not run."""
    policy = result.policy
    if not (profile and profile.first and policy.measured) or policy.measured.skipped_steps:
        return result
    if len(policy.steps) != profile.steps:  # a call of other steps begins elsewhere
        return result
    measured = policy.measured.model_copy(update={"skipped_steps": profile.first})
    policy = policy.model_copy(update={"measured": measured})
    return result.model_copy(update={"policy": policy})


def load_result(folder: Path) -> Result:
    """Read `result.json` of a finished search.

    Raises: RunFolderError when the folder holds none, or a damaged one.
    """
    path = folder / "result.json"
    try:
        return Result.model_validate_json(reading.content(path, reading.OWN))
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot read the result ({error.strerror}); give the folder of a finished"
            " search, or run its command again, which resumes it"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise RunFolderError(
            f"{path}: not a valid result ({place}{first['msg']}); run the search's command again,"
            " which resumes it and writes the file anew"
        ) from None


def load_profile(folder: Path) -> Profile | None:
    """Read the profile of a folder; None where there is none.

    Raises: RunFolderError when it is damaged.
    """
    path = folder / profile_file.FILE
    return profile_file.load(path) if path.is_file() else None
