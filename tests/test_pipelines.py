"""Laws of whole pipelines of diffusers, on tiny ones of every kind from their folders."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conformance.tiny import randomise
from folders import FAMILIES, GUIDED, SIZE, WIDTH, picture, write
from PIL import Image
from test_cli import autofr, refused
from test_correction import table
from test_search import few_rows, settings, work_clock

from autofr import job, zoo
from autofr.errors import BudgetError, ModelError, PolicyError, TaskError
from autofr.inputs import read_inputs
from autofr.measure.calibration import calibrate
from autofr.measure.costs import Costs
from autofr.measure.masks import candidate_masks
from autofr.mix import Constant, Mix, Table
from autofr.plan.choices import Rule
from autofr.plan.correction import correct, trajectory
from autofr.plan.planner import plan
from autofr.policy import Policy
from autofr.policy_file import load
from autofr.report import profile_pictures, report
from autofr.runtime import guidance, sampler
from autofr.runtime.clock import bare_scheduler, solver_steps
from autofr.runtime.families import discover
from autofr.runtime.held import forms
from autofr.runtime.patch import Patch
from autofr.runtime.points import experts, find_denoiser
from autofr.runtime.recording import record
from autofr.runtime.sampler import Samples
from autofr.runtime.start import Starts
from autofr.search import search
from autofr.search.evaluate import latent_errors, other_solvers, solver
from autofr.task import Task, as_task

N, SEEDS = 6, (0, 1)
KEYS = ("key",) * N
PLAN = ("key", "mask", "jump", "key", "mask", "mask")
LATE = ("key", "mask", "mask", "jump", "mask", "jump")
JUMPS = ("key", "jump") * (N // 2)

each = pytest.mark.parametrize("name", FAMILIES)
Load = Callable[[str], Any]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's pipeline, written once."""
    models = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: write(name, models / name.replace(" ", "-")))


@pytest.fixture(scope="session")
def loaded(folder: Callable[[str], Path]) -> Load:
    """A family's pipeline as it comes from its folder, loaded once."""
    return functools.cache(lambda name: zoo.load(str(folder(name))).pipe)


@pytest.fixture
def pipe_of(loaded: Load) -> Load:
    """A copy of a family's pipeline, for one test."""
    return lambda name: copy.deepcopy(loaded(name))


@pytest.fixture
def task_of(pipe_of: Load) -> Load:
    """A family's pipeline with what it draws from."""
    return lambda name: task(name, pipe_of(name))


def task(name: str, pipe: Any) -> Task:
    return Task(pipe, FAMILIES[name].inputs, FAMILIES[name].call)


def drawn(pipe: Any, seeds: Sequence[int] = SEEDS, steps: int = N) -> Samples:
    return sampler.draw(pipe, seeds, steps)


def same(one: Samples, other: Samples) -> bool:
    """Whether two draws have the same bits."""
    return torch.equal(one.latents, other.latents) and torch.equal(one.images, other.images)


def masks_of(pipe: Any) -> dict[str, tuple[str, ...]]:
    """The candidate masks, the published one as `mask`."""
    masks = candidate_masks(discover(find_denoiser(pipe)))
    return masks | {"mask": masks["frdiff"]}


def policy(pipe: Any, steps: Sequence[str], mix: Mix | None = None, replaces: int = N) -> Policy:
    return sampler.compose(
        pipe, "tiny", steps, masks_of(pipe), mix or Constant(), replaces=replaces, latent_shape=(1,)
    )


def branches(name: str) -> int:
    """Denoiser calls per step."""
    return 2 if FAMILIES[name].guidance == "split" else 1


def planned(name: str, steps: Sequence[str]) -> dict[str, int]:
    return {kind: count * branches(name) for kind, count in Counter(steps).items()}


@contextmanager
def forwards(pipe: Any) -> Iterator[list[Any]]:
    """List the denoisers that really run inside the block; to be entered before a policy."""
    kind, ran = type(find_denoiser(pipe)), []
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(self)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        yield ran


def state(pipe: Any) -> dict[str, list[str]]:
    """Names of all attributes of all modules, the scheduler and the pipe."""
    found = {"pipe": sorted(vars(getattr(pipe, "_pipe", pipe)))}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            found |= {f"{name}.{k}": sorted(vars(v)) for k, v in component.named_modules()}
    return found | {"scheduler": sorted(vars(pipe.scheduler))}


# -- every kind of pipeline -----------------------------------------------------------------------


@each
def test_keyframes_draw_what_the_bare_pipe_draws(task_of: Load, name: str) -> None:
    """A policy without reuse changes no bit and no call; removing it leaves no trace."""
    pipe = task_of(name)
    bare, before = drawn(pipe), state(pipe)
    with forwards(pipe) as ran, sampler.reuse(pipe, policy(pipe, KEYS)) as patch:
        assert same(drawn(pipe), bare)
        assert len(ran) == N * branches(name)
        assert patch.counts == planned(name, KEYS)
        assert patch.run.kept_bytes == 0
    assert same(drawn(pipe), bare)
    assert state(pipe) == before


@each
def test_calls_made_are_calls_planned(task_of: Load, name: str) -> None:
    """At jumps the denoiser does not run; a second generation equals the first, nothing stays."""
    pipe = task_of(name)
    bare = drawn(pipe)
    steps = PLAN if name != "wan22" else ("key", "mask", "jump", "mask", "mask", "jump")
    with forwards(pipe) as ran, sampler.reuse(pipe, policy(pipe, steps)) as patch:
        first = drawn(pipe)
        counts = Counter(patch.counts)
        assert len(ran) == counts["key"] + counts["mask"]
        drawn(pipe, [5])
        assert same(drawn(pipe), first)
    if name == "wan22":  # the second expert has nothing to reuse at its first step
        steps = ("key", "mask", "jump", "key", "mask", "jump")
    assert counts == planned(name, steps)
    assert patch.run.kept_bytes == 0 and patch.run.peak_bytes > 0
    assert first.latents.isfinite().all() and not torch.equal(first.latents, bare.latents)


@each
def test_guidance_is_told_from_a_run(task_of: Load, name: str) -> None:
    """One branch, several in a call, or a call for each."""
    assert guidance.of(task_of(name)).kind == FAMILIES[name].guidance


# -- branches of guidance -------------------------------------------------------------------------


def recorded(pipe: Any, steps: Sequence[str] | None = None) -> Any:
    """What a run did, with a policy or without."""
    with record(pipe, calls=True) as tape:
        if steps is None:
            drawn(pipe)
        else:
            with sampler.reuse(pipe, policy(pipe, steps)):
                drawn(pipe)
    return tape


