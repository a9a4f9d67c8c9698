"""The flow of values in a run: which tensor each call reads and makes, below Python's sight or not.

Watched where every torch operation passes (the dispatcher), so scripted functions, custom autograd functions
and fused paths are seen as well as plain modules. The run is on fake tensors, which have shapes and no
numbers: it writes to no buffer, costs next to nothing, and where Python branches on a number both ways are
gone. Where a network asks more of its tensors it is run for real.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.network.compare import tensors_in
from batchnorm.network.inputs import each_tensor, own
from batchnorm.network.undo import (
    Undo,
    hook_after,
    hook_before,
    keep_modules,
    keep_values,
    set_modes,
    stop_gradients,
)
from batchnorm.network.values.modules import has_hooks, is_step
from batchnorm.network.values.values import Call, Value, View, write_down

_MOST_WAYS = 16
# what Python learns of a number, as a bool
_ASKS = frozenset(["_local_scalar_dense", "is_nonzero", "equal", "allclose"])

# three tensors come out of these
_NORMS = frozenset(
    [
        torch.ops.aten.native_batch_norm.default,
        torch.ops.aten._native_batch_norm_legit.default,
        torch.ops.aten._native_batch_norm_legit_no_training.default,
        torch.ops.aten._native_batch_norm_legit.no_stats,
    ]
)

Run = Callable[[nn.Module, Any], Any]


class _Ways:
    """The ways through a forward's branches on numbers: decisions of this run, and runs still to do."""

    def __init__(self) -> None:
        self.waiting: list[list[bool]] = [[]]
        self.taken: list[bool] = []
        self.number = 0

    def next(self) -> bool:
        if not self.waiting or self.number >= _MOST_WAYS:
            return False
        self.given, self.taken = self.waiting.pop(), []
        self.number += 1
        return True

    def decide(self) -> bool:
        place = len(self.taken)
        if place >= len(self.given):
            self.waiting.append([*self.taken, True])
        self.taken.append(self.given[place] if place < len(self.given) else False)
        return self.taken[-1]


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, view: View, ways: _Ways | None, steps: set[int]) -> None:
        super().__init__()
        self.steps = steps
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.owners: dict[int, list[str]] = {}
        for owner, m in model.named_modules():
            for tensor in [*m._parameters.values(), *m._buffers.values()]:
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append(owner)
        self.hooked = {id(m) for m in model.modules() if has_hooks(m)}
        self.view, self.ways = view, ways
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

    def in_place_of(self, tree: Any) -> Any:
        def of(tensor: torch.Tensor) -> Value | None:
            return None if id(tensor) in self.owners else self.value(tensor)

        return pytree.tree_map_only(torch.Tensor, of, tree)

    # -- events -----------------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        path = self.paths[id(self.stack[-1])] if self.stack else ""
        for tensor in tensors_in((args, kwargs)):
            for owner in self.owners.get(id(tensor), ()):
                if not self._inside(owner):
                    self.reads.setdefault(id(tensor), set()).add(path)
        if self.step is not None:
            return self._shapes_of_norm(args[0]) if self.ways and func in _NORMS else func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        name = name if name.endswith("__") else name.removesuffix("_")
        held = self._held((args, kwargs))
        given, named = self.in_place_of((args, kwargs))
        result = self._answer(name, func, args, kwargs)
        written = [
            tensor
            for argument, tensor in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and isinstance(tensor, torch.Tensor)
        ]
        inplace = bool(written) and bool(args) and written[0] is args[0]
        self._note(Call(name, path, None, self.view, given, named, inplace), held, result)
        for tensor in [*written[1:], *tensors_in(kwargs.get("out"))]:
            self.value(tensor).escape = f"overwritten by {name}"
        return result

    def _answer(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.ways is None or name not in _ASKS or not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)  # a constant of the network's own
        except DataDependentOutputException:
            if name == "_local_scalar_dense" and args[0].dtype is not torch.bool:
                raise  # which number it is, nobody knows
            return self.ways.decide()

    @staticmethod
    def _shapes_of_norm(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a batch norm gives a fake tensor; torch decomposes it for that, which takes milliseconds."""
        return torch.empty_like(z), *(z.new_empty(z.shape[1]) for _ in range(2))

    def _inside(self, owner: str) -> bool:
        """Whether the step that runs is the owner of what is read, or holds it."""
        inner = self.paths[id(self.step)] if self.step is not None else None
        return inner is not None and (inner == "" or f"{owner}.".startswith(f"{inner}."))

    def _held(self, tree: Any) -> dict[int, Value]:
        """The storages of some tensors, and whose they are."""
        held: dict[int, Value] = {}
        for tensor in tensors_in(tree):
            if id(tensor) not in self.owners:
                held.setdefault(_storage(tensor), self.value(tensor))
        return held

    def _note(self, call: Call, held: dict[int, Value], result: Any) -> None:
        made = list(tensors_in(result))
        write_down(call, [held.get(_storage(tensor)) for tensor in made])
        for value, tensor in zip(call.outputs, made, strict=True):
            self.remember(tensor, value)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.stack.append(module)
        if self.step is None and id(module) in self.steps:
            self.step = module

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.stack.pop()
        path = self.paths[id(module)]
        if self.step is None and id(module) in self.hooked:
            for tensor in tensors_in((args, kwargs, result)):
                self.value(tensor).escape = f"seen by a hook of {path or 'the model'}"
        if self.step is not module or module in self.stack:
            return
        self.step = None
        if result is None:
            return  # it raised
        given, named = self.in_place_of((args, kwargs))
        inplace = bool(getattr(module, "inplace", False))
        call = Call(type(module).__name__, path, module, self.view, given, named, inplace)
        self._note(call, self._held((args, kwargs)), result)


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a kind of tensor that has none
        return -id(tensor)


def run_once(model: nn.Module, run: Run, example: Any, training: bool) -> None:
    """Run a model as its user would, before it is watched: what it keeps for later runs then has numbers.

    Parameters
    ----------
    model, run, example, training
        As for :func:`watch`. Modes, buffers, attributes and parts are put back; caches in classes, modules
        of Python and other objects stay, as after any call.

    Raises
    ------
    Exception
        Whatever the run raises.
    """
    end = Undo(always=True)
    with end, end:
        keep_values(end, list(model.buffers()))
        _prepare(end, model, training)
        run(model, own(example))


def _prepare(end: Undo, model: nn.Module, training: bool) -> None:
    keep_modules(end, list(model.modules()))
    set_modes(end, model, training)
    stop_gradients(end)


def watch(model: nn.Module, run: Run, example: Any, *, training: bool) -> list[View]:
    """Run a model without gradients and write down how values flow: a view for every way that it goes.

    Parameters
    ----------
    model : torch.nn.Module
        The model; its modes, attributes and parts are put back.
    run : callable
        ``run(model, example)`` calls it.
    example : object
        An input; its tensors are not written to.
    training : bool
        The mode to run in.

    Returns
    -------
    list of View
        Never empty.

    Raises
    ------
    Exception
        Whatever the run on numbers raises.
    """
    ways, views, failed = _Ways(), list[View](), False
    # asked before the run: what a module is may be found by a trial
    steps = {id(module) for module in model.modules() if is_step(module)}
    end = Undo(always=True)
    with end, end:
        # a number that is no part of a fake tensor, a counter of batches, is counted up for real
        keep_values(end, list(model.buffers()))
        while ways.next():
            seen = _Watch(model, View(training), ways, steps)
            try:
                fake = FakeTensorMode(allow_non_fake_inputs=True)
                with fake:
                    views.append(_watch_once(seen, model, run, each_tensor(fake.from_tensor, example)))
            except Exception:
                failed = True  # the network's own check of a number, or more than shapes tell
            _forget_fake(seen)
        if failed or ways.waiting:
            try:
                seen = _Watch(model, View(training), None, steps)
                views.append(_watch_once(seen, model, run, own(example)))
            except Exception:
                if not views:
                    raise
    return views


def _watch_once(seen: _Watch, model: nn.Module, run: Run, example: Any) -> View:
    end = Undo(always=True)
    with end, end:
        _prepare(end, model, seen.view.training)
        for module in list(model.modules()):
            hook_before(end, module, seen.enter, first=True)
            hook_after(end, module, seen.leave, always=True)
        with seen:
            result = run(model, example)
        returned = list(tensors_in(result))
        for tensor in returned:
            entry = seen.known.get(id(tensor))
            if entry is not None and entry[0]() is tensor:
                entry[1].escape = "returned by the model"
        _mark_kept(seen, {id(tensor) for tensor in returned})
    seen.view.reads = seen.reads
    return seen.view


def _mark_kept(seen: _Watch, out: set[int]) -> None:
    """Mark the values whose tensors something still holds after the run."""
    made = [(ref, value) for ref, value in seen.known.values() if value.producer is not None]
    if any(ref() is not None and id(ref()) not in out for ref, _ in made):
        gc.collect()
    for ref, value in made:
        tensor = ref()
        if tensor is not None and id(tensor) not in out:
            value.escape = value.escape or "kept by something after the call"
        del tensor


def _forget_fake(seen: _Watch) -> None:
    """Take what a run, ended or not, left without numbers out of every cache: it would meet the next real run."""
    refs = [ref for ref, _ in seen.known.values()]
    if any(isinstance(ref(), FakeTensor) for ref in refs):
        gc.collect()  # frames of a run that failed
        for ref in refs:
            if isinstance(ref(), FakeTensor):
                _let_go(ref())


def _let_go(kept: Any) -> None:
    """Take a tensor, or the tuple that it is in, out of the function caches and dicts that hold it."""
    holders = gc.get_referrers(kept)
    packed = [kept, *(holder for holder in holders if type(holder) is tuple)]
    for item in packed:
        for holder in gc.get_referrers(item):
            if type(holder) is functools._lru_cache_wrapper:
                holder.cache_clear()
            elif isinstance(holder, dict) and not holder.keys() & {"__builtins__", "__module__"}:
                for key in [key for key, value in holder.items() if value is item]:
                    del holder[key]
