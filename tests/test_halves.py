"""Laws of guidance reuse: one branch of a batched guidance is computed, the other one reused."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from folders import CHANNELS, FAMILIES, GUIDED, PROMPTS
from test_pipelines import without_guidance

from autofr.cli import console
from autofr.errors import InterchangeError, RunFolderError
from autofr.interchange import write
from autofr.measure.calibration import Calibration, calibrate
from autofr.measure.costs import Costs
from autofr.measure.masks import GUIDANCE, candidate_masks
from autofr.measure.profiling import profile
from autofr.memory import Memory
from autofr.mix import Constant, HardSigmoid, Mix, Table
from autofr.plan.choices import Rule, _guided, choices
from autofr.plan.correction import correct, trajectory
from autofr.policy import Policy
from autofr.policy_file import load
from autofr.report import differences
from autofr.report.policy_chart import kinds, mix, strip
from autofr.runtime import guidance, halves, sampler
from autofr.runtime.families import discover
from autofr.runtime.held import forms
from autofr.runtime.patch import Patch
from autofr.runtime.points import find_denoiser, fingerprint, sample_of
from autofr.runtime.recording import Call, Tape, record
from autofr.task import Task

N, SEEDS = 5, (0, 1)
BATCHED = [name for name, family in FAMILIES.items() if family.guidance == "batched"]
batched = pytest.mark.parametrize("name", BATCHED)
POINTS = [*halves.POINTS]
PLAN = ("key", "half", "half", "key", "half")
WEIGHTS = Table(weights=((), (1.0, 0.9), (0.8, 1.1), (), (0.95, 1.3, -0.4)))
Build = Callable[[str], Any]


@pytest.fixture(scope="module")
def built() -> Build:
    """A family's pipeline, built once."""
    return functools.cache(lambda name: FAMILIES[name].build())


@pytest.fixture
def task_of(built: Build) -> Build:
    """A copy of a family's pipeline, with what it draws from."""
    return lambda name: task(name, copy.deepcopy(built(name)))


def task(name: str, pipe: Any, **call: Any) -> Task:
    pipe.set_progress_bar_config(disable=True)
    return Task(pipe, FAMILIES[name].inputs, {**FAMILIES[name].call, **call})


def drawn(pipe: Any, seeds: Sequence[int] = SEEDS) -> sampler.Samples:
    return sampler.draw(pipe, seeds, N)


def policy(
    pipe: Any, branch: int, steps: Sequence[str] = PLAN, mix: Mix | None = None, more: Any = ()
) -> Policy:
    """A policy whose mask `half` computes one branch, and reuses inner points too."""
    masks = {"half": (POINTS[branch], *more)}
    return sampler.compose(
        pipe, "tiny", steps, masks, mix or Constant(), replaces=N, latent_shape=(1,)
    )


def taped(pipe: Any, plan: Policy | None = None) -> Tape:
    """What a run did, with a policy or without; outputs of calls are those that the pipe got."""
    with record(pipe, calls=True) as tape:
        if plan is None:
            drawn(pipe)
        else:
            with sampler.reuse(pipe, plan):
                drawn(pipe)
    return tape


@contextmanager
def rows(pipe: Any) -> Iterator[list[int]]:
    """List the rows of every batch that the denoiser really computes; entered before a policy."""
    kind, seen = type(find_denoiser(pipe)), []
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(sample_of((args, kwargs))))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        yield seen


@torch.inference_mode()
def alone(call: Call, branch: int) -> torch.Tensor:
    """A recorded call's branch, computed by itself."""
    args, kwargs = halves.halve(call.given, branch)
    return call.module(*args, **kwargs)[0]


def noise(pipe: Any, call: Call, output: torch.Tensor) -> torch.Tensor:
    """An output in the form in which it is held."""
    held = forms(pipe.scheduler)
    return held[call.at].noise(sample_of(call.given), output) if held else output


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm()) <= 1e-4 * float(other.norm())


# -- one branch -----------------------------------------------------------------------------------


