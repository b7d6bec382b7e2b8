"""Laws of interchange: others' schedules do here what they do there, and come back as they were."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import tiny_pipe
from torch import nn
from typer.testing import CliRunner

from autofr import interchange
from autofr.cli import policies
from autofr.errors import InterchangeError, PolicyError, UserError
from autofr.interchange.components import freshest
from autofr.mix import Constant, HardSigmoid, Mix, Table
from autofr.policy import Policy
from autofr.policy_file import load
from autofr.runtime.families import discover
from autofr.runtime.points import find_denoiser
from autofr.runtime.recording import record
from autofr.runtime.sampler import compose, reuse

sys.path.append(str(Path(__file__).parent / "conformance"))
Loop: Any = importlib.import_module("loop").Loop  # tiny models of every class, in a sampling loop

laws = settings(deadline=None, max_examples=60, derandomize=True, database=None)
N = 6
DIT, PIXART = "DiTTransformer2DModel", "PixArtTransformer2DModel"
FLUX, FLUX2 = "FluxTransformer2DModel", "Flux2Transformer2DModel"


def read(kind: str, source: Any, pipe: Any, steps: int = N, **options: Any) -> Policy:
    """A schedule (JSON text, or what that says) as a policy."""
    text = source if isinstance(source, (str, Path)) else json.dumps(source)
    return interchange.read(kind, text, pipe, "tiny", steps, (4, 8, 8), **options)


def drawn(pipe: Any, steps: int = N) -> torch.Tensor:
    """Final latents of one seed."""
    with record(pipe) as tape:
        pipe(
            batch_size=1, num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
            output_type="np",
        )  # fmt: skip
    return tape.latents[-1]


@contextmanager
def listening(pipe: Any, begins: str) -> Iterator[list[list[str]]]:
    """Names of the leaf modules that run, a list for each call; `begins` runs first in a call."""
    ran: list[list[str]] = []

    def note(name: str) -> None:
        if name == begins:
            ran.append([])
        ran[-1].append(name)

    handles = [
        module.register_forward_hook(lambda *_, name=name: note(name))
        for name, module in find_denoiser(pipe).named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    yield ran
    for handle in handles:
        handle.remove()


def ran_at(pipe: Any, policy: Policy, begins: str, step: int = 1) -> list[str]:
    """The leaf modules that run at a step under a policy."""
    with reuse(pipe, policy), listening(pipe, begins) as ran:
        drawn(pipe, len(policy.steps))
    return ran[step]


def refusal(kind: str, source: Any, pipe: Any, steps: int = N, **options: Any) -> str:
    """What the refusal of a schedule says."""
    with pytest.raises(InterchangeError) as error:
        read(kind, source, pipe, steps, **options)
    return str(error.value)


def composed(
    pipe: Any, steps: Sequence[str], masks: Mapping[str, Sequence[str]], mix: Mix | None = None
) -> Policy:
    """A policy of our own for a pipe."""
    return compose(
        pipe, "tiny", steps, masks, mix or Constant(), replaces=len(steps), latent_shape=(4, 8, 8)
    )


def objection(kind: str, policy: Policy, pipe: Any) -> str:
    """What the refusal to write a policy says."""
    with pytest.raises(InterchangeError) as error:
        interchange.write(kind, policy, pipe)
    return str(error.value)


# -- DeepCache ------------------------------------------------------------------------------------


def test_deepcache_is_a_cut_at_an_interval() -> None:
    """Everything runs at every third step, the shallowest layer at the others."""
    pipe = make_pipe()
    found = read("deepcache", "3,0", pipe, 8)
    assert found.steps == ("key", *("branch0",) * 2, "key", *("branch0",) * 2, "key", "branch0")
    assert found.masks == {"branch0": ("up_blocks.2.resnets.1#stage",)}
    assert found == read("deepcache", {"cache_interval": 3}, pipe, 8)
    assert found == read("deepcache", [3, 0], pipe, 8)
    with reuse(pipe, found) as patch:
        drawn(pipe, 8)
    assert patch.counts == {"key": 3, "mask": 5}


@pytest.mark.parametrize("branch", range(9))
def test_a_branch_runs_what_deepcache_runs(branch: int) -> None:
    """At reduced steps the layers run that DeepCache's own rule computes, and no others.

    Its rule: block and layer are `divmod(branch, 3)`, counted from the outside; deeper blocks and
    the middle are skipped, shallower ones run; of that block run the down layers before the layer,
    and the up layers (counted backwards) up to it.
    """
    pipe = make_pipe()
    block, layer = divmod(branch, 3)
    wanted = {f"down_blocks.{b}.resnets.{i}" for b in range(block) for i in range(2)}
    wanted |= {f"down_blocks.{block}.resnets.{i}" for i in range(min(layer, 2))}
    wanted |= {f"up_blocks.{2 - b}.resnets.{i}" for b in range(block) for i in range(3)}
    wanted |= {f"up_blocks.{2 - block}.resnets.{2 - i}" for i in range(layer + 1)}
    ran = ran_at(pipe, read("deepcache", [2, branch], pipe, 4), "time_embedding.linear_1")
    assert {name.removesuffix(".conv1") for name in ran if name.endswith(".conv1")} == wanted


@pytest.mark.parametrize("branch", range(9))
@pytest.mark.parametrize("interval", [2, 3, 5, 8])
def test_deepcache_comes_back_as_it_was(interval: int, branch: int) -> None:
    """Writing what was read gives the same text."""
    pipe = make_pipe()
    text = json.dumps({"cache_interval": interval, "cache_branch_id": branch})
    assert interchange.write("deepcache", read("deepcache", text, pipe, 8), pipe) == text


def test_all_keyframes_are_interval_one() -> None:
    """A policy without reuse is one for DeepCache and cache-dit too."""
    pipe = make_pipe()
    text = interchange.write("deepcache", composed(pipe, ["key"] * 4, {}), pipe)
    assert json.loads(text) == {"cache_interval": 1, "cache_branch_id": 0}
    loop = Loop(DIT)
    text = interchange.write("cache-dit", composed(loop, ["key"] * 4, {}), loop)
    assert json.loads(text)["cache_config"]["steps_computation_mask"] == [1] * 4


CUTS = {"a": ("up_blocks.2.resnets.1#stage",), "b": ("up_blocks.1#stage",)}
BEYOND_DEEPCACHE = {
    "a jump": (["key", "a", "key", "jump"], {}, None, "step 3 is a jump"),
    "another interval": (["key", "a", "key", "a", "a"], {}, None, "step 4 reuses, but DeepCache"),
    "a late keyframe": (["key", "a", "a", "key", "a", "key"], {}, None, "step 5 computes everyth"),
    "two branches": (["key", "a", "b"], {}, None, "step 2 reuses branch 2, .* branch 0"),
    "another mask": (
        ["key", "c"], {"c": ("mid_block#stage", "up_blocks.1#stage")}, None,
        "step 1 reuses mid_block#stage and 1 more, which no branch",
    ),
    "λ": (["key", "a", "key", "a"], {}, Constant(value=0.5), "step 1 mixes in older scores"),
    "λ = 0": (["key", "a", "key", "a"], {}, HardSigmoid(), "step 1 is a jump"),
    "a table": (
        ["key", "a", "a"], {}, Table(weights=((), (1.0, 0.0), (1.0, 0.1))), "step 2 mixes in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND_DEEPCACHE)
def test_what_deepcache_cannot_say_is_refused(case: str) -> None:
    """The first step that it cannot express is named, with the reason."""
    pipe = make_pipe()
    steps, masks, mix, said = BEYOND_DEEPCACHE[case]
    policy = composed(pipe, steps, CUTS | masks, mix)
    with pytest.raises(InterchangeError, match=said):
        interchange.write("deepcache", policy, pipe)


def test_bad_numbers_for_deepcache_are_refused() -> None:
    """The message says the shape that was expected, or the branches that there are."""
    pipe = make_pipe()
    for source in ("3", "0,0", "1,2,3", [3, -1], [3, 0.5], {"cache_branch_id": 0}, "[]", '"3,x"'):
        assert "expected two whole numbers" in refusal("deepcache", source, pipe)
    assert "no branch 9; it has 0, 1, 2, 3, 4, 5, 6, 7, 8" in refusal("deepcache", "3,9", pipe)
    said = refusal("deepcache", {"cache_interval": 3, "skip_mode": "quad"}, pipe)
    assert 'only "uniform" is known' in said
    assert "has no cuts; it has points of kind attn" in refusal("deepcache", "3,0", Loop(DIT))


# -- cache-dit and BudCache -----------------------------------------------------------------------


def config(mask: Sequence[int], first: int = 1, behind: int = 0) -> dict[str, Any]:
    """A static configuration of cache-dit."""
    return {
        "cache_config": {
            "Fn_compute_blocks": first,
            "Bn_compute_blocks": behind,
            "num_inference_steps": len(mask),
            "steps_computation_mask": list(mask),
            "steps_computation_policy": "static",
        }
    }


MASK = (1, 1, 0, 1, 0, 0)


def blocks_that_ran(names: Sequence[str]) -> set[tuple[str, int]]:
    """Lists and numbers of the transformer blocks among leaf modules."""
    places = (name.split(".") for name in names)
    return {(place[0], int(place[1])) for place in places if place[0].endswith("blocks")}


@pytest.mark.parametrize(("first", "behind"), [(1, 0), (2, 0), (1, 1)])
@pytest.mark.parametrize("name", [DIT, PIXART, FLUX, FLUX2])
def test_cache_dit_runs_the_blocks_at_both_ends(name: str, first: int, behind: int) -> None:
    """At cached steps the first Fn and last Bn blocks run, of every list; no others.

    Of FLUX.1 cache-dit makes one list, so that Bn is of the single blocks.
    """
    pipe = Loop(name)
    found = read("cache-dit", config(MASK, first, behind), pipe)
    label = f"F{first}B{behind}"
    assert found.steps == tuple("key" if bit else label for bit in MASK)
    begins = {FLUX: "x_embedder", FLUX2: "time_guidance_embed.timestep_embedder.linear_1"}
    first_module = begins.get(name, "pos_embed.proj")
    double, single = "transformer_blocks", "single_transformer_blocks"
    wanted = {(double, i) for i in range(first)}
    wanted |= {(double if name in (DIT, PIXART) else single, i) for i in range(3 - behind, 3)}
    if name == FLUX2:
        wanted |= {(single, i) for i in range(first)} | {(double, i) for i in range(3 - behind, 3)}
    assert blocks_that_ran(ran_at(pipe, found, first_module, step=2)) == wanted
    with reuse(pipe, found) as patch:
        drawn(pipe)
    assert patch.counts == {"key": 3, "mask": 3}


def test_budcache_adds_what_all_blocks_added() -> None:
    """At cached steps no block runs: the head gets the embedding plus the last residual."""
    pipe = Loop(FLUX)
    found = read("budcache", {"cache_step": [2, 4, 5], "best_loss": 0.1}, pipe)
    assert found.steps == tuple("key" if bit else "stack" for bit in MASK)
    assert found == read("budcache", [2, 4, 5], pipe) == read("budcache", "2,4,5", pipe)
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    begins: list[torch.Tensor] = []
    model = pipe.transformer
    model.x_embedder.register_forward_hook(lambda _, __, output: begins.append(output))
    model.norm_out.register_forward_pre_hook(lambda _, args: ends.append((begins[-1], args[0])))
    assert blocks_that_ran(ran_at(pipe, found, "x_embedder", step=2)) == set()
    added = [after - before for before, after in ends]
    for step, made in ((2, 1), (4, 3), (5, 3)):
        torch.testing.assert_close(added[step], added[made], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(added[1], added[3])


def test_a_run_and_its_blocks_are_the_same() -> None:
    """Where a run is no point of its own, its blocks are reused one by one, with the same sum."""
    pipe = Loop(DIT)
    whole = read("cache-dit", config(MASK), pipe)
    assert whole.masks == {"F1B0": ("transformer_blocks.1-2#block",)}
    single = {"F1B0": ("transformer_blocks.1#block", "transformer_blocks.2#block")}
    apart = composed(pipe, whole.steps, single)
    with reuse(pipe, whole):
        together = drawn(pipe)
    with reuse(pipe, apart):
        torch.testing.assert_close(drawn(pipe), together, rtol=1e-4, atol=1e-5)
    assert interchange.write("cache-dit", apart, pipe) == json.dumps(config(MASK))


@pytest.mark.parametrize("name", [DIT, FLUX, FLUX2, "AuraFlowTransformer2DModel"])
@pytest.mark.parametrize(("first", "behind"), [(1, 0), (2, 0), (1, 1)])
def test_cache_dit_comes_back_as_it_was(name: str, first: int, behind: int) -> None:
    """Writing what was read gives the same text."""
    pipe, text = Loop(name), json.dumps(config(MASK, first, behind))
    assert interchange.write("cache-dit", read("cache-dit", text, pipe), pipe) == text


def test_a_mask_alone_computes_one_block() -> None:
    """A list, digits as they are typed, and a configuration without its section mean the same."""
    pipe = Loop(DIT)
    found = read("cache-dit", config(MASK), pipe)
    flat = config(MASK)["cache_config"]
    for source in (list(MASK), "110100", "1,1,0,1,0,0", '"110100"', flat):
        assert read("cache-dit", source, pipe) == found


def test_blocks_that_cache_dit_computes_are_not_reused() -> None:
    """It leaves the joint blocks of AuraFlow alone; BudCache would reuse all there are."""
    pipe = Loop("AuraFlowTransformer2DModel")
    (mask,) = read("cache-dit", config(MASK), pipe).masks.values()
    assert mask == ("single_transformer_blocks.1-2#block",)
    (mask,) = read("budcache", [2], pipe).masks.values()
    assert {point.split(".")[0] for point in mask} == {
        "joint_transformer_blocks", "single_transformer_blocks"
    }  # fmt: skip


def changed(**fields: Any) -> dict[str, Any]:
    """A configuration of cache-dit with some fields changed; None leaves one out."""
    found = config(MASK)["cache_config"] | fields
    return {"cache_config": {key: value for key, value in found.items() if value is not None}}


NO_CACHE_DIT = {
    "dynamic": (changed(steps_computation_policy="dynamic"), "every run decides for itself"),
    "dynamic by default": (changed(steps_computation_policy=None), "every run decides for itself"),
    "a forecast": (changed(enable_taylorseer=True), "enable_taylorseer: autofr reuses"),
    "pruning": (changed(cache_type="DBPrune"), "only DBCache"),
    "a named mask": (changed(steps_computation_mask="fast"), "a list of 1 .compute. and 0"),
    "no mask": (changed(steps_computation_mask=None), "a list of 1 .compute. and 0"),
    "the default Fn": (changed(Fn_compute_blocks=None), "Fn = 8 .* has 3 blocks"),
    "no Fn": (changed(Fn_compute_blocks=0), "expected 1 or more, got 0"),
    "text as Fn": (changed(Fn_compute_blocks=[]), "expected whole numbers"),
    "no block left": (changed(Fn_compute_blocks=2, Bn_compute_blocks=1), "leave no block"),
    "too many ends": (changed(Fn_compute_blocks=2, Bn_compute_blocks=2), "has 3 blocks"),
    "a first step reused": ([0, 1, 1, 1, 1, 1], "step 0 is reused"),
    "another length": ([1, 0, 1], "made for 3 steps, asked for 6: .* retime"),
    "other numbers": ([1, 2, 1, 1, 1, 1], "a list of 1 .compute. and 0"),
    "a list as section": ({"cache_config": []}, "expected .steps_computation_policy"),
}


@pytest.mark.parametrize("case", NO_CACHE_DIT)
def test_bad_configurations_of_cache_dit_are_refused(case: str) -> None:
    """Each refusal says what was expected."""
    source, said = NO_CACHE_DIT[case]
    with pytest.raises(InterchangeError, match=said):
        read("cache-dit", source, Loop(DIT))


def test_bad_steps_of_budcache_are_refused() -> None:
    """Cached steps are whole numbers behind the first step and within the run."""
    pipe = Loop(DIT)
    assert "cached step 6, but 5 is the last" in refusal("budcache", [2, 6], pipe)
    assert "step 0 is reused" in refusal("budcache", [0, 2], pipe)
    for source in ({"cache_steps": [2]}, [1.5], [-1], [True], "7" * 5000, {"cache_step": 3}):
        assert "expected the cached steps" in refusal("budcache", source, pipe)
    assert "no transformer blocks to reuse together" in refusal("budcache", [2], make_pipe())


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    """A checkpoint is refused by name or content, with a safe way to write it as JSON."""
    for name, data in (("a.pt", b"{}"), ("b.json", b"PK\x03\x04rest"), ("c", b"\x80\x04rest")):
        (tmp_path / name).write_bytes(data)
        said = refusal("budcache", tmp_path / name, Loop(DIT))
        assert name in said and "weights_only=True" in said


BEYOND_CACHE_DIT = {
    "a jump": (DIT, ["key", "jump"], {}, "step 1 is a jump"),
    "all blocks": (DIT, ["key", "m"], {"m": ("transformer_blocks.0-2#block",)}, "step 1 reuses"),
    "a sub-layer": (DIT, ["key", "m"], {"m": ("transformer_blocks.0.ff#ff",)}, "step 1 reuses"),
    "a hole": (
        "HunyuanDiT2DModel", ["key", "m"], {"m": ("blocks.1#block", "blocks.3#block")}, "step 1 re",
    ),
    "two masks": (
        DIT, ["key", "m", "n"],
        {"m": ("transformer_blocks.1-2#block",), "n": ("transformer_blocks.2#block",)},
        r"step 2 reuses transformer_blocks.2#block, but cache-dit reuses at all steps",
    ),
    "one list of two": (
        FLUX2, ["key", "m"], {"m": ("single_transformer_blocks.1-2#block",)}, "step 1 reuses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND_CACHE_DIT)
def test_what_cache_dit_cannot_say_is_refused(case: str) -> None:
    """The first step that it cannot express is named, with the reason."""
    name, steps, masks, said = BEYOND_CACHE_DIT[case]
    pipe = Loop(name)
    with pytest.raises(InterchangeError, match=said):
        interchange.write("cache-dit", composed(pipe, steps, masks), pipe)


# -- SmoothCache and ECAD -------------------------------------------------------------------------


@contextmanager
def component_cache(model: nn.Module, computed: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Let modules do what SmoothCache and ECAD do: return what they last computed, step by step."""

    def cached(bits: Sequence[int], original: Any) -> Any:
        held: list[Any] = []
        calls = itertools.count()

        def forward(*args: Any, **kwargs: Any) -> Any:
            if bits[next(calls)] or not held:
                held[:] = [original(*args, **kwargs)]
            return held[0]

        return forward

    modules = {model.get_submodule(path): bits for path, bits in computed.items()}
    for module, bits in modules.items():
        module.forward = cached(bits, module.forward)  # type: ignore[method-assign]
    yield
    for module in modules:
        del module.forward


