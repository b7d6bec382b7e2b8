"""Laws of the report, on a made-up result."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from autofr.errors import RunFolderError
from autofr.measure.profile_file import PointProfile, Profile, Similarity
from autofr.mix import JUMP, KEY, Constant, Sigmoid, Table
from autofr.policy import Fid, Interval, Measured, Model, Policy, Sampler, TextAlignment
from autofr.report import (
    canvas,
    front,
    notes,
    pictures,
    policy_chart,
    profile_charts,
    profile_pictures,
    report,
    result_charts,
    svg,
)
from autofr.search.result import Result, Row


def interval(value: float, share: float = 0.05) -> Interval:
    """An interval of `share` to both sides."""
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def row(name: str, group: str, steps: int, gain: float, error: float, **more) -> Row:
    """A row; FID rises with the error."""
    fields = {
        "solver": "DDIM",
        "network_calls": round(50 / gain, 1),
        "predicted_speedup": gain,
        "speedup": None,
        "error": interval(error, 0.15) if error else Interval(value=0, low=0, high=0),
        "reference_error": interval(0.04 + error, 0.1),
        "fid": 7.1 + 60 * error**1.4,
    }
    return Row(name=name, group=group, steps=steps, **(fields | more))


def make_rows() -> list[Row]:
    """Twenty rows with the numbers of DESIGN, section 3."""
    measured = {"speedup": interval(1.53, 0.015)}
    solver = {"solver": "UniPC", "candidate": False}
    return [
        row("teacher", "teacher", 50, 1.0, 0.0),
        row("fewer steps 33", "fewer steps", 33, 1.52, 0.024),
        row("fewer steps 25", "fewer steps", 25, 2.0, 0.038),
        row("fewer steps 17", "fewer steps", 17, 2.94, 0.075),
        row("frdiff M=2", "frdiff", 50, 1.32, 0.044),
        row("frdiff M=3", "frdiff", 50, 1.47, 0.102, speedup=interval(1.46, 0.02)),
        row("frdiff M=5", "frdiff", 50, 1.63, 0.170),
        row("frdiff M=8", "frdiff", 50, 1.72, 0.239),
        row("deepcache M=2", "deepcache", 50, 1.49, 0.038, speedup=interval(1.48, 0.02)),
        row("deepcache M=3", "deepcache", 50, 1.76, 0.080),
        row("deepcache M=5", "deepcache", 50, 2.10, 0.170),
        row("planned 1.25x", "planned", 50, 1.25, 0.006),
        row("planned 1.5x", "planned", 50, 1.51, 0.0125),
        row("planned 1.5x, λ", "planned", 50, 1.55, 0.031),
        row("planned 1.75x", "planned", 50, 1.82, 0.017),
        row("planned 2x", "planned", 50, 2.07, 0.018),
        row("planned 3x", "planned", 50, 3.04, 0.035),
        row("trial 41", "chosen", 50, 1.55, 0.0101, **measured),
        row("UniPC 13", "other solver", 13, 3.7, 0.083, **solver),
        row("DPM-Solver++ 20 | Karras", "other solver", 20, 2.45, 0.06, **solver),
    ]


def make_policy(steps: int = 50, mix: str = "table", measured: Measured | None = None) -> Policy:
    """Keyframes ever further apart, three masks and jumps between them."""
    rng = np.random.default_rng(0)
    masks = {
        "branches": tuple(f"down_blocks.0.resnets.{i}#branch" for i in range(28)),
        "cut3": ("up_blocks.1.resnets.0#stage",),
        "cut7": ("up_blocks.2.resnets.0#stage",),
    }
    does, rows, keys = [], [], 0
    for i in range(steps):
        name = KEY if i in (0, 1, 3) or i % 4 == 0 else [*masks, JUMP][rng.integers(4)]
        keys += name == KEY
        does.append(name)
        past = [1.6, -0.6] if keys > 1 else [1.0]
        share = 0.0 if name == JUMP else float(rng.uniform(0.5, 1.1))
        rows.append(() if name == KEY else (share, *((1 - share) * w for w in past)))
    return Policy(
        model=Model(name="ldm4", denoiser="UNet2DModel", fingerprint="0" * 16),
        sampler=Sampler(
            scheduler="DDIMScheduler",
            config={"beta_start": 0.0015},
            num_inference_steps=steps,
            replaces=50,
            prediction_type="epsilon",
            latent_shape=(3, 16, 16),
            dtype="float32",
        ),
        masks=masks,
        steps=tuple(does),
        mix={"table": Table(weights=tuple(rows)), "sigmoid": Sigmoid(), "one": Constant()}[mix],
        measured=measured,
    )


def make_measured(low: float = -0.05, high: float = 0.07, **more) -> Measured:
    """Final numbers whose FID difference has the given interval."""
    fields = {
        "speedup": Interval(value=1.53, low=1.51, high=1.55),
        "teacher_seconds": 0.203,
        "policy_seconds": 0.1324,
        "predicted_speedup": 1.55,
        "batch": 1,
        "device": "cpu (Test)",
        "dtype": "float32",
        "threads": 2,
        "versions": {"torch": "2.9"},
        "samples": 1000,
        "seeds": "20000-20999",
        "fid": Fid(
            features="bundled ldm4 features",
            teacher=7.1,
            policy=7.1 + (low + high) / 2,
            difference=Interval(value=(low + high) / 2, low=low, high=high),
        ),
        "trajectory_error": Interval(value=0.0101, low=0.0095, high=0.0108),
        "psnr": 41.2,
        "low_frequency_error": 0.004,
        "high_frequency_error": 0.021,
        "kept_bytes": 1_300_000,
    }
    return Measured(**(fields | more))


ALIGNMENT = TextAlignment(
    towers="bundled sd towers",
    teacher=61.2,
    policy=61.05,
    difference=Interval(value=-0.15, low=-0.25, high=-0.05),
)


def make_result(measured: Measured | None = None, **more) -> Result:
    """A finished search of `ldm4` at 1.5x."""
    fields = {
        "model": "ldm4",
        "pipeline": "LDMPipeline",
        "budget": "1.5x",
        "command": "autofr search --model ldm4 --budget 1.5x",
        "date": "2026-01-01",
        "steps": 50,
        "batch": 1,
        "device": "cpu (Test)",
        "dtype": "float32",
        "threads": 2,
        "versions": {"torch": "2.9", "diffusers": "0.42"},
        "seeds": {"calibration": "0-7", "validation": "1000-1063", "test": "20000-20999"},
        "features": "bundled ldm4 features",
        "reference": "DDIM, 250 steps",
        "rows": make_rows(),
        "chosen": "trial 41",
        "trials": 120,
        "duplicates": 9,
        "stage_seconds": {"profile": 21.4, "calibrate": 40.2, "search": 300.0},
        "remarks": ["UniPC with 13 steps is faster, and closer to the reference."],
        "policy": make_policy(measured=measured or make_measured()),
    }
    return Result(**(fields | more))


def make_profile(
    names: dict[str, list[str]] | None = None, steps: int = 12, first: int = 0
) -> Profile:
    """A profile whose points, given by kind, change most at both ends; calls begin at `first`."""
    names = names or {
        "conv": ["down_blocks.0.resnets.0#conv", "mid_block.resnets.0#conv"],
        "attn": ["mid_block.attentions.0#attn"],
        "stage": ["mid_block#stage"],
    }
    rng = np.random.default_rng(0)
    points, similarity = [], {}
    for k, (kind, of_kind) in enumerate([*names.items(), ("score", ["denoiser#score"])]):
        for name in of_kind:
            whole = float(rng.uniform(2e-4, 2e-3))
            r = np.linspace(-1, 1, steps)
            one = 0.02 * (k + 1) * rng.uniform(0.6, 1.6) * (1 + 4 * r**2 + 3 * (r > 0.8))
            change = [
                [float(one[i]) * g if i >= first + g else None for i in range(steps)]
                for g in (1, 2, 3, 4, 5, 6)
            ]
            cosine = [[None if c is None else 1 - c**2 / 4 for c in of_gap] for of_gap in change]
            similarity[name] = Similarity(cosine=cosine, relative_l1=change)
            if kind != "score":
                skipped = whole * {"conv": 0.4, "branch": 0.9}.get(kind, 1.0)
                time = {"whole_seconds": whole, "skippable_seconds": skipped}
                points.append(PointProfile(name=name, kind=kind, bytes=65_536, **time))
    seconds = {"attn": 0.0036, "frdiff": 0.0029, "branches": 0.0021}
    seconds |= {f"cut{i}": 0.0037 - 0.0004 * i for i in range(9)}
    return Profile(
        denoiser="UNet2DModel",
        fingerprint="0" * 16,
        scheduler="DDIMScheduler",
        steps=steps,
        batch=1,
        device="cpu (Test)",
        dtype="float32",
        threads=2,
        versions={"torch": "2.9"},
        key_seconds=0.004,
        jump_seconds=0.0001,
        fixed_seconds=0.01,
        mask_seconds=seconds,
        masks={name: ("mid_block#stage",) for name in seconds},
        mask_bytes=dict.fromkeys(seconds, 65_536 * 4),
        points=points,
        similarity=similarity,
    )


IMAGES = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with everything that a finished search reports."""
    folder = tmp_path_factory.mktemp("run") / "new"
    paths = report.write(make_result(), folder, make_profile(), IMAGES, IMAGES.flip(3))
    assert sorted(paths) == sorted(folder.iterdir())
    return folder


