"""Laws of the documents' commands and scripts: they run as they stand, and print what is shown.

They run in one folder in which small things stand for large ones; `Stage` and `here` say which.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from folders import SMALL, picture, write
from test_cli import Ran, autofr
from test_docs import COMMANDS, DOCUMENTS, ROOT, blocks, objection
from test_hub import OWNER, Hub, hub  # noqa: F401  (a fixture)
from test_search import tiny_pipe
from test_tune import CHILD

from autofr import files, zoo
from autofr.measure.masks import candidate_masks
from autofr.mix import Constant
from autofr.policy import Provenance
from autofr.runtime import sampler
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser
from autofr.tune import tune

STEPS = 6
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "black-forest-labs/FLUX.1-dev": "flux",
    "stabilityai/stable-video-diffusion-img2vid-xt": "svd",
}
"""Models on the hub, and the tiny folders that stand for them."""
LARGE = (diffusers.FluxPipeline, diffusers.StableVideoDiffusionPipeline)  # in their default sizes
WORDS = {
    "180ms": "0.01ms",
    "height=512": "height=16",
    "width=512": "width=16",
    "cuda": "cpu",
}
"""Words of command lines, and what stands for them: pictures are small, and there is no GPU."""
SEARCHED = "autofr search --model ldm4 --budget 1.5x"
"""The search that is run; of others, `--dry-run` is."""
FEW = {
    "profile": ["--steps", str(STEPS), "--batch", "2"],
    "evaluate": ["--samples", "4", "--batch", "2"],
}
"""What commands are given besides, so that they take seconds."""
NIGHT = """
[defaults]
budgets = ["1.5x"]

[[job]]
model = "ldm5"

[[job]]
model = "ldm4"
budget = 2
"""
DATABASE = re.compile(r"autofr worker|autofr .* --storage ")
"""Command lines that need a database of PostgreSQL: they are checked against what the program takes
(unless they are shown to be refused); test_workers.py runs the commands."""


# -- the folder -----------------------------------------------------------------------------------


class Stage:
    """A working directory with what the documents speak of, and the bundled models' tiny twins."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.ran: set[Line] = set()  # lines that need not run again for another document
        patch.chdir(folder)
        patch.setattr(zoo, "HERE", folder / "zoo")
        tiny_pipe("ldm").save_pretrained(folder / "zoo" / "ldm4")
        for name in ("dit", "sd"):
            write(name, folder / "zoo" / name)
        shutil.copytree(folder / "zoo" / "sd", folder / "my-pipeline")
        self.inputs(folder, folder / "zoo" / "sd")
        small = write("upscaler", folder / "zoo" / "ldm4-sr")
        picture(0).save(small / "cat.png")
        (small / "upscale.jsonl").write_text('{"image": "cat.png"}\n')
        skipped = shutil.ignore_patterns("*.png", "*.md", "*.html", "*.csv", "zoo", "benchmarks")
        shutil.copytree(ROOT / "results", folder / "results", ignore=skipped)
        shutil.copytree(ROOT / "examples", folder / "examples")
        for kind in LARGE:
            patch.setattr(kind, "__call__", spied(kind.__call__, [], **SMALL))
        stand_in = [sys.executable, "-c", CHILD]
        for name in ("run", "foresee"):
            patch.setattr(tune, name, functools.partial(getattr(tune, name), child=stand_in))
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: None)
        self._bad_inputs()

    def _bad_inputs(self) -> None:
        """Models and files of the FAQ, each with one thing wrong."""
        twin = self.folder / "zoo" / "ldm4"
        shutil.copytree(twin, "broken")
        weights = Path("broken/unet/diffusion_pytorch_model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        pipe = tiny_pipe("ldm")
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained("with-euler")
        pipe = tiny_pipe("ldm")
        pipe.unet.conv_out.bias.fill_(float("nan"))
        pipe.save_pretrained("nan")
        unet = diffusers.UNet1DModel(
            sample_size=64,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
            up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
            extra_in_channels=16,
        )
        diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler()).save_pretrained("dance")
        whole = Path("results/ldm4-1.5x/policy.json").read_text()
        Path("half.json").write_text(whole[:300])
        Path("newer.json").write_text(whole.replace('"autofr_policy": 1', '"autofr_policy": 2'))
        shutil.copytree("results/ldm4-1.5x", "damaged")
        Path("damaged/profile.json").write_text("{")
        self.policy("policy.json")
        Path("edited.json").write_text(
            Path("policy.json").read_text().replace('"mask": [', '"m": [')
        )
        Path("night.toml").write_text(NIGHT)
        picture(0).resize((32, 16)).save("wide.png")
        Path("sizes.jsonl").write_text('{"image": "cat.png"}\n{"image": "wide.png"}\n')
        self.policy("made-with-eta.json", call={"eta": 0.0})

    def inputs(self, *folders: Path) -> None:
        """Write prompts and pictures where commands and scripts look for them."""
        for folder in folders:
            (folder / "prompts.txt").write_text("red apple\nblue car\n", encoding="utf-8")
            for name in ("bicycle.png", "cat.png", "hole.png"):
                picture(0).save(folder / name)
            row: dict[str, str] = {"prompt": "a cat", "image": "cat.png"}
            (folder / "img2img.jsonl").write_text(json.dumps(row))
            (folder / "inpaint.jsonl").write_text(json.dumps(row | {"mask_image": "hole.png"}))
            (folder / "images.jsonl").write_text('{"image": "bicycle.png"}\n')
            (folder / "pictures.jsonl").write_text(json.dumps(row))

    def model(self, name: str) -> str:
        """What stands for a model: the same name if it is bundled, a folder for one of the hub."""
        if name not in HUB:
            return name
        folder = self.folder / "hub" / HUB[name]
        if not folder.exists():
            write(HUB[name], folder)
        return str(folder)

    def free(self, place: str) -> str:
        """A folder for a search: what is there and is no search's is gone."""
        if not Path(place, "study").exists() or place == "tiny/refused":
            shutil.rmtree(place, ignore_errors=True)
        return place

    def policy(
        self, place: str, model: str = "ldm4", steps: int = STEPS, call: Mapping[str, Any] = {}
    ) -> int:
        """Write a policy of the tiny model, if there is none; returns the forwards it leaves."""
        pipe = zoo.load(self.model(model)).pipe
        masks = {"mask": candidate_masks(discover(find_denoiser(pipe)))["frdiff"]}
        names = [("key", "mask", "jump")[step % 3] for step in range(steps)]
        found = sampler.compose(
            pipe, model, names, masks, Constant(), replaces=steps, latent_shape=(1,)
        )
        made = Provenance(
            autofr="0",
            command="",
            call=dict(call),
            space="",
            study="",
            trials=0,
            seconds=0,
            date="",
        )
        found = found.model_copy(update={"provenance": made})
        if not Path(place).exists():
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            found.save(place)
        return steps - names.count("jump")


