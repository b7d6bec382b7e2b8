"""autofr: automatic policy search for feature reuse in diffusion models.

autofr search --model ldm4 --budget 1.5x      # finds a policy for this device
autofr.apply(pipe, "policy.json")             # every pipe(...) call uses it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autofr.errors import AutofrError as AutofrError
    from autofr.hub import read as load
    from autofr.policy import Policy as Policy
    from autofr.runtime.sampler import apply as apply
    from autofr.runtime.sampler import remove as remove
    from autofr.runtime.sampler import reuse as reuse
    from autofr.task import Task as Task

# Torch and diffusers load with the first name that needs them, not with `import autofr`.
_HOME = {
    "AutofrError": "autofr.errors",
    "Policy": "autofr.policy",
    "load": "autofr.hub",
    "apply": "autofr.runtime.sampler",
    "remove": "autofr.runtime.sampler",
    "reuse": "autofr.runtime.sampler",
    "Task": "autofr.task",
}
_NAME = {"load": "read"}  # where it is called otherwise there
__all__ = ["AutofrError", "Policy", "Task", "apply", "load", "remove", "reuse"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autofr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), _NAME.get(name, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
