"""Laws of deployment: a policy on compiled, offloaded, casted and quantised pipes."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from conformance.tiny import randomise
from conftest import make_pipe
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from diffusers.hooks.group_offloading import (
    ModuleGroup,
    _maybe_remove_and_reapply_group_offloading,
)
from diffusers.models.attention_processor import AttnProcessor
from folders import FAMILIES
from torch import nn

from autofr.measure.masks import candidate_masks
from autofr.mix import Constant, Mix, Table
from autofr.policy import AS_IS, Keep, Policy
from autofr.runtime import sampler
from autofr.runtime.families import discover
from autofr.runtime.patch import Patch
from autofr.runtime.points import find_denoiser
from autofr.runtime.recording import record
from autofr.runtime.store import tensors_in
from autofr.task import Task

N, SEEDS = 6, (0, 1)
KEYS = ("key",) * N
PLAN = ("key", "frdiff", "deep", "jump", "key", "deep")  # two masks
COUNTS = {"key": 2, "mask": 3, "jump": 1}

when = pytest.mark.parametrize("first", ["policy", "other"])


@functools.cache
def built(name: str, blocks: int | None) -> Any:
    pipe = FAMILIES[name].build()
    if blocks is not None:
        shallow = pipe.transformer
        names = [n for n in ("num_layers", "num_single_layers") if n in shallow.config]
        deep = type(shallow).from_config({**shallow.config, **dict.fromkeys(names, blocks)})
        pipe.register_modules(transformer=randomise(deep))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def task(name: str, blocks: int | None = None) -> Task:
    """A family's tiny pipeline with what it draws from; its transformer has so many blocks."""
    family = FAMILIES[name]
    return Task(copy.deepcopy(built(name, blocks)), family.inputs, family.call)


def drawn(pipe: Any, steps: int = N) -> torch.Tensor:
    """Final latents of two seeds."""
    return sampler.draw(pipe, SEEDS, steps).latents


def masks_of(pipe: Any) -> dict[str, tuple[str, ...]]:
    """The published mask, the deepest and shallowest cut, or the longest and shortest run."""
    masks = candidate_masks(discover(find_denoiser(pipe)))
    nested = [mask for name, mask in masks.items() if name.startswith(("cut", "run"))]
    return {"frdiff": masks["frdiff"], "deep": nested[0], "shallow": nested[-1]}


def policy(
    pipe: Any, steps: Sequence[str] = PLAN, mix: Mix | None = None, keep: Keep = AS_IS
) -> Policy:
    return sampler.compose(
        pipe,
        "tiny",
        steps,
        masks_of(pipe),
        mix or Constant(),
        replaces=N,
        latent_shape=(1,),
        keep=keep,
    )


def reduced(pipe: Any, **given: Any) -> torch.Tensor:
    """What the pipe draws with a policy of two masks."""
    with sampler.reuse(pipe, policy(pipe, **given)):
        return drawn(pipe)


def near(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-5) -> bool:
    """Whether the relative L2 distance is within a bound."""
    return float((found - wanted).norm() / wanted.norm()) <= bound


def state(model: nn.Module) -> dict[str, list[str]]:
    """Names of all attributes of all modules."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@contextmanager
def both(pipe: Any, first: str, other: Callable[[], Any], **given: Any) -> Any:
    """A policy and something else on a pipe, the one or the other first; removes the policy."""
    made = policy(pipe, **given)
    if first == "other":
        other()
    patch = sampler.apply(pipe, made)
    if first == "policy":
        other()
    try:
        yield patch
    finally:
        sampler.remove(pipe)


# -- torch.compile --------------------------------------------------------------------------------


class Graphs:
    """A backend that runs what was traced, and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    """No test meets what another one compiled."""
    yield
    torch.compiler.reset()


def wrapped(pipe: Any, **given: Any) -> None:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(find_denoiser(pipe), **given))


def in_place(pipe: Any, **given: Any) -> None:
    find_denoiser(pipe).compile(**given)


def in_blocks(pipe: Any, **given: Any) -> None:
    """Compile each block; a DiT does not tell diffusers which they are."""
    denoiser = find_denoiser(pipe)
    if denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks(**given)
    else:
        for block in denoiser.transformer_blocks:
            block.compile(**given)


