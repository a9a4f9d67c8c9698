"""The flow of values in a real run: which tensor each call reads and makes, below Python's sight or not.

Watched where every torch operation passes (the dispatcher), so scripted functions, custom autograd functions
and fused paths are seen as well as plain modules. One run shows one way through the branches of a model.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.network.compare import tensors_in
from batchnorm.network.undo import Undo, hook_everywhere, set_modes, stop_gradients
from batchnorm.network.values.modules import has_hooks, is_layer, is_norm
from batchnorm.network.values.values import Value, View, append_call, canonical


def _is_step(module: nn.Module) -> bool:
    """One step of the flow: its inside is not looked at."""
    if is_layer(module) or is_norm(module):
        return True
    return not module._modules and type(module).__module__.startswith("torch.nn.modules")


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, view: View) -> None:
        super().__init__()
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.owners: dict[int, list[str]] = {}
        for owner, m in model.named_modules():
            for tensor in [*m._parameters.values(), *m._buffers.values()]:
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append(owner)
        self.view = view
        self.stack: list[nn.Module] = []
        self.step: nn.Module | None = None
        self.thread = threading.get_ident()
        self.known: dict[int, tuple[Any, Value]] = {}
        self.reads: dict[int, set[str]] = {}

    # -- tensors and values -----------------------------------------------------------------------------
    def value(self, tensor: torch.Tensor) -> Value:
        entry = self.known.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        return self.remember(tensor, Value())

    def remember(self, tensor: torch.Tensor, value: Value) -> Value:
        value.shape = tuple(tensor.shape)
        self.known[id(tensor)] = (weakref.ref(tensor), value)
        return value

    def in_place_of(self, tree: Any, skip: frozenset[int] = frozenset()) -> Any:
        if isinstance(tree, torch.Tensor):
            return None if id(tree) in skip or id(tree) in self.owners else self.value(tree)
        if isinstance(tree, (tuple, list)):
            return [self.in_place_of(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self.in_place_of(item) for key, item in tree.items()}
        return tree

    # -- events -----------------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        where = self.stack[-1] if self.stack else None
        for tensor in tensors_in((args, kwargs)):
            for owner in self.owners.get(id(tensor), ()):
                if not self._inside(owner):
                    self.reads.setdefault(id(tensor), set()).add(
                        self.paths.get(id(where), "") if where else ""
                    )
        if self.step is not None:
            return func(*args, **kwargs)
        given, named = self.in_place_of(args), self.in_place_of(kwargs)
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        name, _ = canonical(func._schema.name.split("::")[-1])
        written = [
            tensor
            for argument, tensor in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and isinstance(tensor, torch.Tensor)
        ]
        path = self.paths.get(id(where), "") if where is not None else ""
        inplace = bool(written) and bool(args) and written[0] is args[0]
        call = append_call(
            self.view, name, path, None, tuple(given), named, inplace=inplace, outputs=len(made)
        )
        self._bind(call.outputs, made)
        for tensor in [*written[1:], *tensors_in(kwargs.get("out"))]:
            self.value(tensor).escape = f"overwritten by {name}"
        return result

    def _inside(self, owner: str) -> bool:
        inner = (
            self.paths.get(id(self.step if self.step is not None else self.stack[-1])) if self.stack else None
        )
        return (
            inner is not None
            and (owner == inner or owner.startswith(inner + ".") or inner == "")
            and (self.step is not None)
        )

    def _bind(self, values: list[Value], made: list[torch.Tensor]) -> None:
        for value, tensor in zip(values, made, strict=True):
            self.remember(tensor, value)

    def enter(self, module: nn.Module, args: Any) -> None:
        if id(module) not in self.paths or threading.get_ident() != self.thread:
            return
        self.stack.append(module)
        if self.step is None and _is_step(module):
            self.step = module

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if id(module) not in self.paths or threading.get_ident() != self.thread:
            return
        self.stack.pop()
        if self.step is None and has_hooks(module):
            for tensor in tensors_in((args, kwargs, result)):
                self.value(tensor).escape = f"seen by a hook of {self.paths[id(module)] or 'the model'}"
        if self.step is not module or module in self.stack:
            return
        self.step = None
        made = list(tensors_in(result))
        path, inplace = self.paths[id(module)], bool(getattr(module, "inplace", False))
        given, named = self.in_place_of(args), self.in_place_of(kwargs)
        call = append_call(
            self.view,
            type(module).__name__,
            path,
            module,
            tuple(given),
            named,
            inplace=inplace,
            outputs=len(made),
        )
        self._bind(call.outputs, made)


def watch(model: nn.Module, run: Callable[[], Any]) -> tuple[View, dict[int, set[str]], Any]:
    """Run a model in eval mode without gradients and write down how values flow.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it is left in the mode it was in.
    run : callable
        Calls it.

    Returns
    -------
    view : View
        The whole run.
    reads : dict
        ``id`` of a parameter or buffer that something other than its own module reads, to the paths of the
        modules that do.
    result : object
        What ``run`` returned.
    """
    view = View("", False, "run")
    seen = _Watch(model, view)
    end = Undo(always=True)
    with end, end:
        hook_everywhere(end, seen.enter, seen.leave)
        set_modes(end, model, False)
        stop_gradients(end)
        with seen:
            result = run()
    returned = list(tensors_in(result))
    for tensor in returned:
        entry = seen.known.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            entry[1].escape = "returned by the model"
            view.returned.append(entry[1])
    out = {id(tensor) for tensor in returned}
    made = [(ref, value) for ref, value in seen.known.values() if value.producer is not None]
    alive = [ref for ref, _ in made if ref() is not None and id(ref()) not in out]
    if alive:
        gc.collect()
    for ref, value in made:
        tensor = ref()
        if tensor is not None and id(tensor) not in out:
            value.escape = value.escape or "kept by something after the call"
        del tensor
    return view, seen.reads, result
