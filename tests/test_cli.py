"""Laws of the command line: what it refuses and how, what it prints and what it writes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import ddim
from folders import write
from PIL import Image
from test_docs import COMMANDS
from test_search import STEPS, few_rows, settings, tiny_pipe, tiny_unet, work_clock

from autofr import job, loading, zoo
from autofr.cli import console
from autofr.cli.app import main
from autofr.cli.console import progress
from autofr.errors import AutofrError, BudgetError, MeasurementError
from autofr.mix import Constant
from autofr.policy import Policy, Provenance
from autofr.policy_file import load
from autofr.report.report import load_result
from autofr.runtime.families import discover
from autofr.runtime.sampler import compose
from autofr.search import folder as folders

FEW = ["--steps", str(STEPS), "--batch", "2", "--threads", "1"]


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str


def ran(words: Iterable[object], *around: contextlib.AbstractContextManager[Any]) -> Ran:
    """Run the command line in this process, inside of what is `around` it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        for one in around:
            stack.enter_context(one)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["autofr", *map(str, words)])
        patch.setenv("AUTOFR_DEBUG", "")
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def autofr(*words: object) -> Ran:
    """Run the command line with few seeds, on a clock that follows the network's arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(folders.Settings, **seeds())
        patch.setattr(folders, "Settings", small)
        return ran(words, work_clock(), few_rows())


def seeds() -> dict[str, int]:
    """So few seeds that a search takes seconds."""
    few = settings()
    names = [f"{purpose}_seeds" for purpose in ("calibration", "trial", "validation", "test")]
    return {name: getattr(few, name) for name in names}


def refused(ran: Ran, *said: str, code: int = 2) -> None:
    """Check a refusal: its exit code, one message on stderr, nothing printed, no traceback."""
    assert ran.code == code, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert [text for text in said if text not in ran.err] == [], ran.err


def make_policy(pipe: Any, points: tuple[str, ...] = ()) -> Policy:
    """A policy with a mask: its first two points unless others are given."""
    mask = points or tuple(discover(pipe.unet))[:2]
    steps = ("key", "early", "jump", "key", "early", "jump")
    mix = Constant(value=0.5)
    return compose(
        pipe, "tiny", steps, {"early": mask}, mix, replaces=STEPS, latent_shape=(3, 8, 8)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LDMPipeline as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe("ldm").save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy file for that pipeline."""
    make_policy(tiny_pipe("ldm")).save(tmp_path / "policy.json")
    return tmp_path / "policy.json"


@pytest.fixture(scope="module")
def searched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The folder of a search that has ended, and what the command printed with `--json`."""
    folder = tmp_path_factory.mktemp("results") / "run"
    words = ["--budget", "1.3x", "--trials", "2", *FEW, "--out", folder, "--json"]
    return folder, autofr("search", "--model", model, *words)


# -- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("0.5x", "above 1x"),
        ("1x", "above 1x"),
        ("1.5", "did you mean 1.5x?"),
        ("abc", "a speed-up such as 1.5x, or a time per call such as 180ms"),
        ("-2x", "a speed-up such as 1.5x"),
        ("nanx", "a speed-up such as 1.5x"),
        ("0ms", "above 0"),
        ("", "a speed-up such as 1.5x"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(budget: str, said: str) -> None:
    """A budget is read before anything is loaded, and the message says what is expected."""
    refused(autofr("search", "--model", "nowhere", f"--budget={budget}"), repr(budget), said)


def test_a_budget_out_of_reach_names_the_largest(model: Path, tmp_path: Path) -> None:
    """A budget that no policy can meet is refused with the largest that one can."""
    folder = tmp_path / "run"
    ran = autofr("search", "--model", model, "--budget", "900x", *FEW, "--out", folder)
    refused(ran, "900.00x", "cannot be met", "the largest that can")
    assert not (folder / "policy.json").exists()
    ran = autofr("search", "--model", model, "--budget", "90s", *FEW, "--out", tmp_path / "other")
    refused(ran, "90s", "already takes only", "give a smaller budget")


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("ldm5", "did you mean ldm4"), ("zzz", "no model")])
def test_an_unknown_model_is_answered_with_the_known_ones(name: str, near: str) -> None:
    """The nearest name, the bundled ones, and how to give a folder."""
    ways = ("Bundled: ldm4", "./my-pipeline", "hub id")
    refused(autofr("sample", "--model", name), repr(name), near, *ways)


def test_a_hub_that_is_told_to_be_off_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE=1 a hub id is refused without a try; the bundled models are named."""
    called = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: called.append(a) or [])
    ran = autofr("search", "--model", "someone/some-model")
    refused(
        ran, "someone/some-model", "the hub cannot be reached", "ldm4", "local diffusers folder"
    )
    assert called == []


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    """A folder without model_index.json is named as such, with how to write one."""
    refused(autofr("profile", "--model", tmp_path), "no model_index.json", "save_pretrained")