def ecad(computed: Mapping[tuple[str, str], Sequence[int]], steps: int = N) -> dict[str, Any]:
    """A schedule file of ECAD: (block, component) -> 0 or 1 for each step."""
    table: dict[str, dict[str, dict[str, bool]]] = {f"{step:03}": {} for step in range(steps)}
    for (block, part), bits in computed.items():
        for step in range(steps):
            table[f"{step:03}"].setdefault(block, {})[part] = bool(bits[step])
    schedule = {"num_blocks": 3, "num_inference_steps": steps, "name": "x", "schedule": table}
    return {"cache_schedule": schedule, "config": {}, "metrics": {}}


ALL_BLOCKS = ("0", "1", "2")
EVERY_THIRD = (1, 0, 0, 1, 0, 0)


@pytest.mark.parametrize(
    ("attn", "ff", "steps"),
    [
        (EVERY_THIRD, EVERY_THIRD, "K22K22"),
        (EVERY_THIRD, (1,) * 6, "K11K11"),
        (EVERY_THIRD, (1, 0, 1, 1, 1, 1), "K21K11"),
        ((0, 0, 0, 1, 0, 0), (0, 0, 0, 1, 0, 0), "K22K22"),  # there is nothing to reuse at first
    ],
)
def test_smoothcache_draws_what_it_draws_there(
    attn: Sequence[int], ff: Sequence[int], steps: str
) -> None:
    """Sub-layers of a type share a list; the latents are those of modules that hold an output."""
    pipe = Loop(DIT)
    names = [{"K": "key", "1": "attn1", "2": "attn1+ff"}[step] for step in steps]
    found = read("smoothcache", {"attn1": attn, "ff": ff}, pipe)
    assert found.steps == tuple(names)
    with reuse(pipe, found) as patch:
        ours = drawn(pipe)
    assert patch.counts == {"key": names.count("key"), "mask": N - names.count("key")}
    parts = {f"transformer_blocks.{b}.attn1": attn for b in ALL_BLOCKS}
    parts |= {f"transformer_blocks.{b}.ff": ff for b in ALL_BLOCKS}
    with component_cache(pipe.transformer, parts):
        assert torch.equal(drawn(pipe), ours)
    assert not torch.equal(drawn(pipe), ours)