def size(path: Path) -> tuple[int, int]:
    """Width and height of a valid PNG that shows more than one colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(set(image.convert("L").get_flattened_data())) > 10
        return image.size


def test_the_script_of_a_report_fits_every_pipeline(tmp_path: Path) -> None:
    """It is Python, and leaves prompts, pictures and what else is asked for to the reader."""
    result = make_result()
    report.markdown(result, tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", (tmp_path / "report.md").read_text(), re.S)
    assert f"pipe(*your_arguments, num_inference_steps={result.steps})" in script
    compile(script, "report.md", "exec")


def test_every_picture_is_a_valid_png_of_sensible_size(folder: Path) -> None:
    """All pictures are there, none is empty, tiny or huge."""
    pictures = {path.name: size(path) for path in folder.glob("*.png")}
    assert pictures.keys() == {*report.BEFORE_AFTER, *report.PROFILE}
    assert all(500 <= w <= 3000 and 250 <= h <= 4000 for w, h in pictures.values()), pictures


def test_pixels_of_samples_are_enlarged_exactly(folder: Path) -> None:
    """Each image pixel is one flat square of whole screen pixels, in its own colour."""
    with Image.open(folder / "grid.png") as image:
        shown = np.asarray(image.convert("RGB"))[6:134, 6:134]
    wanted = IMAGES.flip(3)[0].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1) * 255
    assert np.abs(shown - wanted).max() <= 1


def test_markdown_shows_every_row_picture_and_remark(folder: Path) -> None:
    """Nothing that was found is left out of the page, and every picture it links exists."""
    text, result = (folder / "report.md").read_text(encoding="utf-8"), make_result()
    assert report.headline(result) in text
    assert all(row.name.replace("|", "\\|") in text for row in result.rows)
    assert all(remark in text for remark in result.remarks)
    links = re.findall(r"\]\((.*?)\)", text)
    assert set(links) == {*report.BEFORE_AFTER, *report.PROFILE}
    assert all((folder / link).is_file() for link in links)


def test_markdown_marks_what_is_no_candidate_chosen_or_predicted(folder: Path) -> None:
    """Other solvers are marked as such, the chosen row is bold, predictions are in italics."""
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if line.startswith("|") and "another solver" in line]
    assert len(marked) == sum(not row.candidate for row in make_result().rows)
    assert any(
        "**trial 41** | chosen | DDIM" in line and "1.53x (1.51–1.55)" in line for line in lines
    )
    assert any("planned 2x" in line and "| *2.07x* |" in line for line in lines)
    assert "The budget 1.5x is met" in "".join(lines)


def test_table_has_equally_long_rows_and_no_markdown() -> None:
    """The table for the terminal has a header, one line per row, and its own word for guesses."""
    result = make_result()
    lines = report.table(result)
    assert len(lines) == 1 + len(result.rows)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert not any("*" in cell for line in lines for cell in line)
    assert "2.07x (predicted)" in {cell for line in lines for cell in line}


def test_headline_states_gain_cost_and_interval() -> None:
    """One sentence holds both times, the speed-up with its interval, and the error."""
    assert report.headline(make_result()) == (
        "ldm4 now takes 132 ms per image instead of 203 ms (1.53x, 95 % interval 1.51–1.55); its"
        " latents differ from the unaccelerated ones by 1.0 % (FID in bundled ldm4 features 7.11"
        " against 7.10: no measurable difference)."
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.07, "no measurable difference"),
        (0.0, 0.1, "no measurable difference"),
        (0.1, 0.5, "higher by 0.3, 95 % interval 0.1–0.5"),
        (-0.5, -0.1, "lower by 0.3, 95 % interval 0.1–0.5"),
    ],
)
def test_no_measurable_difference_only_if_the_interval_contains_0(
    low: float, high: float, verdict: str
) -> None:
    """A FID that surely differs is never called equal, in either direction."""
    text = report.headline(make_result(make_measured(low, high)))
    assert verdict in text
    assert ("no measurable difference" in text) == (low <= 0 <= high)


def test_alignment_is_told_beside_fid_or_alone() -> None:
    """The sentence holds both scores and what their difference says; FID need not be there."""
    said = (
        "alignment with prompts in bundled sd towers 61.05 against 61.20: lower by 0.15, 95 %"
        " interval 0.05–0.25)."
    )
    both = report.headline(make_result(make_measured(alignment=ALIGNMENT)))
    assert both.endswith(f"7.10: no measurable difference; {said}")
    alone = make_measured(fid=None, alignment=ALIGNMENT)
    assert report.headline(make_result(alone, features=None)).endswith(f"1.0 % ({said}")


def test_the_report_has_alignment_where_it_was_measured(tmp_path: Path) -> None:
    """Teacher's, policy's and the difference with its interval, in named towers."""
    report.markdown(make_result(make_measured(alignment=ALIGNMENT)), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "| alignment with prompts in bundled sd towers, teacher | 61.20 |",
        "| alignment with prompts in bundled sd towers, policy | 61.05 |",
        "| alignment with prompts in bundled sd towers, difference | -0.150 (-0.250 to -0.050) |",
        "| FID in bundled ldm4 features, teacher | 7.10 |",
    ):
        assert line in text
    report.markdown(make_result(), tmp_path)
    assert "alignment" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_headline_admits_what_was_not_gained_or_not_measured() -> None:
    """A speed-up whose interval contains 1 is no gain; a prediction is called one."""
    same = make_measured(speedup=Interval(value=1.01, low=0.99, high=1.02))
    assert "no measurable gain" in report.headline(make_result(same))
    assert "not measured" in report.headline(make_result(policy=make_policy()))
    assert "FID" not in report.headline(make_result(make_measured(fid=None), features=None))
    assert "per batch of 4 images" in report.headline(make_result(make_measured(batch=4)))


def test_a_missed_budget_is_said_so(tmp_path: Path) -> None:
    """The lower end of the interval decides whether the budget is met."""
    report.markdown(make_result(budget="1.52x"), tmp_path)
    assert "The budget 1.52x is **not met**" in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.parametrize("budget", ["140ms", "300ms"])
def test_a_search_without_fid_images_and_profile_is_reported(tmp_path: Path, budget: str) -> None:
    """What was not measured is left out, for any kind of budget, and nothing fails."""
    rows = [row.model_copy(update={"fid": None}) for row in make_rows()]
    measured = make_measured(fid=None)
    result = make_result(measured, rows=rows, features=None, budget=budget, remarks=[])
    paths = report.write(result, tmp_path, None, None, None)
    assert {path.name for path in paths} == {"result.json", "pareto.png", "policy.png", "report.md"}
    assert size(tmp_path / "pareto.png")[0] < 1500
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "samples.png" not in text
    assert "## Remarks" not in text
    assert "FID in" not in text


@pytest.mark.parametrize("mix", ["table", "sigmoid", "one"])
@pytest.mark.parametrize("steps", [1, 5, 250])
def test_policy_strip_of_any_length(tmp_path: Path, steps: int, mix: str) -> None:
    """Short and long policies with any mix give a picture of the same width."""
    pictures.policy_strip(make_policy(steps, mix), tmp_path / "policy.png")
    assert size(tmp_path / "policy.png")[0] == 1950


def test_what_is_on_a_front_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both renderers know every look, and draw each row of a panel once, in one order."""
    looks = front.LOOKS.values()
    assert {look.marker for look in looks} <= canvas.MARKERS.keys() == svg.MARKERS.keys()
    assert {look.colour for look in looks} <= canvas.colours().keys()
    result, drawn = make_result(), []
    monkeypatch.setattr(pictures, "_mark", lambda ax, mark, floor: drawn.append(mark))
    report.write(result, tmp_path, None, None, None)
    panels = [front.errors(result), front.fids(result)]
    assert drawn == [mark for panel in panels if panel for mark in panel.marks]
    for panel in panels:
        drawing = result_charts.panel(panel)
        assert drawing is not None and panel.marks[-1].row.group == "chosen"
        assert [one.text for one in drawing.iter("title")] == [mark.says for mark in panel.marks]