def truncate(path: Path) -> None:
    """Keep the first half of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "model_index.json"),
        lambda folder: truncate(folder / "unet/config.json"),
        lambda folder: truncate(folder / "unet/diffusion_pytorch_model.safetensors"),
        lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(),
        lambda folder: (folder / "model_index.json").write_text('{"_class_name": "NoPipeline"}'),
    ],
    ids=["index", "config", "weights", "missing", "class"],
)
def test_a_damaged_model_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Whichever file of a model is broken, the message names its folder."""
    tiny_pipe("ldm").save_pretrained(tmp_path / "broken")
    damage(tmp_path / "broken")
    ran = autofr("profile", "--model", tmp_path / "broken", "--out", tmp_path / "out")
    refused(ran, str(tmp_path / "broken"), "cannot be loaded")
    assert not (tmp_path / "out").exists()


def test_a_pipe_without_known_points_is_refused(tmp_path: Path) -> None:
    """A denoiser that autofr does not know is refused with those that it does, before any work."""
    blocks = ("DownBlock1DNoSkip", "DownBlock1D"), ("UpBlock1D", "UpBlock1DNoSkip")
    unet = diffusers.UNet1DModel(
        sample_size=64,
        block_out_channels=(8, 8),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        extra_in_channels=16,
    )
    pipe = diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler())
    pipe.save_pretrained(tmp_path / "dance")
    ran = autofr("search", "--model", tmp_path / "dance", "--out", tmp_path / "out", "--threads", 1)
    refused(ran, "no known reuse points in UNet1DModel", "UNet2DModel")
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_nan_is_a_failure(tmp_path: Path) -> None:
    """What the user asked for was right and the model is not: exit code 1."""
    pipe = tiny_pipe("ldm")
    pipe.unet.conv_out.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    words = ["--model", tmp_path / "nan", *FEW]
    refused(autofr("search", *words, "--out", tmp_path / "run"), "NaN", code=1)
    refused(autofr("sample", *words, "-n", 2, "--out", tmp_path / "a.png"), "NaN", code=1)
    with pytest.raises(MeasurementError):
        autofr("--debug", "search", *words, "--out", tmp_path / "run")


# -- other options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--dtype", "float8", ("float8", "float32, float16, bfloat16")),
        ("--device", "abacus", ("abacus", "cpu or cuda")),
        ("--space", "nowhere.toml", ("nowhere.toml", "default, frdiff, direct")),
    ],
)
def test_a_bad_choice_is_answered_with_the_good_ones(
    model: Path, option: str, value: str, said: tuple[str, ...]
) -> None:
    """What is unknown is named together with what is known."""
    refused(autofr("search", "--model", model, option, value, "--threads", 1), *said)


