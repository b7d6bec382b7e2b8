"""Laws of the runtime, on tiny pipes of every supported class and solver."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from conftest import ddim, make_pipe

from autofr.errors import PolicyError
from autofr.mix import Constant, HardSigmoid, Table
from autofr.policy import Model, Policy
from autofr.runtime import sampler
from autofr.runtime.clock import solver_steps
from autofr.runtime.families import discover
from autofr.runtime.held import forms
from autofr.runtime.points import find_denoiser, fingerprint
from autofr.runtime.recording import record

N = 8
SOLVERS = {
    "ddim": ddim,
    "euler": lambda: diffusers.EulerDiscreteScheduler.from_config(ddim().config),
    "heun": lambda: diffusers.HeunDiscreteScheduler.from_config(ddim().config),
    "pndm": lambda: diffusers.PNDMScheduler.from_config(ddim().config, skip_prk_steps=True),
    "prk": lambda: diffusers.PNDMScheduler.from_config(ddim().config, skip_prk_steps=False),
    "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler.from_config(ddim().config),
    "unipc": lambda: diffusers.UniPCMultistepScheduler.from_config(ddim().config),
}


def run(pipe, seed=0, batch=2, **kwargs):
    """Final latents of one pipe call."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(99)  # LDMPipeline draws the noise of stochastic steps from here
    with record(pipe) as tape:
        pipe(
            batch_size=batch, num_inference_steps=N, generator=generator, output_type="np", **kwargs
        )
    return tape.latents[-1]


def policy(pipe, steps, masks=None, mix=None, **kwargs):
    """A policy of `N` steps for this pipe."""
    denoiser = find_denoiser(pipe)
    points = discover(denoiser)
    return Policy(
        model=Model(
            name="tiny",
            denoiser=type(denoiser).__name__,
            fingerprint=fingerprint(denoiser, points),
        ),
        sampler=sampler.describe(pipe, len(steps), kwargs.pop("replaces", len(steps)), (3, 8, 8)),
        masks=masks or {},
        steps=tuple(steps),
        mix=mix or Constant(),
        **kwargs,
    )


def masks_of(pipe):
    """One mask per kind."""
    points = discover(find_denoiser(pipe))
    kinds = {p.kind for p in points.values()}
    return {kind: tuple(n for n, p in points.items() if p.kind == kind) for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("ldm", s) for s in SOLVERS] + [("ddim", "ddim"), ("ddpm", "ddpm"), ("ddpm", "euler")],
)
def test_all_keyframes_is_bit_identical(kind, solver):
    """A policy without reuse draws exactly what the bare pipe draws."""
    pipe = make_pipe(kind)
    if solver in SOLVERS:
        pipe.scheduler = SOLVERS[solver]()
    bare = run(pipe)
    with sampler.reuse(pipe, policy(pipe, ["key"] * N)) as patch:
        assert torch.equal(run(pipe), bare)
    passes = len(solver_steps(pipe.scheduler))
    assert patch.counts == {"key": passes}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_keyframes_with_noise(pipe, eta):
    """Bit-identity holds for stochastic DDIM too."""
    bare = run(pipe, eta=eta)
    with sampler.reuse(pipe, policy(pipe, ["key"] * N)):
        assert torch.equal(run(pipe, eta=eta), bare)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mask", ["conv", "branch", "attn", "stage"])
def test_calls_made_are_calls_planned(pipe, solver, mask):
    """Every key, mask and jump step costs what the policy says, in stages of the solver."""
    pipe.scheduler = SOLVERS[solver]()
    steps = ["key", mask, "jump", "key", mask, mask, "jump", "key"]
    with sampler.reuse(pipe, policy(pipe, steps, masks_of(pipe))) as patch:
        run(pipe)
        planned = [steps[i].replace(mask, "mask") for i in solver_steps(pipe.scheduler)]
        assert patch.counts == {kind: planned.count(kind) for kind in ("key", "mask", "jump")}


@pytest.mark.parametrize("mask", ["conv", "branch", "attn", "stage"])
def test_second_generation_equals_the_first(pipe, mask):
    """Nothing of one generation reaches the next."""
    steps = ["key", mask, mask, "key", mask, "jump", mask, "key"]
    with sampler.reuse(pipe, policy(pipe, steps, masks_of(pipe))):
        first = run(pipe)
        run(pipe, seed=5)
        assert torch.equal(run(pipe), first)


