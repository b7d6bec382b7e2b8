"""The only code that replaces a forward: hooks on modules, and what they do at reuse points."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import nn

from autofr.errors import PolicyError
from autofr.runtime.points import Given, Point
from autofr.runtime.store import MISSING, Run, Slot, map_tensors

HOOK = "autofr"

Action = Callable[[nn.Module, Given], Any]
"""(module, its arguments) -> its output, or MISSING."""


class Hook(ModelHook):
    """A hook of a patch; whoever copies or pickles a module with one is refused."""

    installed: Any = None  # the forward that calls this hook

    def put_on(self, module: nn.Module) -> None:
        """Register on a module, outside of what is on it.

        A method where diffusers puts a partial: `torch.compile` knows a method by its code and a
        partial by its identity, and would compile every block of a transformer anew.
        """
        HookRegistry.check_if_exists_or_initialize(module).register_hook(self, HOOK)
        forward = vars(module)["forward"].func
        forward.__wrapped__ = type(module).forward  # has the signature that pipelines look at
        self.installed = module.forward = types.MethodType(forward, module)

    def is_on(self, module: nn.Module) -> bool:
        """Whether calling the module calls this hook: offloading drops what came after its own."""
        forward = module.forward
        while forward is not None and forward is not self.installed:
            forward = getattr(forward, "__wrapped__", None)
        return forward is not None and not self._bypassed

    @property
    def _bypassed(self) -> bool:
        """Whether diffusers, removing a hook that this one stands on, has cut this one out."""
        return getattr(self.fn_ref.forward, "func", None) != self.new_forward

    def take_off(self, module: nn.Module) -> None:
        """Remove from a module, with diffusers' traces where no other hook is left."""
        outer, registry = module.forward, HookRegistry.check_if_exists_or_initialize(module)
        if self._bypassed:
            self.fn_ref.original_forward = self.fn_ref.forward
        above = registry._fn_refs[registry._hook_order.index(HOOK) + 1 :][:1]
        replaced = [ref.forward for ref in above if ref.original_forward is not None]
        registry.remove_hook(HOOK, recurse=False)
        for ref, forward in zip(above, replaced, strict=False):  # diffusers drops a new_forward
            ref.original_forward, ref.forward = ref.forward, forward
        if outer is not self.installed:  # offloading has come later, and calls this by its name
            if vars(module).get("_old_forward") is self.installed:
                module._old_forward = module.forward
            module.forward = outer
        if not registry.hooks:
            if getattr(module.forward, "__func__", None) is type(module).forward:
                vars(module).pop("forward", None)
            del module._diffusers_hook

    def __reduce__(self) -> NoReturn:
        """Refuse: a copy would share its clock with the original.

        Raises: PolicyError.
        """
        raise PolicyError(
            "a pipe with a policy cannot be copied or pickled: call autofr.remove(pipe), copy it,"
            " and apply the policy to each"
        )


class StatefulHook(Hook):
    """A hook to which pipelines tell the name of the guidance branch."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self._contexts = StateManager(object)

    @property
    def context(self) -> str | None:
        """The name; None where the pipeline says none."""
        name: str | None = getattr(self._contexts._context, "name", None)
        return name


class Leaf(Hook):
    """Keep, put back or skip at one module; `actions[mask]` is None where the module runs.

    `torch.compile` traces it: a graph for keyframes, one for each mask, one for calls outside runs.
    """

    def __init__(self, run: Run, masks: int) -> None:
        super().__init__()
        self.run = run
        self.keeps: list[tuple[Point, Slot]] = []
        self.enters: list[Slot] = []
        self.actions: list[Action | None] = [None] * (masks + 1)
        self.offloads: list[ModelHook] = []

    def put_on(self, module: nn.Module) -> None:
        """Register on a module.

        Where blocks are offloaded in groups, the first of a group loads its weights and the last
        frees them, also when they are skipped.
        """
        super().put_on(module)
        hook = module._diffusers_hook.get_hook("group_offloading")
        self.offloads = [hook] if hook is not None and len(hook.group.modules) > 1 else []

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        action = self.actions[run.mask]
        if action is not None:
            found = action(module, (args, kwargs))
            if found is not MISSING:
                for offload in self.offloads:
                    offload.pre_forward(module)
                    offload.post_forward(module, found)
                return found
        if not run.keep:
            return self.fn_ref.original_forward(*args, **kwargs)
        for slot in self.enters:
            slot.given = args, kwargs
        output = self.fn_ref.original_forward(*args, **kwargs)
        for point, slot in self.keeps:
            given = args, kwargs
            if slot.given is not None:
                given, slot.given = slot.given, None
            value = point.keep(module, given, output)
            slot.held.append(run.packing.pack(value) if run.packing else value)
        return output


def restore(point: Point, slot: Slot, half: int | None, module: nn.Module, given: Given) -> Any:
    """What a module gives where the next held value of a point is put back; MISSING without one.

    `half`: of the batch, where a call computes no more than one (see `halves`).
    """
    held = slot.take()
    if held is MISSING:
        return MISSING
    if half is not None:
        held = map_tensors(lambda tensor: tensor.chunk(2)[half], held)
    return point.restore(module, given, held)