def test_cores_are_counted_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that do not say which cores a process may use are asked how many there are."""
    assert loading.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert loading.cores() == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said_to_be_missing(model: Path) -> None:
    """Asking for a GPU on a machine without one is no failure of the program."""
    refused(autofr("sample", "--model", model, "--device", "cuda"), "cuda", "no GPU here")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "not valid TOML"),
        ('name = "x"\nkind = "magic"', "expected one of planned, uniform, direct"),
        (
            'name = "x"\nkind = "planned"\n[axes]\nmix = ["fit9"]',
            "axes.mix.0",
        ),
        (
            'name = "x"\nkind = "planned"\n[axes]\nmix = ["fit1"]\nsurprise = 1',
            "axes.surprise",
        ),
        (
            'name = "x"\nkind = "planned"\n[axes]\nmix = ["fit1"]\ntau = [9.0, 1.0]',
            "[lowest, highest]",
        ),
    ],
)
def test_a_bad_space_file_is_named_with_the_field(tmp_path: Path, text: str, said: str) -> None:
    """A search space is checked before a model is loaded."""
    path = tmp_path / "space.toml"
    path.write_text(text)
    refused(autofr("search", "--model", "nowhere", "--space", path), str(path), said)


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--batch", "0"],
        ["search", "--steps", "1"],
        ["profile", "--steps", "1"],
        ["search", "--trials", "many"],
        ["search", "--surprise"],
        ["evaluate"],
        ["sample", "-n", "0"],
        ["show"],
        ["surprise"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_user_errors(words: list[str]) -> None:
    """What cannot be parsed has the exit code of everything that the user can change."""
    refused(autofr(*words))


# -- policy files ---------------------------------------------------------------------------------


def edited(path: Path, **changes: Any) -> str:
    """A policy's text with top-level fields replaced; None removes one."""
    fields = json.loads(path.read_text()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda path: path.read_text()[:200], ("not valid JSON", "truncated?")),
        (lambda path: "", ("not valid JSON",)),
        (lambda path: "[]", ("a policy is a JSON object",)),
        (lambda path: "{}", ("autofr_policy",)),
        (lambda path: edited(path, surprise=1), ("surprise",)),
        (lambda path: edited(path, autofr_policy=9), ("version 9", "reads version 1")),
        (lambda path: edited(path, steps=["key"] * 7), ("7 entries", "is 6")),
        (lambda path: edited(path, steps=["key", *["late"] * 5]), ('no mask "late"', "early")),
        (
            lambda path: edited(path, mix={"kind": "constant", "value": float("nan")}),
            ("mix.constant.value",),
        ),
        (lambda path: edited(path, mix={"kind": "magic"}), ("mix", "sigmoid")),
        (lambda path: edited(path, sampler=None), ("sampler", "required")),
    ],
    ids=[
        "truncated", "empty", "list", "bare", "field", "version", "length", "mask", "nan", "kind",
        "missing",
    ],
)  # fmt: skip
def test_a_bad_policy_file_is_named_with_the_field(
    policy: Path, edit: Callable[[Path], str], said: tuple[str, ...]
) -> None:
    """Every command that reads a policy refuses a bad one before it loads a model."""
    policy.write_text(edit(policy))
    refused(autofr("show", policy), str(policy), *said)
    refused(autofr("evaluate", "--model", "nowhere", "--policy", policy), str(policy), *said)


def test_a_policy_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """No file, a folder, or an image: the message says which file and why."""
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    refused(autofr("show", tmp_path / "none.json"), "none.json", "No such file")
    refused(autofr("show", tmp_path), str(tmp_path), "Is a directory")
    refused(autofr("show", tmp_path / "image.png"), "image.png")


def test_unknown_points_are_named(model: Path, policy: Path, tmp_path: Path) -> None:
    """A policy with points that the denoiser lacks is refused with their names."""
    policy.write_text(edited(policy, masks={"early": ["nowhere#conv"]}))
    out = tmp_path / "a.png"
    ran = autofr("sample", "--model", model, "--policy", policy, "--out", out, "--threads", 1)
    refused(ran, "nowhere#conv", "does not have")
    assert not out.exists()


def another_denoiser() -> Any:
    """The same class with another configuration: the points are equal, the network is not."""
    pipe = tiny_pipe("ldm")
    config = {**tiny_unet().config, "norm_num_groups": 2}
    pipe.unet = diffusers.UNet2DModel.from_config(config)
    return pipe


def another_solver() -> Any:
    """Another class of scheduler."""
    pipe = tiny_pipe("ldm")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(ddim().config)
    return pipe


