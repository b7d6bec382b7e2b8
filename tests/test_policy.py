"""Laws of the policy file: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofr.errors import PolicyError
from autofr.mix import (
    MAX_WEIGHT,
    Constant,
    Cosine,
    HardSigmoid,
    Linear,
    Sigmoid,
    Step,
    Table,
    mix_row,
)
from autofr.policy import Fid, Interval, Measured, Model, Policy, Provenance, Sampler, TextAlignment
from autofr.policy_file import load, loads, schema, schema_text

laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
shares = st.floats(-MAX_WEIGHT, MAX_WEIGHT, width=32)
words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
positive = st.floats(2.0**-20, 2.0**20, width=32)
names = words.filter(lambda name: name not in ("key", "jump"))
points = st.lists(words, min_size=1, max_size=3).map(tuple)


def sampler(steps, **changes):
    """A DDIM sampler of some steps."""
    fields = dict(
        scheduler="DDIMScheduler",
        config={"beta_start": 0.0015, "clip_sample": False, "steps_offset": 0, "shift": None},
        num_inference_steps=steps,
        replaces=steps,
        prediction_type="epsilon",
        latent_shape=(3, 8, 8),
        dtype="float32",
    )
    return Sampler(**fields | changes)


def policy(steps=("key", "m", "jump", "key"), masks=None, **changes):
    """A small valid policy with the mask "m"."""
    fields = dict(
        model=Model(name="tiny", denoiser="UNet2DModel", fingerprint="f"),
        sampler=sampler(len(steps)),
        masks={"m": ("a#conv", "b#attn")} if masks is None else masks,
        steps=tuple(steps),
    )
    return Policy(**fields | changes)


MEASURED = Measured(
    speedup=Interval(value=1.5, low=1.4, high=1.6), teacher_seconds=3.0, policy_seconds=2.0,
    predicted_speedup=1.5, batch=8, device="cpu", dtype="float32", threads=1,
    versions={"torch": "2"}, samples=16, seeds="0 to 15",
    fid=Fid(
        features="mine", teacher=1.0, policy=1.1, difference=Interval(value=0.1, low=0.0, high=0.2)
    ),
    trajectory_error=Interval(value=0.01, low=0.0, high=0.02), psnr=40.0,
    low_frequency_error=0.01, high_frequency_error=0.1, kept_bytes=1024,
)  # fmt: skip
PROVENANCE = Provenance(
    autofr="0.1", command="autofr search", call={"guidance_scale": 3.0, "strength": 1},
    space="default", study="s", trials=3, seconds=1.0, date="2025-01-01",
)  # fmt: skip

families = st.one_of(
    st.builds(Sigmoid, tau=positive, bias=finite),
    st.builds(HardSigmoid, tau=positive, bias=finite),
    st.tuples(finite, positive)
    .filter(lambda pair: pair[0] + pair[1] > pair[0])
    .map(lambda pair: Linear(start=pair[0], end=pair[0] + pair[1])),
    st.just(Cosine()),
    st.builds(Step, bias=finite),
    st.builds(Constant, value=st.floats(0, 1)),
)


@st.composite
def policies(draw):
    """Any valid policy: any names, masks, steps and mix."""
    masks = draw(st.dictionaries(names, points, max_size=3))
    kinds = st.sampled_from(["key", "jump", *masks])
    steps = ("key", *draw(st.lists(kinds, max_size=7)))
    mix = draw(st.one_of(families, st.none()))
    if mix is None:
        rows: list[tuple[float, ...]] = []
        keys = 0
        for step in steps:
            if step == "key" and (keys == 0 or draw(st.booleans())):
                rows.append(())
            else:
                kept = draw(st.lists(shares, min_size=step in ("jump", "key"), max_size=keys))
                first = 0.0 if step == "jump" else draw(shares.filter(bool))
                rows.append((first, *kept))
            keys += step == "key"
        mix = Table(weights=tuple(rows))
    wholes = st.integers(-(2**63), 2**63 - 1)
    config = st.one_of(st.none(), st.booleans(), wholes, st.text(), finite)
    return policy(
        steps,
        masks,
        mix=mix,
        model=Model(name=draw(st.text()), denoiser=draw(st.text()), fingerprint=draw(st.text())),
        sampler=sampler(len(steps), config=draw(st.dictionaries(st.text(), config, max_size=3))),
        measured=draw(st.sampled_from([None, MEASURED, MEASURED.model_copy(update={"fid": None})])),
        provenance=draw(st.sampled_from([None, PROVENANCE])),
    )


def edited(**changes):
    """JSON text of a valid policy with some top fields changed."""
    return json.dumps(json.loads(policy().model_dump_json()) | changes)


def inside(field, **changes):
    """JSON text of a valid policy with fields inside an object changed."""
    fields = json.loads(policy().model_dump_json())
    return json.dumps(fields | {field: fields[field] | changes})


# -- the file ------------------------------------------------------------------------------------


@laws
@given(policies())
def test_writing_and_reading_is_the_identity(one):
    """Whatever is valid comes back from its JSON text as it was."""
    assert loads(one.model_dump_json()) == one
    assert loads(one.model_dump_json(indent=1).encode()).digest == one.digest


def test_save_and_load_are_inverse(tmp_path):
    """A saved file loads as the same policy, and nothing else is left in the folder."""
    one = policy(measured=MEASURED, provenance=PROVENANCE)
    one.save(tmp_path / "p.json")
    one.save(str(tmp_path / "p.json"))
    assert load(tmp_path / "p.json") == load(str(tmp_path / "p.json")) == one
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


@laws
@given(st.one_of(st.binary(), st.text()))
def test_any_text_is_a_policy_or_a_policy_error(text):
    """No input raises anything but PolicyError."""
    with pytest.raises(PolicyError):
        loads(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@laws
@given(st.sampled_from(sorted(Policy.model_fields)), json_values)
def test_any_json_in_any_field_is_a_policy_or_a_policy_error(field, value):
    """A field of any JSON value is accepted or refused by name; never another exception."""
    try:
        loads(edited(**{field: value}))
    except PolicyError as error:
        assert str(error)


@laws
@given(st.integers(0, len(policy().model_dump_json()) - 1))
def test_a_truncated_file_is_refused(length):
    """Every proper beginning of a policy file is a PolicyError."""
    with pytest.raises(PolicyError, match="truncated"):
        loads(policy().model_dump_json()[:length])


def test_deep_nesting_is_refused():
    """Nesting beyond what a parser follows is a PolicyError too."""
    for depth in (200, *range(850, 1010), 100_000):
        with pytest.raises(PolicyError):
            loads('{"autofr_policy": 1, "x": ' + "[" * depth + "]" * depth + "}")


BAD = {
    "an empty object": ("{}", "autofr_policy"),
    "a list": ("[]", "a policy is a JSON object, got list"),
    "a newer version": (edited(autofr_policy=2), "policy version 2.*version 1"),
    "a version as text": (edited(autofr_policy="1"), "policy version '1'"),
    "a version as truth": (edited(autofr_policy=True), "policy version True"),
    "an unknown field": (edited(colour=1), "colour: "),
    "an unknown field inside": (inside("sampler", colour=1), "sampler.colour: "),
    "a missing field": (edited(masks=None), "masks: "),
    "text instead of int": (inside("sampler", num_inference_steps="4"), "num_inference_steps: "),
    "float instead of int": (inside("sampler", replaces=4.5), "sampler.replaces: "),
    "int instead of text": (inside("model", name=3), "model.name: "),
    "a word outside the list": (inside("sampler", guidance="some"), "sampler.guidance: "),
    "no steps": (inside("sampler", num_inference_steps=0), "sampler.num_inference_steps: "),
    "an unknown step": (edited(steps=["key", "n", "m", "m"]), r'steps\[1\]: no mask "n"; known: '),
    "too few steps": (edited(steps=["key"]), "steps: 1 entries, .*num_inference_steps is 4"),
    "too many steps": (edited(steps=["key"] * 5), "steps: 5 entries"),
    "a first step reused": (edited(steps=["m"] * 4), r'steps\[0\]: must be "key", got "m"'),
    "a first step held": (edited(steps=["jump"] * 4), r'steps\[0\]: must be "key"'),
    "a reserved mask name": (edited(masks={"m": ["a"], "key": ["a"]}), '"key" is a reserved name'),
    "an empty mask": (edited(masks={"m": []}), r'masks\["m"\]: no points'),
    "an unknown mix": (edited(mix={"kind": "magic"}), "mix: "),
    "a negative τ": (edited(mix={"kind": "sigmoid", "tau": -1.0}), "mix.sigmoid.tau: "),
    "λ above 1": (edited(mix={"kind": "constant", "value": 1.5}), "mix.constant.value: "),
    "a falling line": (edited(mix={"kind": "linear", "end": -1.0}), "mix.linear: end must be"),
    "a weight beyond any fit": (
        edited(mix={"kind": "table", "weights": [[], [1.0], [0.0, 1000.5], []]}),
        r"mix.table.weights.2.1: .*less than or equal to 1000",
    ),
    "a number of 65 bits": (inside("sampler", latent_shape=[2**63]), "sampler.latent_shape.0: "),
    "a name that moves the cursor": (edited(masks={"m": ["a\x1b[2J"]}), "masks.m.0: .*control"),
    "a name without end": (edited(masks={"m": ["a" * 201]}), "masks.m.0: .*200 characters"),
    "a text of digits in a table": (
        edited(mix={"kind": "table", "weights": [[], ["12"], [0.0, 1.0], []]}),
        r"mix.table.weights.1.0: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_names_the_field(case):
    """Every violation is a PolicyError that names the field and the value or the rule."""
    text, message = BAD[case]
    with pytest.raises(PolicyError, match=message):
        loads(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_are_finite(number):
    """NaN and infinity are refused by field wherever they stand, however they are written."""
    places = {
        "mix.step.bias: ": edited(mix={"kind": "step", "bias": 12345.0}),
        "sampler.config.beta_start.float: ": inside("sampler", config={"beta_start": 12345.0}),
        "sampler.replaces: ": inside("sampler", replaces=12345.0),
        "policy version": edited(autofr_policy=12345.0),
    }
    for message, text in places.items():
        with pytest.raises(PolicyError, match=message):
            loads(text.replace("12345.0", number))


def test_a_field_written_twice_is_refused():
    """A duplicate key is an error and not silently the last one."""
    text = policy().model_dump_json()
    with pytest.raises(PolicyError, match="field 'steps' is written twice"):
        loads(text.replace('"steps":', '"steps": [], "steps":'))
    with pytest.raises(PolicyError, match="field 'm' is written twice"):
        loads(text.replace('"m":', '"m": ["z"], "m":'))


ROWS = {
    "too few rows": ([[], [1.0], [0.0, 1.0]], r"mix.weights: 3 rows, but there are 4 steps"),
    "weights of a keyframe": ([[1.0], [1.0], [0.0, 1.0], []], r"weights\[0\]: the row of a key"),
    "a keyframe with nothing": ([[], [1.0], [0.0, 1.0], [0.9]], r"\[3\]: .* 1 to 1 more"),
    "a keyframe of too many": ([[], [1.0], [0.0, 1.0], [0.9, 0.2, -0.1]], r"\[3\]: .* 1 to 1 more"),
    "a keyframe without itself": ([[], [1.0], [0.0, 1.0], [0.0, 1.0]], r"\[3\]: .* other than 0"),
    "an empty row": ([[], [], [0.0, 1.0], []], r"mix.weights\[1\]: 0 weights, expected 1 to 2"),
    "more than the keyframes": ([[], [1.0, 0.0, 0.0], [0.0, 1.0], []], r"\[1\]: 3 weights"),
    "a jump with a network": ([[], [1.0], [0.5, 1.0], []], r"weights\[2\]: a jump starts with 0"),
    "a jump of nothing": ([[], [1.0], [0.0], []], r"mix.weights\[2\]: 0 alone is no mix"),
    "a mask of nothing": ([[], [0.0], [0.0, 1.0], []], r"mix.weights\[1\]: 0 alone is no mix"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_table_names_the_row(case):
    """The rows of a table must be those that the runtime can mix."""
    rows, message = ROWS[case]
    with pytest.raises(PolicyError, match=message):
        loads(edited(mix={"kind": "table", "weights": rows}))


def test_a_bad_file_is_named(tmp_path):
    """Errors of load name the path: missing, a folder, not text, not a policy, far too large."""
    with pytest.raises(PolicyError, match=r"missing\.json: cannot read"):
        load(tmp_path / "missing.json")
    with pytest.raises(PolicyError, match="cannot read"):
        load(tmp_path)
    bad = tmp_path / "bad.json"
    for content in (b"\xff\xfe\xfa", b"", b"{}", b"\x89PNG\r\n"):
        bad.write_bytes(content)
        with pytest.raises(PolicyError, match=r"bad\.json: "):
            load(bad)
    with bad.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(PolicyError, match=r"1024 MiB, larger than 4 MiB"):
        load(bad)


def test_many_errors_are_counted():
    """A file that is wrong everywhere gives a short message."""
    with pytest.raises(PolicyError, match="and 12 more"):
        loads(edited(**{f"x{i}": 1 for i in range(20)}))


def test_files_from_before_alignment_load_and_new_ones_keep_it():
    """Alignment is a field that may be missing; one that is there comes back."""
    old = json.loads(policy(measured=MEASURED).model_dump_json())
    del old["measured"]["alignment"]
    assert loads(json.dumps(old)).measured.alignment is None
    aligned = TextAlignment(
        towers="mine", teacher=60.0, policy=61.0, difference=Interval(value=1.0, low=0.5, high=2.0)
    )
    new = policy(measured=MEASURED.model_copy(update={"alignment": aligned}))
    assert loads(new.model_dump_json()) == new and new.digest == policy().digest
    assert new.measured.judged == [MEASURED.fid, aligned]


def test_the_schema_knows_every_field():
    """The published schema lists the fields of the value and forbids others."""
    found = schema()
    assert set(found["properties"]) == set(Policy.model_fields)
    assert found["additionalProperties"] is False


DOCS = Path(__file__).parents[1] / "docs"


def test_the_published_schema_is_that_of_the_code() -> None:
    """What stands in docs/ is what is read; `make schema` writes it anew."""
    assert (DOCS / "policy.schema.json").read_text(encoding="utf-8") == schema_text()


def test_the_document_has_every_field() -> None:
    """docs/policy.md says what each field of the schema means, and no field that is none."""
    text = (DOCS / "policy.md").read_text(encoding="utf-8")
    said = {part for word in re.findall(r"`([a-z_.]+)`", text) for part in word.split(".")}
    parts = [schema(), *schema()["$defs"].values()]
    fields = {name for part in parts for name in part["properties"]}
    kinds = {part["properties"]["kind"]["const"] for part in parts if "kind" in part["properties"]}
    assert fields - said == set() and kinds <= said
    rows = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    listed = {word.split(".")[-1] for row in rows for word in re.findall(r"`([a-z_.]+)`", row)}
    assert listed - fields - kinds == set()


def test_the_documents_example_is_a_policy() -> None:
    """The example can be copied, and every policy among our results is one."""
    (example,) = re.findall(r"```json\n(.*?)```", (DOCS / "policy.md").read_text(), re.DOTALL)
    assert loads(example).keyframes == (0, 3, 5)
    found = [load(path) for path in (DOCS.parent / "results").glob("*/policy.json")]
    assert found and all(loads(one.model_dump_json()) == one for one in found)


# -- what it means -------------------------------------------------------------------------------

TABLE = Table(weights=((), (0.9, 0.1), (0.0, 1.0), ()))


def test_keyframes_are_read_off_the_steps():
    """Keyframes are the indices of "key"."""
    assert policy().keyframes == (0, 3)


@laws
@given(policies())
def test_weights_say_what_is_mixed(one):
    """What a table says; else λ and 1 - λ at masks, leading 0 at jumps, nothing at keyframes."""
    for i, step in enumerate(one.steps):
        row = one.weights(i)
        if isinstance(one.mix, Table):
            assert row == one.mix.weights[i]
        elif step == "key":
            assert row == ()
        elif step == "jump":
            assert row == (0.0, 1.0)
        else:
            share = one.mix.weight(i / len(one.steps))
            assert row == ((share, 1 - share) if share < 1 else (1.0,))
            assert math.isclose(sum(row), 1)


@laws
@given(families, st.floats(0, 1), st.floats(0, 1))
def test_lambda_is_a_rising_share(mix, r, later):
    """Every λ(t) lies in [0, 1] and never falls with the step."""
    r, later = sorted((r, later))
    assert 0 <= mix.weight(r) <= mix.weight(later) <= 1


@pytest.mark.parametrize(
    ("steps", "index", "share"),
    [
        (50, 21, 0), (50, 22, 0.05), (50, 25, 0.5), (50, 28, 0.95), (50, 29, 1),
        (20, 8, 0), (20, 9, 0.125), (20, 10, 0.5), (20, 11, 0.875), (20, 12, 1),
    ],
)  # fmt: skip
def test_the_released_lambda(steps, index, share):
    """The hard sigmoid has the values of FRDiff's released code; λ ≤ 0 is a jump, λ ≥ 1 no mix."""
    row = mix_row("m", HardSigmoid(tau=30, bias=0.5), index, steps)
    expected = (1.0,) if share == 1 else (share, 1 - share)
    assert row == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mix", "values"),
    [
        (Sigmoid(tau=30, bias=0.5), {0.5: 0.5, 0.6: 1 / (1 + math.exp(-3)), 0.0: 3.059e-7}),
        (Linear(start=0.2, end=0.7), {0.1: 0, 0.2: 0, 0.45: 0.5, 0.7: 1, 0.9: 1}),
        (Cosine(), {0.0: 0, 1 / 3: 0.25, 0.5: 0.5, 1.0: 1}),
        (Step(bias=0.4), {0.39: 0, 0.4: 1, 1.0: 1}),
        (Constant(value=0.3), {0.0: 0.3, 1.0: 0.3}),
    ],
)  # fmt: skip
def test_lambda_families_at_known_values(mix, values):
    """Each family has the values of its formula."""
    for r, expected in values.items():
        assert mix.weight(r) == pytest.approx(expected, abs=1e-10)