def test_names_of_the_original_dit_code_are_known() -> None:
    """`attn` and `mlp` of SmoothCache's published files are `attn1` and `ff` in diffusers."""
    pipe = Loop(DIT)
    here = read("smoothcache", {"attn1": EVERY_THIRD, "ff": EVERY_THIRD}, pipe)
    assert read("smoothcache", {"attn": EVERY_THIRD, "mlp": EVERY_THIRD}, pipe) == here


def test_a_key_of_one_block_goes_first() -> None:
    """`attn1-2` is for block 2 alone, whatever `attn1` says; what no key names is computed."""
    pipe = Loop(DIT)
    found = read("smoothcache", {"attn1": EVERY_THIRD, "attn-2": [1] * N}, pipe)
    assert found.masks == {
        "mask1": ("transformer_blocks.0.attn1#attn", "transformer_blocks.1.attn1#attn")
    }


def test_bad_lists_of_smoothcache_are_refused() -> None:
    """Unknown components and lists of other lengths or values are named."""
    pipe = Loop(DIT)
    said = refusal("smoothcache", {"attn1": EVERY_THIRD, "attn2": EVERY_THIRD}, pipe)
    assert "no component 'attn2'; it has attn1, attn, ff, mlp" in said
    assert "no component 'ff-3'" in refusal("smoothcache", {"ff-3": EVERY_THIRD}, pipe)
    said = refusal("smoothcache", {"attn1": [1, 0]}, pipe)
    assert "attn1: made for 2 steps, asked for 6" in said
    assert "a list of 1" in refusal("smoothcache", {"attn1": 3}, pipe)
    for source in ({}, [1, 0], "3"):
        assert 'expected {"attn1"' in refusal("smoothcache", source, pipe)
    said = refusal("smoothcache", {"attn1": EVERY_THIRD}, make_pipe())
    assert "no sub-layers of transformer blocks" in said