def another_schedule() -> Any:
    """The same class of scheduler with other noise levels."""
    pipe = tiny_pipe("ldm")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(ddim().config, beta_end=0.012)
    return pipe


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (another_denoiser, ("another UNet2DModel configuration", "search again")),
        (another_solver, ("DDIMScheduler", "EulerDiscreteScheduler")),
        (another_schedule, ("beta_end=0.0195", "0.012")),
    ],
)
def test_a_policy_for_another_pipe_is_refused(
    make: Callable[[], Any], said: tuple[str, ...], policy: Path, tmp_path: Path
) -> None:
    """What differs is said: the denoiser, the scheduler, or a field of its configuration."""
    make().save_pretrained(tmp_path / "other")
    words = ["--model", tmp_path / "other", "--policy", policy, "--threads", 1]
    refused(autofr("evaluate", *words), *said)
    refused(autofr("sample", *words, "--out", tmp_path / "a.png"), *said)


def test_a_policy_for_another_step_count_is_refused(
    model: Path, policy: Path, tmp_path: Path
) -> None:
    """Steps that are asked for are never quietly replaced by the policy's."""
    words = ["--model", model, "--policy", policy, "-n", 2, "--threads", 1]
    out = tmp_path / "a.png"
    ran = autofr("sample", *words, "--steps", STEPS + 1, "--out", out)
    refused(ran, f"{STEPS} steps", f"asked for {STEPS + 1}")
    assert not out.exists()


# -- folders --------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    """With a file where the folder should be, every command says so, and how to choose another."""
    way = tmp_path / "way"
    way.write_text("mine")
    words = ["--model", model, *FEW]
    for command, out in (("search", way), ("search", way / "in"), ("profile", way / "in")):
        refused(autofr(command, *words, "--out", out), "cannot write there", "--out")
    refused(autofr("sample", *words, "--out", way / "a.png"), "cannot write there", "--out")
    assert way.read_text() == "mine"


@pytest.mark.parametrize("name", ["", "picture.xyz"])
def test_a_picture_that_is_no_png_is_refused_before_it_is_drawn(tmp_path: Path, name: str) -> None:
    """A folder or another kind of file is no place for the grid; no model is loaded for it."""
    ran = autofr("sample", "--model", "nowhere", "--out", tmp_path / name)
    refused(ran, str(tmp_path / name), "PNG file")


def test_a_folder_of_other_files_is_refused(model: Path, tmp_path: Path) -> None:
    """A search never mixes its files with somebody else's."""
    (tmp_path / "thesis.tex").write_text("mine")
    ran = autofr("search", "--model", model, *FEW, "--out", tmp_path)
    refused(ran, "holds other files", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_run_is_refused(searched: tuple[Path, Ran], model: Path) -> None:
    """The difference between the run that is there and the one that was asked is shown."""
    folder, _ = searched
    ran = autofr("search", "--model", model, "--budget", "2x", *FEW, "--out", folder)
    refused(ran, "holds another run", "budget: 1.3x there, 2x asked", "--out")


def test_a_report_needs_a_finished_search(tmp_path: Path) -> None:
    """A folder without a result, or with half of one, is refused with what to do."""
    refused(autofr("report", tmp_path), "result.json", "finished")
    (tmp_path / "result.json").write_text('{"autofr_result": 1, "model"')
    refused(autofr("report", tmp_path), "result.json", "not a valid result", "resumes")


@pytest.mark.parametrize(
    "left",
    [b"", b"[]", b'{"autofr_profile": 1, "denoiser"', b'{"autofr_profile": 9}', b"\x89PNG\xff"],
    ids=["empty", "list", "truncated", "version", "image"],
)
def test_a_report_needs_its_profile_whole_or_not_at_all(
    searched: tuple[Path, Ran], tmp_path: Path, left: bytes
) -> None:
    """A damaged profile is named with the way out, and nothing is written; the way out works."""
    result, path = tmp_path / "result.json", tmp_path / "profile.json"
    result.write_bytes((searched[0] / "result.json").read_bytes())
    path.write_bytes(left)
    ran = autofr("report", tmp_path)
    refused(ran, str(path), "damaged, or of another version", "delete it", "command again")
    assert not any(text in ran.err for text in ("ValidationError", "validation error", "pydantic"))
    assert {found.name for found in tmp_path.iterdir()} == {"result.json", "profile.json"}
    path.unlink()
    assert autofr("report", tmp_path).code == 0


def test_a_policy_may_be_written_into_a_new_folder(policy: Path, tmp_path: Path) -> None:
    """Places are checked in one way: a missing folder is made, anything in the way is named."""
    out = tmp_path / "new" / "policy.json"
    assert autofr("retime", policy, "--steps", 8, "--out", out).code == 0
    assert load(out).sampler.replaces == 8
    refused(autofr("retime", policy, "--steps", 8, "--out", tmp_path), "name of a file")
    refused(autofr("retime", policy, "--steps", 8, "--out", out / "in"), "cannot write there")


# -- failures, interrupts, --debug ----------------------------------------------------------------


def sample_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, *words: object) -> Ran:
    """Draw a sample with a pipe that raises an error."""

    def draw(*_: Any) -> None:
        raise error

    monkeypatch.setattr("autofr.runtime.sampler.draw", draw)
    return autofr(*words)


