"""Laws of reading: what others wrote is data, within limits, and nothing in it is run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autofr import apply, hub, reading, zoo
from autofr.errors import HubError, ModelError, PolicyError, TaskError, redacted
from autofr.inputs import MOST_PIXELS, read_inputs
from autofr.measure.quality import load_features
from autofr.policy import Provenance
from autofr.policy_file import loads
from autofr.zoo import loop

laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)
ROOT = Path(__file__).parents[1]


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


# -- bytes ----------------------------------------------------------------------------------------


@laws
@given(size=st.integers(0, 300), limit=st.integers(0, 300))
def test_a_file_is_read_whole_or_refused_with_both_sizes(
    tmp_path_factory: pytest.TempPathFactory, size: int, limit: int
) -> None:
    """What is within the limit is read to the last byte; nothing of what is beyond it is."""
    path = tmp_path_factory.mktemp("sizes") / "file"
    data = os.urandom(size)
    path.write_bytes(data)
    if size <= limit:
        assert reading.content(path, limit) == data
        return
    with pytest.raises(OSError) as refused:
        reading.content(path, limit)
    for one in (size, limit):
        assert f"{one / 2**20:.6g} MiB" in refused.value.strerror


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe without a writer, a device without an end, a folder and no name are refused."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, Path("a\0b"), Path("\ud800")):
        with pytest.raises(OSError) as refused:
            reading.content(place, 100)
        assert refused.value.strerror


def test_links_are_followed(tmp_path: Path) -> None:
    """Who can put a link into a folder can put the file there; caches are made of links."""
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    assert reading.content(tmp_path / "link", 4) == b"data"


@laws
@given(st.lists(st.sampled_from(["a", "b", "..", "."]), max_size=6).map("/".join))
def test_a_path_stays_inside_or_leads_out(way: str) -> None:
    """Inside is where no beginning of the path has more steps up than down it."""
    depth, lowest = 0, 0
    for one in way.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(one, 1)
        lowest = min(lowest, depth)
    assert reading.inside(Path("root"), Path("root") / way) == (lowest >= 0)


# -- TOML, JSON, arrays ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": 1, "a": 2}',
        json.dumps({str(i): i for i in range(reading.MOST_FIELDS + 1)}),
        "[" + "{}," * reading.MOST_PARTS + "{}]",
        "[" + "[]," * reading.MOST_PARTS + "[]]",
        "9" * 5000,
        "",
    ],
    ids=["deep", "twice", "fields", "objects", "lists", "digits", "empty"],
)
def test_a_json_text_beyond_limits_is_a_value_error(text: str) -> None:
    """Whatever a parser stumbles over is one kind of error."""
    with pytest.raises(ValueError):
        reading.parsed(text)


def test_json_within_limits_is_read() -> None:
    """The limits are where they are said to be, not before."""
    fields = {str(i): {} for i in range(reading.MOST_FIELDS)}
    assert reading.parsed(json.dumps(fields)) == fields
    most = reading.MOST_PARTS - 1
    assert len(reading.parsed("[" + "{}," * (most - 1) + "{}]")) == most


def test_an_archive_is_refused_by_what_it_unpacks_to(tmp_path: Path) -> None:
    """A small file of many zeros is held to the limit; a pickle in it is not loaded."""
    np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(10_000))
    assert len(reading.content(tmp_path / "zeros.npz", 10_000)) < 1000
    assert reading.arrays(tmp_path / "zeros.npz", 90_000)["zeros"].shape == (10_000,)
    with pytest.raises(OSError, match="larger than"):
        reading.arrays(tmp_path / "zeros.npz", 80_000)
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "sprung")
    np.savez(tmp_path / "trap.npz", trap=trap)
    with pytest.raises(ValueError, match="no archive of arrays"):
        reading.arrays(tmp_path / "trap.npz", 2**20)
    assert not (tmp_path / "sprung").exists()


@laws
@given(st.text(), st.integers(1, 50))
def test_what_is_printed_moves_no_cursor(text: str, most: int) -> None:
    """What is left can be written anywhere, is no longer than asked, and stays as it is."""
    found = reading.printable(text, most)
    assert len(found) <= most + 3 and reading.printable(found) == found
    assert not set(found) & {*map(chr, range(9)), "\x1b", "\x7f", "\x9b", "\u202e"}
    found.encode("utf-8")


# -- pictures -------------------------------------------------------------------------------------


def rows(folder: Path, **row: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    return path


def test_pictures_are_of_the_usual_kinds_and_sizes(tmp_path: Path) -> None:
    """What would start a program (EPS), unpack to gigabytes or is broken is refused by name."""
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "good.png")
    picture.save(tmp_path / "script.png", "EPS")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:40] + b"\0" * 40)
    side = int(MOST_PIXELS**0.5)
    for extra in (0, 1):
        wide = Image.new("1", (side, side + extra))
        wide.save(tmp_path / f"large{extra}.png")
    assert read_inputs(rows(tmp_path, image="good.png"))[0]["image"].size == (8, 8)
    assert read_inputs(rows(tmp_path, mask_image="large0.png"))
    for name in ("script.png", "broken.png", "large1.png", "none.png", "a\0.png"):
        with pytest.raises(TaskError, match="cannot be read"):
            read_inputs(rows(tmp_path, image=name))
    Image.new("1", (12_000, 8_000)).save(tmp_path / "vast.png")  # so large that Pillow warns of it
    with warnings.catch_warnings(), pytest.raises(TaskError, match="are the most"):
        warnings.simplefilter("error")
        read_inputs(rows(tmp_path, image="vast.png"))


def test_a_root_holds_the_pictures_of_inputs(tmp_path: Path) -> None:
    """Rows of a model's folder or of a job file take pictures from there, and from nowhere else."""
    inner = tmp_path / "model"
    inner.mkdir()
    for folder in (tmp_path, inner):
        Image.new("RGB", (8, 8)).save(folder / "cat.png")
    assert read_inputs(rows(inner, image="../cat.png"))
    assert read_inputs(rows(inner, image="cat.png"), inner)
    for way in ("../cat.png", str(tmp_path / "cat.png"), "a/../../cat.png"):
        with pytest.raises(TaskError, match="leads out of"):
            read_inputs(rows(inner, image=way), inner)