def test_ecad_draws_what_it_draws_there() -> None:
    """Each component of each block has its own list; the latents are those of held outputs."""
    pipe = Loop(PIXART)
    computed = {(b, p): EVERY_THIRD for b in ALL_BLOCKS for p in ("attn1", "attn2", "ff")}
    computed[("1", "attn1")] = (1,) * 6
    computed[("2", "ff")] = (1, 0, 1, 1, 0, 1)
    found = read("ecad", ecad(computed), pipe)
    assert found.steps == ("key", "mask1", "mask2", "key", "mask1", "mask2")
    assert len(found.masks["mask1"]) == 8 and len(found.masks["mask2"]) == 7
    with reuse(pipe, found):
        ours = drawn(pipe)
    theirs = {f"transformer_blocks.{b}.{p}": bits for (b, p), bits in computed.items()}
    with component_cache(pipe.transformer, theirs):
        assert torch.equal(drawn(pipe), ours)


def flux_schedule(**single: Sequence[int]) -> dict[str, Any]:
    """A schedule for FLUX with some component of the single block 1 changed."""
    parts = ("full_attn", "full_ff", "full_ff_context")
    computed: dict[tuple[str, str], Sequence[int]] = {
        (b, p): EVERY_THIRD for b in ALL_BLOCKS for p in parts
    }
    inner = ("single_attn", "single_proj_mlp", "single_proj_out")
    computed |= {(f"single_{b}", p): EVERY_THIRD for b in ALL_BLOCKS for p in inner}
    return ecad(computed | {("single_1", part): bits for part, bits in single.items()})