def test_a_defect_exits_with_1_and_a_hint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is one line with its class; `--debug` lets it through whole."""
    words = ["sample", "--model", model, "--threads", 1, "--out", tmp_path / "a.png"]
    boom = IndexError("boom")
    refused(sample_with(monkeypatch, boom, *words), "IndexError: boom", "--debug", code=1)
    with pytest.raises(IndexError, match="boom"):
        autofr("--debug", *words)


def test_ctrl_c_exits_with_130(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt is neither a failure nor a traceback, and says that the command resumes."""
    words = ["sample", "--model", model, "--threads", 1, "--out", tmp_path / "a.png"]
    ran = sample_with(monkeypatch, KeyboardInterrupt(), *words)
    refused(ran, "stopped", "the same command resumes", code=130)


def test_debug_lets_user_errors_through() -> None:
    """With `--debug` the error itself comes out, so that Python shows where it was raised."""
    with pytest.raises(BudgetError):
        autofr("--debug", "search", "--budget", "0.5x")
    refused(autofr("search", "--budget", "0.5x"))  # the next command is quiet again


def test_every_error_has_one_of_two_exit_codes() -> None:
    """2 for what the user can change, 1 for failures; there is nothing else to learn."""

    def tree(cls: type[AutofrError]) -> Iterator[type[AutofrError]]:
        yield cls
        for child in cls.__subclasses__():
            yield from tree(child)

    assert {cls.exit_code for cls in tree(AutofrError)} == {1, 2}


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(name: str) -> None:
    """Help ends with a command line that can be copied."""
    assert f"Example: `autofr {name}" in COMMANDS[name].help


def test_help_names_every_command() -> None:
    """Help is no error, and shows what there is."""
    ran = autofr("--help")
    assert ran.code == 0 and len(COMMANDS) >= 14
    for name in COMMANDS:
        assert name in ran.out
        assert autofr(name, "--help").code == 0


# -- progress -------------------------------------------------------------------------------------


def report_progress() -> str:
    """What two stages print on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err, progress() as on_progress:
        for stage, total in (("profile", 1), ("trials", 2)):
            for done in range(total + 1):
                on_progress(stage, done, total)
    return err.getvalue()


def test_progress_in_a_log_is_two_lines_a_stage() -> None:
    """Where nobody watches, a stage says that it begins and how long it took."""
    lines = report_progress().splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "profile ...", "profile done", "trials ...", "trials done",
    ]  # fmt: skip


def test_progress_on_a_terminal_is_a_bar_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal every stage has a bar with its count."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", report_progress())
    assert all(text in shown for text in ("profile", "1/1", "trials", "2/2"))


# -- what commands print and write ----------------------------------------------------------------


def test_models_are_listed() -> None:
    """The table and the JSON name the bundled models."""
    ran = autofr("models")
    assert ran.code == 0 and "ldm4" in ran.out
    rows = json.loads(autofr("models", "--json").out)
    assert [row["name"] for row in rows] == [*zoo.installed()] and rows[0]["steps"] == 50


def test_models_that_are_not_there_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout without any says so; one with some lists these, with task and call."""
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    ran = autofr("models")
    assert ran.code == 0 and "no model is bundled" in ran.out
    (tmp_path / "sd").mkdir()
    for name in ("model_index.json", "img2img.jsonl"):
        (tmp_path / "sd" / name).write_text("{}", encoding="utf-8")
    (row,) = json.loads(autofr("models", "--json").out)
    assert (row["name"], row["tasks"]) == ("sd", "img2img")
    assert row["call"].startswith("guidance_scale=")


