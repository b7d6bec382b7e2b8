"""Laws of the profile: what it says of points is what the network really computes."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import ddim, make_pipe

from autofr.errors import MeasurementError, ModelError
from autofr.measure.costs import Costs
from autofr.measure.profile_file import Profile
from autofr.measure.profiling import costs_of, profile
from autofr.measure.similarity import measure_similarity
from autofr.runtime.families import discover
from autofr.runtime.points import SCORE, fingerprint
from autofr.runtime.sampler import draw

N, GAPS, SEEDS = 6, 3, [0, 1, 2]
MASKS = {
    "cut": ("up_blocks.1#stage",),
    "reuse": ("mid_block.resnets.0#branch", "mid_block.attentions.0#attn"),
}


def profiled(pipe, **changes):
    """A small profile of this pipe."""
    fields = dict(steps=N, batch=4, seeds=SEEDS, max_gap=GAPS)
    return profile(pipe, MASKS, **fields | changes)


def similarity(pipe, gaps=GAPS, on_progress=None):
    """Similarities and bytes alone, without latency."""
    return measure_similarity(pipe, discover(pipe.unet), N, SEEDS, gaps, on_progress)


@pytest.fixture(scope="module")
def measured():
    """A pipe and its profile."""
    pipe = make_pipe()
    return pipe, profiled(pipe)


def seen(pipe, module):
    """(input, output) of a module at every denoiser call of the teacher."""
    pairs = []
    handle = pipe.unet.get_submodule(module).register_forward_hook(
        lambda _, args, output: pairs.append((args[0] if args else None, output))
    )
    draw(pipe, SEEDS, N)
    handle.remove()
    return pairs


def tensors(pipe, name):
    """A point's tensor at every step, taken by hand."""
    if name == SCORE:
        return [output for _, output in seen(pipe, "conv_out")]
    path, kind = name.split("#")
    if kind == "conv":
        return [output for _, output in seen(pipe, f"{path}.conv1")]
    if kind == "branch":
        return [output for _, output in seen(pipe, f"{path}.conv2")]
    if kind == "attn":
        scale = pipe.unet.get_submodule(path).rescale_output_factor
        return [output - given / scale for given, output in seen(pipe, path)]
    return [output for _, output in seen(pipe, path)]


# -- similarity ----------------------------------------------------------------------------------


NAMES = [
    SCORE, "down_blocks.0.resnets.0#conv", "up_blocks.1.resnets.2#branch",
    "mid_block.attentions.0#attn", "up_blocks.1#stage",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_similarities_are_those_of_the_tensors(measured, name):
    """Cosine and relative L1 are means over samples of each step against each step before."""
    pipe, found = measured
    steps = [tensor.flatten(1).double() for tensor in tensors(pipe, name)]
    entry = found.similarity[name]
    for gap in range(1, GAPS + 1):
        for step in range(gap, N):
            now, then = steps[step], steps[step - gap]
            cosine = (now * then).sum(1) / (now.norm(dim=1) * then.norm(dim=1))
            change = (now - then).abs().sum(1) / then.abs().sum(1)
            assert entry.cosine[gap - 1][step] == pytest.approx(float(cosine.mean()), abs=2e-4)
            assert entry.relative_l1[gap - 1][step] == pytest.approx(float(change.mean()), abs=2e-4)


def empty_before_the_gap(table, steps=N):
    """Whether exactly the entries without an earlier step are None."""
    return len(table) == GAPS and all(
        [value is None for value in row] == [step < gap for step in range(steps)]
        for gap, row in enumerate(table, start=1)
    )


def test_steps_before_the_gap_have_no_similarity(measured):
    """Entries are None exactly where step < gap, for every point and the score."""
    pipe, found = measured
    assert set(found.similarity) == {*discover(pipe.unet), SCORE}
    for entry in found.similarity.values():
        assert empty_before_the_gap(entry.cosine) and empty_before_the_gap(entry.relative_l1)


@pytest.mark.parametrize("solver", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_stages_of_one_step_count_once(pipe, solver):
    """Solvers that call twice in a step are compared step by step, by the first call."""
    pipe.scheduler = getattr(diffusers, solver).from_config(ddim().config)
    done = []
    found, _ = similarity(pipe, on_progress=lambda *progress: done.append(progress))
    scores = tensors(pipe, SCORE)
    assert len(scores) > N
    for entry in found.values():
        assert empty_before_the_gap(entry.cosine)
    assert done == [(step + 1, N) for step in range(N)]
    second = {"HeunDiscreteScheduler": 2, "PNDMScheduler": 4}[solver]  # PNDM starts Runge-Kutta
    a, b = scores[second].flatten(1), scores[0].flatten(1)
    cosine = float(torch.nn.functional.cosine_similarity(a, b).mean())
    assert found[SCORE].cosine[0][1] == pytest.approx(cosine, abs=2e-4)


@pytest.mark.parametrize("gaps", [1, 3])
def test_no_more_steps_are_held_than_are_compared(pipe, gaps):
    """However long the run, at most `max_gap` steps and the current one are in memory."""
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(module, args, output):
        nonlocal most
        held.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in held))

    handle = pipe.unet.up_blocks[1].register_forward_hook(watch)
    similarity(pipe, gaps)
    handle.remove()
    assert len(held) == N
    assert most <= gaps + 1


