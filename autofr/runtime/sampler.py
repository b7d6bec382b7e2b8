"""Apply a policy to a pipe: check that it fits, compile it once, install the hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autofr import hub
from autofr.errors import ModelError, PolicyError
from autofr.mix import JUMP, KEY, Mix, executed
from autofr.policy import AS_IS, Guidance, Keep, Model, Policy, Sampler
from autofr.runtime import halves
from autofr.runtime.families import discover
from autofr.runtime.patch import Patch
from autofr.runtime.points import Pipe, Point, dtype_of, find_denoiser, fingerprint, weights_hash
from autofr.runtime.recording import record
from autofr.runtime.root import HOLD, Row
from autofr.runtime.store import COMPUTE, Packing

_ATTRIBUTE = "_autofr_patch"
_CONFIG_FIELDS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type",
    "timestep_spacing", "steps_offset", "clip_sample", "thresholding", "set_alpha_to_one",
    "solver_order", "algorithm_type", "solver_type", "lower_order_final", "final_sigmas_type",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "shift",
    "skip_prk_steps", "rescale_betas_zero_snr", "predict_x0", "variance_type", "flow_shift",
    "use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal", "time_shift_type",
    "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "timestep_type",
    "interpolation_type", "original_inference_steps", "euler_at_final", "solver_p",
)  # fmt: skip


def apply(pipe: Pipe, policy: Policy | str | Path) -> Patch:
    """Make every later `pipe(...)` call follow the policy; applying again replaces it.

    Args: pipe, a diffusers pipeline; policy, a Policy, the path of its JSON file, or its reference
        on the hub (`hub:owner/name@revision`).
    Returns: the installed Patch (its `counts` say what the last run computed).
    Raises: PolicyError when the policy is not valid or was made for another denoiser, point set
        or scheduler; a call with another step count raises it too. HubError when the hub does not
        give it.
    """
    if not isinstance(policy, Policy):
        policy = hub.read(policy)
    points = check(pipe, policy)
    remove(pipe)
    masks, plan = compile_plan(policy, points)
    order = max([1, *(len(weights) - 1 for _, weights in plan)])
    keep = policy.keep
    packing = Packing(dtype=getattr(torch, keep.dtype) if keep.dtype else None, host=keep.host)
    patch = Patch(pipe, masks, plan, policy.sampler.replaces, order, packing).install()
    setattr(find_denoiser(pipe), _ATTRIBUTE, patch)
    return patch


def remove(pipe: Pipe) -> None:
    """Restore the pipe; a pipe without a policy is left as it is."""
    denoiser = find_denoiser(pipe)
    patch = vars(denoiser).pop(_ATTRIBUTE, None)
    if patch is not None:
        patch.remove()


@contextmanager
def reuse(pipe: Pipe, policy: Policy | str | Path) -> Iterator[Patch]:
    """Apply the policy inside the block and restore the pipe afterwards, also on errors."""
    patch = apply(pipe, policy)
    try:
        yield patch
    finally:
        remove(pipe)


def compile_plan(policy: Policy, points: dict[str, Point]) -> tuple[list[list[Point]], list[Row]]:
    """Turn names into the tables that the hooks index: masks, and one row per step."""
    names = [name for name in policy.masks if name in policy.steps]
    masks = [[points[point] for point in policy.masks[name]] for name in names]
    rows: list[Row] = []
    for i, step in enumerate(policy.steps):
        weights = policy.weights(i)
        runs = executed(step, weights)
        index = {KEY: COMPUTE, JUMP: HOLD}.get(runs)
        rows.append((names.index(runs) + 1 if index is None else index, weights))
    return masks, rows


def check(pipe: Pipe, policy: Policy) -> dict[str, Point]:
    """Return the pipe's points, if the policy was made for this denoiser and scheduler.

    Raises: PolicyError saying what differs.
    """
    denoiser = find_denoiser(pipe)
    found = type(denoiser).__name__
    if found != policy.model.denoiser:
        raise PolicyError(f"the policy is for a {policy.model.denoiser}, this pipe has a {found}")
    own = discover(denoiser)
    points = own | halves.POINTS
    unknown = sorted({p for mask in policy.masks.values() for p in mask} - set(points))
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if unknown[3:] else "")
        raise PolicyError(
            f"the policy names points that this denoiser does not have: {shown};"
            f" it has {len(points)}, such as {next(iter(points))}"
        )
    mark = fingerprint(denoiser, own)
    if mark != policy.model.fingerprint:
        raise PolicyError(
            f"the policy is for another {found} configuration (fingerprint"
            f" {policy.model.fingerprint}, this one has {mark}): search again for this model"
        )
    scheduler = type(pipe.scheduler).__name__
    if scheduler != policy.sampler.scheduler:
        raise PolicyError(
            f"the policy is for {policy.sampler.scheduler}, this pipe has {scheduler}: set that"
            " scheduler, or search again with this one"
        )
    here = scheduler_config(pipe)
    for name, value in policy.sampler.config.items():
        if here.get(name) != value:
            raise PolicyError(
                f"the policy is for {scheduler} with {name}={value!r}, this pipe has"
                f" {here.get(name)!r}: set it, or search again"
            )
    return points


def scheduler_config(pipe: Pipe) -> dict[str, Any]:
    """The fields of the scheduler's configuration that change what a policy does."""
    config = pipe.scheduler.config
    return {name: config[name] for name in _CONFIG_FIELDS if name in config}


