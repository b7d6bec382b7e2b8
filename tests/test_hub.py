"""Laws of policies on the hub, against a stand-in of the hub on this machine."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import make_pipe
from huggingface_hub import close_session, constants, metadata_load
from hypothesis import given
from test_policy import MEASURED, PROVENANCE, edited, laws, policies, policy

from autofr.errors import HubError, PolicyError
from autofr.hub import is_reference, pull, push
from autofr.hub_card import card
from autofr.policy import MAX_BYTES, Model, Policy
from autofr.policy_file import load

OWNER, TOKEN = "alice", "hf_token-of-alice"
REPOSITORY = f"{OWNER}/fast"
POLICY = policy(measured=MEASURED, provenance=PROVENANCE)
OTHER = policy(("key", "jump", "jump"))


# -- a stand-in of the hub ------------------------------------------------------------------------


@dataclass
class Repository:
    """Commits (hash -> files), and branches (name -> hash)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch and return the commit's hash."""
        parent = self.branches.get(branch, "")
        tree = self.commits.get(parent, {}) | files
        text = parent + branch + "".join(name + blob(data) for name, data in sorted(tree.items()))
        made = hashlib.sha1(text.encode()).hexdigest()
        self.commits[made], self.branches[branch] = tree, made
        return made


@dataclass
class Hub:
    """Repositories, what was asked of them, and a status that every answer has if it is set."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    always: int | None = None

    def repository(self, name: str = REPOSITORY, **changes: Any) -> Repository:
        """Make a repository with its first commit."""
        self.repositories[name] = Repository(**changes)
        self.repositories[name].commit({".gitattributes": b""})
        return self.repositories[name]


class AnswerError(Exception):
    """An answer with a status and the error code that the hub gives with it."""

    def __init__(self, status: int, code: str = "", message: str = "", url: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code, self.url = status, code, url


def blob(data: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The few addresses of the hub that a policy's way there and back needs."""

    hub: Hub

    def log_message(self, *args: object) -> None:
        """Stay quiet."""

    def handle_any(self) -> None:
        """Answer a request, or refuse it as the hub does."""
        path = urlsplit(self.path).path
        self.hub.asked.append((self.command, unquote(path)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.always:
                status, headers = self.hub.always, {"Content-Type": "text/html"}
                answer = b"<html></html>"
            else:
                headers, answer = self.find(*(unquote(part) for part in path.split("/")[1:]))
                status = 200
        except AnswerError as error:
            status = error.status
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            answer = json.dumps({"error": str(error), "url": self.hub.url + error.url}).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_POST = handle_any  # noqa: N815

    def find(self, *parts: str) -> tuple[dict[str, str], bytes]:
        """Return headers and content of the answer."""
        answer: Any
        match parts:
            case ("api", "repos", "create"):
                answer = self.create(**json.loads(self.body))
            case ("api", "validate-yaml"):
                answer = {"errors": [], "warnings": []}
            case ("api", "models", owner, name, *rest):
                answer = self.api(f"{owner}/{name}", *rest)
            case (owner, name, "resolve", revision, *path):
                repository = self.open(f"{owner}/{name}")
                return self.file(repository, revision, "/".join(path))
            case _:
                raise AnswerError(404)
        return {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def open(self, name: str, write: bool = False) -> Repository:
        """Return a repository, if whoever asks may read (and write) it."""
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            raise AnswerError(404 if known else 401, "RepoNotFound", "Repository not found")
        if repository.gated:
            raise AnswerError(403, "GatedRepo", "Access to this model is restricted")
        if write and not (known and name.startswith(f"{OWNER}/")):
            raise AnswerError(403 if known else 401, "", "You may not write here")
        return repository

    def create(self, name: str, organization: str, **wanted: Any) -> dict[str, str]:
        """Make an empty repository."""
        where = f"{organization}/{name}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise AnswerError(401, "", "Invalid username or password.")
        if organization != OWNER:
            raise AnswerError(403, "", "You don't have the rights to create a model here")
        if where in self.hub.repositories:
            raise AnswerError(409, "", "You already created this model repo", f"/{where}")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repository(where, private=private)
        return {"url": f"{self.hub.url}/{where}"}

    def api(self, name: str, action: str = "", revision: str = "main") -> dict[str, Any]:
        """What is asked about a repository, or done to it."""
        repository = self.open(name, write=self.command == "POST")
        if action == "branch":
            if revision in repository.branches:
                raise AnswerError(409, "", "Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            return {}
        if revision not in repository.branches:
            raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head = repository.branches[revision]
        if action == "preupload":
            files = [{"path": file["path"]} for file in json.loads(self.body)["files"]]
            for file in files:
                now = repository.commits[head].get(file["path"])
                file |= {"uploadMode": "regular", "shouldIgnore": False}
                file |= {"oid": None if now is None else blob(now)}
            return {"files": files}
        if action == "commit":
            lines = [json.loads(line) for line in self.body.splitlines()]
            new = [line["value"] for line in lines if line["key"] == "file"]
            sent = {file["path"]: base64.b64decode(file["content"]) for file in new}
            made = repository.commit(sent, revision)
            return {"commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"}
        return {"id": name, "sha": head, "private": repository.private}

    def file(
        self, repository: Repository, revision: str, path: str
    ) -> tuple[dict[str, str], bytes]:
        """One file at a revision."""
        found = repository.branches.get(revision, revision)
        if found not in repository.commits:
            raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repository.commits[found]:
            raise AnswerError(404, "EntryNotFound", "Entry not found")
        data = repository.commits[found][path]
        return {"ETag": f'"{blob(data)}"', "X-Repo-Commit": found}, data


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, an empty cache, and the login of its owner."""
    found = Hub()
    handler = type("Answers", (Handler,), {"hub": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest sets it for the session
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    close_session()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def text(of: Policy) -> bytes:
    """A policy as its file."""
    return of.model_dump_json().encode()


def downloads(hub: Hub) -> list[str]:
    """The files whose content was asked for."""
    return [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]


# -- references -----------------------------------------------------------------------------------


def test_only_the_prefix_makes_a_reference() -> None:
    """Paths are paths, whatever is in them; a reference begins with `hub:`."""
    assert is_reference("hub:alice/fast")
    assert is_reference(Path("hub:alice/fast@v1"))
    assert not any(map(is_reference, ["alice/fast", "./hub/policy.json", "policy.json", ""]))


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("hub:alice/fast", "main/policy.json"),
        ("hub:alice/fast@v1.0", "v1.0/policy.json"),
        ("hub:alice/fast/h200/b8.json", "main/h200/b8.json"),
        ("hub:alice/fast/h200/b8.json@feature/x", "feature/x/h200/b8.json"),
    ],
)
def test_a_reference_names_repository_file_and_revision(
    hub: Hub, reference: str, path: str
) -> None:
    """File and revision have defaults; a revision may have slashes."""
    hub.repository()
    with pytest.raises(HubError):
        pull(reference)
    assert hub.asked == [("HEAD", f"/alice/fast/resolve/{path}")]


@pytest.mark.parametrize(
    "reference",
    [
        "hub:",
        "hub:fast",
        "hub:alice/fast/policy.yaml",
        "hub:alice/fast@",
        "hub:alice/fast@v1@v2",
        "hub:alice/fast@/etc/passwd",
        "hub:alice/fast@../../x",
        "hub:alice/fast/../x.json",
        "hub://alice/fast",
        "hub:alice/fast /x.json",
        "alice/fast",
    ],
)
def test_what_is_no_reference_is_refused_with_the_grammar(hub: Hub, reference: str) -> None:
    """A reference that cannot be read is refused before anything is asked of the hub."""
    with pytest.raises(HubError, match="expected hub:owner/name") as caught:
        pull(reference)
    assert repr(reference) in str(caught.value)
    assert hub.asked == []


# -- push and pull --------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [POLICY, OTHER], ids=["measured", "bare"])
def test_what_is_pushed_is_pulled(hub: Hub, one: Policy) -> None:
    """A policy comes back equal, from its repository and from the commit that push returns."""
    made = push(one, REPOSITORY)
    assert re.fullmatch(f"hub:{REPOSITORY}@[0-9a-f]{{40}}", made)
    assert load(pull(made)) == load(pull(f"hub:{REPOSITORY}")) == one


def test_a_file_is_pushed_like_its_policy(hub: Hub, tmp_path: Path) -> None:
    """The path of a policy file stands for the policy in it."""
    POLICY.save(tmp_path / "any-name.json")
    assert push(tmp_path / "any-name.json", REPOSITORY) == push(POLICY, REPOSITORY)


def test_a_policy_on_the_hub_is_pushed_by_its_reference(hub: Hub) -> None:
    """What stands on the hub is taken wherever a file is: a push copies it to another place."""
    made = push(POLICY, REPOSITORY)
    assert load(pull(push(made, f"{OWNER}/copy"))) == POLICY
    with pytest.raises(HubError, match="has no revision nowhere"):
        push(f"hub:{REPOSITORY}@nowhere", f"{OWNER}/copy")


def test_a_push_is_one_commit_and_only_if_something_changed(hub: Hub) -> None:
    """Policy and card arrive together; the same push again makes no commit."""
    first = push(POLICY, REPOSITORY)
    commits = hub.repositories[REPOSITORY].commits
    assert len(commits) == 2  # the empty one, and ours
    assert {"policy.json", "README.md"} <= commits[first.partition("@")[2]].keys()
    assert push(POLICY, REPOSITORY) == first
    assert len(commits) == 2


def test_an_older_revision_gives_the_older_policy(hub: Hub) -> None:
    """A commit keeps its policy; the repository without a revision gives the newest."""
    first, second = push(POLICY, REPOSITORY), push(OTHER, REPOSITORY)
    assert load(pull(first)) == POLICY
    assert load(pull(second)) == load(pull(f"hub:{REPOSITORY}")) == OTHER


def test_a_newer_policy_replaces_the_cached_one(hub: Hub) -> None:
    """A branch is asked for anew at every pull."""
    push(POLICY, REPOSITORY)
    assert load(pull(f"hub:{REPOSITORY}")) == POLICY
    push(OTHER, REPOSITORY)
    assert load(pull(f"hub:{REPOSITORY}")) == OTHER


def test_a_branch_is_made_and_leaves_main_alone(hub: Hub) -> None:
    """A push to a revision is seen there only, also the second one."""
    push(POLICY, REPOSITORY)
    for one in (POLICY.model_copy(update={"measured": None}), OTHER):
        push(one, REPOSITORY, revision="h200")
        assert load(pull(f"hub:{REPOSITORY}@h200")) == one
    assert load(pull(f"hub:{REPOSITORY}")) == POLICY


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_if_asked(hub: Hub, private: bool) -> None:
    """Privacy is settled when the repository is made, and does not keep its owner out."""
    made = push(POLICY, REPOSITORY, private=private)
    assert hub.repositories[REPOSITORY].private == private
    assert load(pull(made)) == POLICY


def test_a_given_token_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is given stands in for the login."""
    monkeypatch.delenv("HF_TOKEN")
    push(POLICY, REPOSITORY, token=TOKEN)
    assert REPOSITORY in hub.repositories


# -- refusals of pull -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hub:alice/slow", "no repository alice/slow"),
        ("hub:alice/fast@v9", "alice/fast has no revision v9"),
        ("hub:alice/fast@" + "0" * 40, "alice/fast has no revision 000"),
        ("hub:alice/fast/b8.json", "alice/fast has no file b8.json at revision main"),
        ("hub:alice/gated", "alice/gated is gated; ask for access at http://127.0.0.1"),
        ("hub:alice/fa--st", "Cannot have -- or .. in repo_id"),
    ],
)
def test_what_the_hub_does_not_give_is_named(hub: Hub, reference: str, said: str) -> None:
    """The message says what is missing, in a line that begins with the reference."""
    push(POLICY, REPOSITORY)
    hub.repository("alice/gated", gated=True)
    with pytest.raises(HubError, match=re.escape(said)) as caught:
        pull(reference)
    assert str(caught.value).startswith(f"{reference}: ")
    assert "\n" not in str(caught.value)


def test_a_stranger_is_told_to_log_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private repository looks missing to who is not logged in; the message has both."""
    push(POLICY, REPOSITORY, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"or it is private; if so, log in with `hf auth login`"):
        pull(f"hub:{REPOSITORY}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (text(POLICY)[:-40], "is the file truncated"),
        (edited(steps=["jump", "key"]).encode(), "steps"),
        (b"\xff\xfe", "not a text file in UTF-8"),
        (b" " * (MAX_BYTES + 1), "larger than 4 MiB"),
    ],
    ids=["truncated", "invalid", "binary", "large"],
)
def test_an_invalid_policy_is_refused_with_its_reference(hub: Hub, data: bytes, said: str) -> None:
    """What is wrong with the file is said of the reference, not of a path in the cache."""
    hub.repository().commit({"policy.json": data})
    with pytest.raises(PolicyError, match=said) as caught:
        pull(f"hub:{REPOSITORY}")
    assert str(caught.value).startswith(f"hub:{REPOSITORY}: ")
    assert "snapshots" not in str(caught.value)
    assert bool(downloads(hub)) == (len(data) <= MAX_BYTES)


# -- a hub that does not answer -------------------------------------------------------------------


@pytest.fixture(params=["gone", "failing", "offline"])
def silence(request: pytest.FixtureRequest, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the hub give no answer: there is none, it has a failure, or the user is offline."""

    def fall_silent() -> None:
        if request.param == "gone":
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        elif request.param == "failing":
            hub.always = 503
        else:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return fall_silent


def test_a_copy_stands_in_for_a_silent_hub(
    hub: Hub, silence: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The last policy seen at that revision is used, and the log says so."""
    push(POLICY, REPOSITORY)
    seen = pull(f"hub:{REPOSITORY}")
    silence()
    with caplog.at_level(logging.WARNING, "autofr"):
        assert pull(f"hub:{REPOSITORY}") == seen
    (notice,) = [record for record in caplog.records if record.name == "autofr"]
    assert notice.getMessage().startswith(f"hub:{REPOSITORY}: ")
    assert notice.getMessage().endswith("the copy in the cache is used")


def test_a_silent_hub_and_no_copy_is_an_error(hub: Hub, silence: Any) -> None:
    """Without a copy of that very revision the pull fails, at once and with the reason."""
    push(POLICY, REPOSITORY)
    pull(f"hub:{REPOSITORY}")
    silence()
    with pytest.raises(HubError, match=r"(does not answer \(.+\)|not asked), and the cache has no"):
        pull(f"hub:{REPOSITORY}@v2")


def test_a_push_to_a_silent_hub_is_an_error(hub: Hub, silence: Any) -> None:
    """A push has no copy to fall back on."""
    silence()
    with pytest.raises(HubError, match=rf"hub:{REPOSITORY}: .*(does not answer|not asked)"):
        push(POLICY, REPOSITORY)


def test_a_commit_in_the_cache_is_not_asked_for(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """What a commit holds never changes, so that a pinned policy works offline without a word."""
    made = push(POLICY, REPOSITORY)
    seen = pull(made)
    hub.asked.clear()
    with caplog.at_level(logging.WARNING, "autofr"):
        assert pull(made) == seen
    assert hub.asked == []
    assert not caplog.records


def test_what_is_no_hub_is_an_error(hub: Hub) -> None:
    """An address where something else answers gives an error, for both ways."""
    hub.always = 200
    with pytest.raises(HubError, match=f"hub:{REPOSITORY}: "):
        pull(f"hub:{REPOSITORY}")
    with pytest.raises(HubError, match=f"hub:{REPOSITORY}: "):
        push(POLICY, REPOSITORY)


def test_a_cache_that_cannot_be_written_is_named(hub: Hub) -> None:
    """The fault is not put on the hub when it is the disk's."""
    push(POLICY, REPOSITORY, token=TOKEN)
    Path(constants.HF_HUB_CACHE).write_text("in the way")
    with pytest.raises(HubError, match="the cache cannot be used"):
        pull(f"hub:{REPOSITORY}")


# -- refusals of push -----------------------------------------------------------------------------


def test_an_invalid_policy_uploads_nothing(hub: Hub, tmp_path: Path) -> None:
    """Neither a file nor a value that is not a valid policy reaches the hub."""
    (tmp_path / "policy.json").write_bytes(text(POLICY)[:-40])
    with pytest.raises(PolicyError, match=r"policy\.json"):
        push(tmp_path / "policy.json", REPOSITORY)
    with pytest.raises(PolicyError, match="steps"):
        push(POLICY.model_copy(update={"steps": ("jump", "key")}), REPOSITORY)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["fast", "alice/fast@v1", "alice/fast/b8.json", "hub:alice/fast"])
def test_a_push_wants_owner_and_name(hub: Hub, name: str) -> None:
    """A push takes a repository, and nothing that only a reference has."""
    with pytest.raises(HubError, match="expected owner/name"):
        push(POLICY, name)
    assert hub.asked == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub) -> None:
    """A policy that was to be private is not uploaded where everybody sees it."""
    head = hub.repository().branches["main"]
    with pytest.raises(HubError, match="is public"):
        push(POLICY, REPOSITORY, private=True)
    assert hub.repositories[REPOSITORY].branches["main"] == head


def test_a_push_needs_the_right_to_write(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's name and no login are refused with the way out."""
    with pytest.raises(HubError, match=r"does not allow it .*log in"):
        push(POLICY, "bob/fast")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"does not allow it .*log in"):
        push(POLICY, REPOSITORY)
    assert hub.repositories == {}
    head = hub.repository().branches["main"]
    with pytest.raises(HubError, match=r"does not allow it .*log in"):
        push(POLICY, REPOSITORY, token="hf_of-nobody")
    assert hub.repositories[REPOSITORY].branches["main"] == head


# -- the card -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs",
    [
        b"# Mine\n",
        b"---\nlicense: mit\n---\n# Mine\n",
        b"---\nlibrary_name: diffusers\ntags:\n- autofr\n---\n# A model that ships a policy\n",
        b"---\ntags: [autofr\n---\n# Not YAML\n",
    ],
    ids=["plain", "untagged", "model", "broken"],
)
def test_a_foreign_readme_is_left_as_it_is(
    hub: Hub, theirs: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a card of autofr is replaced; of any other the log says that it stays."""
    hub.repository().commit({"README.md": theirs})
    with caplog.at_level(logging.WARNING, "autofr"):
        made = push(POLICY, REPOSITORY)
    files = hub.repositories[REPOSITORY].commits[made.partition("@")[2]]
    assert files["README.md"] == theirs
    assert load(pull(made)) == POLICY
    assert "README.md is no card of autofr" in caplog.text


def test_our_own_card_is_replaced(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The card follows the policy."""
    push(OTHER, REPOSITORY)
    made = push(POLICY, REPOSITORY)
    files = hub.repositories[REPOSITORY].commits[made.partition("@")[2]]
    assert files["README.md"].decode() == card(POLICY, f"hub:{REPOSITORY}")
    assert not caplog.records


def facts(page: str, folder: Path) -> dict[str, Any]:
    """The front matter of a card."""
    (folder / "README.md").write_text(page, encoding="utf-8")
    return metadata_load(folder / "README.md") or {}


@laws
@given(policies())
def test_every_policy_has_a_card(tmp_path_factory: pytest.TempPathFactory, one: Policy) -> None:
    """Whatever a policy holds, its card is known as ours and its example is Python."""
    page = card(one, "hub:alice/fast")
    found = facts(page, tmp_path_factory.getbasetemp())
    assert found["library_name"] == "autofr"
    assert found["tags"] == ["autofr", "feature-reuse", "diffusers"]
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(ast.parse(example).body) == 3


@pytest.mark.parametrize(
    ("name", "base"),
    [("CompVis/ldm-celebahq-256", "CompVis/ldm-celebahq-256"), ("ldm4", None), ("a b/c: d", None)],
)
def test_a_base_model_is_named_if_the_hub_has_it(tmp_path: Path, name: str, base: object) -> None:
    """Only a name of the form owner/name can be a model on the hub."""
    one = POLICY.model_copy(update={"model": Model(name=name, denoiser="D", fingerprint="f")})
    assert facts(card(one, "hub:alice/fast"), tmp_path).get("base_model") == base


def test_a_card_has_the_numbers_with_their_protocol() -> None:
    """What was measured, on what, how often and in which features stands in the card."""
    page = card(POLICY, "hub:alice/fast@h200")
    for said in (
        "1.50x (1.40 to 1.60)",
        "0.01 (0 to 0.02)",
        "FID in mine, without / with | 1.000 / 1.100",
        "+0.100 (+0.000 to +0.200)",
        "16, seeds 0 to 15",
        "cpu, CPU threads: 1",
        "| batch | 8 |",
        "| dtype | float32 |",
        "torch 2",
        "| kept between steps | 1.0 KiB |",
        "`autofr search`",
        'autofr.apply(pipe, "hub:alice/fast@h200")',
        "`hub:alice/fast@COMMIT`",
    ):
        assert said in page
    assert "not measured" in card(OTHER, "hub:alice/fast")


# -- beside the zoo -------------------------------------------------------------------------------

SCRIPT = """
import sys
from autofr import hub, zoo
zoo.load(sys.argv[1])
print(hub.pull(sys.argv[2]))
"""


def test_a_local_model_does_not_turn_the_hub_off(hub: Hub, tmp_path: Path) -> None:
    """Loading a local folder asks nothing of the hub, and leaves it open for the policy."""
    make_pipe().save_pretrained(tmp_path / "tiny")
    made = push(POLICY, REPOSITORY)
    hub.asked.clear()
    environment = {name: os.environ[name] for name in os.environ if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tiny"), made],
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert load(done.stdout.split()[-1]) == POLICY
    assert all("/resolve/" in path for _, path in hub.asked)