def test_the_digest_is_of_behaviour():
    """Name, mask names, unused masks, measurements and provenance leave the digest as it is."""
    one = policy()
    same = [
        policy(model=one.model.model_copy(update={"name": "other"})),
        policy(measured=MEASURED),
        policy(provenance=PROVENANCE),
        policy(masks={"m": ("a#conv", "b#attn"), "unused": ("c",)}),
        policy(masks={"m": ("b#attn", "a#conv")}),
        policy(("key", "n", "jump", "key"), {"n": ("a#conv", "b#attn")}),
        policy(mix=Table(weights=((), (1.0,), (0.0, 1.0), ()))),  # the same mix, written out
    ]
    assert {p.digest for p in same} == {one.digest}


def test_the_digest_changes_with_behaviour():
    """Steps, points, mix, sampler and denoiser change the digest."""
    one = policy()
    changed = [
        policy(("key", "jump", "m", "key")),
        policy(masks={"m": ("a#conv",)}),
        policy(mix=HardSigmoid()),
        policy(mix=TABLE),
        policy(sampler=sampler(4, replaces=5)),
        policy(sampler=sampler(4, scheduler="EulerDiscreteScheduler")),
        policy(model=one.model.model_copy(update={"fingerprint": "g"})),
    ]
    assert len({p.digest for p in [one, *changed]}) == 1 + len(changed)


def test_a_policy_cannot_be_changed():
    """The value is frozen, and its tables are tuples."""
    with pytest.raises(ValueError, match="frozen"):
        policy().steps = ("key",)
