"""Laws of the documents: README, help texts and CHANGELOG say what the program does."""

from __future__ import annotations

import ast
import pydoc
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

import autofr
from autofr.cli.app import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER = {"python", "py", "json", "toml"}  # blocks of these languages hold no command lines


@pytest.fixture(scope="module")
def readme() -> str:
    """The README's text."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced code blocks as (language, content)."""
    found = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(language.lower(), content) for language, content in found]


def command_lines(text: str) -> list[str]:
    """Lines of code blocks that call autofr, prompts and continuations undone."""
    lines = []
    for language, content in blocks(text):
        if language not in OTHER:
            lines += content.replace("\\\n", " ").splitlines()
    bare = [re.sub(r"^\s*\$?\s*(\S*bin/)?", "", line) for line in lines]
    return [line for line in bare if line.startswith("autofr ")]


def objection(line: str) -> str | None:
    """Say what the command line does not accept about a line; None if it accepts all of it."""
    words = shlex.split(line, comments=True)[1:]
    while words[:1] == ["--debug"]:
        words = words[1:]
    if not words or words[0] not in COMMANDS:
        return f"{line}: no such command"
    try:
        COMMANDS[words[0]].make_context(words[0], words[1:])
    except Exception as error:  # typer's own tree of usage errors is private
        return f"{line}: {error}"
    return None


def names_used(script: str) -> set[str]:
    """Dotted names of autofr that a script imports, or reads of what it imports."""
    nodes, names, homes = [*ast.walk(ast.parse(script))], set(), {"autofr": "autofr"}
    for node in nodes:
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module)):
                homes |= {one.asname or one.name: f"{module}.{one.name}" for one in node.names}
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in homes:
                names.add(f"{homes[name]}.{attribute}")
    return {name for name in {*names, *homes.values()} if name.split(".")[0] == "autofr"}


def exists(name: str) -> bool:
    """Say whether a dotted name is a module, or a name in one."""
    return pydoc.locate(name) is not None


# -- the reader itself ----------------------------------------------------------------------------


def test_the_reader_finds_command_lines() -> None:
    """The reader that the laws below rely on sees prompts, continuations and paths."""
    text = (
        "```bash\n$ autofr models  # all\n.venv/bin/autofr show a.json\nmake search\n"
        "autofr search \\\n  --budget 2x\n```\n"
        "```python\nautofr .apply\n```\nautofr outside\n"
    )
    assert [line.split() for line in command_lines(text)] == [
        ["autofr", "models", "#", "all"],
        ["autofr", "show", "a.json"],
        ["autofr", "search", "--budget", "2x"],
    ]


@pytest.mark.parametrize(
    ("line", "accepted"),
    [
        ("autofr models --json", True),
        ("autofr --debug search --budget 2x  # a comment --surprise", True),
        ("autofr find --budget 2x", False),
        ("autofr search --bugdet 2x", False),
        ("autofr search --batch many", False),
        ("autofr search --batch", False),
        ("autofr show", False),
        ("autofr show a.json b.json", False),
    ],
)
def test_the_reader_knows_what_the_program_accepts(line: str, accepted: bool) -> None:
    """Unknown commands, unknown options, bad values and missing arguments are all objected to."""
    assert (objection(line) is None) == accepted


def test_the_reader_sees_which_names_a_script_uses() -> None:
    """Imported names, what is read of them under any name, and which of these there are."""
    script = "import autofr\nfrom autofr import policy as p, zoo\np.load, zoo.load, autofr.apply"
    found = {name: exists(name) for name in names_used(script)}
    there = ("autofr", "autofr.policy", "autofr.zoo", "autofr.zoo.load", "autofr.apply")
    assert found == dict.fromkeys(there, True) | {"autofr.policy.load": False}


# -- README and help ------------------------------------------------------------------------------


def test_command_lines_in_the_readme_are_accepted(readme: str) -> None:
    """Every command line that the README shows can be copied: commands and options exist."""
    lines = command_lines(readme)
    assert lines
    assert [found for line in lines if (found := objection(line))] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_a_help_text_is_accepted(name: str) -> None:
    """The example of each command is a line that the command takes."""
    (line,) = re.findall(r"Example: `(autofr [^`]+)`", COMMANDS[name].help)
    assert line.split()[1] == name
    assert objection(line) is None


def test_the_readme_mentions_every_command(readme: str) -> None:
    """There is no command that only its help knows."""
    assert [n for n in COMMANDS if f"autofr {n}" not in readme and f"`{n}`" not in readme] == []


def test_scripts_in_the_readme_use_what_exists(readme: str) -> None:
    """Every Python block compiles, and one of them shows how a policy is used."""
    scripts = [content for language, content in blocks(readme) if language in ("python", "py")]
    used = set().union(*map(names_used, scripts))
    assert used & {"autofr.apply", "autofr.reuse"}
    assert [name for name in used if not exists(name)] == []


def test_a_policy_is_used_with_ten_lines(readme: str) -> None:
    """The first script of the README is short."""
    script = next(content for language, content in blocks(readme) if language in ("python", "py"))
    assert len([line for line in script.splitlines() if line.strip()]) <= 10


def package_files() -> set[str]:
    """Names of the package's files; what lies inside these two is explained where it is."""
    inside = [path.relative_to(ROOT / "autofr") for path in (ROOT / "autofr").rglob("*.py")]
    return {path.name for path in inside if path.parts[0] not in ("zoo", "interchange")}


