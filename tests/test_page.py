"""Laws of the pages: complete without network or script, safe, and readable in every setting."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import screenshots
import torch
from browser import NAMES, Page, browser, find
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_report import make_measured, make_policy, make_profile, make_result, row
from typer.testing import CliRunner

from autofr.cli.app import app as commands
from autofr.cli.results import app
from autofr.errors import RunFolderError
from autofr.mix import Sigmoid
from autofr.policy import Policy
from autofr.report import before_after, differences, front, page, policy_chart
from autofr.report.svg import Axis

HOSTILE = '<script>alert("x")</script>\' onload=alert(1) </title><img src=x onerror=alert(2)>&amp;'
STYLE = Path(page.__file__).parent / "templates" / "page.css"
JOBS = Path(__file__).parents[1] / "examples" / "jobs.toml"
NETWORKS = {"torch", "diffusers", "transformers", "optuna", "scipy"}
COLUMNS = [
    "trial",
    "state",
    "error",
    "label",
    "digest",
    "duplicate_of",
    "seconds",
    "masks",
    "reason",
]


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def trials(count: int, label: str = "planned (all, fit2)") -> list[dict[str, object]]:
    """Lines of `trials.csv`: published schedules first, some repeated, some pruned."""
    lines = []
    for i in range(count):
        known = {"trial": i, "state": "COMPLETE", "error": 0.2 / (1 + i % 17), "label": label}
        known |= {"seconds": 2.5, "masks": "all" if i > 3 else ""}
        if i % 11 == 10:
            known |= {"state": "PRUNED", "error": "", "reason": "too slow"}
        elif i % 7 == 6:
            known |= {"duplicate_of": i - 3}
        lines.append(known)
    return lines


def fill(folder: Path, count: int = 20, label: str = "planned (all, fit2)") -> Path:
    """Leave in a folder what a search leaves there, but the result and the profile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(trials(count, label))
    images = torch.rand(8, 3, 24, 24, generator=torch.manual_seed(0))
    before_after.save(images, 0.9 * images, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of a made-up run."""
    folder = fill(tmp_path_factory.mktemp("runs") / "run")
    result = make_result()
    (folder / "result.json").write_text(result.model_dump_json())
    page.write(result, folder, make_profile(steps=50))
    return folder


# -- one file, and safe ---------------------------------------------------------------------------


def test_the_page_asks_for_nothing(run: Path) -> None:
    """All that it shows is in the file, and it forbids itself every request."""
    text = (run / "report.html").read_text()
    tags = Reader(text).tags
    places = [
        a[name] or "" for _, a in tags for name in ("src", "href", "data", "srcset") if name in a
    ]
    assert len(places) >= 16
    assert [place for place in places if not place.startswith(("data:", "#"))] == []
    assert not re.search(r"url\((?!data:)|@import", text)
    (policy,) = (
        a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy and policy.startswith("default-src 'none'")
    assert not re.search(r"https?:", policy) and "script-src 'sha256-" in policy


def test_what_stands_in_files_never_becomes_markup(tmp_path: Path) -> None:
    """Names, remarks, masks, commands and labels of trials are text, whatever they hold."""
    plain, hostile = (
        fill(tmp_path / name, label=name) for name in ("plain", HOSTILE.split()[0][1:7])
    )
    fill(hostile, label=HOSTILE)
    policy = make_policy(measured=make_measured(device=HOSTILE)).model_dump_json()
    wrong = Policy.model_validate_json(policy.replace('"cut3"', json.dumps(HOSTILE)))
    rows = [
        row("teacher", "teacher", 50, 1.0, 0.0),
        row(HOSTILE, "chosen", 50, 1.5, 0.01, solver=HOSTILE),
    ]
    more = {"rows": rows, "chosen": HOSTILE, "policy": wrong, "remarks": [HOSTILE]}
    more |= {"model": HOSTILE, "command": HOSTILE, "features": HOSTILE, "seeds": {HOSTILE: HOSTILE}}
    profile = make_profile({"conv": [HOSTILE]}, steps=50)
    profile = profile.model_copy(update={"mask_seconds": {**profile.mask_seconds, HOSTILE: 0.001}})
    texts = [
        page.run_page(make_result(), make_profile(steps=50), plain),
        page.run_page(make_result(**more), profile, hostile),
    ]
    tags = [
        {(tag, *(n for n in a if n.startswith("on"))) for tag, a in Reader(t).tags} for t in texts
    ]
    assert tags[1] <= tags[0] | {("g",)}
    assert texts[0].count("<script") == texts[1].count("<script") == 1
    assert Reader(texts[1]).text.count(HOSTILE) > 8


def test_other_pages_are_safe_too(tmp_path: Path) -> None:
    """Index and comparison write names as text."""
    index = page.write_index({HOSTILE: make_result(model=HOSTILE), "broken": HOSTILE}, tmp_path)
    policy = make_policy()
    differences.write(policy, policy, (HOSTILE, HOSTILE), tmp_path / "compare.html")
    for path in (index, tmp_path / "compare.html"):
        found = Reader(path.read_text())
        assert HOSTILE in found.text
        assert [tag for tag, _ in found.tags if tag in ("script", "img")] == ["script"]


# -- what it says ---------------------------------------------------------------------------------


def test_the_page_says_everything(run: Path) -> None:
    """Headline, every row with its numbers, every remark, command, versions and seeds are there."""
    text, result = Reader((run / "report.html").read_text()).text, make_result()
    said = [one.name for one in result.rows] + [*result.remarks, result.command, result.reference]
    said += [*result.versions.values(), *result.seeds.values(), result.policy.digest]
    assert [one for one in said if one not in text] == []
    assert page.headline(result) in text and "budget 1.5x met" in text


@pytest.mark.parametrize("low", [0.99, 1.2])
def test_the_title_claims_no_gain_that_was_not_measured(low: float) -> None:
    """An interval that reaches 1 is no speed-up, and one below the budget has not met it."""
    speedup = {"speedup": {"value": 1.3, "low": low, "high": 1.6}}
    measured = type(make_measured())(**make_measured().model_dump() | speedup)
    result = make_result(measured)
    assert ("no measurable gain" in page.title(result)) == (low <= 1)
    assert page.verdict(result)[0] == "missed"


def test_little_is_needed(tmp_path: Path) -> None:
    """A result alone gives a page: no trials, profile, images, FID or measurement."""
    rows = [one.model_copy(update={"fid": None}) for one in make_result().rows]
    result = make_result(rows=rows, features=None, policy=make_policy(), remarks=[])
    found = Reader(page.run_page(result, None, tmp_path))
    assert "predicted" in found.text and "not measured" in found.text
    assert not [tag for tag, _ in found.tags if tag == "img"]


def test_older_folders_show_their_sheet_of_samples(tmp_path: Path) -> None:
    """A folder without strips, of an older version, shows the picture that it has."""
    Image.new("RGB", (40, 20)).save(tmp_path / "samples.png")
    found = Reader(page.run_page(make_result(), None, tmp_path))
    assert len([tag for tag, _ in found.tags if tag == "img"]) == 1
    assert "no before.png and after.png" in found.text
    assert "no before.png" not in Reader(page.run_page(make_result(), None, fill(tmp_path))).text


def test_every_value_of_the_pictures_can_be_read(run: Path) -> None:
    """Marks say in a title what they show: one per row and panel, step and trial."""
    text, result = (run / "report.html").read_text(), make_result()
    titles = re.findall(r"<title>([^<]*)</title>", text)
    assert sum("error" in title and "x" in title for title in titles) >= 2 * len(result.rows)
    assert len([t for t in titles if re.match(r"step \d+: (key|jump|cut|branches)", t)]) == 50
    assert len([t for t in titles if t.startswith("trial ")]) == 20


def test_images_come_back_as_they_were(tmp_path: Path) -> None:
    """Small images are kept bit by bit; large ones are shrunk to the width that tiles have."""
    import base64
    import io

    images = torch.randint(0, 256, (3, 3, 10, 12)) / 255
    before_after.save(images, 1 - images, tmp_path)
    tiles = before_after.load(tmp_path)
    assert tiles and tiles.width % 12 == 0 and tiles.exact
    back = [Image.open(io.BytesIO(base64.b64decode(t.split(",")[1]))) for t in tiles.before]
    wanted = [(255 * i.permute(1, 2, 0)).round().byte().numpy().tobytes() for i in images]
    assert [image.tobytes() for image in back] == wanted
    before_after.save(torch.rand(2, 3, 512, 512), torch.rand(2, 3, 512, 512), tmp_path)
    assert Image.open(tmp_path / "before.png").size == (2 * before_after.SIDE, before_after.SIDE)


@pytest.mark.parametrize("name", ["before.png", "trials.csv"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    """A half-written strip or table is refused with its name and what to do."""
    path = fill(tmp_path) / name
    path.write_bytes(b"trial,state\nx\n")
    with pytest.raises(RunFolderError, match=rf"{name}.*delete it"):
        page.run_page(make_result(), None, tmp_path)


@pytest.mark.parametrize("mix", ["table", "sigmoid", "one"])
def test_the_mix_is_drawn_as_it_is(mix: str) -> None:
    """Bars of a step are as long as its weights; λ(t) is drawn as a line where there is one."""
    policy = make_policy(mix=mix)
    chart = policy_chart.mix(policy)
    bars = [r for r in chart.drawing.iter("rect") if r.get("class", "").startswith("fill-")]
    long = sum(abs(w) for i in range(50) for w in policy.weights(i))
    assert sum(float(bar.get("height", 0)) for bar in bars) == pytest.approx(
        long, abs=0.01 * len(bars)
    )
    assert bool(chart.drawing.findall("polyline")) == (mix != "table")


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e4), st.booleans())
def test_axes_keep_the_order_and_their_ticks(low: float, factor: float, log: bool) -> None:
    """Larger values stand further along; ticks lie within the axis and are few."""
    axis = Axis(low, low * factor, 10, 500, log)
    values = [low * (1 + (factor - 1) * k / 8) for k in range(9)]
    places = [axis(value) for value in values]
    assert all(a <= b for a, b in pairwise(places)) and places[0] == 10 and places[-1] == 500
    ticks = axis.ticks()
    assert len(ticks) <= 20 and all(10 <= axis(tick) <= 500 for tick in ticks)


def test_a_long_study_is_small(tmp_path: Path) -> None:
    """500 trials, 200 points, 100 steps and images that do not compress stay below 5 MB."""
    fill(tmp_path, 500)
    images = torch.rand(8, 3, 256, 256)
    before_after.save(images, images.flip(0), tmp_path)
    names = {"conv": [f"up_blocks.{i}.resnets.0#conv" for i in range(200)]}
    profile, result = make_profile(names, steps=100), make_result(policy=make_policy(100))
    text = page.run_page(result, profile, tmp_path)
    assert text.count("<title>trial ") == 500
    assert len(text.encode()) < 5_000_000


# -- several runs, two policies -------------------------------------------------------------------


def test_the_index_links_every_run(tmp_path: Path, run: Path) -> None:
    """`report` on a folder of runs writes their pages and an index; a broken run is named there."""
    for name in ("one run", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes((run / "result.json").read_bytes())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    ran = CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert ran.exit_code == 0 and "index.html" in ran.output
    found = Reader((tmp_path / "index.html").read_text())
    links = [a["href"] for tag, a in found.tags if tag == "a"]
    assert links == ["one%20run/report.html", "two/report.html"]
    assert "cannot be read" in found.text and not (tmp_path / "bad" / "report.html").exists()
    assert all((tmp_path / name / "report.html").is_file() for name in ("one run", "two"))


def imported(line: str) -> set[str]:
    """The modules that a command line has imported when it ends, without a complaint."""
    code = (
        "import sys, autofr.cli.app as line\n"
        "try:\n    line.main()\n"
        "except SystemExit:\n    print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "models",
        "tune jobs.toml --status",
        "show policy.json",
        "compare policy.json policy.json",
        "report runs",
        "report runs/one",
    ],
)
def test_what_only_reads_files_loads_no_networks(
    line: str, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that read what others measured import nothing that measures: they start at once.

    Matplotlib is there only where pictures are drawn.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "one")
    make_profile(steps=50).save(tmp_path / "runs" / "one" / "profile.json")
    make_policy(measured=make_measured()).save(tmp_path / "policy.json")
    shutil.copy(JOBS, tmp_path / "jobs.toml")
    names = imported(line)
    assert names & NETWORKS == set()
    assert ("matplotlib" in names) == (line == "report runs/one")


def test_a_policy_does_not_differ_from_itself() -> None:
    """Another name of a mask or other measurements are no difference in what is done."""
    policy = make_policy(measured=make_measured())
    text = policy.model_dump_json().replace('"cut3"', '"renamed"')
    other = Policy.model_validate_json(text)
    assert differences.changed(policy, other) == []
    assert "do the same at every step" in differences.words(policy, other)[0]


def test_every_kind_of_difference_is_said() -> None:
    """Steps, masks, mix, scheduler, keeping and measured numbers: each change has its sentence."""
    policy = make_policy(measured=make_measured())
    steps = [*policy.steps]
    at = max(i for i, step in enumerate(steps) if step == "cut3")
    steps[at] = "cut7"
    sampler = policy.sampler.model_copy(update={"config": {"beta_start": 0.002}})
    mean = make_measured(speedup={"value": 3.0, "low": 2.9, "high": 3.1})
    changes = {"steps": tuple(steps), "sampler": sampler, "measured": mean}
    other = policy.model_copy(update=changes)
    said = " ".join(differences.words(policy, other))
    assert f"at 1 of 50 steps: {at}." in said
    assert "beta_start" in said and "B has the higher speed-up" in said
    assert differences.changed(policy, policy.retime(25)) is None
    mixed = policy.model_copy(update={"mix": Sigmoid()})
    assert "weights of the mix differ" in " ".join(differences.words(policy, mixed))


def test_policies_are_compared_by_command(tmp_path: Path) -> None:
    """`compare` prints the differences and writes the page; another kind of file is refused."""
    places = [tmp_path / "a.json", tmp_path / "b.json"]
    for place, steps in zip(places, (50, 40), strict=True):
        make_policy(steps).save(place)
    out = tmp_path / "new" / "c.html"
    words = ["compare", *map(str, places), "--out", str(out)]
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ran.exit_code == 0 and "not the same number of steps" in ran.output
    assert "not the same number of steps" in Reader(out.read_text()).text


def test_steps_that_do_not_run_are_told_apart(tmp_path: Path) -> None:
    """`show` and the page of a call that starts from a picture count the steps that run."""
    policy = make_policy(measured=make_measured(skipped_steps=6))
    policy.save(tmp_path / "p.json")
    said = CliRunner().invoke(commands, ["show", str(tmp_path / "p.json")]).output
    late = policy.steps[6:]
    assert "of which 44 run" in said and re.search(r"steps +-{6}[^-]{44}\n", said)
    assert f"{late.count('key')} key" in said and "keyframes 0" not in said
    text = page.run_page(make_result(policy=policy), None, tmp_path)
    assert f"</b> × {late.count('key')}: everything" in text
    assert len(re.findall(r"<title>step \d+: left out", text)) == 6


def test_a_folder_of_older_runs_is_reported(tmp_path: Path) -> None:
    """Without images, profile and trials, and with one sheet of samples: pages all the same."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(make_result().model_dump_json())
    Image.new("RGB", (40, 20)).save(tmp_path / "two" / "samples.png")
    ran = CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert ran.exit_code == 0 and "cannot be read" not in ran.output
    assert "no before.png" not in Reader((tmp_path / "one" / "report.html").read_text()).text
    assert "no before.png" in Reader((tmp_path / "two" / "report.html").read_text()).text


# -- as it is seen --------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` or `#rgb`, as WCAG defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_told_from_the_paper() -> None:
    """WCAG in both themes: text has contrast 4.5, marks and bars have 3 (pale: left out)."""
    themes = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)[:2]
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w]+): (#\w+)", theme))

        def contrast(name: str, on: str, colours: dict[str, str] = colours) -> float:
            dark, light = sorted(luminance(colours[one]) for one in (name, on))
            return (light + 0.05) / (dark + 0.05)

        texts = ("ink", "soft", "chosen", "fewer", "good", "bad")
        assert [(n, on) for n in texts for on in ("paper", "tint") if contrast(n, on) < 4.5] == []
        drawn = [f"m{i}" for i in range(8)] + [f"w{i}" for i in range(4)]
        drawn += [look.colour for look in front.LOOKS.values()] + ["key", "focus"]
        assert [name for name in drawn if contrast(name, "paper") < 3] == []


@pytest.fixture(scope="module")
def seen(run: Path, tmp_path_factory: pytest.TempPathFactory):
    """A browser that shows the page of the run."""
    if find() is None:
        pytest.skip("no Chromium here: the page was not looked at")
    with browser(tmp_path_factory.mktemp("browser")) as found:
        found.open(run / "report.html")
        yield found


def shown(seen: Page) -> str:
    """What the browser paints now, as bytes."""
    return seen.call("Page.captureScreenshot")["data"]


def test_the_page_is_shown_in_light_and_dark(seen: Page, run: Path, tmp_path: Path) -> None:
    """Screenshots are bright and dark, nothing is asked of a network, the console is silent."""
    light = {}
    for dark in (False, True):
        seen.open(run / "report.html", dark=dark)
        image = Image.open(seen.screenshot(tmp_path / f"{dark}.png")).convert("L")
        assert image.width == 1200 and image.height > 2000
        light[dark] = sum(image.resize((1, 1)).tobytes())
    assert light[False] > 200 and light[True] < 90
    assert seen.said == []
    assert {url.split(":")[0] for url in seen.asked} <= {"file", "data"}
    assert {url for url in seen.asked if url.startswith("file")} == {(run / "report.html").as_uri()}


def test_pictures_of_a_page_are_small(run: Path, tmp_path: Path) -> None:
    """Both themes, as wide as a README's reader may want to read them."""
    if find() is None:
        pytest.skip("no Chromium here: no picture was taken")
    paths = screenshots.take(run, tmp_path)
    assert [path.name for path in paths] == ["report-light.png", "report-dark.png"]
    for path in paths:
        assert Image.open(path).width == 1200 and 20_000 < path.stat().st_size < 700_000


def test_without_a_browser_no_picture_is_taken(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script says so in one line, and is no failure; a folder without a page is one."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["screenshots.py", str(run)])
    screenshots.main()
    assert capsys.readouterr().out == f"skipped: no browser here; looked for {', '.join(NAMES)}\n"
    monkeypatch.setattr("sys.argv", ["screenshots.py", str(run.parent)])
    with pytest.raises(SystemExit):
        screenshots.main()
    assert f"`autofr report {run.parent}` writes it" in capsys.readouterr().err


@pytest.mark.parametrize("width", [320, 360, 768])
def test_the_page_fits_narrow_windows(seen: Page, run: Path, width: int) -> None:
    """On a phone nothing but tables is wider than the window."""
    seen.open(run / "report.html", width=width)
    assert seen.run("document.documentElement.scrollWidth") == width


def test_images_are_switched_by_keyboard(seen: Page, run: Path) -> None:
    """Arrow keys on the switch change which images are painted."""
    seen.open(run / "report.html")
    seen.run("document.querySelector('.switch input:checked').focus()")
    seen.run("document.querySelector('.switch').scrollIntoView()")
    after = shown(seen)
    seen.press("ArrowLeft")
    assert seen.run("document.querySelector('.switch input:checked').value") == "before"
    style = "getComputedStyle(document.querySelector('.after')).visibility"
    assert seen.run(style) == "hidden" and shown(seen) != after
    seen.press("ArrowRight")
    assert seen.run(style) == "visible" and shown(seen) == after


def test_values_are_read_by_keyboard(seen: Page, run: Path) -> None:
    """Every chart and map can be focused, and arrow keys say their values one by one."""
    seen.open(run / "report.html")
    for kind in ("svg.front", "svg.strip", "svg.mix", "svg.stack", ".map"):
        seen.run(f"window.chart = document.querySelector('{kind}'); chart.focus()")
        assert seen.run("document.activeElement === chart"), kind
        said = []
        for _ in range(2):
            seen.press("ArrowRight")
            said.append(seen.run("chart.closest('figure').querySelector('.readout').textContent"))
        assert all(said) and said[0] != said[1], kind


def test_focus_can_be_seen(seen: Page, run: Path) -> None:
    """The tab key goes through the page, and where it is is outlined."""
    seen.open(run / "report.html")
    outlines = []
    for _ in range(6):
        seen.press("Tab")
        one = "[document.activeElement].map(e => e.matches('input') ? e.nextElementSibling : e)[0]"
        outlines.append(seen.run(f"getComputedStyle({one}).outlineStyle"))
    assert outlines == ["solid"] * 6


def test_paper_shows_both_images(seen: Page, run: Path, tmp_path: Path) -> None:
    """In print images stand below one another, and the page becomes a document."""
    seen.open(run / "report.html")
    assert seen.pdf(tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    seen.call("Emulation.setEmulatedMedia", media="print")
    place = "(name) => document.querySelector('.' + name).getBoundingClientRect()"
    assert seen.run(f"({place})('after').top >= ({place})('before').bottom")
    assert seen.run("getComputedStyle(document.querySelector('.switch')).display") == "none"
    seen.call("Emulation.setEmulatedMedia", media="")


def test_the_page_is_whole_without_its_script(run: Path) -> None:
    """Without the script nothing is missing: values are titles, the switch is of radio buttons."""
    bare = re.sub(r"<script>.*?</script>", "", (run / "report.html").read_text(), flags=re.DOTALL)
    tags = Reader(bare).tags
    assert len([a for tag, a in tags if tag == "input" and a.get("type") == "radio"]) == 3
    assert all(a.get("alt") is not None for tag, a in tags if tag == "img")
    assert all(a.get("aria-label") for tag, a in tags if tag == "svg" and a.get("role") == "img")