@batched
def test_a_half_alone_is_what_it_is_in_its_batch(task_of: Build, name: str) -> None:
    """Either branch of a call, computed by itself, gives its rows of the call's output."""
    tape = taped(task_of(name))
    for call in (tape.calls[0], tape.calls[-1]):
        for branch in (0, 1):
            assert close(alone(call, branch), call.output.chunk(2)[branch])
            assert halves.separable(call.module, call.given, call.output, branch)


@batched
def test_the_branch_with_the_condition_is_computed(task_of: Build, name: str) -> None:
    """The branch of more weight: DiT has it in the first half of its batch, others not."""
    branches = guidance.of(task_of(name))
    assert branches == ("batched", 0 if name == "dit" else 1)
    masks = candidate_masks(discover(find_denoiser(task_of(name))), branches.alone)
    assert masks[GUIDANCE] == (POINTS[branches.alone],)
    assert GUIDANCE not in candidate_masks(discover(find_denoiser(task_of(name))))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BATCHED])
def test_no_guidance_and_split_guidance_have_no_half(task_of: Build, name: str) -> None:
    """There is no batch to take apart."""
    assert guidance.of(task_of(name)).alone is None


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_perturbed_attention_has_no_half(built: Build, scale: float) -> None:
    """Three branches, or two of which one changes its attention by its place in the batch."""
    pipe = copy.deepcopy(built("sd"))
    pag = diffusers.AutoPipelineForText2Image.from_pipe(
        pipe, enable_pag=True, pag_applied_layers=["down"]
    )
    pag.set_progress_bar_config(disable=True)
    call = {**GUIDED, "guidance_scale": scale, "pag_scale": 2.0}
    perturbed = Task(pag, PROMPTS, call)
    assert guidance.of(perturbed) == ("batched", None)
    bare = drawn(perturbed)
    with sampler.reuse(perturbed, policy(perturbed, 1)) as patch:
        assert torch.equal(drawn(perturbed).latents, bare.latents)
    assert patch.counts == {"key": N}


