"""Laws of job files: how a matrix is spanned and named, and that all that is wrong is said."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_docs import blocks
from test_search import tiny_pipe

from autofr import zoo
from autofr.cli.app import app
from autofr.errors import JobsError
from autofr.request import Request
from autofr.tune import job_file
from autofr.tune.jobs import LONGEST, Plan

laws = settings(deadline=None, max_examples=20, derandomize=True, database=None)
EXAMPLE = Path(__file__).parents[1] / "examples/jobs.toml"
SEARCH = typer.main.get_command(app).commands["search"]  # type: ignore[attr-defined]
VALUES: dict[str, list[Any]] = {
    "model": ["ldm4", "dit", "owner/name"],
    "budget": ["1.5x", "2x", "180ms"],
    "batch": [1, 4],
    "steps": [20, 50],
    "device": ["cpu", "cuda:1"],
    "dtype": ["float32", "float16"],
    "seed": [0, 3],
    "threads": [0, 2],
    "task": ["text2img", "inpaint"],
    "inputs": ["a.txt", "b.jsonl"],
    "keep_on_host": [True, False],
    "keep_dtype": ["float16", "bfloat16"],
    "max_memory": ["200MB", "1GB"],
    "call": [{"guidance_scale": 5.0}, {"height": 64, "width": 96}],
}
SPANS = st.fixed_dictionaries(
    {},
    optional={
        key: st.lists(st.sampled_from(range(len(values))), min_size=1, unique=True)
        for key, values in VALUES.items()
    },
).filter(lambda spans: math.prod(map(len, spans.values())) <= 16)


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def table(title: str, fields: dict[str, Any]) -> str:
    return "\n".join([title, *(f"{key} = {toml(value)}" for key, value in fields.items()), ""])


def plan_of(folder: Path, text: str) -> Plan:
    """The plan of a job file with this text, whose paths start from its folder."""
    (folder / "jobs.toml").write_text(text)
    return job_file.read(folder / "jobs.toml", root=folder)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(JobsError) as refused:
        plan_of(folder, text)
    return str(refused.value)


def spanned(spans: dict[str, list[int]]) -> dict[str, Any]:
    return {key: [VALUES[key][index] for index in indices] for key, indices in spans.items()}


# -- the matrix -----------------------------------------------------------------------------------


@laws
@given(spans=SPANS, split=st.integers(0, 20), named=st.booleans())
def test_lists_span_a_matrix(
    tmp_path_factory: pytest.TempPathFactory, spans: dict[str, list[int]], split: int, named: bool
) -> None:
    """There is one job per cell, each name is there once, and defaults are as if written out."""
    folder = tmp_path_factory.mktemp("file")
    fields = spanned(spans)
    names = {"name": "mine"} if named else {}
    whole = plan_of(folder, table("[[job]]", names | fields)).jobs
    assert len(whole) == math.prod(map(len, fields.values()))
    assert len({job.name.lower() for job in whole}) == len({job.folder for job in whole})
    assert len({job.name.lower() for job in whole}) == len(whole)
    assert all(len(job.name) <= LONGEST for job in whole)
    upper = dict([*fields.items()][:split])
    lower = names | dict([*fields.items()][split:])
    text = table("[defaults]", upper) + table("[[job]]", lower)
    assert {(job.name, job.asked) for job in plan_of(folder, text).jobs} == {
        (job.name, job.asked) for job in whole
    }


@laws
@given(spans=SPANS)
def test_a_name_depends_on_no_other_job(
    tmp_path_factory: pytest.TempPathFactory, spans: dict[str, list[int]]
) -> None:
    """A file that grows keeps the names, and so the results, of the jobs that it had."""
    folder = tmp_path_factory.mktemp("file")
    fields = spanned(spans)
    first = {key: values[:1] for key, values in fields.items()}
    (alone,) = plan_of(folder, table("[[job]]", first)).jobs
    more = table("[[job]]", fields) + table("[[job]]", {"model": "new", "budget": "9x"})
    assert alone.name in {job.name for job in plan_of(folder, more).jobs}


def test_a_table_goes_before_the_defaults(tmp_path: Path) -> None:
    """What stands in a job replaces what stands in the defaults, lists as a whole."""
    text = table("[defaults]", {"budget": ["1.5x", "2x"], "trials": 7})
    text += table("[[job]]", {"budget": "3x"}) + table("[[job]]", {"model": "dit", "trials": 9})
    found = plan_of(tmp_path, text).jobs
    assert [(j.name, j.request.budget, j.request.trials) for j in found] == [
        ("ldm4-3x", "3x", 7),
        ("dit-1.5x", "1.5x", 9),
        ("dit-2x", "2x", 9),
    ]
    assert found[0].folder == tmp_path / "results" / "ldm4-3x"


@laws
@given(spans=SPANS)
def test_a_job_is_a_command_line(
    tmp_path_factory: pytest.TempPathFactory, spans: dict[str, list[int]]
) -> None:
    """The command that a job notes asks `autofr search` for the same, in every option."""
    folder = tmp_path_factory.mktemp("file")
    for job in plan_of(folder, table("[[job]]", spanned(spans))).jobs[:3]:
        words = shlex.split(job.request.command)
        assert words[:2] == ["autofr", "search"]
        given = dict(SEARCH.make_context("search", words[2:]).params)
        given["call"] = tuple(given["call"] or ())
        fields = {name: given[name] for name in Request.model_fields}
        assert Request.model_validate(fields) == job.request


def test_a_request_knows_the_defaults_of_the_command() -> None:
    """A job file without a word asks for what `autofr search` without an option does."""
    given = SEARCH.make_context("search", []).params
    blank = Request().model_dump() | {"call": given["call"]}
    assert {name: given[name] for name in blank} == blank


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("steps", 2, 1000), ("batch", 1, 4096), ("seed", 0, 2**32 - 1), ("threads", 0, 1024)],
)
def test_numbers_have_the_bounds_of_the_command(name: str, low: int, high: int) -> None:
    """What `autofr search` refuses as too small or too large a job file cannot ask for either."""
    for number in (low, high):
        assert SEARCH.make_context("search", [f"--{name}={number}"]).params[name] == number
        assert getattr(Request.model_validate({name: number}), name) == number
    for number in (low - 1, high + 1):
        with pytest.raises(typer.BadParameter):
            SEARCH.make_context("search", [f"--{name}={number}"])
        with pytest.raises(ValidationError):
            Request.model_validate({name: number})


# -- what is wrong --------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """One message has every table's problems, with the nearest known key."""
    text = table("[defaults]", {"bugdet": "2x"})
    text += table("[[job]]", {"steps": "six", "budget": 1.5, "max-memory": "2MB"})
    text += table("[[job]]", {"batch": 0, "dtype": []}) + table("[[job]]", {"name": "../up"})
    said = refusal(tmp_path, "surprise = 1\n" + text)
    for one in (
        f"{len(said.splitlines()) - 1} things are wrong",
        "top level: unknown key 'surprise'; known are out, defaults, job",
        "[defaults]: unknown key 'bugdet'; did you mean budget?",
        "[[job]] 1: unknown key 'max-memory'; did you mean max_memory?",
        "[[job]] 1: steps 'six'",
        '[[job]] 1: budget 1.5: expected text such as "1.5x"',
        "[[job]] 2: dtype is an empty list",
        "[[job]] 3: name '../up'",
        "nothing was started",
    ):
        assert one in said, said