@pytest.mark.parametrize("name", ["flux guided", "wan"])
def test_split_branches_are_kept_apart(task_of: Load, name: str) -> None:
    """Each branch reuses and holds what the same calls, made alone, would reuse and hold."""
    pipe = task_of(name)
    tape = recorded(pipe, ("key", "mask", "jump", "jump", "jump", "jump"))
    points = discover(find_denoiser(pipe))
    for branch in (0, 1):
        key, mask, jump = tape.calls[branch:6:2]
        patch = Patch(pipe, [[points[name] for name in masks_of(pipe)["mask"]]]).install()
        for call, mode in ((key, patch.keyframe()), (mask, patch.reduced(1))):
            with mode, torch.inference_mode():
                args, kwargs = call.given
                assert torch.equal(call.module(*args, **kwargs)[0], call.output)
        patch.remove()
        assert torch.equal(jump.output, key.output)
    assert not torch.equal(tape.calls[0].output, tape.calls[1].output)


def without_guidance(after: int, pipe: Any, step: int, time: Any, given: dict[str, Any]) -> Any:
    """Stop guiding, as documented: half of a batched text is left, or no second call."""
    if step == after:
        pipe._guidance_scale = 0.0
        if isinstance(pipe, diffusers.StableDiffusionPipeline):
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
    return given


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_guidance_may_end_in_the_middle(pipe_of: Load, name: str) -> None:
    """A batch that shrinks is computed anew; of split calls the one that is left goes on."""
    family = FAMILIES[name]
    ends = {
        "callback_on_step_end": functools.partial(without_guidance, 1),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    pipe = Task(pipe_of(name), family.inputs, {**family.call, **ends})
    bare = drawn(pipe)
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        assert same(drawn(pipe), bare)
    with forwards(pipe) as ran, sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        assert drawn(pipe).latents.isfinite().all()
    batched = {"key": 3, "mask": 3}
    split = {"key": 2 + 1, "mask": 2 + 2, "jump": 1}
    assert patch.counts == (batched if name == "sd" else split)
    assert len(ran) == patch.counts["key"] + patch.counts["mask"]


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_guidance_that_ends_is_applied_but_not_planned(pipe_of: Load, name: str) -> None:
    """Searching refuses it before any work: a table for one batch says nothing of another."""
    family = FAMILIES[name]
    ends = {
        "callback_on_step_end": functools.partial(without_guidance, 0),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    pipe = Task(pipe_of(name), family.inputs, {**family.call, **ends})
    with pytest.raises(ModelError, match="changes its batch or its guidance"):
        guidance.of(pipe)


class UncondFirst:
    """Guidance in two nameless calls per step, the unconditional one first, and left out later."""

    def __init__(self, pipe: Any, until: int) -> None:
        self.unet, self.scheduler, self.until = pipe.unet, pipe.scheduler, until
        self.texts = torch.randn(2, 1, 5, WIDTH, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = N,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        latents = torch.stack([torch.randn(4, SIZE, SIZE, generator=one) for one in generator])
        texts = [text.repeat(batch_size, 1, 1) for text in self.texts]
        self.scheduler.set_timesteps(num_inference_steps)
        for step, time in enumerate(self.scheduler.timesteps):
            used = texts if step < self.until else texts[1:]
            scores = [self.unet(latents, time, encoder_hidden_states=t).sample for t in used]
            score = scores[-1] + 2 * (scores[-1] - scores[0])
            latents = self.scheduler.step(score, time, latents).prev_sample
        return SimpleNamespace(images=np.zeros((batch_size, SIZE, SIZE, 3)))


def test_the_call_that_is_left_is_known_by_its_tensors(pipe_of: Load) -> None:
    """Without the unconditional call, which came first, the other one holds its own score."""
    pipe = UncondFirst(pipe_of("sd"), until=2)
    calls = recorded(pipe, ("key", "jump", "jump", "mask", "key", "jump")).calls
    assert [call.at for call in calls] == [0, 0, 1, 1, 2, 3, 4, 5]
    uncond, cond, held_uncond, held_cond, alone, reduced, key, last = (c.output for c in calls)
    assert torch.equal(held_uncond, uncond) and torch.equal(held_cond, cond)
    assert torch.equal(alone, cond) and not torch.equal(cond, uncond)
    assert torch.equal(last, key) and not torch.equal(reduced, cond)


# -- callbacks ------------------------------------------------------------------------------------


def called(pipe: Any, call: Callable[..., Any], **kwargs: Any) -> Any:
    """One call of a Stable Diffusion pipe with a callback at the end of every step."""
    return pipe(
        "a cat",
        num_inference_steps=N,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=call,
        **kwargs,
    ).images


def test_callbacks_see_every_step(pipe_of: Load) -> None:
    """A callback is called at the end of all steps, those without network among them."""
    pipe, seen = pipe_of("sd"), []

    def note(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(time)))
        return given

    with sampler.reuse(pipe, policy(pipe, PLAN)):
        called(pipe, note)
    assert seen == [*enumerate(pipe.scheduler.timesteps.tolist())]


@pytest.mark.parametrize("how", ["raise", "interrupt"])
def test_a_run_that_is_given_up_leaves_nothing(pipe_of: Load, how: str) -> None:
    """After an error or an interrupt in a callback nothing is kept, and the next run is right."""
    pipe = pipe_of("sd")

    def stop(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and how == "raise":
            raise KeyboardInterrupt
        pipe._interrupt = step == 1
        return given

    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        good = called(pipe, lambda *given: given[-1])
        if how == "raise":
            with pytest.raises(KeyboardInterrupt):
                called(pipe, stop)
        else:
            called(pipe, stop)
        assert patch.counts == {"key": 1, "mask": 1}
        assert patch.run.kept_bytes == 0
        assert (called(pipe, lambda *given: given[-1]) == good).all()


# -- runs that begin in the middle, or end there --------------------------------------------------

SOLVERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,  # its steps are found by their time
    "pndm": diffusers.PNDMScheduler,  # as are these; the second one is visited twice
    "euler": diffusers.EulerDiscreteScheduler,  # pipelines tell this one where they begin
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp": diffusers.DPMSolverMultistepScheduler,
}
HALVES = np.array([0, 255], np.uint8)  # the picture's right half is drawn anew
PASSES = {"ddim": 3, "pndm": 4, "euler": 3, "heun": 5, "dpmpp": 3}  # with six tenths of the noise


def with_solver(pipe: Any, solver: str) -> Any:
    changes = {"skip_prk_steps": True} if solver == "pndm" else {}
    pipe.scheduler = SOLVERS[solver].from_config(pipe.scheduler.config, **changes)
    return pipe


def from_picture(pipe: Any, kind: str) -> Task:
    """Image-to-image or inpainting with the same components, from six tenths of the noise."""
    rows = [{"prompt": f"a cat {i}", "image": picture(i)} for i in range(2)]
    if kind == "inpaint":
        mask = Image.fromarray(np.tile(np.repeat(HALVES, SIZE), (2 * SIZE, 1)))
        rows = [{**row, "mask_image": mask} for row in rows]
    classes = {
        "img2img": diffusers.StableDiffusionImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionInpaintPipeline,
    }
    start = classes[kind].from_pipe(pipe)
    start.set_progress_bar_config(disable=True)
    return Task(start, rows, {**GUIDED, "strength": 0.6})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_a_run_from_the_middle_takes_the_late_steps(pipe_of: Load, kind: str, solver: str) -> None:
    """With a strength below 1 the last decisions count; the first step that runs computes."""
    pipe = from_picture(with_solver(pipe_of("sd"), solver), kind)
    bare = drawn(pipe)
    with forwards(pipe) as ran, sampler.reuse(pipe, policy(pipe, KEYS)) as patch:
        assert same(drawn(pipe), bare)
        assert len(ran) == patch.counts["key"] == PASSES[solver]
    late = [LATE[step] for step in solver_steps(pipe.scheduler)[-PASSES[solver] :]]
    other = ("key", "key", "jump", *LATE[3:])
    found = []
    for steps in (LATE, other):
        with sampler.reuse(pipe, policy(pipe, steps)) as patch:
            found.append(drawn(pipe))
        assert patch.counts == Counter(["key", *late[1:]])
    assert same(*found) and not same(found[0], bare)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp"])
def test_a_run_from_the_middle_asks_for_the_policys_own_steps(pipe_of: Load, solver: str) -> None:
    """Such pipes count where they begin themselves: the teacher's count would mislead them."""
    pipe = from_picture(with_solver(pipe_of("sd"), solver), "img2img")
    bare = drawn(pipe, steps=4)
    with sampler.reuse(pipe, policy(pipe, ("key",) * 4, replaces=N)) as patch:
        with pytest.raises(PolicyError, match="num_inference_steps=4"):
            drawn(pipe, steps=N)
        assert same(drawn(pipe, steps=4), bare)
        assert patch.counts == {"key": 2}


def test_a_policy_reaches_pipes_that_share_the_components(pipe_of: Load) -> None:
    """What is applied to a pipe works in one made `from_pipe`, and is removed from either."""
    pipe = pipe_of("sd")
    start = from_picture(pipe, "img2img")
    bare = drawn(start)
    with sampler.reuse(start, policy(start, LATE)):
        there = drawn(start)
    patch = sampler.apply(pipe, policy(pipe, LATE))
    assert same(drawn(start), there) and patch.counts == {"key": 1, "mask": 1, "jump": 1}
    assert patch.run.kept_bytes == 0
    sampler.remove(start)
    assert same(drawn(start), bare) and "progress_bar" not in vars(pipe)


def test_base_and_refiner_share_a_trajectory(pipe_of: Load) -> None:
    """SDXL's base ends early and frees its state; the refiner begins there with late decisions."""
    base = pipe_of("sdxl")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base)
    refiner.set_progress_bar_config(disable=True)
    shared = {"prompt": "a cat", "num_inference_steps": N, "output_type": "latent"}
    made = {}
    for steps in (None, KEYS, LATE):
        patch = sampler.apply(base, policy(base, steps)) if steps else None
        generator = torch.Generator().manual_seed(0)
        half = base(**shared, denoising_end=0.5, generator=generator).images
        if patch:
            assert patch.run.kept_bytes == 0 < patch.run.peak_bytes
            early = dict(patch.counts)
        made[steps] = refiner(**shared, denoising_start=0.5, image=half).images
        if patch:
            assert patch.run.kept_bytes == 0
            late = dict(patch.counts)
        sampler.remove(base)
    assert torch.equal(made[None], made[KEYS])
    assert early == {"key": 1, "mask": 2} and late == {"key": 1, "mask": 1, "jump": 1}


# -- what users add to a pipe ---------------------------------------------------------------------


def test_a_controlnet_runs_beside_a_policy(pipe_of: Load) -> None:
    """Residuals of a ControlNet reach keyframes and masks; it runs at every step."""
    bare = pipe_of("sd")
    made = diffusers.ControlNetModel.from_unet(
        bare.unet, conditioning_embedding_out_channels=(4, 8)
    )
    net = randomise(made, 3)
    with_net = diffusers.StableDiffusionControlNetPipeline.from_pipe(bare, controlnet=net)
    with_net.set_progress_bar_config(disable=True)
    rows = [{"prompt": f"a cat {i}", "image": picture(i)} for i in range(2)]
    pipe = Task(with_net, rows, {**GUIDED, "controlnet_conditioning_scale": 0.5})
    teacher, ran = drawn(pipe), []
    net.register_forward_hook(lambda *_: ran.append(1))
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        assert same(drawn(pipe), teacher)
    for mask in masks_of(pipe):
        ran.clear()
        steps = [mask if step == "mask" else step for step in PLAN]
        with sampler.reuse(pipe, policy(pipe, steps)) as patch:
            found = drawn(pipe)
        assert patch.counts == {"key": 2, "mask": 3, "jump": 1} and len(ran) == N
        assert found.latents.isfinite().all() and not same(found, teacher)


def add_ip_adapter(pipe: Any, folder: Path) -> None:
    """Load an IP-Adapter of random weights, as one loads it from the hub."""
    from safetensors.torch import save_file

    unet, generator = pipe.unet, torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"image_proj.proj.weight": random(4 * WIDTH, 8)}
    weights |= {"image_proj.proj.bias": random(4 * WIDTH)}
    weights |= {"image_proj.norm.weight": random(WIDTH), "image_proj.norm.bias": random(WIDTH)}
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(cross):
        width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("k", "v"):
            key = f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"
            weights[key] = random(width, WIDTH)
    save_file(weights, folder / "adapter.safetensors")
    pipe.load_ip_adapter(str(folder), "", "adapter.safetensors", image_encoder_folder=None)