def spied(call: Callable[..., Any], calls: list[int], **changes: Any) -> Callable[..., Any]:
    """The method, with its calls noted and some of its arguments changed."""

    @functools.wraps(call)
    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return call(*args, **kwargs | changes)

    return method


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The folder in which the documents' commands run, in their order."""
    with pytest.MonkeyPatch.context() as patch:
        found = Stage(tmp_path_factory.mktemp("docs"), patch)
        Path("busy/study").mkdir(parents=True)
        with files.locked(Path("busy/study/lock")):
            yield found


# -- command lines --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A command line of a document, and what it is shown to print (None: not shown)."""

    command: str
    shown: str | None = None

    @property
    def refused(self) -> bool:
        """Whether a refusal is shown."""
        return bool(self.shown and re.search(r"^(autofr: |Usage: )", self.shown, re.MULTILINE))


def lines_of(text: str) -> list[Line]:
    """Command lines in code blocks; in `console` blocks they follow a `$`, and print the rest."""
    found = []
    for language, content in blocks(text):
        content = content.replace("\\\n", " ")
        if language == "console":
            for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                found.append(Line(" ".join(command.split()), shown if shown.strip() else None))
        elif language in ("", "sh", "bash"):
            bare = re.sub(r"\s+# .*", "", content)
            found += [Line(" ".join(one.split())) for one in bare.splitlines()]
    begin = ("autofr ", "python -m ", "make ")
    return [line for line in dict.fromkeys(found) if line.command.startswith(begin)]


def here(line: Line, stage: Stage) -> list[str]:
    """The words of a command as it is run: on tiny models, with few steps and seeds.

    A search is run where it is `SEARCHED` or is shown to be refused; of others, `--dry-run` is.
    """
    words = shlex.split(line.command, comments=True)[1:]
    name = next(word for word in words if not word.startswith("-"))
    options = {option for param in COMMANDS[name].params for option in param.opts}
    words = [re.sub(r"^(hub:)?me/", rf"\g<1>{OWNER}/", word) for word in words]
    if "--model" not in options and name not in ("push", "retime"):
        return words
    words = [WORDS.get(word, re.sub("^results/", "tiny/", word)) for word in words]
    model = words[words.index("--model") + 1] if "--model" in words else "ldm4"
    for place in (word for word in words if re.search(r"^tiny/\S+\.json$", word)):
        steps = re.search(r"-(\d+)/", place)
        stage.policy(place, model, int(steps[1]) if steps else STEPS)
    words = [stage.model(word) for word in words]
    if name == "search":
        few = ["--trials", "2", "--steps", str(STEPS), "--batch", "2"]
        there = "tiny/ldm4-1.5x" in words and not Path("tiny/ldm4-1.5x/study").exists()
        if there and run(Line(SEARCHED), stage).code:
            raise AssertionError(f"{SEARCHED} fails")
        if line.command == SEARCHED:
            words += [*few, "--out", stage.free("tiny/ldm4-1.5x")]
        elif line.refused:
            words += few if "--task" not in words else few[:2]
            words += [] if "--out" in words else ["--out", stage.free("tiny/refused")]
        elif "--dry-run" not in words:
            words += ["--dry-run"]
    return words + FEW.get(name, []) + (["--threads", "1"] if "--threads" in options else [])


