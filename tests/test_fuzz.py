"""Whatever bytes a file holds, reading it gives a value or one clear error, soon and in bounds.

The readers are a table. `benchmarks/fuzz.py` runs the same laws for longer.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr import interchange, policy_file, reading
from autofr.errors import AutofrError
from autofr.inputs import parse_call, read_inputs
from autofr.interchange import READERS
from autofr.measure import profile_file
from autofr.measure.calibration import Calibration
from autofr.search.space import load_space
from autofr.tune import job_file

ROOT = Path(__file__).parents[1]
LONGEST = 12_000  # characters of a message
laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)


sys.path.append(str(Path(__file__).parent / "conformance"))


@functools.cache
def pipe(cuts: bool) -> Any:
    """What schedules are read for: a U-Net where they are of cuts, else three blocks of DiT."""
    return make_pipe() if cuts else importlib.import_module("loop").Loop("DiTTransformer2DModel")


def schedule(kind: str, path: Path) -> Any:
    return interchange.read(kind, path, pipe(kind == "deepcache"), "m", 6, (3, 8, 8), nearest=True)


FILES: dict[str, Callable[[Path], Any]] = {
    "policy": policy_file.load,
    "profile": profile_file.load,
    "calibration": Calibration.load,
    "space": lambda path: load_space(str(path)),
    "jobs": lambda path: job_file.read_checked(path, root=path.parent),
    "inputs.txt": read_inputs,
    "inputs.jsonl": read_inputs,
    **{kind: functools.partial(schedule, kind) for kind in READERS},
}
"""Every reader of a file, by what the file is called."""


def outcome(name: str, data: bytes, folder: Path) -> Any:
    """The value that a reader makes of some bytes, or its error; nothing else may be raised.

    Raises: AssertionError for an error that is long or none of ours, and after a second.
    """
    path = folder / (name if "." in name else f"{name}.json")
    path.write_bytes(data)
    began = time.process_time()
    try:
        found = FILES[name](path)
    except AutofrError as error:
        found = error
        assert 0 < len(str(error)) < LONGEST and "Traceback" not in str(error)
        assert reading.printable(str(error)) == str(error)
    assert time.process_time() - began < 1, f"{name}: more than a second"
    return found


# -- what is fed ----------------------------------------------------------------------------------


def archive(**members: Any) -> bytes:
    """An .npz file of some arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **members)
    return buffer.getvalue()


def calibration(**changes: Any) -> bytes:
    """The file of a small calibration, some of its arrays changed."""
    fields = dict(
        masks=np.array(["a"]), teacher=np.eye(3), cross=np.zeros((1, 3, 2, 3)),
        own=np.zeros((1, 3, 2)), gain=np.ones(3), norm=1.0, switch=0, first=0,
    )  # fmt: skip
    return archive(**fields | changes)


def shipped(path: str) -> bytes:
    return (ROOT / path).read_bytes()


def profile() -> bytes:
    """A shipped profile, of one point."""
    whole = json.loads(shipped("results/ldm4-1.5x/profile.json"))
    similarity = dict([*whole["similarity"].items()][:1])
    return json.dumps(whole | {"points": whole["points"][:1], "similarity": similarity}).encode()


def ecad() -> bytes:
    """A schedule for the three blocks: everything at every other step."""
    blocks = [{str(b): {"attn1": one, "ff": one} for b in range(3)} for one in (True, False)]
    table = {str(step): blocks[step % 2] for step in range(6)}
    return json.dumps({"cache_schedule": {"schedule": table}}).encode()