@pytest.mark.parametrize(("how", "first"), [(wrapped, "other"), (in_place, "policy")])
def test_a_compiled_denoiser_has_one_graph_for_each_mode(how: Any, first: str) -> None:
    """Keyframes, each mask and calls without a policy have a graph each, once for all runs."""
    pipe, graphs = task("dit"), Graphs()
    bare, wanted = drawn(pipe), reduced(pipe)

    def compiled() -> None:
        how(pipe, backend=graphs)
        if first == "other":
            drawn(pipe)

    with both(pipe, first, compiled) as patch:
        for _ in range(3):
            assert near(drawn(pipe), wanted) and patch.counts == COUNTS
            assert graphs.count == 3 + (first == "other")
    assert near(drawn(pipe), bare) and graphs.count == 4
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        keys = drawn(pipe)
    assert torch.equal(keys, drawn(pipe)) and graphs.count == 4


def test_a_compiled_unet_has_one_graph_for_each_mode() -> None:
    """A U-Net with cuts and text is traced whole, too."""
    pipe, graphs = task("sd"), Graphs()
    wanted = reduced(pipe)
    in_place(pipe, backend=graphs)
    with sampler.reuse(pipe, policy(pipe)) as patch:
        for _ in range(3):
            assert near(drawn(pipe), wanted) and patch.counts == COUNTS
            assert graphs.count == 3


def test_guidance_branches_share_the_graphs() -> None:
    """Two calls per step, each with a store of its own, run the same graphs."""
    pipe, graphs = task("flux guided"), Graphs()
    wanted = reduced(pipe)
    in_place(pipe, backend=graphs)
    with sampler.reuse(pipe, policy(pipe)) as patch:
        for _ in range(2):
            assert near(drawn(pipe), wanted)
            assert patch.counts == {kind: 2 * count for kind, count in COUNTS.items()}
            assert graphs.count == 3


@pytest.mark.parametrize(
    ("name", "full", "first"),
    [
        ("dit", True, "other"),
        pytest.param("flux", True, "policy", marks=pytest.mark.slow),
        pytest.param("dit", False, "policy", marks=pytest.mark.slow),
        pytest.param("flux", False, "other", marks=pytest.mark.slow),
    ],
)
def test_blocks_of_one_role_share_their_graphs(name: str, full: bool, first: str) -> None:
    """Compiled block by block, a deeper transformer has no more graphs, and no run has new ones."""
    counts = []
    for blocks in (3, 4):
        torch.compiler.reset()
        pipe, graphs = task(name, blocks), Graphs()
        bare, wanted = drawn(pipe), reduced(pipe)
        compiled = partial(in_blocks, pipe, backend=graphs, fullgraph=full)
        with both(pipe, first, compiled) as patch:
            made = []
            for _ in range(3):
                assert near(drawn(pipe), wanted) and patch.counts == COUNTS
                made.append(graphs.count)
        assert near(drawn(pipe), bare)
        counts.append(made)
    assert counts[0] == counts[1]
    assert counts[0][1] == counts[0][2] <= 16
    assert not full or counts[0][0] == counts[0][1] <= 10


def test_a_whole_denoiser_has_a_break_at_its_root() -> None:
    """Where fullgraph forbids it, the error says how to compile instead."""
    pipe = task("dit")
    in_place(pipe, backend=Graphs(), fullgraph=True)
    with (
        sampler.reuse(pipe, policy(pipe)),
        pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph"),
    ):
        drawn(pipe)


@pytest.mark.parametrize("keep", [Keep(dtype="float16"), Keep(host=True)])
def test_kept_tensors_are_packed_within_a_graph(keep: Keep) -> None:
    """Storing in another dtype or on the host breaks no graph."""
    pipe = task("dit")
    wanted = reduced(pipe, keep=keep)
    in_blocks(pipe, backend=Graphs(), fullgraph=True)
    assert near(reduced(pipe, keep=keep), wanted)


class Overwriting:
    """A backend that overwrites what all its graphs returned before, as CUDA graphs do."""

    def __init__(self) -> None:
        self.returned: list[torch.Tensor] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            given = [one.clone() if isinstance(one, torch.Tensor) else one for one in given]
            for tensor in self.returned:
                tensor.fill_(float("nan"))
            found = graph(*given)
            self.returned = [t for t in found if t.is_floating_point()]
            return found

        return run


