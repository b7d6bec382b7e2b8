"""One resumable training loop, bounded by wall time, for every stage of a recipe."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from autofr import files


def mixed_precision(like: torch.Tensor) -> torch.autocast:
    """bf16 where it is safe: twice as fast on CPUs with AVX512-BF16 or AMX, and on GPUs."""
    return torch.autocast(like.device.type, torch.bfloat16)


Loss = Callable[[int, float, torch.Generator], torch.Tensor]


def learning_rate(fraction: float, peak: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Warm up linearly, then follow a cosine down to `floor * peak` at the end of the time."""
    if fraction < warmup:
        return peak * (fraction + 1e-3) / (warmup + 1e-3)
    phase = min(1.0, (fraction - warmup) / (1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * phase)))


class _Run:
    """A module under training with its optimiser, averaged weights and checkpoint."""

    def __init__(self, module: torch.nn.Module, lr: float, ema: float, checkpoint: Path) -> None:
        self.module, self.ema, self.checkpoint = module, ema, checkpoint
        self.optimiser = torch.optim.AdamW(
            module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        self.averaged = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        if checkpoint.is_file():
            self._restore(torch.load(checkpoint, weights_only=True, map_location="cpu"))

    def _restore(self, saved: dict[str, Any]) -> None:
        self.module.load_state_dict(saved["module"])
        self.optimiser.load_state_dict(saved["optimiser"])
        for key, value in saved["averaged"].items():
            self.averaged[key].copy_(value)
        self.step, self.seconds, self.loss = saved["step"], saved["seconds"], saved["loss"]

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        _write(state, self.checkpoint)

    def keep(self, number: int) -> None:
        """Write the averaged weights of this moment beside the checkpoint."""
        name = f"{self.checkpoint.stem}-{number}.pt"
        state = {"seconds": self.seconds, "weights": self.averaged}
        _write(state, self.checkpoint.with_name(name))

    def advance(self, value: torch.Tensor, lr: float) -> None:
        """Take one optimiser step down the gradient of `value`."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        if self.ema:
            blend = min(self.ema, (1 + self.step) / (10 + self.step))
            weights = list(self.module.state_dict().values())
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), weights, 1 - blend)
        if self.step % 20 == 0:
            last = float(value.detach())
            self.loss = last if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * last


def _write(state: dict[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write(path, buffer.getvalue())


def kept(work: Path, name: str) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The moments that a training kept: seconds of training and averaged weights, in order.

    They come to the CPU, wherever they were trained.
    """
    found = [
        torch.load(path, weights_only=True, map_location="cpu")
        for path in work.glob(f"{name}-*.pt")
    ]
    return sorted(((one["seconds"], one["weights"]) for one in found), key=lambda one: one[0])


def train(
    name: str,
    module: torch.nn.Module,
    loss: Loss,
    seconds: float,
    work: Path,
    *,
    seed: int,
    lr: float,
    ema: float = 0.0,
    save_every: float = 60.0,
    moments: int = 1,
) -> torch.nn.Module:
    """Minimise `loss(step, fraction of time used, generator)` for `seconds` of training time.

    The same call after an interruption continues from its checkpoint in `work`; each step's
    randomness depends on (seed, step) alone. `moments` divide the time into equal parts; after each
    but the last the averaged weights are kept. Returns the averaged module when `ema` > 0, else
    the module.
    """
    run = _Run(module, lr, ema, work / f"{name}.pt")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=seconds, completed=int(run.seconds))
        saved_at = run.seconds
        module.train()
        while run.seconds < seconds:
            started = time.monotonic()
            fraction = run.seconds / seconds
            generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
            run.advance(loss(run.step, fraction, generator), learning_rate(fraction, lr))
            run.seconds += time.monotonic() - started
            passed = int(moments * min(run.seconds / seconds, 1))
            if int(moments * fraction) < passed < moments:
                run.keep(passed)
            if run.step % 20 == 0:
                said = f"{name}  step {run.step}  loss {run.loss:.4f}"
                progress.update(bar, completed=min(run.seconds, seconds), description=said)
            if run.seconds - saved_at > save_every:
                run.save()
                saved_at = run.seconds
        run.save()
    if ema:
        module.load_state_dict(run.averaged)
    return module.eval()