def test_notes_cover_nothing_and_stand_by_their_own_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the choice, steps and solvers stand side by side, far to the right."""
    rows = [
        row("teacher", "teacher", 50, 1.0, 0.0),
        row("fewer steps 14", "fewer steps", 14, 3.05, 0.060),
        row("chosen", "chosen", 50, 3.0, 0.054, speedup=interval(3.0, 0.01)),
        row("UniPC 14", "other solver", 14, 2.95, 0.056, solver="UniPC", candidate=False),
        row("DPM 14", "other solver", 14, 3.0, 0.050, solver="DPM-Solver++", candidate=False),
    ]
    boxes: list[tuple[dict[str, Bbox], dict[str, Bbox]]] = []
    write = notes.write

    def written(ax: Axes, marks: list[front.Mark]) -> None:
        write(ax, marks)
        renderer = ax.figure.canvas.get_renderer()
        found = {str(note.get_text()): note.get_window_extent(renderer) for note in ax.texts}
        there = {notes._text(mark): notes._box(ax, mark) for mark in marks}
        boxes.append((found, there))

    monkeypatch.setattr(notes, "write", written)
    pictures.pareto(make_result(rows=rows), tmp_path / "pareto.png")
    assert len(boxes) == 2
    for found, marks in boxes:
        assert len(found) >= 4
        both = [*itertools.combinations(found.values(), 2)]
        both += itertools.product(found.values(), marks.values())
        assert not any(Bbox.intersection(one, other) for one, other in both)
        for text, box in found.items():
            far = {name: notes._gap(box, mark) for name, mark in marks.items() if name}
            assert min(far, key=far.__getitem__) == text


def test_the_planned_line_only_rises() -> None:
    """Whoever follows it to the right pays with error; the choice is on it or beaten by a row."""
    (line, fewer) = front.errors(make_result()).lines.values()
    errors = [mark.row.error.value for mark in line]
    assert errors == sorted(errors) and "planned 1.5x" not in {mark.row.name for mark in line}
    assert "trial 41" in {mark.row.name for mark in line}
    assert [mark.row.steps for mark in fewer] == [33, 25, 17]


@pytest.mark.parametrize(("spread", "log"), [(0.001, False), (0.5, False), (5.0, True)])
def test_an_axis_does_not_magnify_noise(spread: float, log: bool) -> None:
    """Values that differ by a thousandth do not fill the axis; a wide range is logarithmic."""
    rows = [row(f"{k}", "frdiff", 50, 1.5, 0.1, fid=7 * (1 + spread * k)) for k in (0, 1)]
    panel = front.fids(make_result(rows=rows))
    assert panel and panel.log == log
    low, high = panel.up
    assert low < 7 < 7 * (1 + spread) < high and high / low > 1 + front.NARROW
    assert all(low <= end <= high for mark in panel.marks for end in (mark.y.low, mark.y.high))


def test_a_picture_is_drawn_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What matplotlib's own saving does twice takes most of a report's time."""
    draw, drawn = Figure.draw, []

    def counted(figure: Figure, *given: object) -> None:
        drawn.append(figure)
        draw(figure, *given)

    monkeypatch.setattr(Figure, "draw", counted)
    report.write(make_result(), tmp_path, make_profile(), None, None)
    assert len(drawn) == len({*map(id, drawn)}) == len([*tmp_path.glob("*.png")]) == 5