def test_reuse_changes_the_result(pipe):
    """Masks really reuse: with them the latents differ from the bare pipe's."""
    bare = run(pipe)
    for mask in ("conv", "branch", "attn", "stage"):
        with sampler.reuse(pipe, policy(pipe, ["key"] + [mask] * 7, masks_of(pipe))):
            assert not torch.equal(run(pipe), bare), mask


def test_every_point_is_exact_at_equal_input():
    """Reusing any point at the keyframe's own input and time gives the keyframe's score."""
    from autofr.runtime.patch import Patch

    pipe = make_pipe()
    points = discover(pipe.unet)
    masks = [[point] for point in points.values()]
    patch = Patch(pipe, masks).install()
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with patch.keyframe():
        expected = pipe.unet(sample, 500).sample
    for index, name in enumerate(points, start=1):
        with patch.reduced(index):
            again = pipe.unet(sample, 500).sample
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5, msg=name)
    patch.remove()


def test_stage_skips_what_is_deeper():
    """The shallowest stage runs one ResNet block; the deepest all but the mid block."""
    from autofr.runtime.patch import Patch

    pipe = make_pipe()
    points = discover(pipe.unet)
    stages = [p for p in points.values() if p.kind == "stage"]
    assert stages[0].module == "mid_block"
    assert len(stages) == sum(len(b.resnets) for b in pipe.unet.up_blocks)
    ran: list[str] = []
    for name, module in pipe.unet.named_modules():
        if type(module).__name__ == "Conv2d":
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    patch = Patch(pipe, [[p] for p in stages]).install()
    sample = torch.randn(1, 3, 8, 8)
    with patch.keyframe():
        pipe.unet(sample, 3)
    counts = []
    for index in range(1, len(stages) + 1):
        ran.clear()
        with patch.reduced(index):
            pipe.unet(sample, 3)
        counts.append(len(ran))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts)
    last = "up_blocks.2.resnets.2"
    assert ran == ["conv_in", f"{last}.conv1", f"{last}.conv2", f"{last}.conv_shortcut", "conv_out"]
    patch.remove()


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_jump_is_the_keyframe_grid(pipe, solver):
    """With a first-order deterministic solver, Jump equals sampling on the keyframes alone."""
    pipe.scheduler = SOLVERS[solver]()
    with sampler.reuse(pipe, policy(pipe, ["key", "jump"] * (N // 2))):
        jumped = run(pipe)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(N)
    kept = scheduler.timesteps[::2]
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if solver == "ddim":
        levels = torch.cat([scheduler.alphas_cumprod[kept], scheduler.final_alpha_cumprod[None]])
        for t, now, then in zip(kept, levels[:-1], levels[1:], strict=True):
            score = pipe.unet(sample, t).sample
            clean = (sample - (1 - now).sqrt() * score) / now.sqrt()
            sample = then.sqrt() * clean + (1 - then).sqrt() * score
    else:
        sample = sample * scheduler.init_noise_sigma
        sigmas = torch.cat([scheduler.sigmas[:-1:2], scheduler.sigmas[-1:]])
        for t, now, then in zip(kept, sigmas[:-1], sigmas[1:], strict=True):
            score = pipe.unet(sample / (now**2 + 1).sqrt(), t).sample
            sample = sample + (then - now) * score
    torch.testing.assert_close(jumped, sample, rtol=1e-4, atol=1e-4)


def test_remove_is_the_inverse_of_apply(pipe):
    """After remove no trace is left on any module or on the scheduler."""

    def traces():
        modules = {n: sorted(vars(m)) for n, m in pipe.unet.named_modules()}
        return modules, sorted(vars(pipe.scheduler)), sorted(vars(pipe))

    run(pipe)
    before, bare = traces(), run(pipe)
    mask = masks_of(pipe)
    sampler.apply(pipe, policy(pipe, ["key"] + ["branch"] * 7, mask))
    sampler.apply(pipe, policy(pipe, ["key"] + ["stage"] * 7, mask))  # replaces the first
    run(pipe)
    sampler.remove(pipe)
    sampler.remove(pipe)
    assert traces() == before
    assert torch.equal(run(pipe), bare)


def test_batch_change_mid_life_recomputes(pipe):
    """Another batch size starts empty, in a new run and in the middle of one."""
    steps = ["key"] + ["branch"] * 7
    with sampler.reuse(pipe, policy(pipe, steps, masks_of(pipe))) as patch:
        alone = run(pipe, batch=1)
        run(pipe, batch=2)
        assert torch.equal(run(pipe, batch=1), alone)
        pipe.scheduler.set_timesteps(N)
        sample = torch.randn(2, 3, 8, 8)
        pipe.unet(sample, 5)
        pipe.scheduler.step(sample, pipe.scheduler.timesteps[0], sample)
        halved = pipe.unet(sample[:1], 5).sample
        assert patch.counts == {"key": 2}
    assert torch.equal(halved, pipe.unet(sample[:1], 5).sample)


def test_branches_of_one_step_are_kept_apart(pipe):
    """Two denoiser calls in one step (split guidance) have a store each."""
    with sampler.reuse(pipe, policy(pipe, ["key", "jump"] * 4)):
        pipe.scheduler.set_timesteps(N)
        a, b = torch.randn(2, 1, 3, 8, 8)
        first = [pipe.unet(x, 7).sample for x in (a, b)]
        pipe.scheduler.step(first[0], pipe.scheduler.timesteps[0], a)
        held = [pipe.unet(x, 3).sample for x in (a, b)]
    assert torch.equal(held[0], first[0]) and torch.equal(held[1], first[1])
    assert not torch.equal(held[0], held[1])


def test_an_exception_leaves_no_state(pipe):
    """An error inside the denoiser frees everything; the next run is as if it had not been."""
    with sampler.reuse(pipe, policy(pipe, ["key"] + ["branch"] * 7, masks_of(pipe))) as patch:
        good = run(pipe)
        calls = 0

        def fail(*_):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt

        handle = pipe.unet.conv_out.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
        handle.remove()
        assert patch.run.kept_bytes == 0
        assert torch.equal(run(pipe), good)


def test_memory_is_freed_at_the_end_of_a_run(pipe):
    """Kept tensors live for one run; their peak is remembered."""
    with sampler.reuse(pipe, policy(pipe, ["key"] + ["branch"] * 7, masks_of(pipe))) as patch:
        run(pipe)
        assert patch.run.kept_bytes == 0 and patch.run.peak_bytes > 0


def test_direct_calls_are_untouched(pipe):
    """The denoiser called outside a sampling loop answers as without a policy."""
    sample = torch.randn(1, 3, 8, 8)
    expected = pipe.unet(sample, 3).sample
    with sampler.reuse(pipe, policy(pipe, ["key"] + ["jump"] * 7)):
        assert torch.equal(pipe.unet(sample, 3).sample, expected)
        run(pipe)
        assert torch.equal(pipe.unet(sample, 3).sample, expected)


def test_lambda_zero_does_not_call_the_network(pipe):
    """With the released code's λ, the masks of the first 43 % are jumps."""
    steps = ["key", "branch"] * 4
    with sampler.reuse(pipe, policy(pipe, steps, masks_of(pipe), HardSigmoid())) as patch:
        run(pipe)
    assert patch.counts == {"key": 4, "jump": 2, "mask": 2}  # λ(1/8) = λ(3/8) = 0


def test_mix_blends_reduced_and_kept_scores(pipe):
    """A table row weighs the reduced score, the last keyframe's and the one's before."""
    rows = ((), (), (0.5, 0.3, 0.2), *[()] * 5)
    steps = ["key", "key", "branch"] + ["key"] * 5
    masks = masks_of(pipe)
    table = policy(pipe, steps, masks, Table(weights=rows))
    seen = []
    plain = policy(pipe, steps, masks)
    for one in (plain, table):
        outputs = []
        with sampler.reuse(pipe, one):
            pipe.scheduler.set_timesteps(N)
            sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
            for t in pipe.scheduler.timesteps[:3]:
                outputs.append(pipe.unet(sample, t).sample)
                pipe.scheduler.step(outputs[-1], t, sample)
        seen.append(outputs)
    first, second, reduced = seen[0]
    expected = 0.5 * reduced + 0.3 * second + 0.2 * first
    torch.testing.assert_close(seen[1][2], expected)


def outputs_of(pipe, one, steps):
    """What the denoiser gives at the first steps of a run, always at the same sample."""
    found = []
    with sampler.reuse(pipe, one) as patch:
        pipe.scheduler.set_timesteps(N)
        sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        for t in pipe.scheduler.timesteps[:steps]:
            found.append(pipe.unet(sample, t).sample)
            pipe.scheduler.step(found[-1], t, sample)
    return found, patch.counts


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_keyframe_mixes_and_keeps_its_own(pipe, prediction):
    """Its row weighs its full score and older ones; what later steps get of it is not mixed."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(ddim().config, prediction_type=prediction)
    rows = ((), (0.0, 1.0), (0.9, 0.3), (0.8, 0.3, -0.1), *[(0.0, 1.0)] * 4)
    steps = ["key", "jump", "key", "key"] + ["jump"] * 4
    plain, counts = outputs_of(pipe, policy(pipe, steps), 5)
    mixed, same = outputs_of(pipe, policy(pipe, steps, mix=Table(weights=rows)), 5)
    assert counts == same == {"key": 3, "jump": 2}
    pipe.scheduler.set_timesteps(N)
    held = [sampled(pipe, output, i, into=True) for i, output in enumerate(plain)]
    expected = {2: 0.9 * held[2] + 0.3 * held[0], 3: 0.8 * held[3] + 0.3 * held[2] - 0.1 * held[0]}
    for i, output in enumerate(mixed):
        wanted = sampled(pipe, expected[i], i, into=False) if i in expected else plain[i]
        torch.testing.assert_close(output, wanted)


def sampled(pipe, value, step, into):
    """A score at the sample of `outputs_of` as the noise that it stands for, or back."""
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    held = forms(pipe.scheduler)
    if held is None:
        return value
    return held[step].noise(sample, value) if into else held[step].score(sample, value)


def test_a_keyframe_with_nothing_before_it_does_not_mix(pipe):
    """Another batch in the middle of a run starts empty: its first keyframe is plain."""
    rows = ((), (0.9, 0.3), (0.8, 0.2, 0.1), *[(0.0, 1.0)] * 5)
    steps = ["key"] * 3 + ["jump"] * 5
    one = policy(pipe, steps, mix=Table(weights=rows))
    with sampler.reuse(pipe, one):
        pipe.scheduler.set_timesteps(N)
        sample = torch.randn(2, 3, 8, 8)
        pipe.unet(sample, 5)
        pipe.scheduler.step(sample, pipe.scheduler.timesteps[0], sample)
        halved = pipe.unet(sample[:1], 5).sample
    assert torch.equal(halved, pipe.unet(sample[:1], 5).sample)


def test_mixing_at_a_keyframe_of_several_calls_is_refused(pipe):
    """A second-order solver has no one score per step: the run is refused before it starts."""
    pipe.scheduler = SOLVERS["heun"]()
    rows = ((), (0.0, 1.0), (0.9, 0.1), *[()] * 5)
    one = policy(pipe, ["key", "jump"] + ["key"] * 6, mix=Table(weights=rows))
    with sampler.reuse(pipe, one), pytest.raises(PolicyError, match="keyframe 2, which 2 calls of"):
        run(pipe)
    plain = Table(weights=((), (0.0, 1.0), *[()] * 6))
    with sampler.reuse(pipe, one.model_copy(update={"mix": plain})):
        assert run(pipe).isfinite().all()


def test_shorter_policy_replaces_the_teachers_steps(pipe):
    """A call for the teacher's step count runs the policy's own."""
    short = policy(pipe, ["key"] * 5, replaces=N)
    with sampler.reuse(pipe, short) as patch:
        run(pipe)
        assert patch.counts == {"key": 5}
        with pytest.raises(PolicyError, match="5 steps, the call asked for 7"):
            pipe(num_inference_steps=7)


def test_refusals_say_what_differs(pipe):
    """Another scheduler, configuration, architecture or point is refused with the reason."""
    good = policy(pipe, ["key"] * N)
    other = make_pipe()
    other.scheduler = SOLVERS["euler"]()
    with pytest.raises(PolicyError, match="DDIMScheduler, this pipe has EulerDiscreteScheduler"):
        sampler.apply(other, good)
    other.scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    with pytest.raises(PolicyError, match="beta_"):
        sampler.apply(other, good)
    wrong = good.model_copy(update={"model": good.model.model_copy(update={"fingerprint": "0"})})
    with pytest.raises(PolicyError, match="fingerprint"):
        sampler.apply(pipe, wrong)
    unknown = good.model_copy(update={"masks": {"m": ("nowhere#conv",)}})
    with pytest.raises(PolicyError, match="nowhere#conv"):
        sampler.apply(pipe, unknown)


def test_a_replaced_scheduler_is_noticed(pipe):
    """Changing pipe.scheduler under a policy raises instead of silently doing nothing."""
    with sampler.reuse(pipe, policy(pipe, ["key"] * N)):
        pipe.scheduler = ddim()
        with pytest.raises(PolicyError, match="apply again"):
            run(pipe)


def test_images_come_out(pipe):
    """The stock pipe returns images as before."""
    with sampler.reuse(pipe, policy(pipe, ["key", "jump"] * 4)):
        images = pipe(batch_size=2, num_inference_steps=N, output_type="np").images
    assert np.isfinite(images).all() and images.shape[0] == 2