def test_the_file_tree_names_every_file(readme: str) -> None:
    """A new file of the package is explained before it is used."""
    trees = "\n".join(content for _, content in blocks(readme))
    files = [name for name in package_files() if name[0] != "_"]
    assert [name for name in files if not re.search(rf"(?<![\w.]){re.escape(name)}\b", trees)] == []


def test_the_file_tree_names_no_file_that_is_gone(readme: str) -> None:
    """The tree does not speak of files that are no more."""
    named = set(re.findall(r"^\s+(\w+\.py)\s", "\n".join(c for _, c in blocks(readme)), re.M))
    assert named
    assert named - package_files() == set()


def test_the_file_tree_names_every_benchmark(readme: str) -> None:
    """The scripts behind the numbers can be found."""
    trees = "\n".join(content for _, content in blocks(readme))
    files = [path.name for path in (ROOT / "benchmarks").glob("*.py")]
    assert [name for name in files if not re.search(rf"(?<![\w.]){re.escape(name)}\b", trees)] == []


def test_benchmarks_use_what_exists() -> None:
    """Scripts that no test runs find the names of autofr that they use."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        used = names_used(path.read_text(encoding="utf-8"))
        assert [name for name in used if not exists(name)] == [], path.name


def test_dependencies_are_imported() -> None:
    """Nothing is installed along with autofr that it never imports."""
    names = {re.split(r"[^\w-]", one, maxsplit=1)[0] for one in PROJECT["dependencies"]}
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "autofr").rglob("*.py"))
    modules = {name: {"pillow": "PIL"}.get(name, name) for name in names}
    assert [n for n, m in modules.items() if not re.search(rf"(?:import|from) {m}\b", text)] == []


def test_stages_of_solvers_are_as_the_documents_say() -> None:
    """Heun's stages share a step, those of DPM-Solver++ 2S are steps of their own."""
    from diffusers import DPMSolverSinglestepScheduler, HeunDiscreteScheduler

    from autofr.runtime.clock import solver_steps

    for solver, steps in ((HeunDiscreteScheduler(), 4), (DPMSolverSinglestepScheduler(), 7)):
        solver.set_timesteps(steps)
        assert len(solver.timesteps) == 7
        assert len({*solver_steps(solver)}) == steps


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_pictures_and_links_lead_somewhere(document: Path) -> None:
    """Local links lead to files of the checkout (once there are results), and to headings there."""
    local = re.findall(r"\]\((?![^)]*://)([^)\s]+)\)", document.read_text(encoding="utf-8"))
    if not any((ROOT / "results").glob("*/report.md")):
        local = [link for link in local if "results/" not in link]
    wrong = []
    for link in local:
        name, _, anchor = link.partition("#")
        place = document.parent / name if name else document
        known = anchors(place.read_text(encoding="utf-8")) if anchor and place.is_file() else set()
        if not place.exists() or (anchor and anchor not in known):
            wrong.append(link)
    assert wrong == []


def test_the_index_names_every_page() -> None:
    """A page of `docs/` is found from its index and from the README."""
    for text in (DOCUMENTS[0].read_text(), (ROOT / "docs/README.md").read_text()):
        pages = [path.name for path in DOCUMENTS[1:] if path.name != "README.md"]
        assert [page for page in pages if f"{page})" not in text] == []


def test_options_in_the_documents_exist() -> None:
    """Every option that a document names is one of a command; and every command is in `docs/`."""
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    params = [param for command in COMMANDS.values() for param in command.params]
    known = {option for param in params for option in param.opts} | {"--help", "--debug"}
    prose = {
        path: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for path, text in texts.items()
    }
    named = {
        (path.name, o) for path, text in prose.items() for o in re.findall(r"`.*?(--[a-z-]+)", text)
    }
    assert {(name, option) for name, option in named if option not in known} == set()
    pages = "\n".join(text for path, text in texts.items() if path.parent.name == "docs")
    assert [name for name in COMMANDS if f"autofr {name}" not in pages] == []


def test_the_table_of_results_is_that_of_the_runs(readme: str) -> None:
    """Every number in the table comes from the reference runs."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))["text"]()
    assert made in readme


def test_the_front_in_the_guide_is_that_of_the_run() -> None:
    """Errors that the guide weighs budgets with stand in the report that it names."""
    text = (ROOT / "docs/budget.md").read_text(encoding="utf-8")
    shown = re.findall(r"[\d.]+ %", "".join(re.findall(r"^\| [\d.]+x \|.*$", text, re.M)))
    report = (ROOT / "results/ldm4-1.5x/report.md").read_text(encoding="utf-8")
    assert shown
    assert [error for error in shown if f"| {error}" not in report] == []


def test_public_names_are_documented_in_the_package(readme: str) -> None:
    """What `import autofr` offers for use in a pipeline is in the README."""
    for name in {*autofr.__all__} - {"AutofrError"}:
        assert f"autofr.{name}" in readme
    assert "`retime(steps)`" in readme


# -- CHANGELOG ------------------------------------------------------------------------------------


def test_the_changelog_has_the_current_version() -> None:
    """The version that is built has its section, and the section has entries."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    head = rf"^## \[?{re.escape(PROJECT['version'])}\b"
    assert re.search(head, text, re.MULTILINE)
    section = re.split(head, text, flags=re.MULTILINE)[1].split("\n## ")[0]
    assert re.search(r"^- \S", section, re.MULTILINE)