def test_ecad_of_flux_has_two_kinds_of_blocks() -> None:
    """All components reused are all sub-layers of both lists; single blocks are one each."""
    pipe = Loop(FLUX)
    found = read("ecad", flux_schedule(), pipe)
    ((label, mask),) = found.masks.items()
    assert label == "attn+ff+ff_context+proj_out"
    assert found.steps == tuple("key" if bit else label for bit in EVERY_THIRD)
    assert len(mask) == 3 * 3 + 3
    # What feeds a reused output makes no difference.
    assert read("ecad", flux_schedule(single_attn=(1,) * N), pipe) == found
    with reuse(pipe, found) as patch:
        assert drawn(pipe).isfinite().all()
    assert patch.counts == {"key": 2, "mask": 4}


def test_parts_of_a_single_block_are_not_reused_alone() -> None:
    """An output computed from a reused part is refused; `nearest` computes it from a new one."""
    pipe = Loop(FLUX)
    schedule = flux_schedule(single_proj_out=(1,) * N)
    said = refusal("ecad", schedule, pipe)
    assert "step 1, block single_1: single_attn is reused to compute single_proj_out" in said
    found = read("ecad", schedule, pipe, nearest=True)
    assert "single_transformer_blocks.1#attn" not in found.masks["mask1"]