SEEDS: dict[str, list[bytes]] = {
    "policy": [shipped("results/ldm4-1.5x/policy.json"), shipped("results/sd-2x/policy.json")],
    "profile": [profile()],
    "calibration": [calibration()],
    "space": [shipped("search_spaces/default.toml"), shipped("search_spaces/direct.toml")],
    "jobs": [shipped("examples/jobs.toml")],
    "inputs.txt": [b"a cat\na dog\n"],
    "inputs.jsonl": [b'{"prompt": "a", "seed": 0}\n{"prompt": "b", "seed": 1}\n'],
    "deepcache": [b"3,0", b'{"cache_interval": 3, "cache_branch_id": 0}'],
    "smoothcache": [b'{"attn1": [1, 0, 1, 0, 1, 0], "ff-2": [1, 1, 1, 0, 0, 0]}'],
    "ecad": [ecad()],
    "cache-dit": [
        b'{"cache_config": {"steps_computation_policy": "static", "Fn_compute_blocks": 1,'
        b' "Bn_compute_blocks": 0, "steps_computation_mask": [1, 0, 1, 0, 1, 0]}}',
        b"101010",
    ],
    "budcache": [b'{"cache_step": [3, 5]}', b"[1, 2]"],
}
DEEP = b"[" * 990 + b"]" * 990
PIECES = [
    b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"}", b"[", b"]", b"\n", b"=", b".", b",",
    b"\\ud800", b"\x1b[2J", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"-1", b"0", b"1.5",
    b"9" * 4300, b"9" * 5000, b"0x" + b"f" * 5000, DEEP, b"a." * 2000, b"x" * 5000, b"../" * 9,
    b"1979-05-27", b"[[job]]\n", b'{"a": 1, "a": 2}', b"inf",
]  # fmt: skip


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """A file that was right once: parts of it cut out, doubled, or replaced by what hurts."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 4, 40, 400])))
        middle = draw(
            st.sampled_from(PIECES) | st.binary(max_size=8) | st.just(data[start:end] * 3)
        )
        data = data[:start] + middle + data[end:]
    return data


PARTS = [
    None, True, -1, 0, 2**31, 2**63, 2**64, -(10**4000), 1e308, float("inf"), float("nan"), 0.5, "",
    "key", "jump", "../x", "\x1b]0;x\x07", "\ud800", "x" * 9999, [], {}, [[]], [None], {"": 0},
    [0] * 20_000, {str(i): i for i in range(1500)}, json.loads("[" * 900 + "]" * 900),
]  # fmt: skip
TEXTS = st.sampled_from([json.dumps(part) for part in PARTS])
values = TEXTS.map(json.loads) | st.integers() | st.floats() | st.text(max_size=8)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every part of a JSON value."""
    keys = [*value] if isinstance(value, dict) else [*range(min(3, len(value)))]
    found = [(*way, key) for key in keys]
    inner = [(one, value[one[-1]]) for one in found]
    return found + [way for one, part in inner if isinstance(part, dict | list)
                    for way in places(part, one)]  # fmt: skip


@st.composite
def altered(draw: Any, seed: bytes) -> bytes:
    """A JSON file that parses still: fields gone, of another type, or new."""
    whole = json.loads(seed)
    for _ in range(draw(st.integers(1, 3))):
        if not (ways := places(whole)):
            break
        *way, last = draw(st.sampled_from(ways))
        part = functools.reduce(lambda inner, key: inner[key], way, whole)
        change = draw(st.sampled_from(["drop", "set", "set", "add"]))
        if change == "drop":
            del part[last]
        elif change == "set" or isinstance(part, list):
            part[last] = draw(values)
        else:
            part[draw(st.text(max_size=6))] = draw(values)
    return json.dumps(whole).encode()


# -- the laws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_any_bytes_are_a_value_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """No reader raises anything but an error of ours: short, printable, within a second."""
    folder = tmp_path_factory.mktemp("fuzz")
    for seed in SEEDS[name]:
        found = outcome(name, seed, folder)
        assert not isinstance(found, Exception), found

    @laws
    @given(st.binary(max_size=200) | damaged(SEEDS[name]))
    def law(data: bytes) -> None:
        outcome(name, data, folder)

    law()


@pytest.mark.parametrize("seed", ["results/ldm4-1.5x/policy.json", "results/sd-2x/policy.json"])
def test_a_policy_with_other_fields_is_a_policy_or_one_clear_error(
    tmp_path: Path, seed: str
) -> None:
    """Types swapped, fields gone or added, numbers out of bounds: still no other exception."""

    @laws
    @given(altered(shipped(seed)))
    def law(data: bytes) -> None:
        found = outcome("policy", data, tmp_path)
        if not isinstance(found, Exception):
            assert policy_file.loads(found.model_dump_json()) == found

    law()


@pytest.mark.parametrize("name", ["smoothcache", "ecad", "cache-dit", "budcache", "deepcache"])
def test_a_schedule_with_other_fields_is_read_or_refused(tmp_path: Path, name: str) -> None:
    """Schedules of other tools that parse are held to the same law."""

    @laws
    @given(altered(SEEDS[name][-1 if name == "deepcache" else 0]))
    def law(data: bytes) -> None:
        outcome(name, data, tmp_path)

    law()