def test_a_task_is_in_the_name_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches for several tasks of one model do not meet in one folder."""
    write("sd", tmp_path / "tiny")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    words = ["--model", "tiny", "--task", "img2img", "--call", "image=cat.png", "--dry-run"]
    ran = autofr("search", "--budget", "2x", *words, *FEW)
    assert ran.code == 0, ran
    assert f"folder: {Path('results') / 'tiny-img2img-2x'} " in ran.out
    assert "StableDiffusionImg2ImgPipeline" in ran.out
    refused(autofr("search", *words[:4], *FEW), "starts from image", "--inputs")
    refused(autofr("search", *words[:3], "video", *FEW), "text2img")


def test_sample_draws_the_prompts_of_the_command(tmp_path: Path) -> None:
    """`--prompt` may be given again and again; what is drawn depends on it."""
    write("sd", tmp_path / "tiny")
    words = ["--model", tmp_path / "tiny", "-n", 2, "--steps", 2, "--threads", 1]
    pictures = []
    for prompts in (["red apple"], ["red apple", "blue car"], ["red apple", "red apple"]):
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        ran = autofr("sample", *words, *given, "--out", tmp_path / "some.png")
        assert ran.code == 0, ran
        pictures.append((tmp_path / "some.png").read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]


def test_show_names_keyframes_and_masks(policy: Path) -> None:
    """A policy in words: steps as letters, keyframes as numbers, masks with their points."""
    ran = autofr("show", policy)
    assert ran.code == 0 and ran.err == ""
    assert "Ka·Ka·" in ran.out
    assert "keyframes 0, 3" in ran.out
    points = load(policy).masks["early"]
    assert f"early: {', '.join(points)}" in ran.out
    assert "2 key, 2 early, 2 jump" in ran.out


def test_show_prints_the_whole_policy_as_json(policy: Path) -> None:
    """`--json` gives the file's value back."""
    assert json.loads(autofr("show", policy, "--json").out) == json.loads(policy.read_text())


def test_show_needs_no_masks(policy: Path) -> None:
    """A policy of keyframes and jumps alone is shown as well."""
    policy.write_text(edited(policy, masks={}, steps=["key", "jump"] * 3))
    lines = autofr("show", policy).out.splitlines()
    assert "          K key, · jump" in lines


def test_show_has_a_letter_for_every_mask(policy: Path) -> None:
    """However many masks there are, steps are printable signs; K is always a keyframe."""
    found = load(policy)
    names = [f"m{i}" for i in range(70)]
    steps = ("key", *names)
    sampler = found.sampler.model_dump() | {"num_inference_steps": 71, "replaces": 71}
    many = found.model_dump() | {"steps": steps, "sampler": sampler}
    many["masks"] = dict.fromkeys(names, found.masks["early"])
    strip = console.words(Policy(**many))[2].split()[1]
    assert len(strip) == 71 and strip.isascii() and strip.isprintable()
    assert strip.count("K") == 1 and len(set(strip[1:62])) == 61 and strip[62:] == "?" * 9


@pytest.mark.parametrize(
    ("made", "used", "said"),
    [
        ({}, {"guidance_scale": 5.0}, None),  # an older policy does not say
        ({"guidance_scale": 3.0}, {"guidance_scale": 3.0}, None),
        ({"guidance_scale": 3.0}, {"guidance_scale": 5.0}, "guidance_scale=5.0"),
        ({"guidance_scale": 3.0}, {}, "none of them"),
    ],
)
def test_other_calls_than_those_of_the_search_are_noticed(
    policy: Path, made: dict, used: dict, said: str | None
) -> None:
    """A policy that was searched for one guidance scale is not measured at another in silence."""
    found = load(policy)
    provenance = Provenance(
        autofr="0", command="", call=made, space="", study="", trials=0, seconds=0.0, date=""
    )
    notice = console.other_call(found.model_copy(update={"provenance": provenance}), used)
    assert (notice is None) == (said is None)
    if said:
        assert notice is not None and said in notice and "guidance_scale=3.0" in notice