def test_an_ip_adapter_runs_under_a_policy(pipe_of: Load, tmp_path: Path) -> None:
    """Loaded before a policy or under it, an IP-Adapter draws the same."""
    pipe, other = pipe_of("sd"), pipe_of("sd")
    generator = torch.Generator().manual_seed(1)
    embeds = {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=generator)]}
    plain = called(pipe, lambda *given: given[-1])
    add_ip_adapter(pipe, tmp_path)
    teacher = called(pipe, lambda *given: given[-1], **embeds)
    assert not (teacher == plain).all()
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        assert (called(pipe, lambda *given: given[-1], **embeds) == teacher).all()
    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        before = called(pipe, lambda *given: given[-1], **embeds)
    assert patch.counts == {"key": 2, "mask": 3, "jump": 1}
    with sampler.reuse(other, policy(other, PLAN)):
        add_ip_adapter(other, tmp_path)
        assert (called(other, lambda *given: given[-1], **embeds) == before).all()


@pytest.mark.parametrize("guided", [3.0, 0.0])
def test_perturbed_attention_is_a_third_branch(pipe_of: Load, guided: float) -> None:
    """PAG batches one branch more, and what it does is linear in the branches."""
    made = diffusers.StableDiffusionPAGPipeline.from_pipe(pipe_of("sd"), pag_applied_layers="down")
    made.set_progress_bar_config(disable=True)
    pipe = Task(made, FAMILIES["sd"].inputs, {"guidance_scale": guided, "pag_scale": 2.0})
    bare = drawn(pipe)
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        assert same(drawn(pipe), bare)
    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        assert drawn(pipe).latents.isfinite().all()
    assert patch.counts == {"key": 2, "mask": 3, "jump": 1}
    tape = recorded(pipe)
    fitted = guidance.fit([tape.calls[0].output], tape.scores[0], len(SEEDS))
    expected = [1 - guided, guided + 2, -2.0] if guided else [1 + 2.0, -2.0]
    np.testing.assert_allclose(fitted.weights.numpy(), expected, atol=1e-3)