@laws
@given(st.sampled_from([*PIECES]) | st.binary(max_size=20))
def test_any_call_argument_is_a_value_or_one_clear_error(data: bytes) -> None:
    """What `--call` is given becomes a value that a file can hold, or an error of ours."""
    text = data.decode("utf-8", "replace")
    try:
        found = parse_call([f"x={text}"])
    except AutofrError as error:
        assert len(str(error)) < LONGEST
        return
    json.dumps(found, allow_nan=False)


def _members(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            packed.writestr(name, content)
    return buffer.getvalue()


def _header(shape: str, kind: str = "<f8") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


VERSION = b'{"autofr_policy": 1'
FOUND: dict[str, tuple[str, bytes]] = {
    "a whole number that cannot be written out, as kind": ("space", b"kind = 0x" + b"f" * 5000),
    "lists in lists, in a space": ("space", b"x = " + b"[" * 5000),
    "digits beyond what is converted, in a space": ("space", b"x = " + b"9" * 5000),
    "digits beyond what is converted, in a job file": ("jobs", b"x = " + b"9" * 5000),
    "a key of thousands of parts": ("jobs", b"a." * 30_000 + b"b = 1"),
    "a number that cannot be written out, of a job": ("jobs", b"[[job]]\nsteps = 0x" + b"f" * 5000),
    "a model's name that no file has": ("jobs", b'[[job]]\nmodel = "' + b"m" * 300 + b'"'),
    "unknown keys without end": ("jobs", b"".join(b"k%d = 1\n" % i for i in range(20_000))),
    "lists in lists, in a row": ("inputs.jsonl", b'{"x": ' + b"[" * 100_000),
    "a picture's name with a NUL": ("inputs.jsonl", b'{"image": "a\\u0000.png"}'),
    "a picture's name with half a character": ("inputs.jsonl", b'{"image": "\\ud800.png"}'),
    "a number that no file can hold": ("inputs.jsonl", b'{"scale": NaN}'),
    "cached steps without end": ("budcache", json.dumps([0] * 10**6).encode()),
    "a value that cannot be shown": ("budcache", b"[" * 900 + b"]" * 900),
    "2,000,000 wrong steps": ("policy", VERSION + b', "steps": [' + b"1," * 2_000_000 + b"1]}"),
    "a million lists": ("policy", VERSION + b', "steps": [' + b"[]," * 1_300_000 + b"0]}"),
    "a million objects": ("policy", VERSION + b', "x": [' + b"{}," * 1_000_000 + b"{}]}"),
    "a field's name without end": ("policy", VERSION + b', "' + b"x" * 10**6 + b'": 1}'),
    "a version without end": ("policy", b'{"autofr_policy": "' + b"1" * 10**6 + b'"}'),
    "half a character": ("policy", b'{"autofr_policy": 1, "model": {"name": "\\ud800"}}'),
    "an archive that claims 8 EB": ("calibration", _members(("masks.npy", _header(f"({2**60},)")))),
    "an array of a petabyte": ("calibration", _members(("masks.npy", _header(f"({10**15},)")))),
    "a pickle": ("calibration", archive(masks=np.array([{}], dtype=object))),
    "arrays of other shapes": ("calibration", calibration(cross=np.zeros((1, 3, 2, 2)))),
    "text for numbers": ("calibration", calibration(gain=np.array(["a", "b", "c"]))),
    "infinitely many steps": ("calibration", calibration(switch=np.inf)),
    "a switch that is a list": ("calibration", calibration(switch=np.zeros(3))),
}  # fmt: skip
"""Inputs that once ended in another exception, took minutes or had no end."""


@pytest.mark.parametrize("case", FOUND)
def test_what_fuzzing_found_stays_refused(tmp_path: Path, case: str) -> None:
    """Every file that was once read badly is one clear error now."""
    name, data = FOUND[case]
    assert isinstance(outcome(name, data, tmp_path), AutofrError)


def test_a_space_file_that_is_well_formed_is_still_read(tmp_path: Path) -> None:
    """The limit on dots leaves ordinary lists of numbers alone."""
    text = 'name = "mine"\nkind = "planned"\n[axes]\nmix = ["fit2"]\nsteps = ['
    path = tmp_path / "mine.toml"
    path.write_text(text + ", ".join(["0.5"] * 90) + "]")
    assert len(load_space(str(path)).axes.steps) == 90


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_gigabytes_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    """Nothing of a file that is far too large is read."""
    path = tmp_path / (name if "." in name else f"{name}.json")
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    if name in READERS:
        pipe(name == "deepcache")  # made before anything is counted
    tracemalloc.start()
    try:
        with pytest.raises(AutofrError):
            FILES[name](path)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