def test_branches_that_look_at_each_other_have_no_half(task_of: Build) -> None:
    """A network that normalises over its batch gives other rows for a half of it."""
    pipe = task_of("sd")

    def mixing(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(0, keepdim=True)

    pipe.unet.conv_out.register_forward_hook(mixing)
    assert guidance.of(pipe) == ("batched", None)


def test_arguments_are_halved_by_their_rows() -> None:
    """What has a row per sample is cut, wherever it is nested; all else stays as it is."""
    sample, text, time = torch.randn(4, 3), torch.randn(4, 2, 5), torch.tensor([7.0])
    given = (sample, time), {"text": text, "added": {"ids": text, "list": [sample]}, "flag": True}
    (half, same), kwargs = halves.halve(given, 1)
    assert torch.equal(half, sample[2:]) and same is time and kwargs["flag"] is True
    assert torch.equal(kwargs["text"], text[2:]) and torch.equal(kwargs["added"]["ids"], text[2:])
    assert torch.equal(kwargs["added"]["list"][0], sample[2:])


# -- policies -------------------------------------------------------------------------------------


@batched
def test_a_step_gives_what_the_formula_says(task_of: Build, name: str) -> None:
    """w0 times the branch in the place of both, and w1, w2 times what keyframes add to it."""
    pipe = task_of(name)
    branch = guidance.of(pipe).alone
    calls = taped(pipe, policy(pipe, branch, mix=WEIGHTS)).calls
    held: list[torch.Tensor] = []
    for call, step, weights in zip(calls, PLAN, WEIGHTS.weights, strict=True):
        if step == "key":
            held.insert(0, noise(pipe, call, call.output))
            continue
        mine = alone(call, branch)
        wanted = weights[0] * noise(pipe, call, torch.cat([mine, mine]))
        for weight, score in zip(weights[1:], held, strict=False):
            part = score.chunk(2)[branch]
            wanted = wanted + weight * (score - torch.cat([part, part]))
        assert close(noise(pipe, call, call.output), wanted)


@batched
def test_half_of_the_batch_runs(task_of: Build, name: str) -> None:
    """Keyframes compute both branches, steps with the mask one; nothing but scores is kept."""
    pipe = task_of(name)
    plan = policy(pipe, guidance.of(pipe).alone)
    with rows(pipe) as seen, sampler.reuse(pipe, plan) as patch:
        assert drawn(pipe).latents.isfinite().all()
    both = seen[0]
    assert both % 2 == 0 and seen == [both if step == "key" else both // 2 for step in PLAN]
    assert patch.counts == {"key": 2, "mask": 3} and patch.run.kept_bytes == 0


@pytest.mark.parametrize("name", ["sd", "dit"])
@pytest.mark.parametrize("branch", [0, 1])
def test_plain_reuse_for_the_same_input_gives_the_keyframe(
    task_of: Build, name: str, branch: int
) -> None:
    """Without a table the keyframe's difference is taken as it is, whichever branch is computed."""
    pipe = task_of(name)
    call = taped(pipe).calls[0]
    args, kwargs = call.given
    with rows(pipe) as seen, sampler.reuse(pipe, policy(pipe, branch)), torch.inference_mode():
        pipe.scheduler.set_timesteps(N)
        key = call.module(*args, **kwargs)[0]
        some = key[:, :CHANNELS]
        pipe.scheduler.step(some, pipe.scheduler.timesteps[0], torch.zeros_like(some))
        reduced = call.module(*args, **kwargs)[0]
    assert seen == [len(key), len(key) // 2]
    assert torch.equal(key, call.output) and close(reduced, key)


@pytest.mark.parametrize("name", ["sd", "dit"])
@pytest.mark.parametrize("mix", [Constant(), WEIGHTS])
def test_with_inner_points_it_is_the_half_of_what_these_give(
    task_of: Build, name: str, mix: Mix
) -> None:
    """One mask may have both: the branch that runs reuses its rows of what the keyframe kept."""
    pipe = task_of(name)
    branch = guidance.of(pipe).alone
    points = discover(find_denoiser(pipe))
    inner = candidate_masks(points)["frdiff"]
    with rows(pipe) as seen:
        calls = taped(pipe, policy(pipe, branch, mix=mix, more=inner)).calls
    assert seen[1] == seen[0] // 2
    patch = Patch(pipe, [[points[point] for point in inner]]).install()
    found = []
    for call, mode in zip(calls, (patch.keyframe(), patch.reduced(1)), strict=False):
        with mode, torch.inference_mode():
            args, kwargs = call.given
            found.append(call.module(*args, **kwargs)[0])
    patch.remove()
    key, reduced = found
    w0, w1 = (1.0, 1.0) if mix == Constant() else WEIGHTS.weights[1]
    mine, part = (one.chunk(2)[branch] for one in (reduced, key))
    wanted = w0 * torch.cat([mine, mine]) + w1 * (key - torch.cat([part, part]))
    assert close(calls[1].output, wanted) and not close(calls[1].output, key)
    assert not close(wanted, alone(calls[1], branch).repeat(2, *[1] * (key.dim() - 1)))


def test_a_call_without_guidance_is_computed(
    built: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """Two different samples are no two branches: nothing changes, and it is said once a call."""
    pipe = task("sd", copy.deepcopy(built("sd")), guidance_scale=1.0)
    bare = drawn(pipe)
    plan = policy(pipe, 1)
    caplog.set_level(logging.WARNING, "autofr")
    with rows(pipe) as seen, sampler.reuse(pipe, plan) as patch:
        assert torch.equal(drawn(pipe).latents, bare.latents)
    assert seen == [2] * N and patch.counts == {"key": N}
    said = [one.message for one in caplog.records if "no classifier-free guidance" in one.message]
    assert len(said) == 1


def test_one_sample_without_guidance_is_computed(built: Build) -> None:
    """A batch of one has no halves."""
    pipe = task("sd", copy.deepcopy(built("sd")), guidance_scale=1.0)
    bare = drawn(pipe, [3])
    with sampler.reuse(pipe, policy(pipe, 1)) as patch:
        assert torch.equal(drawn(pipe, [3]).latents, bare.latents)
    assert patch.counts == {"key": N}


def test_guidance_that_ends_is_computed_from_there(built: Build) -> None:
    """The batch that is left has no second branch; with guidance the next call goes on as ever."""
    call = {
        "callback_on_step_end": functools.partial(without_guidance, 1),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    raw = copy.deepcopy(built("sd"))
    ends, goes = task("sd", raw, **call), task("sd", raw)
    with rows(ends) as seen, sampler.reuse(raw, policy(raw, 1)) as patch:
        first = drawn(goes)
        assert drawn(ends).latents.isfinite().all()
        assert torch.equal(drawn(goes).latents, first.latents)
        assert patch.run.kept_bytes == 0
    whole = [4, 2, 2, 4, 2]
    assert seen == [*whole, 4, 2, 2, 2, 2, *whole]  # two of one branch: no more than half


def test_kept_is_what_memory_counts(task_of: Build) -> None:
    """The point itself keeps nothing: one keyframe's scores, and with a third weight two."""
    pipe = task_of("sd")
    score = taped(pipe).calls[0].output.nbytes
    for how, held in ((Constant(), 1), (WEIGHTS, 2)):
        plan = policy(pipe, 1, mix=how)
        with sampler.reuse(pipe, plan) as patch:
            drawn(pipe)
        assert Memory({}, score).of(plan.steps, plan.masks, plan.mix) == held * score
        assert patch.run.peak_bytes == held * score


def test_costs_are_measured_on_half_the_batch(task_of: Build) -> None:
    """What is timed for the mask is the denoiser on half of the rows, which keeps nothing."""
    pipe = task_of("sd")
    masks = {GUIDANCE: (POINTS[1],)}
    with rows(pipe) as seen:
        found = profile(pipe, masks, steps=N, batch=2, seeds=SEEDS)
    assert {*seen} == {4, 2} and seen.count(2) >= 3
    assert found.mask_bytes == {GUIDANCE: 0} and found.masks == masks


def test_a_compiled_denoiser_does_the_same(task_of: Build) -> None:
    """The halved call goes through the compiled denoiser, with a graph of its own."""
    pipe = task_of("dit")
    plan = policy(pipe, guidance.of(pipe).alone, mix=WEIGHTS)
    with sampler.reuse(pipe, plan):
        bare = drawn(pipe)
    torch.compiler.reset()
    pipe.transformer.compile(backend="eager")
    with sampler.reuse(pipe, plan):
        assert close(drawn(pipe).latents, bare.latents)
    torch.compiler.reset()


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        Constant(value=0.5),
        Constant(value=0.0),
        HardSigmoid(tau=30, bias=0.5),
        Table(weights=((), (1.0,), (0.0, 1.0), (), (1.0,))),
        Table(weights=((), (0.5,), (1.0, 1.0), (), (1.0,))),
    ],
)
def test_other_mixes_are_refused(task_of: Build, mix: Mix) -> None:
    """Weights are those of differences, which no λ(t) means; without the branch nothing is."""
    with pytest.raises(ValueError, match=r'steps\[\d\]: "half" reuses a guidance branch'):
        policy(task_of("sd"), 1, mix=mix)


def test_two_branches_alone_are_refused(task_of: Build) -> None:
    """There is nothing that one of them could add to the other."""
    with pytest.raises(ValueError, match=r'masks\["half"\]: more than one guidance branch'):
        policy(task_of("sd"), 0, more=[POINTS[1]])


def test_a_file_gives_the_policy_back(task_of: Build, tmp_path: Path) -> None:
    """It is for the same denoiser as policies without such a mask, and does something else."""
    pipe = task_of("sd")
    plan = policy(pipe, 1, mix=WEIGHTS)
    plan.save(tmp_path / "policy.json")
    again = load(tmp_path / "policy.json")
    assert again == plan and again.digest == plan.digest
    assert plan.digest != policy(pipe, 0, mix=WEIGHTS).digest
    assert plan.model.fingerprint == fingerprint(pipe.unet, discover(pipe.unet))
    assert not {*POINTS} & {*discover(pipe.unet)}
    longer = plan.retime(2 * N)
    assert {*filter(None, map(longer.weights, range(2 * N)))} == {*filter(None, WEIGHTS.weights)}


@pytest.mark.parametrize(("kind", "name"), [("deepcache", "sd"), ("cache-dit", "dit")])
def test_other_tools_cannot_say_it(task_of: Build, kind: str, name: str) -> None:
    """An export is refused, and says at which step."""
    pipe = task_of(name)
    steps = ("key", "half", "key", "half", "key")
    with pytest.raises(InterchangeError, match="step 1 reuses denoiser#guidance1"):
        write(kind, policy(pipe, 1, steps), pipe)


def test_reports_say_what_the_weights_are_of(task_of: Build) -> None:
    """The legend of the strip names the branch; the mix's weights have their own meaning."""
    plan = policy(task_of("sd"), 1, mix=WEIGHTS)
    (half,) = [kind for kind in kinds(plan) if kind.name == "half"]
    assert half.means == "one guidance branch is computed, the other one's difference reused"
    assert half.steps == 3 and any(half.means in text for text in _titles(strip(plan).drawing))
    said = _titles(mix(plan).drawing)
    assert "step 1: 1.000 of the branch found here, 0.900 of the last keyframe's difference" in said


def test_show_and_compare_name_the_branch(task_of: Build) -> None:
    """A mask of one branch is told like any other, by its point."""
    pipe = task_of("sd")
    one, other = policy(pipe, 1, mix=WEIGHTS), policy(pipe, 1, ("key", "jump") * 2 + ("key",))
    assert "mask      half: denoiser#guidance1" in console.words(one)
    said = differences.words(one, other)
    assert "Only A uses half (denoiser#guidance1)." in said


def test_correction_brings_it_nearer(task_of: Build) -> None:
    """Refitted along its own path, such a policy ends nearer to the teacher, and is valid."""
    for name in ("sd", "sd2", "dit"):
        pipe = task_of(name)
        before = policy(pipe, guidance.of(pipe).alone, mix=WEIGHTS)
        after = correct(pipe, before, trajectory(pipe, SEEDS, N))
        assert Policy(**dict(after)).steps == before.steps and after.mix != before.mix
        wanted = drawn(pipe).latents
        errors = []
        for one in (before, after):
            with sampler.reuse(pipe, one):
                errors.append(float((drawn(pipe).latents - wanted).norm()))
        assert errors[1] < 0.9 * errors[0]


def _titles(drawing: Any) -> list[str]:
    return [one.text for one in drawing.iter() if one.tag.endswith("title")]


# -- calibration and choices ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_products_are_those_of_runs_of_the_branch(task_of: Build, name: str) -> None:
    """What `branch` says without a further run is what the branch gives by itself."""
    pipe = task_of(name)
    table, branch = measured(pipe, {})
    tape = taped(pipe)
    scores = np.stack([flat(score) for score in tape.scores])
    mine = np.stack([flat(alone(c, branch)[:, :CHANNELS].contiguous()) for c in tape.calls])
    if name == "dit":  # its scheduler gets both halves of a batch that is guided alike
        scores = scores[:, : scores.shape[1] // 2]
    np.testing.assert_allclose(table.branch[0], scores @ mine.T, rtol=2e-3, atol=1e-2)
    np.testing.assert_allclose(table.branch[1], mine @ mine.T, rtol=2e-3, atol=1e-2)
    assert np.isnan(table.cross).all() and np.isnan(table.own).all()


def test_it_needs_no_further_run(task_of: Build) -> None:
    """The teacher, its keyframes, and the other mask alone: all of whole batches."""
    pipe = task_of("sd")
    masks = {"frdiff": candidate_masks(discover(pipe.unet))["frdiff"]}
    found = []
    for some in (masks, {GUIDANCE: (POINTS[1],), **masks}):
        with rows(pipe) as seen:
            found.append(calibrate(pipe, SEEDS, N, some, max_gap=2))
        assert {*seen} == {4}
        found.append(len(seen))
    bare, few, both, many = found
    assert few == many
    np.testing.assert_array_equal(both.cross[1], bare.cross[0])
    assert bare.branch.size == 0 and both.branch.shape == (2, N, N)


def measured(pipe: Any, more: Any, **kwargs: Any) -> tuple[Calibration, int]:
    """A calibration with the mask `guidance`, and its branch."""
    branch = guidance.of(pipe).alone
    masks = {GUIDANCE: (POINTS[branch],), **more}
    return calibrate(pipe, SEEDS, N, masks, max_gap=3, **kwargs), branch


def flat(score: torch.Tensor) -> np.ndarray:
    return score.flatten().double().numpy()


def test_batches_of_seeds_add_up(task_of: Build) -> None:
    """Products of seeds one by one are those of all at once."""
    pipe = task_of("sd")
    whole, parts = measured(pipe, {})[0], measured(pipe, {}, batch=1)[0]
    np.testing.assert_allclose(parts.branch, whole.branch, rtol=1e-3, atol=1e-2)


def test_saving_and_loading_are_inverse(task_of: Build, tmp_path: Path) -> None:
    """The file gives `branch` back; files of before have none, and other shapes are refused."""
    table = measured(task_of("sd"), {})[0]
    path = tmp_path / "table.npz"
    table.save(path)
    np.testing.assert_array_equal(Calibration.load(path).branch, table.branch)
    with np.load(path) as file:
        numbers = dict(file)
    old = {name: value for name, value in numbers.items() if name != "branch"} | {
        "masks": np.array(["frdiff"])
    }
    np.savez(path, **old)
    assert Calibration.load(path).branch.size == 0
    np.savez(path, **numbers | {"branch": numbers["branch"][:1]})
    with pytest.raises(RunFolderError, match="damaged"):
        Calibration.load(path)


def test_products_of_a_choice_are_those_of_its_vectors() -> None:
    """[b_i, s_k - b_k, s_k' - b_k', s_next] with each other and with s_i, from inner products."""
    rng = np.random.default_rng(0)
    s, b = rng.normal(size=(2, 8, 50))
    steps = np.array([4, 5, 6])
    keys = np.array([[3, 1, 7], [3, 3, 6], [2, 0, 7]])
    gram, wanted = _guided(s @ s.T, np.stack([s @ b.T, b @ b.T]), steps, keys)
    for at, (i, (k, older, after)) in enumerate(zip(steps, keys, strict=True)):
        vectors = np.stack([b[i], s[k] - b[k], s[older] - b[older], s[after]])
        np.testing.assert_allclose(gram[at], vectors @ vectors.T, atol=1e-9)
        np.testing.assert_allclose(wanted[at], vectors @ s[i], atol=1e-9)


def test_what_the_table_says_is_what_the_policy_errs(task_of: Build) -> None:
    """Of a choice: its fitted row, at the teacher's own input, misses the score by what it says."""
    pipe = task_of("sd")
    table, branch = measured(pipe, {})
    rule = Rule(masks=(GUIDANCE, "jump"), max_gap=3)
    costs = Costs(key=1.0, jump=0.1, fixed=0.1, masks={GUIDANCE: 0.5})
    found = choices(table, costs, rule)
    tape = taped(pipe)
    step, gap, before = 4, 1, 2
    row = found.weights[found.names.index(GUIDANCE), step, gap - 1, before]
    mine = [flat(alone(tape.calls[i], branch)) for i in (step, 3, 1)]
    held = [flat(tape.scores[i]) - part for i, part in zip((3, 1), mine[1:], strict=True)]
    made = row[0] * mine[0] + row[1] * held[0] + row[2] * held[1]
    missed = float(((made - flat(tape.scores[step])) ** 2).sum())
    said = found.error[found.names.index(GUIDANCE), step, gap - 1, before, 0]
    assert said == pytest.approx(missed * table.gain[step] ** 2 / table.norm, rel=0.02)
    plain = found.error[found.names.index("jump"), step, gap - 1, before, 0]
    assert said < plain


def test_no_lambda_is_planned_with_it(task_of: Build) -> None:
    """With a λ(t) the mask is left out, with fitted mixes it is a choice."""
    table = measured(task_of("sd"), {})[0]
    costs = Costs(key=1.0, jump=0.1, fixed=0.1, masks={GUIDANCE: 0.5})
    for how, names in ((Constant(), ()), ("fit1", (GUIDANCE,))):
        assert choices(table, costs, Rule(masks=(GUIDANCE,), mix=how)).names == names