@pytest.fixture(scope="session")
def lora(loaded: Load, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on attention and first convolutions."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, folder = copy.deepcopy(loaded("sd")), tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "proj_out", "conv1", "conv2"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    weights = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder, unet_lora_layers=weights)
    return folder


def test_a_lora_may_come_before_a_policy(task_of: Load, lora: Path) -> None:
    """With a LoRA the laws hold as without; at scale 0 it is as if it were not there."""
    pipe, plain = task_of("sd"), task_of("sd")
    pipe.load_lora_weights(lora, adapter_name="style")
    bare = drawn(pipe)
    assert not same(bare, drawn(plain))
    with sampler.reuse(pipe, policy(pipe, KEYS)):
        assert same(drawn(pipe), bare)
    with sampler.reuse(plain, policy(plain, PLAN)):
        wanted = drawn(plain)
    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        assert not same(drawn(pipe), wanted)
        pipe.set_adapters(["style"], [0.0])
        assert same(drawn(pipe), wanted)
        assert patch.counts == {"key": 2, "mask": 3, "jump": 1}


@pytest.mark.parametrize("mask", ["mask", "branches"])
def test_hooks_follow_the_modules_that_a_lora_wraps(task_of: Load, lora: Path, mask: str) -> None:
    """Loaded and unloaded under a policy, a LoRA draws what it draws when it is there before."""
    steps = [mask if step == "mask" else step for step in PLAN]
    pipe, other = task_of("sd"), task_of("sd")
    bare = drawn(pipe)
    other.load_lora_weights(lora, adapter_name="style")
    with sampler.reuse(other, policy(other, steps)):
        wanted = drawn(other)
    other.unload_lora_weights()
    with sampler.reuse(pipe, policy(pipe, steps)):
        plain = drawn(pipe)
        pipe.load_lora_weights(lora, adapter_name="style")
        assert same(drawn(pipe), wanted)
        pipe.set_adapters(["style"], [0.0])
        assert same(drawn(pipe), plain)
        pipe.unload_lora_weights()
        assert same(drawn(pipe), plain)
    assert same(drawn(pipe), bare) and same(drawn(other), bare)
    assert state(pipe) == state(other)


def test_a_policy_is_removed_from_under_a_lora(task_of: Load, lora: Path) -> None:
    """A LoRA that came after the policy stays when the policy goes."""
    pipe, other = task_of("sd"), task_of("sd")
    other.load_lora_weights(lora, adapter_name="style")
    for run in (False, True):
        sampler.apply(pipe, policy(pipe, PLAN))
        pipe.load_lora_weights(lora, adapter_name="style")
        if run:
            drawn(pipe)
        sampler.remove(pipe)
        assert same(drawn(pipe), drawn(other))
        pipe.unload_lora_weights()


def test_a_lora_may_be_fused_under_a_policy(task_of: Load, lora: Path) -> None:
    """Fused weights draw what wrapped ones draw, up to rounding."""
    pipe, other = task_of("sd"), task_of("sd")
    other.load_lora_weights(lora)
    with sampler.reuse(other, policy(other, PLAN)):
        wanted = drawn(other)
    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(drawn(pipe).latents, wanted.latents, rtol=1e-3, atol=1e-3)
    assert patch.counts == {"key": 2, "mask": 3, "jump": 1}


@pytest.mark.parametrize("first", ["offload", "policy"])
def test_offloading_and_a_policy_leave_each_other_in_place(task_of: Load, first: str) -> None:
    """Every generation follows the policy, though offloading renews its hooks after each."""
    pipe, plain = task_of("sd"), task_of("sd")
    bare = drawn(plain)
    with sampler.reuse(plain, policy(plain, PLAN)):
        wanted = drawn(plain)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    patch = sampler.apply(pipe, policy(pipe, PLAN))
    if first == "policy":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):
        patch.counts.clear()
        assert same(drawn(pipe), wanted)
        assert patch.counts == {"key": 2, "mask": 3, "jump": 1}
    sampler.remove(pipe)
    moved = []
    hook = pipe.unet._hf_hook
    pre_forward = hook.pre_forward
    hook.pre_forward = lambda *given, **named: moved.append(1) or pre_forward(*given, **named)
    assert same(drawn(pipe), bare) and len(moved) == N
    pipe.remove_all_hooks()
    assert same(drawn(pipe), bare)
    traces = {name for module in pipe.unet.modules() for name in vars(module)}
    assert not traces & {"_diffusers_hook", "_hf_hook", "_old_forward"}


# -- two experts ----------------------------------------------------------------------------------


def test_each_expert_computes_first(task_of: Load) -> None:
    """Where the second expert takes over in the middle of a mask it computes, and keeps its own."""
    pipe = task_of("wan22")
    with forwards(pipe) as ran, sampler.reuse(pipe, policy(pipe, ("key", *["mask"] * 5))) as patch:
        drawn(pipe)
    second = experts(pipe)[1]
    assert [module is second for module in ran] == [False] * 6 + [True] * 6
    assert patch.counts == {"key": 4, "mask": 8}
    with sampler.reuse(pipe, policy(pipe, ("key", *["jump"] * 5))) as patch:
        drawn(pipe)
    assert patch.counts == {"key": 4, "jump": 8}


def test_plans_let_each_expert_begin_with_a_keyframe(task_of: Load) -> None:
    """No plan reuses across the change of expert, and a run computes what was planned."""
    pipe = task_of("wan22")
    masks = {"mask": masks_of(pipe)["mask"]}
    found = calibrate(pipe, SEEDS, N, masks, max_gap=4)
    assert found.switch == 3 and np.isnan(found.own[0, 3:, 2:]).all()
    costs = Costs(1.0, 0.0, 0.0, {"mask": 0.5})
    ways = 0
    for allowed in (("mask",), ("jump",), ("mask", "jump")):
        for seconds in (2.2, 3.2, 4.2):
            try:
                planned = plan(found, costs, Rule(masks=allowed, max_gap=4), seconds)
            except BudgetError:
                continue
            ways += 1
            assert planned.steps[found.switch] == "key"
            one = policy(pipe, planned.steps, planned.mix)
            with sampler.reuse(pipe, one) as patch:
                drawn(pipe)
            kinds = Counter(planned.steps)
            assert patch.counts == {kind: 2 * count for kind, count in kinds.items()}
    assert ways >= 3