def test_bad_schedules_of_ecad_are_refused() -> None:
    """Files of another shape, another model or with other functions are named."""
    pipe = Loop(PIXART)
    computed = {(b, p): EVERY_THIRD for b in ALL_BLOCKS for p in ("attn1", "attn2", "ff")}
    for source in ({}, [], {"cache_schedule": {}}, {"cache_schedule": {"schedule": {"a": {}}}}):
        assert 'expected {"cache_schedule"' in refusal("ecad", source, pipe)
    broken = {"cache_schedule": {"schedule": {str(step): 3 for step in range(N)}}}
    assert "step 0: expected" in refusal("ecad", broken, pipe)
    assert "made for 6 steps, asked for 9" in refusal("ecad", ecad(computed), pipe, 9)
    said = refusal("ecad", ecad(computed | {("3", "ff"): EVERY_THIRD}), pipe)
    assert "no sub-layer transformer_blocks.3.ff, which step 0 speaks of" in said
    smaller = {key: bits for key, bits in computed.items() if key[0] != "2"}
    said = refusal("ecad", ecad(smaller), pipe)
    assert "says nothing of transformer_blocks.2.attn1 and 2 more" in said
    odd = ecad(computed)
    odd["cache_schedule"]["schedule"]["002"]["1"]["custom_compute_attn"] = {"name": "tgate"}
    assert "step 2, block 1: custom_compute_attn" in refusal("ecad", odd, pipe)