def test_steps_that_do_not_run_are_not_counted() -> None:
    """Calls that start from a picture: charts show the steps that run, whoever measured them."""
    result, profile = make_result(), make_profile(steps=50, first=6)
    assert (profile.first, make_profile().first) == (6, 0)
    policy = report.told(result, profile).policy
    assert policy.digest == result.policy.digest
    assert report.told(result, make_profile(steps=50)) == result
    assert report.told(result, make_profile(steps=40, first=6)) == result
    steps = policy_chart.does(policy)
    assert steps[:6] == [policy_chart.OFF] * 6 and steps[6:] == policy_chart.does(result.policy)[6:]
    counts = {kind.name: kind.steps for kind in policy_chart.kinds(policy)}
    assert sum(counts.values()) == 50 and counts[policy_chart.OFF] == 6
    heat = profile_charts.heat_map(profile)
    assert heat.steps == range(6, 50)
    assert {len(said.split()) for kind in heat.kinds for *_, said in kind.rows} == {44}
    masks = profile_charts.mask_rows(profile, policy)
    assert next(row["steps"] for row in masks if row["name"] == KEY) == counts[KEY]
    teacher = profile.fixed_seconds + 44 * profile.key_seconds
    fast = make_measured(teacher_seconds=teacher, skipped_steps=6)
    bars = profile_charts.bars(profile, policy.model_copy(update={"measured": fast}))
    assert [bar.name for bar in bars] == ["teacher", "policy"] and bars[0].seconds == "186 ms"
    assert "50 steps of which 44 run" in profile_charts.setting(profile)