# -- what is loaded runs nothing ------------------------------------------------------------------


def test_a_model_folder_runs_no_code_of_its_own(tmp_path: Path) -> None:
    """A pipeline or a part that brings its own Python file is refused, and the file is not run."""
    mark = tmp_path / "sprung"
    code = f"import os; os.mkdir({str(mark)!r})\nclass Mine: pass\n"
    for name in ("pipeline", "part"):
        folder = tmp_path / name
        make_pipe().save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        if name == "pipeline":
            index["_class_name"] = ["mine", "Mine"]
            (folder / "mine.py").write_text(code)
        else:
            index["unet"] = ["mine", "Mine"]
            (folder / "unet" / "mine.py").write_text(code)
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError):
            zoo.load(str(folder))
        assert not mark.exists()


def test_weights_and_checkpoints_are_not_unpickled(tmp_path: Path) -> None:
    """A pickle in the place of weights is refused before anything in it runs."""
    mark = tmp_path / "sprung"
    folder = tmp_path / "model"
    make_pipe().save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Trap(mark), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError):
        zoo.load(str(folder))
    torch.save(Trap(mark), tmp_path / "stage.pt")
    with pytest.raises(Exception, match="eights"):
        loop._Run(torch.nn.Linear(1, 1), 0.1, 0.0, tmp_path / "stage.pt")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["features.safetensors", "reference.safetensors", "sets.json"])
@pytest.mark.parametrize("data", [b"", b"\xff" * 99, b"{}", (2**62).to_bytes(8, "little") + b"{}"])
def test_damaged_features_are_one_error(tmp_path: Path, name: str, data: bytes) -> None:
    """A file beside a model that says nothing sensible is an error that names the folder."""
    for one in ("features.safetensors", "reference.safetensors"):
        (tmp_path / one).write_bytes((ROOT / "autofr/zoo/ldm4" / one).read_bytes())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_features(tmp_path)


# -- policies -------------------------------------------------------------------------------------


def test_a_point_is_never_a_path(tmp_path: Path) -> None:
    """Names of points are looked up among those of the denoiser; no file is touched."""
    fields = json.loads((ROOT / "results/ldm4-1.5x/policy.json").read_text())
    fields["masks"] = {name: [f"{tmp_path}/../{name}"] for name in fields["masks"]}
    with pytest.raises(PolicyError, match="points that this denoiser does not have"):
        apply(zoo.load("ldm4").pipe, loads(json.dumps(fields)))
    assert not [*tmp_path.iterdir()]


def test_texts_of_a_policy_can_be_printed() -> None:
    """What would move a terminal's cursor is replaced when a policy is made, or read."""
    made = Provenance(
        autofr="1", command="a\x1b]0;title\x07b\ud800\n", space="s", study="s", trials=1,
        seconds=1.0, date="d",
    )  # fmt: skip
    assert made.command == "a\ufffd]0;title\ufffdb\ufffd\n"
    assert Provenance.model_validate_json(made.model_dump_json()) == made


# -- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["hf_AbCdEf123", "hf_with\nnewline"])
def test_no_message_of_the_hub_has_a_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, secret: str
) -> None:
    """Neither the token nor the password of an address is told, whatever goes wrong."""
    monkeypatch.setenv("HF_ENDPOINT", "http://user:pass-word@127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    policy = ROOT / "results/ldm4-1.5x/policy.json"
    with pytest.raises(HubError) as refused:
        hub.push(policy, "owner/name", token=secret)
    said = str(refused.value) + caplog.text
    assert "127.0.0.1:9" in said
    assert "pass-word" not in said and "AbCdEf123" not in said and "hf_with" not in said


def test_errors_of_others_are_told_without_secrets() -> None:
    """Where a library quotes a header or an address, the secret in it is cut out."""
    token = f"hf_{'aB3' * 12}"
    text = f"Illegal header value b'Bearer {token}' for https://me:secret@host/x?y={token}"
    assert redacted(text) == "Illegal header value b'Bearer ***' for https://***@host/x?y=hf_***"
    assert redacted(f"https://{token}@host/x") == "https://***@host/x"
    assert redacted("autofr search --model hf_models/sd") == "autofr search --model hf_models/sd"


def test_nothing_is_unpickled_and_toml_has_one_reader() -> None:
    """No module unpickles, loads weights as more than weights, or parses TOML without limits."""
    loose = []
    for path in (ROOT / "autofr").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "reading.py" and ("tomllib" in text or "pickle.load" in text):
            loose.append(path.name)
        if "torch.load(" in text and text.count("torch.load(") != text.count("weights_only=True"):
            loose.append(path.name)
    assert loose == []