# -- what cannot be expressed ---------------------------------------------------------------------


def test_a_refresh_between_keyframes_is_refused() -> None:
    """The message names the step, the sub-layer, when it was computed and what autofr has."""
    pipe = Loop(DIT)
    said = refusal("smoothcache", {"attn1": (1, 0, 1, 0, 0, 1), "ff": EVERY_THIRD}, pipe)
    assert "step 3 reuses transformer_blocks.0.attn1#attn as computed at step 2" in said
    assert "step 0 is the last" in said and "nearest=True" in said


def test_nearest_keeps_everything_as_fresh() -> None:
    """The approximation computes anew what would be too old, and is a policy that runs."""
    pipe = Loop(DIT)
    lists = {"attn1": (1, 0, 1, 0, 0, 1), "ff": (1, 0, 0, 1, 0, 0)}
    found = read("smoothcache", lists, pipe, nearest=True)
    assert found.steps == ("key", "attn1+ff", "ff", "key", "attn1+ff", "ff")
    with reuse(pipe, found) as patch:
        assert drawn(pipe).isfinite().all()
    assert patch.counts["key"] == found.steps.count("key")


def cost_of(keys: Sequence[int], rows: Sequence[int], everything: int) -> float:
    """Computations of the policy with these keyframes that reuses nothing older than asked."""
    total, since = 0.0, 0
    for step, row in enumerate(rows):
        since = everything if step in keys else since | row
        if step not in keys and since == everything:
            return float("inf")  # a step that reuses nothing is a keyframe
        total += since.bit_count()
        since = 0 if step in keys else since
    return total


schedules = st.integers(1, 3).flatmap(
    lambda parts: st.tuples(
        st.just((1 << parts) - 1),
        st.lists(st.integers(0, (1 << parts) - 1), min_size=1, max_size=7),
    )
)


@laws
@given(schedules)
def test_nothing_is_older_than_asked(case: tuple[int, list[int]]) -> None:
    """What a step reuses the schedule reuses too, and it is not from before that one's own."""
    everything, rows = case
    rows[0] = everything
    found = freshest(rows, everything)
    assert len(found) == len(rows) and found[0] == 0
    for bit in range(everything.bit_length()):
        theirs = ours = 0
        for step, (row, reused) in enumerate(zip(rows, found, strict=True)):
            theirs = step if row >> bit & 1 else theirs
            ours = step if reused == 0 else ours
            if reused >> bit & 1:
                assert not row >> bit & 1 and ours >= theirs


@laws
@given(schedules)
def test_no_keyframes_are_cheaper(case: tuple[int, list[int]]) -> None:
    """No other choice of keyframes computes fewer components."""
    everything, rows = case
    rows[0] = everything
    found = freshest(rows, everything)
    cost = sum((everything & ~reused).bit_count() for reused in found)
    later = range(1, len(rows))
    choices = (keys for n in range(len(rows)) for keys in itertools.combinations(later, n))
    assert cost == min(cost_of((0, *keys), rows, everything) for keys in choices)


@laws
@given(schedules)
def test_what_can_be_expressed_is_read_exactly(case: tuple[int, list[int]]) -> None:
    """Where every reused tensor is of the last full step, each step does what the schedule says."""
    everything, rows = case
    rows[0] = everything
    since = 0
    for step, row in enumerate(rows):  # computed again until the next full step
        row |= since
        rows[step] = row
        since = 0 if row == everything else row
    assert freshest(rows, everything) == [everything & ~row for row in rows]


# -- anything else --------------------------------------------------------------------------------


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=6)
    | st.dictionaries(
        st.sampled_from(["attn1", "cache_schedule", "schedule", "cache_step", "cache_interval",
                         "cache_config", "steps_computation_mask", "0", "ff"]), inner, max_size=3
    ),
    max_leaves=12,
)  # fmt: skip