@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_what_is_kept_outlives_cuda_graphs(mode: str) -> None:
    """Kept tensors and scores are copied out of memory that the next call overwrites."""
    pipe = task("dit")
    mix = Table(weights=((), (1.0,), (0.5, 0.5), (0.0, 1.0), (), (0.5, 0.25, 0.25)))
    wanted = reduced(pipe, mix=mix)
    wrapped(pipe, backend=Overwriting())
    asked = torch.compile(nn.Linear(1, 1), mode=mode)
    pipe.transformer.get_compiler_config = asked.get_compiler_config
    found = reduced(pipe, mix=mix)
    assert near(found, wanted) if mode == "reduce-overhead" else not found.isfinite().all()


def test_a_compiled_denoiser_is_calibrated_like_a_bare_one() -> None:
    """Hooks whose mode the caller sets have one graph for each mode, too."""
    pipe, graphs = task("dit"), Graphs()
    points = discover(pipe.transformer)
    masks = [[points[name] for name in mask] for mask in masks_of(pipe).values()][:2]
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }

    @torch.no_grad()
    def scores() -> list[torch.Tensor]:
        patch = Patch(pipe, masks).install()
        found = []
        for _ in range(2):
            with patch.keyframe():
                found.append(pipe.transformer(**inputs).sample)
            for index in (1, 2):
                with patch.reduced(index):
                    found.append(pipe.transformer(**inputs).sample)
        patch.remove()
        return found

    wanted = scores()
    in_place(pipe, backend=graphs)
    assert all(near(a, b) for a, b in zip(scores(), wanted, strict=True)) and graphs.count == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", [in_place, in_blocks])
def test_inductor_draws_the_same(how: Any) -> None:
    """With kernels that are really compiled, reuse draws what it draws without."""
    pipe = task("dit")
    bare, wanted = drawn(pipe), reduced(pipe)
    how(pipe)
    assert near(drawn(pipe), bare) and near(reduced(pipe), wanted, 1e-4)
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        keys = drawn(pipe)
    assert torch.equal(keys, drawn(pipe))


# -- offloading -----------------------------------------------------------------------------------

CUTS = ("key", "shallow", "deep", "jump", "key", "frdiff")


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are offloaded to disk turn to NaN in memory, instead of to anything."""

    def empty_like(tensor: torch.Tensor, **given: Any) -> torch.Tensor:
        return torch.full_like(tensor, float("nan"), **given)

    monkeypatch.setattr(torch, "empty_like", empty_like)


def in_groups(blocks: int | None, folder: Path, pipe: Any) -> None:
    """Offload to disk in groups of so many blocks, or leaf by leaf."""
    kind = {"offload_type": "leaf_level"} if blocks is None else {"num_blocks_per_group": blocks}
    apply_group_offloading(
        find_denoiser(pipe),
        onload_device="cpu",
        offload_device="cpu",
        offload_to_disk_path=str(folder),
        **kind,
    )


def loaded(model: nn.Module) -> list[str]:
    """Parameters that are in memory."""
    held = model.named_parameters()
    return [name for name, value in held if not value.is_meta and not value.isnan().any()]


def loads(pipe: Any) -> int:
    """How often a run loads a group."""
    count, onload = 0, ModuleGroup.onload_

    def counted(group: ModuleGroup) -> None:
        nonlocal count
        count += 1
        onload(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModuleGroup, "onload_", counted)
        drawn(pipe)
    return count


def leaf_by_leaf(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does to a denoiser; it wants another device itself."""
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