def test_show_tells_what_was_measured(searched: tuple[Path, Ran]) -> None:
    """A policy of a search is shown with its speed-up, its error and the command that found it."""
    found = load(searched[0] / "policy.json")
    shown = autofr("show", searched[0] / "policy.json").out.splitlines()
    lines = {line.split()[0]: line for line in shown}
    assert f"{found.measured.speedup.value:.2f}x" in lines["measured"]
    assert f"{found.measured.trajectory_error.value:.4f}" in lines["error"]
    assert "FID" not in lines  # the tiny model has no features
    assert "autofr search" in lines["made"]


def picture(path: Path) -> Image.Image:
    """Open a PNG file, pixels and all."""
    image = Image.open(path)
    assert image.format == "PNG"
    image.load()
    return image


def test_sample_writes_a_png(model: Path, policy: Path, tmp_path: Path) -> None:
    """A grid is drawn with and without a policy, and they differ."""
    words = ["sample", "--model", model, "-n", 3, "--batch", 2, "--threads", 1]
    plain = autofr(*words, "--steps", STEPS, "--out", tmp_path / "new" / "plain.png")
    faster = autofr(*words, "--policy", policy, "--out", tmp_path / "faster.png")
    assert plain.code == faster.code == 0
    assert "3 images" in plain.out and "plain.png" in plain.out
    one, other = picture(tmp_path / "new" / "plain.png"), picture(tmp_path / "faster.png")
    assert one.size == other.size and one.tobytes() != other.tobytes()


def test_profile_writes_json_and_three_pictures(model: Path, tmp_path: Path) -> None:
    """Every mask has a line with its cost; the folder holds the numbers and the pictures."""
    folder = tmp_path / "new" / "profile"
    ran = autofr("profile", "--model", model, *FEW, "--out", folder)
    assert ran.code == 0, ran.err
    found = json.loads((folder / "profile.json").read_text())
    assert all(name in ran.out for name in found["masks"])
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == 3 and all(picture(folder / name) for name in pictures)
    assert {path.name for path in folder.iterdir()} == {"profile.json", *pictures}
    assert all(name in ran.out for name in pictures)


