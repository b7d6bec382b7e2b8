"""One resumable training loop, bounded by wall time, for every stage of a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Loss = Callable[[int, float, torch.Generator], torch.Tensor]


def learning_rate(fraction: float, peak: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Warm up linearly, then follow a cosine down to `floor * peak` at the end of the time."""
    if fraction < warmup:
        return peak * (fraction + 1e-3) / (warmup + 1e-3)
    phase = min(1.0, (fraction - warmup) / (1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * phase)))


def train(
    name: str,
    module: torch.nn.Module,
    loss: Loss,
    *,
    seconds: float,
    checkpoint: Path,
    lr: float,
    seed: int,
    ema: float = 0.0,
    save_every: float = 60.0,
) -> torch.nn.Module:
    """Minimise `loss(step, fraction of time used, generator)` for `seconds` of training time.

    The same call after an interruption continues from `checkpoint`; each step's randomness
    depends on (seed, step) alone. Returns the averaged module when `ema` > 0, else the module.
    """
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    averaged = {key: value.detach().clone() for key, value in module.state_dict().items()}
    step, used, average = 0, 0.0, float("nan")
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        for key, value in saved["averaged"].items():
            averaged[key].copy_(value)
        step, used, average = saved["step"], saved["seconds"], saved["loss"]

    def save() -> None:
        state = dict(module=module.state_dict(), optimiser=optimiser.state_dict())
        state |= dict(averaged=averaged, step=step, seconds=used, loss=average)
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint)

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=seconds)
        progress.update(bar, completed=used)
        saved_at = used
        module.train()
        while used < seconds:
            started = time.monotonic()
            fraction = used / seconds
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(fraction, lr)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            value = loss(step, fraction, generator)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            step += 1
            if ema:
                blend = min(ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(averaged.values()), list(module.state_dict().values()), 1 - blend
                    )
            used += time.monotonic() - started
            if step % 20 == 0:
                last = float(value.detach())
                average = last if math.isnan(average) else 0.95 * average + 0.05 * last
                progress.update(
                    bar,
                    completed=min(used, seconds),
                    description=f"{name}  step {step}  loss {average:.4f}",
                )
            if used - saved_at > save_every:
                save()
                saved_at = used
        save()
    if ema:
        module.load_state_dict(averaged)
    return module.eval()