def test_profile_shorter_than_its_gaps(tmp_path: Path) -> None:
    """Gaps that no step reaches are left out, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = profile_pictures.profile_pictures(make_profile(steps=4), tmp_path)
    assert [path.name for path in paths] == list(report.PROFILE)


def test_pictures_leave_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    """Drawing neither keeps nor follows global settings."""
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.dpi": 30}):
        before = dict(matplotlib.rcParams)
        pictures.policy_strip(make_policy(5), tmp_path / "policy.png")
        assert dict(matplotlib.rcParams) == before
    assert size(tmp_path / "policy.png")[0] == 1950


def test_result_survives_the_file(folder: Path) -> None:
    """What is read back equals what was written."""
    assert report.load_result(folder) == make_result()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-200], "EOF"),
        (lambda text: text.replace(b'"ldm4"', b"4", 1), "model: "),
        (lambda text: text.replace(b'"steps": [', b'"strides": [', 1), "policy"),
        (lambda text: b"\xff\xfe", "not a valid result"),
        (None, "cannot read the result"),
    ],
    ids=["truncated", "type", "field", "bytes", "missing"],
)
def test_a_damaged_result_is_refused(folder: Path, tmp_path: Path, damage, said: str) -> None:
    """The refusal names the file, the field and the way out."""
    if damage:
        (tmp_path / "result.json").write_bytes(damage((folder / "result.json").read_bytes()))
    with pytest.raises(RunFolderError, match="resumes") as refusal:
        report.load_result(tmp_path)
    assert said in str(refusal.value)
    assert str(tmp_path / "result.json") in str(refusal.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A file where the folder should be is an error of the user's, with its name."""
    (tmp_path / "run").write_text("here first")
    with pytest.raises(RunFolderError, match="run"):
        report.write(make_result(), tmp_path / "run", None, None, None)