def run(line: Line, stage: Stage) -> Ran:
    """Run a command line of a document; one that has run before, only for what it prints."""
    command = line.command
    if line in stage.ran:
        return Ran(0, "", "")
    if line.shown is None:
        stage.ran.add(line)
    if command.startswith("make "):
        words = ["make", "-n", *shlex.split(command, comments=True)[1:]]
        recipe = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        calls = re.findall(r"\S*bin/(autofr .*)", recipe.stdout)
        found = [run(Line(" ".join(call.split())), stage) for call in calls]
        return next((ran for ran in found if ran.code), Ran(recipe.returncode, "", recipe.stderr))
    if DATABASE.match(command) and not line.refused:
        said = objection(command)
        return Ran(int(said is not None), "", said or "")
    assert command.startswith("autofr "), f"{command}: a test has to say how this is run"
    return autofr(*here(line, stage))


def matches(shown: str, printed: str) -> bool:
    """Whether that was printed, `...` for anything; line ends and further spaces do not count."""
    parts = (re.escape(" ".join(part.split())) for part in shown.split("..."))
    wanted = r"[\s\S]*?".join(rf"\s*{part}\s*".replace(r"\ ", r"\s+") for part in parts)
    return re.fullmatch(rf"\s*{wanted}\s*", printed) is not None


def trouble(line: Line, ran: Ran) -> str | None:
    """Say what is not as the document shows it; None if all is."""
    printed = (ran.out + ran.err).replace(f"{OWNER}/", "me/")
    if (ran.code in (1, 2)) != line.refused or "Traceback" in printed:
        return f"{line.command}\n  exit code {ran.code}: {printed}"
    if line.shown is not None and not matches(line.shown, printed):
        return f"{line.command}\n  printed: {printed}\n  shown: {line.shown}"
    return None


def test_the_reader_tells_commands_from_what_they_print() -> None:
    """Comments and continuations are undone; what stands below a `$` belongs to it."""
    text = (
        "```sh\nautofr models  # all\nautofr search \\\n  --budget 2x\nls\n```\n"
        "```console\n$ autofr show a\nautofr: no\n  such file\n$ make test\n```\n"
        "```python\nautofr .apply\n```\n"
    )
    assert lines_of(text) == [
        Line("autofr models"),
        Line("autofr search --budget 2x"),
        Line("autofr show a", "autofr: no\n  such file\n"),
        Line("make test"),
    ]
    assert [line.refused for line in lines_of(text)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("one two\nthree", "one  two three\n", True),
        ("one ... three", "one 2 3 three", True),
        ("one ...x", "one 1.5x", True),
        ("one", "one two", False),
        ("one two", "one 2", False),
        ("one (a.b)", "one (a-b)", False),
        ("...\ntwo", "one\ntwo", True),
        ("...\ntwo", "one", False),
    ],
)
def test_what_is_shown_is_what_is_printed(shown: str, printed: str, same: bool) -> None:
    """Line ends do not count, `...` is anything, and everything else is said."""
    assert matches(shown, printed) == same


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_run_and_print_what_is_shown(document: Path, stage: Stage, hub: Hub) -> None:  # noqa: F811
    """Every command of a document ends well, or with the refusal that is shown below it."""
    lines = lines_of(document.read_text(encoding="utf-8"))
    found = [trouble(line, run(line, stage)) for line in lines]
    assert not any(found), "\n\n".join(filter(None, found))


# -- scripts --------------------------------------------------------------------------------------


def scripts() -> list[tuple[str, str]]:
    """The Python blocks of all documents, each with where it stands."""
    return [
        (f"{path.stem}-{index}", code)
        for path in DOCUMENTS
        for index, (language, code) in enumerate(blocks(path.read_text(encoding="utf-8")))
        if language in ("python", "py")
    ]


@pytest.mark.parametrize("script", [pytest.param(code, id=name) for name, code in scripts()])
def test_scripts_run(
    script: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id stands for a tiny folder, a GPU for this machine; `pipe` is there for parts.

    Where a script calls the pipe under its policy, the calls are those that the policy leaves.
    """
    monkeypatch.chdir(tmp_path)
    stage.inputs(tmp_path)
    named = (name for name in (*HUB, "dit", "sd", "ldm4-sr") if f'"{name}"' in script)
    model = next(named, "ldm4")
    steps = [int(count) for count in re.findall(r"num_inference_steps=(\d+)", script)] or [STEPS]
    forwards = 0
    for place in re.findall(r'"([^"\s:]+\.json)"', script):
        forwards = stage.policy(place, model, steps[0])
    pipe = zoo.load(stage.model(model)).pipe
    kind, calls = type(find_denoiser(pipe)), []
    monkeypatch.setattr(kind, "forward", spied(kind.forward, calls))
    text = script.replace(f'"{model}"', json.dumps(stage.model(model))).replace('"cuda"', '"cpu"')
    exec(compile(text, "script", "exec"), {"pipe": pipe})
    assert len(calls) in ((forwards,) if "autofr.reuse" in script else range(10_000))