@laws
@given(st.sampled_from(sorted(interchange.READERS)), json_values | st.text().map(str))
def test_anything_is_a_policy_or_an_interchange_error(kind: str, value: Any) -> None:
    """No source raises anything but InterchangeError, and that says of which tool it is."""
    pipe = SHARED["unet" if kind == "deepcache" else "dit"]
    source = value if isinstance(value, str) else json.dumps(value)
    try:
        read(kind, source, pipe)
    except InterchangeError as error:
        assert str(error).startswith(f"{kind} schedule: ")


SHARED = {"unet": make_pipe(), "dit": Loop(DIT)}


def test_unknown_kinds_and_step_counts_are_refused(tmp_path: Path) -> None:
    """The message lists what is known; files that cannot be read are named."""
    pipe = SHARED["dit"]
    assert "known are deepcache, smoothcache, ecad" in refusal("teacache", "{}", pipe)
    assert "0 steps: expected 1 to 10000" in refusal("budcache", "[]", pipe, 0)
    policy = composed(pipe, ["key"], {})
    assert "known are deepcache, cache-dit" in objection("ecad", policy, pipe)
    assert "missing.json (ecad): cannot be read" in refusal("ecad", tmp_path / "missing.json", pipe)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\xfa")
    assert "not a text file" in refusal("ecad", tmp_path / "bad.json", pipe)
    (tmp_path / "bad.json").write_text("[1, 2")
    assert "not valid JSON" in refusal("ecad", tmp_path / "bad.json", pipe)


def test_a_policy_for_another_pipe_is_not_written() -> None:
    """The pipe that is asked for its blocks must be the policy's."""
    policy = composed(SHARED["dit"], ["key"], {})
    with pytest.raises(PolicyError, match="the policy is for a DiTTransformer2DModel"):
        interchange.write("cache-dit", policy, SHARED["unet"])


@pytest.mark.parametrize("name", [DIT, PIXART, FLUX])
def test_masks_name_points_that_exist(name: str) -> None:
    """Whatever is read names points of the pipe, and the pipe takes it."""
    pipe = Loop(name)
    points = discover(pipe.transformer)
    for kind, source in (("budcache", [1, 2]), ("cache-dit", [1, 0, 1, 0, 1, 0])):
        found = read(kind, source, pipe)
        assert {point for mask in found.masks.values() for point in mask} <= set(points)
        assert found.sampler.replaces == found.sampler.num_inference_steps == N


# -- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LDMPipeline as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe("ldm").save_pretrained(folder)
    return folder


def autofr(*words: object) -> str:
    """Run a command and return what it prints."""
    ran = CliRunner().invoke(policies.app, [*map(str, words)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_import_and_export_are_inverse(model: Path, tmp_path: Path) -> None:
    """A schedule that was imported is exported as it was, to a file or to the terminal."""
    policy, text = tmp_path / "policy.json", '{"cache_interval": 3, "cache_branch_id": 1}'
    (tmp_path / "theirs.json").write_text(text, encoding="utf-8-sig")
    common = ["--from", "deepcache", "--model", model, "--steps", 8, "--out", policy]
    said = autofr("import", tmp_path / "theirs.json", *common)
    assert "3 keyframes among 8 steps" in said
    found = load(policy)
    assert found.sampler.latent_shape == (3, 8, 8) and found.model.name == "tiny"
    autofr("import", "3, 1", *common)
    assert load(policy) == found
    assert autofr("export", policy, "--to", "deepcache", "--model", model) == text + "\n"
    autofr("export", policy, "--to", "deepcache", "--model", model, "--out", tmp_path / "again")
    assert (tmp_path / "again").read_text() == text + "\n"
    steps = (*found.steps[:2], *found.steps[:1], *found.steps[3:])
    found.model_copy(update={"steps": steps}).save(policy)
    with pytest.raises(InterchangeError, match=r"policy\.json: step"):
        autofr("export", policy, "--to", "deepcache", "--model", model)


def test_commands_fail_before_they_load(tmp_path: Path) -> None:
    """A place that cannot be written is refused before the model is looked for."""
    (tmp_path / "way").write_text("mine")
    nowhere = tmp_path / "way" / "policy.json"
    words = ["import", "3,0", "--from", "deepcache", "--model", "none", "--steps", "8", "--out"]
    with pytest.raises(UserError, match="cannot write there"):
        autofr(*words, nowhere)
    with pytest.raises(UserError, match="expected the name of a file"):
        autofr("export", "none.json", "--to", "deepcache", "--model", "none", "--out", tmp_path)


def test_the_commands_know_every_kind() -> None:
    """What the options list is what can be read and written."""
    assert set(get_args(policies.Readable)) == set(interchange.READERS)
    assert set(get_args(policies.Writable)) == set(interchange.WRITERS)
