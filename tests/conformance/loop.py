"""The smallest sampling loop around a tiny model, written as diffusers' pipelines write theirs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from laws import ALL
from torch.nn.functional import pad

STEPS = 6


def scheduler_of(prediction: str) -> Any:
    """The plain first-order solver of a prediction type."""
    if prediction == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)


class Loop:
    """A pipe: `transformer`, `scheduler` and a call, for any row of the tiny models.

    `split` calls the denoiser twice per step, as pipelines with guidance do that keep the two
    branches apart; `start` leaves the first passes out without a word to the scheduler.
    """

    def __init__(
        self, name: str, scheduler: Any = None, split: bool = False, start: int = 0
    ) -> None:
        self.tiny = ALL[name]
        self.transformer = self.tiny.build()
        self.scheduler = scheduler or scheduler_of(self.tiny.prediction)
        self.split, self.start = split, start

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = STEPS,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        latents = self._noise(batch_size, generator)
        self.scheduler.set_timesteps(num_inference_steps)
        if hasattr(self.scheduler, "init_noise_sigma"):
            latents = latents * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps[self.start :]:
            score = self._score(latents, timestep, 0)
            if self.split:
                score = score + 2.0 * (score - self._score(latents, timestep, 1))
            latents = self.scheduler.step(score, timestep, latents, return_dict=False)[0]
        images = torch.zeros(batch_size, 8, 8, 3) + latents.flatten(1).mean(1)[:, None, None, None]
        return SimpleNamespace(images=images.numpy())

    def _noise(self, batch: int, generator: Any) -> torch.Tensor:
        given = next(iter(self.tiny.inputs(0, 0.5, batch).values()))
        shape = (torch.stack(given) if isinstance(given, list) else given).shape
        each = generator if isinstance(generator, Sequence) else [generator] * batch
        return torch.stack([torch.randn(shape[1:], generator=one) for one in each])

    def _score(self, latents: torch.Tensor, timestep: torch.Tensor, branch: int) -> torch.Tensor:
        """The denoiser's output, cut or padded to the shape of the latents."""
        last = float(self.scheduler.config.num_train_timesteps)
        inputs = self.tiny.inputs(0, min(1.0, float(timestep) / last), len(latents))
        if self.start:  # then it has to be the scheduler's very number
            inputs["timestep"] = timestep.expand(len(latents))
        name, given = next(iter(inputs.items()))
        scaled = latents * (1 + 0.1 * branch)
        if hasattr(self.scheduler, "scale_model_input"):
            scaled = self.scheduler.scale_model_input(scaled, timestep)
        inputs[name] = list(scaled) if isinstance(given, list) else scaled
        found = self.transformer(**inputs)[0]
        found = torch.stack(found) if isinstance(found, list) else found
        found = found[tuple(slice(size) for size in latents.shape)]
        missing = [want - have for want, have in zip(latents.shape, found.shape, strict=True)]
        return pad(found, [n for size in reversed(missing) for n in (0, size)]).clamp(-5, 5)