@pytest.mark.parametrize(
    "field",
    [
        {"inputs": "../secret.txt"},
        {"inputs": "/etc/hostname"},
        {"inputs": "a/../../secret.txt"},
        {"space": "../space.toml"},
        {"space": "/space.toml"},
        {"model": "../model"},
        {"model": ".."},
        {"model": "/models/sd"},
        {"model": "a/../../sd"},
        {"call": {"image": "../cat.png"}},
        {"call": {"mask_image": "/cat.png"}},
        {"inputs": "nul\0.txt"},
    ],
    ids=str,
)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, field: dict[str, Any]) -> None:
    """A job file reads and writes nothing outside of the folder that its paths start from."""
    (key,) = field
    said = refusal(tmp_path, table("[[job]]", field))
    assert f"[[job]] 1: {key}" in said and "leads out of" in said and "--root" in said


def test_pictures_of_a_jobs_inputs_stay_in_the_folder_too(tmp_path: Path) -> None:
    """Rows that a job file asks for take no picture from elsewhere."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "image": "../cat.png"}')
    (tmp_path / "jobs.toml").write_text('[[job]]\ninputs = "rows.jsonl"\n')
    with pytest.raises(JobsError, match=r"cat\.png leads out of"):
        job_file.read_checked(tmp_path / "jobs.toml", root=tmp_path)


def test_links_in_the_folder_are_its_owners(tmp_path: Path) -> None:
    """Results may go through a link that lies in the folder: a job file cannot make one."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "results").symlink_to("../elsewhere")
    (job,) = plan_of(tmp_path / "root", "[[job]]").jobs
    assert job.folder == tmp_path / "root/results/ldm4-1.5x"


@pytest.mark.parametrize("out", ["../elsewhere", "/tmp", "a/../.."])
def test_results_stay_in_the_folder_too(tmp_path: Path, out: str) -> None:
    """Only the one who gives the command may put results elsewhere."""
    assert "leads out of" in refusal(tmp_path, f'out = "{out}"\n[[job]]\n')
    (tmp_path / "jobs.toml").write_text(f'out = "{out}"\n[[job]]\n')
    (job,) = job_file.read(tmp_path / "jobs.toml", out=Path("/given"), root=tmp_path).jobs
    assert job.folder == Path("/given/ldm4-1.5x")