def test_profile_prints_json(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json` prints what the file holds, and nothing else on stdout."""
    monkeypatch.setattr("autofr.report.profile_pictures.profile_pictures", lambda *_: [])
    ran = autofr("profile", "--model", model, *FEW, "--out", tmp_path, "--json")
    assert json.loads(ran.out) == json.loads((tmp_path / "profile.json").read_text())


def test_evaluate_measures_a_policy(model: Path, policy: Path) -> None:
    """The table and the JSON say what the policy gains and what it costs."""
    words = ["evaluate", "--model", model, "--policy", policy, "--samples", 2, "--batch", 2]
    shown = autofr(*words, "--threads", 1)
    assert shown.code == 0, shown.err
    assert "speedup" in shown.out and "trajectory error" in shown.out
    found = json.loads(autofr(*words, "--threads", 1, "--json").out)
    assert found["speedup"]["value"] > 1 and found["samples"] == 2
    assert found["trajectory_error"]["value"] > 0


def test_evaluate_tells_what_is_lost_to_another_policy(
    model: Path, policy: Path, tmp_path: Path
) -> None:
    """Two policies for the same teacher are compared in one sentence."""
    pipe, steps = tiny_pipe("ldm"), ("key", "jump") * 3
    other = compose(pipe, "tiny", steps, {}, Constant(), replaces=STEPS, latent_shape=(3, 8, 8))
    other.save(tmp_path / "other.json")
    words = ["--policy", policy, "--against", tmp_path / "other.json", "--samples", 2]
    ran = autofr("evaluate", "--model", model, *words, "--batch", 2, "--threads", 1)
    assert ran.code == 0 and "times the error of the second" in ran.out, ran


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replaces": STEPS + 4}, f"steps of a call {STEPS} and {STEPS + 4}"),
        ({"scheduler": "UniPCMultistepScheduler"}, "DDIMScheduler and UniPCMultistepScheduler"),
        ({"config": {"timestep_spacing": "trailing"}}, "timestep_spacing leading and trailing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_policies_of_different_teachers_are_not_compared(
    policy: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Errors to different teachers say nothing of each other; no model is loaded to find out."""
    sampler = json.loads(policy.read_text())["sampler"]
    changes = {k: {**sampler[k], **v} if k == "config" else v for k, v in changes.items()}
    (tmp_path / "other.json").write_text(edited(policy, sampler=sampler | changes))
    words = ["--model", "nowhere", "--policy", policy, "--against", tmp_path / "other.json"]
    refused(autofr("evaluate", *words), "different teachers", said)


def test_inputs_of_a_search_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search knows how many inputs there are; what is drawn from noise alone has none."""
    asked: list[folders.Settings] = []
    monkeypatch.setattr(job, "estimate", lambda pipe, settings, _: asked.append(settings) or "")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na boat\n", encoding="utf-8")
    tiny_pipe("ldm").save_pretrained(tmp_path / "ldm")
    for folder, more in (
        (write("sd", tmp_path / "sd"), ["--inputs", tmp_path / "prompts.txt"]),
        (tmp_path / "ldm", ["--call", "eta=0"]),
    ):
        ran = autofr("search", "--model", folder, *more, "--threads", 1, "--dry-run")
        assert ran.code == 0, ran
    assert [settings.inputs_count for settings in asked] == [3, 0]


def test_dry_run_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of a search is printed, with the folder that it would take."""
    monkeypatch.chdir(tmp_path)
    words = ["search", "--model", model, *FEW, "--dry-run"]
    ran = autofr(*words, "--budget", "2x", "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert "2x" in ran.out and str(tmp_path / "run") in ran.out and "nothing written" in ran.out
    assert "results/tiny-2x" in autofr(*words, "--budget", "2x").out
    refused(autofr(*words, "--budget", "90s"), "already takes only")
    assert list(tmp_path.iterdir()) == []


def test_search_leaves_everything_in_its_folder(searched: tuple[Path, Ran]) -> None:
    """Policy, result, report, trials and pictures lie there, and belong together."""
    folder, ran = searched
    assert ran.code == 0, ran.err
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "policy.json", "result.json", "report.md", "trials.csv", "profile.json",
        "pareto.png", "policy.png", "samples.png",
    }  # fmt: skip
    assert not any(name.endswith(".part") for name in names)
    found = load(folder / "policy.json")
    assert found == load_result(folder).policy
    assert found.measured is not None and found.measured.speedup.low >= 1.3
    for path in folder.glob("*.png"):
        picture(path)


def test_search_prints_json(searched: tuple[Path, Ran]) -> None:
    """`--json` prints the result alone; progress goes to stderr."""
    folder, ran = searched
    assert json.loads(ran.out) == json.loads((folder / "result.json").read_text())
    for stage in ("profile", "calibrate", "trials", "choose", "test"):
        assert f"{stage} ..." in ran.err


def test_search_again_resumes_and_tells(searched: tuple[Path, Ran], model: Path) -> None:
    """The same command ends at once with the same policy: a table, a sentence, and where it is."""
    folder, _ = searched
    before, trials = load(folder / "policy.json"), (folder / "trials.csv").read_text()
    words = ["--budget", "1.3x", "--trials", "2", *FEW, "--out", folder]
    ran = autofr("search", "--model", model, *words)
    assert ran.code == 0, ran.err
    assert load(folder / "policy.json").digest == before.digest
    assert (folder / "trials.csv").read_text() == trials
    assert all(text in ran.out for text in ("teacher", "4 steps", "FRDiff M=2", "chosen"))
    assert "tiny now takes" in ran.out and "instead of" in ran.out
    assert f"Policy: {folder / 'policy.json'}" in ran.out


def test_report_is_written_again(searched: tuple[Path, Ran]) -> None:
    """Tables and plots of a finished search can be made anew from its result alone."""
    folder, _ = searched
    (folder / "report.md").unlink()
    (folder / "pareto.png").unlink()
    ran = autofr("report", folder)
    assert ran.code == 0, ran.err
    assert "instead of" in ran.out and "report.md" in ran.out
    assert (folder / "report.md").is_file() and picture(folder / "pareto.png")