@when
@pytest.mark.parametrize("blocks", [1, 3, None, "accelerate"])
def test_skipped_modules_do_their_part_in_offloading(
    lost: None, tmp_path: Path, blocks: Any, first: str
) -> None:
    """What runs is loaded although what leads its group is skipped, and nothing stays loaded."""
    pipe = make_pipe("ddim")
    bare, wanted = drawn(pipe), reduced(pipe, steps=CUTS)
    offload = leaf_by_leaf if blocks == "accelerate" else partial(in_groups, blocks, tmp_path)
    with both(pipe, first, partial(offload, pipe), steps=CUTS) as patch:
        for _ in range(2):
            assert torch.equal(drawn(pipe), wanted) and patch.counts == COUNTS
            assert loaded(pipe.unet) == []
    assert torch.equal(drawn(pipe), bare)
    assert loaded(pipe.unet) == []
    assert policy(pipe).model.fingerprint == policy(make_pipe("ddim")).model.fingerprint
    if blocks == "accelerate":
        remove_hook_from_module(pipe.unet, recurse=True)
        forwards = {type(module).forward for module in pipe.unet.modules()}
        assert {getattr(m.forward, "__func__", None) for m in pipe.unet.modules()} == forwards
        assert not any(hasattr(module, "_diffusers_hook") for module in pipe.unet.modules())


def test_renewed_offloading_leaves_the_policy_on(lost: None, tmp_path: Path) -> None:
    """Loading a LoRA removes and renews the hooks of group offloading below a policy's."""
    pipe = make_pipe("ddim")
    bare, wanted = drawn(pipe), reduced(pipe, steps=CUTS)
    in_groups(1, tmp_path, pipe)
    before = loads(pipe)
    with sampler.reuse(pipe, policy(pipe, CUTS)) as patch:
        for _ in range(2):
            assert torch.equal(drawn(pipe), wanted) and patch.counts == COUNTS
            _maybe_remove_and_reapply_group_offloading(pipe.unet)
    assert torch.equal(drawn(pipe), bare)
    assert loaded(pipe.unet) == [] and loads(pipe) == before


class Doubled(ModelHook):
    """Someone else's hook, which replaces a forward."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


@when
def test_removal_leaves_the_hooks_of_others(first: str) -> None:
    """A hook below or above a policy's goes on working when the policy is removed."""
    pipe = make_pipe("ddim")
    conv = pipe.unet.mid_block.resnets[0].conv1

    def other() -> None:
        HookRegistry.check_if_exists_or_initialize(conv).register_hook(Doubled(), "doubled")

    with both(pipe, first, other):
        pass
    given = torch.randn(1, conv.in_channels, 4, 4)
    assert torch.equal(conv(given), 2 * type(conv).forward(conv, given))
    conv._diffusers_hook.remove_hook("doubled")
    assert torch.equal(conv(given), type(conv).forward(conv, given))


# -- dtypes and layouts ---------------------------------------------------------------------------


@when
def test_layerwise_casting(first: str) -> None:
    """Weights stored in 8 bits and computed in 32: reuse sees the computed tensors alone."""
    pipe, plain = make_pipe("ddim"), make_pipe("ddim")
    casted = partial(
        pipe.unet.enable_layerwise_casting,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=torch.float32,
    )
    with both(pipe, first, casted) as patch:
        found = drawn(pipe)
        assert patch.counts == COUNTS
        bytes_kept = patch.run.peak_bytes
    bare = drawn(pipe)
    assert pipe.unet.mid_block.resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(reduced(pipe, steps=KEYS), bare)
    assert torch.equal(reduced(pipe), found)
    with sampler.reuse(plain, policy(plain)) as patch:
        assert near(found, drawn(plain), 0.2) and not torch.equal(found, bare)
        assert patch.run.peak_bytes == bytes_kept


@contextmanager
def watched(patch: Patch) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """List what is held, and the scores, whenever scores are mixed."""
    kept, scores = [], []

    def look(step: int, form: Any, sample: Any, reduced: Any, held: Any) -> None:
        kept.extend(tensors_in(patch.run.kept.tensors))
        scores.extend(tensors_in([held, reduced]))

    patch.on_mix = look
    yield kept, scores
    patch.on_mix = None