def test_paths_start_from_the_root(tmp_path: Path) -> None:
    """Inputs, spaces, pictures and model folders are looked for there; bundled names are not."""
    (tmp_path / "m").mkdir()
    call = {"image": "pictures/cat.png", "guidance_scale": 2}
    fields = {"model": "./m", "inputs": "a.txt", "space": "s/b.toml", "call": call}
    (job,) = plan_of(tmp_path, table("[[job]]", fields)).jobs
    request = job.request
    assert Path(request.model) == tmp_path / "m" and request.inputs == tmp_path / "a.txt"
    assert Path(request.space) == tmp_path / "s/b.toml"
    assert request.call == (f"image={tmp_path}/pictures/cat.png", "guidance_scale=2")
    (job,) = plan_of(tmp_path, '[[job]]\nmodel = "owner/name"\n').jobs
    assert (job.request.model, job.name) == ("owner/name", "name-1.5x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[job]", "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
        ("", "no [[job]]"),
        ("job = 3", "[[job]] per model"),
        ("job = [3]", "[[job]] 1: expected a table"),
        ("#" * (job_file.MOST_BYTES + 1), "larger than 0.25 MiB"),
        (f"[[job]]\nseed = {[*range(40)]}\nsteps = {[*range(2, 42)]}", "more than 1000 jobs"),
        ("\n".join(f"[[job]]\nseed = {[*range(n, n + 900)]}" for n in (0, 900)), "split the file"),
        ('[[job]]\nname = "a"\n[[job]]\nname = "A"', "A is also a job of [[job]] 1"),
        ('[[job]]\nbudget = ["2x", "2x"]', "is also a job of"),
        (f'[[job]]\nname = "{"a" * 200}"', "up to 60 letters"),
        ("[[job]]\ncall = 5", "expected a table such as"),
        ("[[job]]\ncall = {when = 1979-05-27}", "expected text, a number"),
    ],
    ids=range(13),
)
def test_a_file_that_is_no_job_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """Whatever stands in the file, there is one message that says what was expected."""
    assert said in refusal(tmp_path, text)


def test_what_is_not_there_is_found_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models, budgets, spaces, devices, inputs and sizes are looked at before any job starts."""
    monkeypatch.setattr(zoo, "_from_pretrained", lambda *_: pytest.fail("weights were loaded"))
    tiny_pipe("ldm").save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\nhalf\n')
    good = {"model": "./tiny", "budget": "2x"}
    wrong = {
        "model": ["ldm5", "./tiny"],
        "budget": ["0.5x", "2x"],
        "space": ["nope.toml", "default"],
        "device": ["abacus", "cpu"],
        "inputs": ["none.txt", "a.jsonl"],
        "max_memory": ["much"],
        "call": [{"image": "no.png"}],
    }
    said = []
    for key, value in wrong.items():
        (tmp_path / "jobs.toml").write_text(table("[[job]]", good | {key: value}))
        with pytest.raises(JobsError) as refused:
            job_file.read_checked(tmp_path / "jobs.toml", root=tmp_path)
        said.append(str(refused.value))
    words = ["ldm4", "above 1x", "nope.toml", "abacus", "line 2", "200MB", "no.png"]
    assert [word for word, text in zip(words, said, strict=True) if word not in text] == [], said
    (tmp_path / "jobs.toml").write_text(table("[[job]]", good))
    assert len(job_file.read_checked(tmp_path / "jobs.toml", root=tmp_path).jobs) == 1


def test_a_pipeline_that_takes_no_such_type_is_found_without_weights(tmp_path: Path) -> None:
    """The class that a folder names says what it cannot be drawn in."""
    tiny_pipe("ldm").save_pretrained(tmp_path / "tiny")
    text = table("[[job]]", {"model": "./tiny", "dtype": "float16"})
    (tmp_path / "jobs.toml").write_text(text)
    with pytest.raises(JobsError, match="LDMPipeline of diffusers draws its noise in float32"):
        job_file.read_checked(tmp_path / "jobs.toml", root=tmp_path)


def test_a_changed_file_is_another_job(tmp_path: Path) -> None:
    """Inputs, spaces and models count with their content: what was found for others is not it."""
    text = table("[[job]]", {"model": "./m", "inputs": "a.txt", "space": "s.toml"})
    (tmp_path / "m").mkdir()
    seen = {plan_of(tmp_path, text).jobs[0].asked}
    for name in ("a.txt", "s.toml", "m/model.safetensors", "m/model_index.json"):
        (tmp_path / name).write_text("x")
        seen.add(plan_of(tmp_path, text).jobs[0].asked)
    assert len(seen) == 5


def test_job_files_in_the_readme_are_job_files(tmp_path: Path) -> None:
    """What the document shows can be copied."""
    text = (EXAMPLE.parents[1] / "docs/tuning-jobs.md").read_text(encoding="utf-8")
    shown = [content for language, content in blocks(text) if language == "toml"]
    assert shown and all(plan_of(tmp_path, content).jobs for content in shown)


def test_the_example_is_every_model_by_two_budgets() -> None:
    """The shipped file is the bundled models, each at 1.5x and 2x."""
    names = {f"{model}-{budget}" for model in zoo.BUNDLED for budget in ("1.5x", "2x")}
    assert {job.name for job in job_file.read(EXAMPLE).jobs} == names
