"""The model card of a policy: what was measured, how to use the policy, what it refuses."""

from __future__ import annotations

import re

from autofr.hub_place import FILE, REPOSITORY
from autofr.memory import size
from autofr.policy import Interval, Measured, Policy, Provenance

_CARD = """\
---
library_name: autofr
tags:
- autofr
- feature-reuse
- diffusers
{base}---

# {title}

`{file}` tells the stock diffusers pipeline how to sample {name} faster: of {steps} steps of
{scheduler}{instead}, {keys} are computed in full, the others reuse kept features or hold the score.
It holds no weights and changes none; `autofr` follows it.

## What was measured

{measured}

## How to use it

```python
import autofr
autofr.apply(pipe, "{reference}")  # pipe: your diffusers pipeline of the model
result = pipe(*your_arguments, num_inference_steps={replaces})
```

`{pinned}@COMMIT` is the policy of that commit and no later one. On another device, or with another
batch, dtype or resolution, the gain is another; this measures it:

```sh
autofr evaluate --model MODEL --policy {reference}
```

## What it refuses

- a denoiser other than this {denoiser} (fingerprint of architecture and reuse points:
  {fingerprint});
- a scheduler other than {scheduler}, or one with other settings;
- a call with another number of steps than {counts}.
"""


def card(policy: Policy, reference: str) -> str:
    """Write a policy's model card: what was measured and how, how to use it, what it refuses."""
    model, sampler, measured = policy.model, policy.sampler, policy.measured
    name, steps, replaces = _line(model.name), len(policy.steps), sampler.replaces
    based = re.fullmatch(REPOSITORY, model.name, re.ASCII)
    gain = f": {measured.speedup.value:.2f}x faster" if measured else ""
    found = "\n".join(f"| {what} | {value} |" for what, value in _rows(measured))
    made = f"\n\n{_origin(policy.provenance)}" if policy.provenance else ""
    return _CARD.format(
        base=f"base_model: {model.name}\n" if based else "",
        title=f"{name}{gain}",
        file=FILE,
        name=name,
        steps=steps,
        scheduler=_line(sampler.scheduler),
        instead="" if steps == replaces else f", instead of {replaces}",
        keys=len(policy.keyframes),
        measured=found + made,
        reference=reference,
        pinned=reference.partition("@")[0],
        replaces=replaces,
        denoiser=_line(model.denoiser),
        fingerprint=_line(model.fingerprint),
        counts=" or ".join(str(n) for n in sorted({steps, replaces})),
    )


def _origin(made: Provenance) -> str:
    return (
        f"Found on {_line(made.date)} by autofr {_line(made.autofr)} in {made.trials} trials:"
        f" `{_line(made.command)}`"
    )


def _rows(measured: Measured | None) -> list[tuple[str, str]]:
    """What was measured, then the protocol; the header first."""
    if measured is None:
        return [("what", "value"), ("---", "---"), ("speed-up", "not measured yet")]
    rows = [
        ("what", "value (95 % interval)"),
        ("---", "---"),
        ("speed-up of the whole call", _spread(measured.speedup, ".2f", "x")),
        ("time per call without the policy", f"{measured.teacher_seconds:.3g} s"),
        ("time per call with it", f"{measured.policy_seconds:.3g} s"),
        ("relative error of the final latents", _spread(measured.trajectory_error, ".2g")),
        ("PSNR to the images without it", f"{measured.psnr:.1f} dB"),
    ]
    for one in measured.judged:
        title = _line(one.title)
        rows += [
            (f"{title}, without / with", f"{one.teacher:.3f} / {one.policy:.3f}"),
            (f"{title}, difference", _spread(one.difference, "+.3f")),
        ]
    return [
        *rows,
        ("samples", f"{measured.samples}, seeds {_line(measured.seeds)}"),
        ("device", f"{_line(measured.device)}, CPU threads: {measured.threads}"),
        ("batch", str(measured.batch)),
        ("dtype", _line(measured.dtype)),
        ("versions", ", ".join(f"{_line(k)} {_line(v)}" for k, v in measured.versions.items())),
        ("kept between steps", size(measured.kept_bytes)),
    ]


def _spread(value: Interval, form: str, unit: str = "") -> str:
    return f"{value.value:{form}}{unit} ({value.low:{form}} to {value.high:{form}})"


def _line(text: str) -> str:
    """A text of the policy where Markdown wants one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