MIX = Table(weights=((), (0.5, 0.5), (0.5, 0.5), (0.0, 1.0), (), (0.5, 0.25, 0.25)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [AS_IS, Keep(dtype="float16"), Keep(dtype="bfloat16")])
def test_half_precision(dtype: torch.dtype, keep: Keep) -> None:
    """Scores are mixed in their own type; kept tensors are stored in theirs or in the policy's."""
    pipe, single = task("dit"), task("dit")
    pipe.to(dtype)
    bare = drawn(pipe)
    assert torch.equal(reduced(pipe, steps=KEYS, keep=keep), bare)
    with sampler.reuse(pipe, policy(pipe, mix=MIX, keep=keep)) as patch:
        with watched(patch) as (kept, scores):
            found = drawn(pipe)
        assert patch.counts == COUNTS and not torch.equal(found, bare)
    assert {t.dtype for t in kept} == {getattr(torch, keep.dtype) if keep.dtype else dtype}
    assert {t.dtype for t in scores} == {dtype}
    assert near(found, reduced(single, mix=MIX), 0.05)


@pytest.mark.parametrize("keep", [AS_IS, Keep(dtype="bfloat16")])
def test_channels_last(keep: Keep) -> None:
    """Kept tensors have the layout of what they stand for; keyframes are bit-identical."""
    pipe = make_pipe("ddim")
    wanted = reduced(pipe, keep=keep)
    pipe.unet.to(memory_format=torch.channels_last)
    bare = drawn(pipe)
    assert torch.equal(reduced(pipe, steps=KEYS), bare)
    with sampler.reuse(pipe, policy(pipe, keep=keep)) as patch, watched(patch) as (kept, _):
        assert near(drawn(pipe), wanted, 1e-4 if keep == AS_IS else 1e-2)
    convs = [t for t in kept if t.ndim == 4 and t.shape[1] > 1 and t.shape[2] > 1]
    assert convs and all(t.is_contiguous(memory_format=torch.channels_last) for t in convs)


def test_nothing_kept_outlives_its_grad_mode() -> None:
    """Runs in inference mode and without it take turns, and none meets a tensor of another."""
    pipe = make_pipe("ddim")
    latents = []
    with sampler.reuse(pipe, policy(pipe, mix=MIX)) as patch, watched(patch) as (kept, scores):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
            kept.clear(), scores.clear()
            with record(pipe) as tape, mode():
                generator = torch.Generator().manual_seed(0)
                pipe(num_inference_steps=N, generator=generator, output_type="np")
            latents.append(tape.latents[-1])
            made = {tensor.is_inference() for tensor in (*kept, *scores)}
            assert kept and made == {mode is torch.inference_mode}
    assert all(torch.equal(one, latents[0]) for one in latents)


# -- quantised weights ----------------------------------------------------------------------------


def by_torchao(pipe: Any) -> None:
    """Replace the weights of linear layers by 8-bit ones."""
    quantisation = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantisation.quantize_(pipe.unet, quantisation.Int8WeightOnlyConfig())


def by_torch(pipe: Any) -> None:
    """Replace linear layers by others, which quantise what they are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, torch.qint8, inplace=True)


@pytest.mark.parametrize("quantise", [by_torchao, by_torch])
def test_quantised_weights(quantise: Callable[[Any], None]) -> None:
    """A policy made for a denoiser fits its quantised form, and reuses there what it reused."""
    pipe, plain = make_pipe("ddim"), make_pipe("ddim")
    made = policy(plain)
    quantise(pipe)
    bare, before = drawn(pipe), state(pipe.unet)
    assert policy(pipe).model.fingerprint == made.model.fingerprint
    assert policy(pipe).model.weights != made.model.weights
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        assert torch.equal(drawn(pipe), bare)
    with sampler.reuse(pipe, made) as patch:
        assert near(drawn(pipe), reduced(plain), 0.1) and patch.counts == COUNTS
    assert torch.equal(drawn(pipe), bare) and state(pipe.unet) == before


# -- attention ------------------------------------------------------------------------------------


def plain_processors(pipe: Any) -> None:
    find_denoiser(pipe).set_attn_processor(AttnProcessor())


def fused_projections(pipe: Any) -> None:
    find_denoiser(pipe).fuse_qkv_projections()


@when
@pytest.mark.parametrize(
    ("name", "change"),
    [("sd", plain_processors), ("sd", fused_projections), ("flux", fused_projections)],
)
def test_attention_may_be_changed(name: str, change: Callable[[Any], None], first: str) -> None:
    """Points follow attention that gets another processor or fused projections."""
    pipe = task(name)
    bare, wanted = drawn(pipe), reduced(pipe)
    with both(pipe, first, partial(change, pipe)) as patch:
        assert near(drawn(pipe), wanted) and patch.counts == COUNTS
    assert near(drawn(pipe), bare)
