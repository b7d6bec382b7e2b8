"""A policy on quantised weights: whether the gains multiply, and the errors add.

    pip install torchao
    python benchmarks/quantised.py --policy results/ldm4-1.5x/policy.json

Whole `pipe(...)` calls in interleaved pairs; errors are relative L2 of final latents, on seeds that
the policy's search has not used.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import load, write
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autofr import policy_file
from autofr.measure import quality
from autofr.measure.latency import paired
from autofr.policy import Policy
from autofr.runtime.points import find_denoiser
from autofr.runtime.sampler import draw, reuse

SEEDS = range(9000, 9016)


def by_torchao(pipe: Any) -> None:
    """Store the weights of linear layers in 8 bits; they are multiplied in float32."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(find_denoiser(pipe), Int8WeightOnlyConfig())


def by_torch(pipe: Any) -> None:
    """Put linear layers that multiply in 8 bits in the place of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(
            find_denoiser(pipe), {nn.Linear}, torch.qint8, inplace=True
        )


KINDS: dict[str, Callable[[Any], None]] = {
    "float32": lambda pipe: None,
    "int8 weights (torchao)": by_torchao,
    "int8 dynamic (torch)": by_torch,
}


def share(pipe: Any) -> tuple[float, float]:
    """Share of linear layers in the denoiser's weights and in its multiplications."""
    denoiser = find_denoiser(pipe)
    linear = [module for module in denoiser.modules() if isinstance(module, nn.Linear)]
    weights = sum(module.weight.numel() for module in linear) / denoiser.num_parameters()
    with FlopCounterMode(display=False) as counter:
        draw(pipe, range(1), 2)
    by_op = counter.get_flop_counts()[type(denoiser).__name__]
    products = sum(count for op, count in by_op.items() if "conv" not in str(op))
    return weights, products / sum(by_op.values())


def following(pipe: Any, chosen: Policy | None) -> contextlib.AbstractContextManager[Any]:
    """The pipe with a policy inside the block, or as it is."""
    return reuse(pipe, chosen) if chosen else contextlib.nullcontext()


def main() -> None:
    """Measure each kind of weights, without and with the policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ldm4")
    parser.add_argument("--policy", type=Path, default=Path("results/ldm4-1.5x/policy.json"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit per comparison")
    args = parser.parse_args()
    chosen, bare = policy_file.load(args.policy), load(args.model, args.threads)
    weights, products = share(bare)
    teacher = draw(bare, SEEDS, args.steps).latents

    def speedup(first: tuple[Any, Any], second: tuple[Any, Any]) -> str:
        """Time two pairs (pipe, policy or None) of whole calls."""

        def call(pipe: Any, follows: Policy | None) -> None:
            with following(pipe, follows):
                draw(pipe, range(args.batch), args.steps)

        found = paired(
            lambda: call(*first), lambda: call(*second), half_width=0.01, max_seconds=args.seconds
        )
        ratio = found.ratio
        return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}, {found.pairs} pairs)"

    rows = []
    for kind, quantise in KINDS.items():
        pipe = load(args.model, args.threads)
        quantise(pipe)
        own = draw(pipe, SEEDS, args.steps).latents
        for follows in (None, chosen):
            with following(pipe, follows):
                found = draw(pipe, SEEDS, args.steps).latents
            changed = kind != "float32"
            rows.append(
                {
                    "weights": kind,
                    "policy": args.policy.parent.name if follows else "none",
                    "speed-up over float32": speedup((bare, None), (pipe, follows))
                    if changed or follows
                    else "1",
                    "over the same weights": speedup((pipe, None), (pipe, follows))
                    if changed and follows
                    else "",
                    "error to float32": f"{quality.relative_error(found, teacher).mean():.4f}",
                    "error to the same weights": f"{quality.relative_error(found, own).mean():.4f}",
                }
            )
    note = (
        f"A policy on quantised linear layers: they are {100 * weights:.0f} % of the denoiser's"
        f" weights and {100 * products:.0f} % of its multiplications (convolutions are the rest)."
        " So 8 bits can gain little time here; the policy's own gain is what it is in float32."
        f" Batch {args.batch}; errors on {len(SEEDS)} seeds."
    )
    options = f"--policy {args.policy} --threads {args.threads} --seconds {args.seconds:g}"
    write("quantised", bare, f"python benchmarks/quantised.py {options}", rows, note)


if __name__ == "__main__":
    main()