def test_similarities_repeat(pipe):
    """The same seeds give the same numbers; the progress names every step."""
    done = []
    first = similarity(pipe, on_progress=lambda *progress: done.append(progress))
    assert similarity(pipe) == first
    assert done == [(step + 1, N) for step in range(N)]


# -- bytes and seconds ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[1:])
def test_bytes_are_those_of_the_tensors(measured, name):
    """A point's bytes are its kept tensor's at the batch of the calls."""
    pipe, found = measured
    point = next(p for p in found.points if p.name == name)
    whole = tensors(pipe, name)[0]
    assert point.bytes == whole.nbytes // len(SEEDS) * found.batch


def test_bytes_of_a_mask_are_its_points(measured):
    """Masks keep what their points keep."""
    found = measured[1]
    sizes = {point.name: point.bytes for point in found.points}
    assert found.mask_bytes == {name: sum(sizes[p] for p in mask) for name, mask in MASKS.items()}


def test_every_point_has_a_row(measured):
    """The profile describes the denoiser, each of its points, and the masks it was given."""
    pipe, found = measured
    points = discover(pipe.unet)
    assert [(p.name, p.kind) for p in found.points] == [(n, p.kind) for n, p in points.items()]
    assert found.fingerprint == fingerprint(pipe.unet, points)
    assert (found.denoiser, found.scheduler) == ("UNet2DModel", "DDIMScheduler")
    assert (found.steps, found.batch, found.dtype) == (N, 4, "float32")
    assert found.masks == MASKS and set(found.mask_seconds) == set(MASKS)
    inner = [p for p in found.points if p.kind != "stage"]
    assert all(p.whole_seconds > 0 for p in inner)
    assert all(p.skippable_seconds <= p.whole_seconds for p in inner if p.kind != "conv")


def test_the_costs_are_the_profiles_seconds(measured):
    """The cost model of planning reads the profile's numbers and nothing else."""
    found = measured[1]
    expected = Costs(
        found.key_seconds, found.jump_seconds, found.fixed_seconds, found.mask_seconds
    )  # fmt: skip
    assert found.costs == expected
    assert found.costs.of_call(["key", "cut", "jump"]) > 0


def test_measuring_costs_calls_what_it_names(pipe, monkeypatch):
    """Keyframes run the whole network, masks skip, jumps do not call it at all."""
    from autofr.measure import profiling

    ran: list[str] = []
    for name in ("conv_in", "mid_block"):
        module = pipe.unet.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: ran.append(name))

    def trace(call, evaluate, steps, masks, **kwargs):
        counts = {}
        for name, work in {
            "key": lambda: evaluate("key"),
            "refresh": kwargs["refresh"],
            "cut": lambda: evaluate("cut"),
            "full": lambda: call(["key"] * steps),
            "idle": lambda: call(["key", *["jump"] * (steps - 1)]),
            "short": lambda: call(["key", "jump"]),
        }.items():
            ran.clear()
            work()
            counts[name] = (ran.count("conv_in"), ran.count("mid_block"))
        assert counts["key"] == counts["refresh"] == (1, 1)
        assert counts["full"] == (N, N)
        assert counts["idle"] == counts["short"] == (1, 1)
        assert counts["cut"][0] == 1 and masks == ["cut", "reuse"]
        return Costs(1.0, 0.0, 0.0, {"cut": 0.5, "reuse": 0.6})

    monkeypatch.setattr(profiling, "measure_costs", trace)
    assert costs_of(pipe, discover(pipe.unet), MASKS, N, 2).masks == {"cut": 0.5, "reuse": 0.6}


# -- the value -----------------------------------------------------------------------------------


def test_the_file_gives_back_the_profile(measured, tmp_path):
    """A profile comes back from its JSON file as it was."""
    found = measured[1]
    found.save(tmp_path / "profile.json")
    again = Profile.model_validate_json((tmp_path / "profile.json").read_text())
    assert again == found
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_profiling_leaves_the_pipe_as_it_was(pipe):
    """No hook stays on the denoiser or the scheduler."""

    def traces():
        modules = {
            n: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in pipe.unet.named_modules()
        }
        return modules, sorted(vars(pipe.scheduler))

    bare = draw(pipe, SEEDS, N).latents
    before = traces()
    profiled(pipe)
    assert traces() == before
    assert torch.equal(draw(pipe, SEEDS, N).latents, bare)


def test_nan_is_refused(pipe):
    """A network that gives NaN is an error that names the step."""
    pipe.unet.conv_out.bias.data[:] = float("nan")
    with pytest.raises(MeasurementError, match="NaN or infinity at step 0"):
        profiled(pipe)


def test_a_denoiser_without_points_is_refused():
    """An unknown class is an error that lists the supported ones."""
    strange = SimpleNamespace(unet=torch.nn.Linear(1, 1), scheduler=ddim())
    with pytest.raises(ModelError, match=r"points in Linear; supported denoisers: .*UNet2DModel"):
        profiled(strange)


def test_no_more_is_drawn_at_once_than_a_batch(pipe):
    """What is profiled at batch 1 is drawn at batch 1, so that it fits where the pipe fits."""
    one, three = (profiled(pipe, batch=batch) for batch in (1, 3))
    assert one.similarity == profiled(pipe, batch=1, seeds=SEEDS[:1]).similarity
    assert [point.bytes for point in three.points] == [3 * point.bytes for point in one.points]