def describe(
    pipe: Pipe,
    steps: int,
    replaces: int,
    latent_shape: tuple[int, ...],
    guidance: Guidance = "none",
) -> Sampler:
    """Describe how this pipe samples, for a policy's `sampler` field."""
    return Sampler(
        scheduler=type(pipe.scheduler).__name__,
        config=scheduler_config(pipe),
        num_inference_steps=steps,
        replaces=replaces,
        prediction_type=str(pipe.scheduler.config.get("prediction_type", "epsilon")),
        guidance=guidance,
        latent_shape=latent_shape,
        dtype=dtype_of(pipe),
    )


def compose(
    pipe: Pipe,
    name: str,
    steps: Sequence[str],
    masks: Mapping[str, Sequence[str]],
    mix: Mix,
    *,
    replaces: int,
    latent_shape: tuple[int, ...],
    guidance: Guidance = "none",
    keep: Keep = AS_IS,
) -> Policy:
    """Write a policy for this pipe as it is now; masks that no step uses are left out.

    `latent_shape` is that of one sample.
    """
    denoiser = find_denoiser(pipe)
    return Policy(
        model=Model(
            name=name,
            denoiser=type(denoiser).__name__,
            fingerprint=fingerprint(denoiser, discover(denoiser)),
            weights=weights_hash(denoiser),
        ),
        sampler=describe(pipe, len(steps), replaces, latent_shape, guidance),
        masks={name: tuple(points) for name, points in masks.items() if name in steps},
        steps=tuple(steps),
        mix=mix,
        keep=keep,
    )


@dataclass(frozen=True)
class Samples:
    """Images (n, 3, h, w) in [0, 1] on the CPU and final latents (n, c, h, w) of some seeds.

    Latents are 0 where the pipe puts those of a picture instead (inpainting).
    """

    images: torch.Tensor
    latents: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Concatenate batches."""
        images = torch.cat([part.images for part in parts])
        return cls(images, torch.cat([part.latents for part in parts]))


def batches(seeds: Sequence[int], size: int | None) -> list[Sequence[int]]:
    """Cut seeds into batches of a size; None leaves them in one."""
    step = size or max(1, len(seeds))
    return [seeds[start : start + step] for start in range(0, len(seeds), step)]


def draw(pipe: Pipe, seeds: Sequence[int], steps: int) -> Samples:
    """Call the pipe once, one generator per seed, and return images and final latents.

    A sample depends on its own seed alone, not on the batch it is drawn in. Pipes that draw from
    prompts, labels or images are called through a `Task`.
    Raises: ModelError for a pipe that wants more than a batch size.
    """
    if "batch_size" not in inspect.signature(pipe.__call__).parameters:
        raise ModelError(
            f"{type(pipe).__name__} draws from prompts, labels or images: wrap it, as in"
            " autofr.Task(pipe, [{'prompt': 'a cat'}, ...])"
        )
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with record(pipe) as tape, torch.inference_mode():
        images = pipe(
            batch_size=len(seeds),
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
        ).images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
    # Some pipelines carry the latents of both guidance branches along; the first half is drawn.
    latents, drawn = tape.latents[-1][: len(seeds)], tape.drawn()
    if drawn is not None:
        latents = latents * drawn[: len(seeds)]
    return Samples(pixels, latents.float().cpu())