def test_keyframes_of_each_expert_are_corrected_with_its_own(task_of: Load) -> None:
    """A keyframe's mix leans on what its own expert kept: nothing at the first, one at the next."""
    pipe = task_of("wan22")
    steps = ("key", "jump", "key", "key", "jump", "key")
    rows = tuple((0.0, 1.0) if step == "jump" else () for step in steps)
    teacher = trajectory(pipe, SEEDS, N)
    assert teacher.switch == 3
    after = correct(pipe, policy(pipe, steps, Table(weights=rows)), teacher)
    assert [len(row) for row in after.mix.weights] == [0, 2, 2, 0, 2, 2]
    with sampler.reuse(pipe, after) as patch:
        mixed: list[int] = []
        patch.on_mix = lambda step, *_: mixed.append(step)
        drawn(pipe)
    assert {2, 5} <= set(mixed)


def test_a_run_that_ends_early_is_not_planned(pipe_of: Load) -> None:
    """It shows too little to plan from: it is said so, with the way out."""
    pipe = task("sdxl", pipe_of("sdxl"))
    pipe._call["denoising_end"] = 0.5
    with pytest.raises(ModelError, match="search with whole runs"):
        calibrate(pipe, SEEDS, N, {}, max_gap=2)


# -- runs from the middle -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_part_of_a_run_is_planned(pipe_of: Load, solver: str) -> None:
    """Plans are of the steps that run, cost these alone, and a run computes what was planned."""
    pipe = from_picture(with_solver(pipe_of("sd"), solver), "img2img")
    masks = {"mask": masks_of(pipe)["mask"]}
    starts = Starts(pipe)
    first, passes = starts(N), PASSES[solver]
    found = calibrate(pipe, SEEDS, N, masks, max_gap=4)
    assert (found.first, found.asked) == (first, N)
    costs = Costs(1.0, 0.0, 0.25, {"mask": 0.5}, first=starts)
    planned = plan(found, costs, Rule(masks=("mask", "jump"), max_gap=4), costs.teacher(N) / 1.5)
    assert planned.steps[: first + 1] == ("key",) * (first + 1) and len(planned.steps) == N
    assert planned.seconds <= costs.teacher(N) / 1.5
    late = [planned.steps[step] for step in solver_steps(pipe.scheduler)[-passes:]]
    teacher = trajectory(pipe, SEEDS, N)
    assert len(teacher.parts[0].latents) == passes
    before = policy(pipe, planned.steps, planned.mix)
    after = correct(pipe, before, teacher)
    assert after.steps == before.steps
    wanted, errors = drawn(pipe).latents, []
    for one in (before, after):
        with sampler.reuse(pipe, one) as patch:
            errors.append(float((drawn(pipe).latents - wanted).norm()))
        assert patch.counts == Counter(late)
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
@pytest.mark.parametrize("solver", ["ddim", "pndm", "dpmpp"])
def test_the_planners_model_is_the_run(pipe_of: Load, kind: str, solver: str) -> None:
    """From the first latents the scheduler alone, on the held scores, comes to what was drawn.

    Under inpainting that holds where the pipe draws; elsewhere it puts the picture's own latents.
    """
    pipe = from_picture(with_solver(pipe_of("sd"), solver), kind)
    with record(pipe) as tape:
        found = drawn(pipe).latents
    assert tape.begin == N - tape.steps[-1] - 1 + Starts(pipe)(N) + (solver == "pndm")
    scheduler, latents = bare_scheduler(tape.scheduler), tape.first_latents
    for index, score in enumerate(tape.scores):
        time = scheduler.timesteps[tape.begin + index]
        latents = scheduler.step(score, time, latents)[0]
    kept = tape.drawn()
    assert (kept is None) == (kind == "img2img")
    torch.testing.assert_close(latents if kept is None else latents * kept, found)
    rows = [pipe.row(seed) for seed in SEEDS]
    final = pipe._pipe(
        **{name: [row[name] for row in rows] for name in rows[0] if name not in pipe._call},
        **pipe._call,
        num_inference_steps=N,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    inside = torch.ones_like(final, dtype=torch.bool) if kept is None else kept
    assert torch.equal(final[inside], found[inside]) and not found[~inside].any()
    if kept is not None:
        assert 0.4 < float(kept.float().mean()) < 0.6


def test_teacher_and_policy_start_from_the_same_noise(pipe_of: Load) -> None:
    """A call noises its picture with the seed's generator: the same with a policy or without."""
    pipe = from_picture(pipe_of("sd"), "img2img")
    firsts = []
    for steps in (KEYS, LATE, KEYS):
        with sampler.reuse(pipe, policy(pipe, steps)), record(pipe) as tape:
            drawn(pipe)
        firsts.append(tape.first_latents)
    with record(pipe) as tape:
        drawn(pipe)
    assert all(torch.equal(first, tape.first_latents) for first in firsts)
    with record(pipe) as tape:
        drawn(pipe, (1, 0))
    assert not torch.equal(tape.first_latents, firsts[0])


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_what_inpainting_overwrites_is_no_error(pipe_of: Load, solver: str) -> None:
    """A wrong score there changes no bit of the images, and nothing that is planned with."""
    pipe = from_picture(with_solver(pipe_of("sd"), solver), "inpaint")
    with record(pipe) as tape:
        right = drawn(pipe)
    kept = tape.drawn()
    assert kept is not None

    def spoil(score: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return torch.where(kept, score, 1 - 3 * score)

    with record(pipe, revise=spoil):
        assert same(drawn(pipe), right)
    found = calibrate(pipe, SEEDS, N, {}, max_gap=2)
    flat = torch.stack([(score * kept).flatten().double() for score in tape.scores])
    np.testing.assert_allclose(found.teacher, (flat @ flat.T).numpy(), rtol=1e-3)
    assert found.norm == pytest.approx(float(right.latents.double().square().sum()), rel=1e-5)


def test_a_hole_that_vanishes_has_no_error(pipe_of: Load) -> None:
    """A mask of which no latent is left draws nothing: that is right with any policy."""
    pipe = from_picture(pipe_of("sd"), "inpaint")
    none = np.zeros_like(np.asarray(pipe._inputs[0]["mask_image"]))
    pipe._inputs[0]["mask_image"] = Image.fromarray(none)
    wanted = drawn(pipe).latents
    with sampler.reuse(pipe, policy(pipe, LATE)):
        first, second = latent_errors(drawn(pipe).latents, wanted)
    assert first == 0 < second < 1


def test_a_single_step_of_inpainting_counts_where_it_draws(pipe_of: Load) -> None:
    """It does not show what is overwritten after it; longer runs do."""
    pipe = from_picture(pipe_of("sd"), "inpaint")
    with record(pipe) as tape:
        wanted = drawn(pipe).latents
    kept = tape.drawn()
    assert kept is not None and Starts(pipe).runs(2) == 1
    found = drawn(pipe, steps=2).latents
    inside = [
        (one - other)[row].norm() / other[row].norm()
        for one, other, row in zip(found, wanted, kept, strict=True)
    ]
    np.testing.assert_allclose(latent_errors(found, wanted), inside, rtol=1e-4)
    assert bool(found[~kept].any())


def test_a_shorter_policy_is_measured_in_its_own_calls(pipe_of: Load) -> None:
    """Fewer steps of a pipe that counts its start itself are timed and tested as they are used."""
    pipe = from_picture(pipe_of("sd"), "img2img")
    short = policy(pipe, ("key",) * 4, replaces=N)
    with work_clock():
        measured = job.evaluate(pipe, short, SEEDS, 2)
    assert measured.speedup.value > 1.2 and measured.trajectory_error.value > 0


@pytest.mark.parametrize("kind", [pytest.param("img2img", marks=pytest.mark.slow), "inpaint"])
def test_a_search_finds_a_policy_for_a_part(
    pipe_of: Load, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    """A whole search, and the speed-ups that it tells are over the calls as they run."""
    monkeypatch.setattr(report, "write", lambda *given: [])  # pictures take seconds
    monkeypatch.setattr(search, "other_solvers", lambda *given: {})
    pipe = from_picture(pipe_of("sd"), kind)
    asked = settings(trials=1, steps=10, inputs=pipe.digest)
    with work_clock(), few_rows():
        result = job.run(pipe, asked, tmp_path / "run")
    found = result.policy
    assert found.steps[:5] == ("key",) * 5 and found.sampler.guidance == "batched"
    teacher, *rows = result.rows
    assert teacher.network_calls == 6 and all(row.network_calls < 6 for row in rows)
    assert {row.name: row.network_calls for row in rows}["4 steps"] == 2
    with sampler.reuse(pipe, found) as patch:
        drawn(pipe, steps=len(found.steps))
    assert sum(patch.counts.values()) == Starts(pipe).runs(len(found.steps))
    assert any("6 run here" in line for line in result.remarks)
    assert found.measured and found.measured.skipped_steps == len(found.steps) - 6
    assert any("given guidance_scale=3.0, strength=0.6:" in line for line in result.remarks)


def test_a_strength_that_leaves_nothing_to_reuse_is_refused(pipe_of: Load, tmp_path: Path) -> None:
    """With the count of what would run, before any work."""
    pipe = from_picture(pipe_of("sd"), "img2img")
    for strength, count in ((0.01, "none"), (0.2, "1")):
        pipe._call["strength"] = strength
        for work in (
            lambda folder: job.run(pipe, settings(steps=N, inputs=pipe.digest), folder),
            lambda folder: job.profile(pipe, folder, N, 2, SEEDS),
            lambda folder: job.evaluate(pipe, policy(pipe, KEYS), SEEDS, 2),
        ):
            with pytest.raises(ModelError, match=f"of {N} steps {count} would run.*strength"):
                work(tmp_path / count)


def test_what_fails_before_the_timesteps_is_no_start(pipe_of: Load, monkeypatch: Any) -> None:
    """A pipe that cannot read its prompt is not said to have nothing to run."""
    pipe = from_picture(pipe_of("sd"), "img2img")

    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("no such word")

    monkeypatch.setattr(pipe._pipe, "encode_prompt", broken)
    with pytest.raises(RuntimeError, match="no such word"):
        Starts(pipe)(N)


@pytest.mark.parametrize("strength", [0.15, 0.5, 0.8, 1.0])
def test_starts_are_told_as_the_pipe_counts(pipe_of: Load, strength: float) -> None:
    """How many steps a call leaves out, and a short call that runs some, at any strength."""
    pipe = from_picture(pipe_of("sd"), "img2img")
    pipe._call["strength"] = strength
    starts = Starts(pipe)
    for steps in (20, 1, 3, 10, 20):
        assert starts(steps) == steps - int(steps * strength)
    for count in (2, 3, 12):
        short = starts.short(count, 20)
        assert count <= starts.runs(short) <= count + 1


# -- other calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_batch_and_size_may_change_from_call_to_call(pipe_of: Load, name: str) -> None:
    """After a call of another size a pipe draws what it draws with the policy applied afresh."""
    inner, family = pipe_of(name), FAMILIES[name]
    small = task(name, inner)
    larger = {"height": 3 * SIZE, "width": 4 * SIZE} if name != "wan" else {"height": 64}
    large = Task(inner, family.inputs, {**family.call, **larger})
    asked = ((small, SEEDS), (small, (1,)), (large, SEEDS), (small, SEEDS))
    afresh = []
    for pipe, seeds in asked:
        with sampler.reuse(pipe, policy(pipe, PLAN)):
            afresh.append(drawn(pipe, seeds))
    with sampler.reuse(small, policy(small, PLAN)):
        for (pipe, seeds), wanted in zip(asked, afresh, strict=True):
            assert same(drawn(pipe, seeds), wanted)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan", "svd"])
def test_a_shorter_policy_replaces_the_teachers_steps(task_of: Load, name: str) -> None:
    """A call for the teacher's steps runs the policy's own, as one that asks for them does."""
    pipe = task_of(name)
    bare = drawn(pipe, steps=4)
    with sampler.reuse(pipe, policy(pipe, ("key",) * 4, replaces=N)) as patch:
        assert same(drawn(pipe, steps=N), bare)
        assert patch.counts == planned(name, ("key",) * 4)
        assert same(drawn(pipe, steps=4), bare)


def test_two_pipes_in_two_threads(task_of: Load) -> None:
    """At the same time they draw what each draws alone."""
    pipes = [task_of("sd"), task_of("sd2"), task_of("wan")]
    for pipe in pipes:
        sampler.apply(pipe, policy(pipe, PLAN))
    alone = [drawn(pipe) for pipe in pipes]
    found: dict[int, Samples] = {}
    threads = [
        threading.Thread(target=lambda i=i, pipe=pipe: found.update({i: drawn(pipe)}))
        for i, pipe in enumerate(pipes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[i], one) for i, one in enumerate(alone))


# -- copies and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [KEYS, PLAN])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["copy", "pickle"])
def test_a_pipe_with_a_policy_is_not_copied(
    pipe_of: Load, copied: Callable[[Any], Any], steps: tuple[str, ...]
) -> None:
    """A copy would share its clock with the original: it is refused, with the way out."""
    pipe = pipe_of("sd")
    with sampler.reuse(pipe, policy(pipe, steps)):
        for what in (pipe, pipe.unet):
            with pytest.raises(PolicyError, match=r"autofr.remove\(pipe\), copy it"):
                copied(what)
    copied(pipe.unet)


def test_a_pipe_with_a_policy_is_saved_as_it_is(task_of: Load, tmp_path: Path) -> None:
    """`save_pretrained` writes the files of the bare pipe."""
    pipe = task_of("sd")
    drawn(pipe)  # tokenizers remember how they padded
    pipe.save_pretrained(tmp_path / "bare")
    with sampler.reuse(pipe, policy(pipe, PLAN)):
        drawn(pipe)
        pipe.save_pretrained(tmp_path / "patched")
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "bare", tmp_path / "patched")
    ]
    assert files[0] == files[1]


def test_a_copied_scheduler_is_not_followed(pipe_of: Load) -> None:
    """Steps of a copy do not advance the run; the copy steps as the original does."""
    pipe = pipe_of("sd")

    def look_ahead(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        ahead = copy.deepcopy(pipe.scheduler)
        latents = given["latents"]
        moved = ahead.step(torch.zeros_like(latents), time, latents)[0]
        assert torch.equal(moved, bare_scheduler.step(torch.zeros_like(latents), time, latents)[0])
        ahead.set_timesteps(3)
        return given

    bare_scheduler = copy.deepcopy(pipe.scheduler)
    bare_scheduler.set_timesteps(N)
    with sampler.reuse(pipe, policy(pipe, PLAN)) as patch:
        plain = called(pipe, lambda *given: given[-1])
        assert (called(pipe, look_ahead) == plain).all()
    assert patch.counts == {"key": 2, "mask": 3, "jump": 1}


# -- Jump on the grid of the keyframes ------------------------------------------------------------


@torch.no_grad()
def on_keyframes(pipe: Any, text: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Sample a v-prediction U-Net by hand, from each second step to the next."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(N)
    if hasattr(scheduler, "sigmas"):
        sigmas = [*scheduler.sigmas[:-1:2], scheduler.sigmas[-1]]
        latents = latents * scheduler.init_noise_sigma
    else:
        ends = scheduler.alphas_cumprod[scheduler.timesteps[::2]]
        levels = [*ends, scheduler.final_alpha_cumprod]
        sigmas = [((1 - level) / level).sqrt() for level in levels]
        latents = latents * (1 + sigmas[0] ** 2).sqrt()
    for time, now, then in zip(scheduler.timesteps[::2], sigmas[:-1], sigmas[1:], strict=True):
        signal = 1 / (1 + now**2).sqrt()
        given = latents * signal
        v = pipe.unet(given, time, encoder_hidden_states=text).sample
        latents = latents + (then - now) * (signal * v + now * signal * given)
    return latents / (1 if hasattr(scheduler, "sigmas") else (1 + sigmas[-1] ** 2).sqrt())


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_jump_holds_the_noise_of_a_velocity(pipe_of: Load, solver: str) -> None:
    """v-prediction with Jump equals sampling on the keyframes alone, as ε-prediction does."""
    pipe = with_solver(pipe_of("sd2"), solver)
    text = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    noise = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with sampler.reuse(pipe, policy(pipe, JUMPS)), record(pipe) as tape:
        called(pipe, lambda *given: given[-1], guidance_scale=1.0, latents=noise)
    wanted = on_keyframes(pipe, text, noise)
    torch.testing.assert_close(tape.latents[-1], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_enough_to_hold_a_velocity(loaded: Load, dtype: torch.dtype) -> None:
    """At every noise level of SVD (the first is 700) a velocity comes back from the noise held."""
    scheduler = copy.deepcopy(loaded("svd").scheduler)
    scheduler.set_timesteps(N)
    given, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given, velocity = given.to(dtype), velocity.to(dtype)
    for form in forms(scheduler):
        back = form.score(given, form.noise(given, velocity))
        assert back.dtype == dtype
        torch.testing.assert_close(back, velocity, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_jump_holds_the_velocity_of_a_flow(pipe_of: Load, name: str) -> None:
    """Flow matching with Jump equals a call that names the keyframes' noise levels alone."""
    inner, family = pipe_of(name), FAMILIES[name]
    grid = np.linspace(1, 1 / N, N)
    whole, coarse = (
        Task(inner, family.inputs, {**family.call, "sigmas": [*map(float, sigmas)]})
        for sigmas in (grid, grid[::2])
    )
    with sampler.reuse(whole, policy(whole, JUMPS)):
        found = drawn(whole)
    wanted = drawn(coarse, steps=N // 2)
    torch.testing.assert_close(found.latents, wanted.latents, rtol=1e-3, atol=1e-4)


# -- planning under guidance ----------------------------------------------------------------------

GUIDANCES = ["sd", "sd2", "dit", "sd3", "flux guided", "svd", "wan"]


@pytest.mark.parametrize("name", GUIDANCES)
def test_calibration_predicts_what_reuse_does_after_guidance(task_of: Load, name: str) -> None:
    """The tabled error of a jump or mask is that of the guided score that the scheduler gets."""
    pipe = task_of(name)
    masks = {"mask": masks_of(pipe)["mask"]}
    found = calibrate(pipe, SEEDS, N, masks, max_gap=2)
    teacher = recorded(pipe)
    held = forms(teacher.scheduler)
    slopes = [abs(form.q) for form in held] if held else [1.0] * N
    for kind in ("jump", "mask"):
        for key in (0, 2):
            steps = [*["key"] * (key + 1), kind, *["key"] * (N - key - 2)]
            made = recorded(pipe, steps)
            step = key + 1
            few = [tape.scores[step][: len(SEEDS)].double() for tape in (made, teacher)]
            real = float(((few[0] - few[1]) * slopes[step]).square().sum())
            own, cross = found.own[0, step, 0], found.cross[0, step, 0, step]
            if kind == "jump":
                own, cross = found.teacher[key, key], found.teacher[key, step]
            assert own - 2 * cross + found.teacher[step, step] == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("name", GUIDANCES)
def test_correction_brings_a_guided_policy_nearer(task_of: Load, name: str) -> None:
    """Refitted along its own path, the mix ends nearer to the teacher, whatever the guidance."""
    pipe = task_of(name)
    steps = ("key", "mask", "jump", "key", "mask", "jump")
    teacher = trajectory(pipe, SEEDS, N)
    before = policy(pipe, steps, table(steps))
    after = correct(pipe, before, teacher)
    errors = []
    for one in (before, after):
        with sampler.reuse(pipe, one), record(pipe) as tape:
            drawn(pipe)
        pairs = zip(tape.latents, teacher.parts[0][1], strict=True)
        errors.append(np.array([float((a - b).double().norm()) for a, b in pairs]))
    assert (errors[1] <= errors[0] * (1 + 1e-3)).all()
    assert errors[1][-1] < 0.99 * errors[0][-1]


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "flux"])
def test_other_solvers_solve_the_same_model(pipe_of: Load, name: str) -> None:
    """With many steps the solvers of the table draw what the pipe's own draws with as many."""
    pipe = Task(pipe_of(name), *unguided(name))
    solvers = other_solvers(pipe)
    assert len(solvers) == 2
    own = drawn(pipe, [0], 40).latents
    for other in solvers.values():
        with solver(pipe, other):
            assert float((drawn(pipe, [0], 40).latents - own).norm() / own.norm()) < 0.1


def unguided(name: str) -> tuple[Any, dict[str, Any]]:
    """What a family draws from, without classifier-free guidance."""
    return FAMILIES[name].inputs, FAMILIES[name].call | {"guidance_scale": 1.0}


def test_a_model_that_asks_for_more_than_timesteps_has_no_other_solvers(task_of: Load) -> None:
    """SVD is asked for logarithms of noise levels, which the solvers of the table do not give."""
    assert other_solvers(task_of("svd")) == {}


# -- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "call", "said"),
    [
        ([{"promt": "a cat"}], {}, r"cannot be given promt \(did you mean prompt\?\)"),
        ([{"prompt": "a cat"}], {"guidance": 3}, r"\(did you mean guidance_scale\?\); its"),
        ([{"prompt": "a cat"}], {"generator": 3}, "cannot be given generator; --seed sets"),
        ([], {}, "at least one row"),
        ([{"prompt": "a"}, {"prompt": "b", "negative_prompt": "c"}], {}, "same arguments"),
    ],
)
def test_arguments_that_a_pipe_does_not_take_are_named(
    loaded: Load, inputs: Any, call: Any, said: str
) -> None:
    """Unknown or missing arguments are refused before anything is drawn."""
    with pytest.raises(TaskError, match=said):
        Task(loaded("sd"), inputs, call)


def test_pipes_say_what_they_draw_from(loaded: Load) -> None:
    """Prompts and labels are known by themselves; where a picture is needed it is asked for."""
    labels = as_task(loaded("dit"))
    assert drawn(labels, steps=2).images.shape[0] == 2
    assert drawn(as_task(loaded("sd")), [17], 2).images.shape[0] == 1
    with pytest.raises(TaskError, match=r'starts from image.*"image": "cat.png"'):
        as_task(loaded("svd"))


def test_the_same_seed_draws_the_same_row(task_of: Load) -> None:
    """A sample depends on its own seed, not on its batch; seeds take the inputs in turn."""
    pipe = task_of("sd")
    together, alone = drawn(pipe, (0, 1, 2)), drawn(pipe, (2,))
    torch.testing.assert_close(together.latents[2:], alone.latents, rtol=1e-3, atol=1e-3)
    pipe._inputs[1] = {"prompt": "something else"}
    again = drawn(pipe, (0, 1, 2))
    assert torch.equal(again.latents[0], together.latents[0])
    assert not torch.equal(again.latents[1], together.latents[1])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("prompts.txt", "\n \n", "empty"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("rows.jsonl", '["a"]\n', "line 1: expected an object"),
        ("rows.jsonl", '{"image": "nowhere.png"}\n', "line 1: image .*nowhere.png cannot be read"),
    ],
)
def test_files_of_inputs_are_refused_by_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    """A file that cannot be used is named with its line and what is expected there."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=said):
        read_inputs(tmp_path / name)


def test_pictures_are_read_beside_the_file(loaded: Load, tmp_path: Path) -> None:
    """A line may name a picture by its place relative to the file; it starts a video."""
    picture(0).save(tmp_path / "cat.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "cat.png"}\n', encoding="utf-8")
    rows = read_inputs(tmp_path / "rows.jsonl")
    pipe = as_task(loaded("svd"), rows, FAMILIES["svd"].call)
    assert drawn(pipe, [0], 2).images.shape == (1, 3, 2 * 2 * SIZE, 2 * SIZE)


# -- whole jobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("sd", marks=pytest.mark.slow), "dit"])
def test_a_search_finds_a_policy_under_guidance(
    folder: Callable[[str], Path], task_of: Load, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    """A whole search on a guided pipe leaves a policy that a freshly loaded pipe follows."""
    monkeypatch.setattr(report, "write", lambda *given: [])  # pictures take seconds
    asked = settings(trials=2, inputs=task_of(name).digest)
    with work_clock(), few_rows():
        result = job.run(task_of(name), asked, tmp_path / "run")
    found = load(tmp_path / "run" / "policy.json")
    assert found == result.policy and found.sampler.guidance == FAMILIES[name].guidance
    fresh = task(name, zoo.load(str(folder(name))).pipe)
    with sampler.reuse(fresh, found) as patch:
        assert drawn(fresh).images.isfinite().all()
    assert 0 < patch.counts["key"] < N * branches(name)


def test_the_command_line_takes_prompts(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Profile and sample work on a folder that draws from prompts; the prompts matter."""
    monkeypatch.setattr(profile_pictures, "profile_pictures", lambda *given: [])
    texts = [tmp_path / "one.txt", tmp_path / "other.txt"]
    texts[0].write_text("a cat\na dog\n", encoding="utf-8")
    texts[1].write_text("a boat\n", encoding="utf-8")
    words = ["--model", folder("sd"), "--steps", N, "--batch", 2, "--threads", 1]
    words += ["--call", "guidance_scale=3"]
    ran = autofr("profile", *words, "--inputs", texts[0], "--out", tmp_path / "profile")
    assert ran.code == 0, ran
    assert (tmp_path / "profile" / "profile.json").is_file()
    pictures = []
    for text in texts:
        out = tmp_path / f"{text.stem}.png"
        ran = autofr("sample", *words, "--inputs", text, "-n", 2, "--out", out)
        assert ran.code == 0 and out.is_file(), ran
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


def test_the_command_line_refuses_what_a_pipe_does_not_take(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Inputs and arguments are checked before any work, and nothing is written."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    out = ["--out", tmp_path / "run", "--threads", 1]
    sd = ["search", "--model", folder("sd"), *out]
    refused(autofr(*sd, "--call", "guidance=3"), "cannot be given guidance", "guidance_scale")
    refused(autofr(*sd, "--call", "guidance_scale"), "expected NAME=VALUE")
    refused(autofr(*sd, "--inputs", tmp_path / "nowhere.txt"), "nowhere.txt", "cannot be read")
    svd = ["search", "--model", folder("svd"), *out]
    refused(autofr(*svd), "starts from image", "--inputs")
    refused(autofr(*svd, "--inputs", prompts), "cannot be given prompt")
    assert not (tmp_path / "run").exists()
