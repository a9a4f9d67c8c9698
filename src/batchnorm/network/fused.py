"""A module whose forward calls a norm and what follows it as one, as long as nothing looks in between.

The module keeps its identity, its children, its name, and the forward it was written with: its class becomes
one derived from its own, whose forward takes the rewritten way when everything that the rewriting rests on
still holds, and the written way otherwise.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from batchnorm.errors import BatchNormError
from batchnorm.modules import Layer, _path_from_stack
from batchnorm.network.body import OtherWay
from batchnorm.network.kinds import activation_name, has_hooks

PLANS = "_batchnorm_plans"
_APPLY: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
_HOMES = ("torch", "torch.nn.functional", "operator", "builtins", "math")
# what generated source may name without an import
ALWAYS = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan, "NoneType": type(None)}


class Pending(NamedTuple):
    """A norm that has its input and waits for what is to be added to its output."""

    norm: Any
    z: Tensor


def fused(norm: Any, z: Tensor, residual: Any, activation: str | None) -> Tensor:
    """Normalize, add and activate in one call.

    Parameters
    ----------
    norm : BatchNorm1d, BatchNorm2d or BatchNorm3d of this package
        Without an activation of its own, and without hooks.
    z : Tensor, shape (N, C, *S)
        Its input.
    residual : Tensor, number or None
        What is added; in one call where it has the shape and dtype of ``z``, after it otherwise.
    activation : str or None
        What follows.

    Returns
    -------
    Tensor
        ``activation(norm(z) + residual)``.
    """
    fits = residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == z.shape
        and residual.dtype == z.dtype
        and residual.device == z.device
    )
    try:
        if fits:
            return norm._forward(z, residual, None, "zero", activation)
        return _APPLY[activation](norm._forward(z, None, None, "zero") + residual)
    except BatchNormError as error:
        if not error.at and not torch.compiler.is_compiling():
            error.at = _path_from_stack(norm)
        raise


def until(module: nn.Module, *args: Any) -> Any:
    """Run a module up to the norm that is its last step.

    Parameters
    ----------
    module : torch.nn.Module
        A norm, or a module with a plan that ends in one.
    *args
        What the module is called with.

    Returns
    -------
    Pending or object
        The norm and its input; or what the module returns, where somebody looks at it or its plan does not
        hold.
    """
    if has_hooks(module):
        return module(*args)
    if is_plain(module):
        return Pending(module, args[0])
    chosen = choose(module, args, {})
    if chosen is None or chosen[0].head is None:
        return module(*args)
    try:
        return chosen[0].head(module, *chosen[1])
    except OtherWay:
        return module(*args)


def finish(pending: Any, residual: Any, activation: str | None) -> Any:
    """End what :func:`until` began.

    Parameters
    ----------
    pending : Pending or Tensor
        As :func:`until` gave it.
    residual : Tensor, number or None
        What is added.
    activation : str or None
        What follows.

    Returns
    -------
    Tensor
        ``activation(output + residual)``.
    """
    if isinstance(pending, Pending):
        return fused(pending.norm, pending.z, residual, activation)
    return _APPLY[activation](pending if residual is None else pending + residual)


def is_plain(module: Any) -> bool:
    """Whether a module is a norm of ours, with the forward of ours, an activation of its own left out.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True when :func:`fused` may call it.
    """
    return (
        isinstance(module, Layer)
        and type(module).forward is Layer.forward
        and module.activation is None
        and "forward" not in module.__dict__
    )


class Plan:
    """One way through a module's forward, rewritten, with what it rests on.

    Parameters
    ----------
    body, head : tuple of str and dict, or None
        Source and globals of the whole forward, and of the forward up to the norm that is its last step.
    required : tuple of str
        Names of the arguments without default, in order.
    defaults : dict
        The other arguments; the way holds for these values alone.
    tensors : frozenset of str
        Required arguments that were taken for tensors.
    guards : tuple of (str, str, object)
        Path of a module, name of an attribute, and the value the way was seen with.
    norms : tuple of str
        Paths of the norms that are called in another way.
    elided : tuple of (str, type, str or None)
        Paths of modules that are not called, what they were, and the activation's name.
    """

    def __init__(
        self,
        body: tuple[str, dict[str, Any]],
        head: tuple[str, dict[str, Any]] | None,
        required: tuple[str, ...],
        defaults: dict[str, Any],
        tensors: frozenset[str],
        guards: tuple[tuple[str, str, Any], ...],
        norms: tuple[str, ...],
        elided: tuple[tuple[str, type, str | None], ...],
    ) -> None:
        self._parts = (body, head, required, defaults, tensors, guards, norms, elided)
        self.run = _compiled(*body)
        self.head = None if head is None else _compiled(*head)
        self.required, self.defaults, self.tensors = required, defaults, tensors
        self.guards = tuple((_steps(path), tuple(name.split(".")), value) for path, name, value in guards)
        self.norms = tuple(map(_steps, norms))
        self.elided: tuple[tuple[tuple[str, ...], type, str | None], ...] = tuple(
            (_steps(path), kind, name) for path, kind, name in elided
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # it refers to modules by path alone

    def __reduce__(self) -> tuple[Any, ...]:
        body, head, *rest = self._parts
        parts = [p and (p[0], {k: importable(v) for k, v in p[1].items()}) for p in (body, head)]
        return (_revive, (parts, rest))

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still what the way was seen on.

        Parameters
        ----------
        module : torch.nn.Module
            The module with the plan.

        Returns
        -------
        bool
            True when the rewritten forward gives what the written one would.
        """
        try:
            for steps, names, value in self.guards:
                found: Any = _walk(module, steps)
                for name in names:
                    found = getattr(found, name)
                if names == ("_modules",):
                    found = tuple(found)
                if found is not value and (type(found) is not type(value) or found != value):
                    return False
            for steps in self.norms:
                norm = _walk(module, steps)
                if not is_plain(norm) or has_hooks(norm):
                    return False
            for steps, kind, activation in self.elided:
                skipped: nn.Module = _walk(module, steps)
                if type(skipped) is not kind or has_hooks(skipped):
                    return False
                if activation is not None and activation_name(skipped, "", {}) != activation:
                    return False
        except (AttributeError, KeyError):
            return False
        return True

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """Required arguments in order, when the call is one that the way was seen with.

        Parameters
        ----------
        args, kwargs : tuple, dict
            Of the call.

        Returns
        -------
        list or None
            None for any other call.
        """
        names = (*self.required, *self.defaults)
        if len(args) > len(names):
            return None
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in names:
                return None
            given[name] = value
        for name, value in self.defaults.items():
            if name in given:
                found = given[name]
                if found is not value and (type(found) is not type(value) or found != value):
                    return None
        chosen = []
        for name in self.required:
            value = given.get(name)
            if value is None or (name in self.tensors and not isinstance(value, Tensor)):
                return None
            if isinstance(value, fx.Proxy) or issubclass(type(value), fx.Proxy):
                return None  # whoever looks at the flow of values is to see the forward as it was written
            chosen.append(value)
        return chosen


def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, list[Any]] | None:
    """The plan of a module that holds for a call, and its arguments.

    Parameters
    ----------
    module : torch.nn.Module
        With or without plans.
    args, kwargs : tuple, dict
        Of the call.

    Returns
    -------
    tuple of Plan and list, or None
        None where the forward is to be taken as it was written.
    """
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return None
    for plan in module.__dict__.get(PLANS, ()):
        given = plan.arguments(args, kwargs)
        if given is not None and plan.holds(module):
            return plan, given
    return None


class Fused:
    """First base of the classes of modules whose forward was rewritten."""

    _fused_from: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state is not None else self.__dict__
        return (_remake, (self._fused_from,), state)


def _once(make: Callable[..., type[nn.Module]]) -> Callable[..., type[nn.Module]]:
    return functools.cache(make)


def _remake(origin: type[nn.Module]) -> nn.Module:
    made = fused_type(origin)
    return made.__new__(made)


@_once
def fused_type(origin: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class ``origin`` with plans.

    Parameters
    ----------
    origin : type
        Class of the module.

    Returns
    -------
    type
        Derived from ``origin``, with its name.
    """
    written: Any = origin.forward

    @functools.wraps(written)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        chosen = choose(self, args, kwargs)
        if chosen is None:
            return written(self, *args, **kwargs)
        plan, given = chosen
        try:
            return plan.run(self, *given)
        except OtherWay:
            return written(self, *args, **kwargs)

    namespace = {
        "__module__": origin.__module__,
        "__qualname__": origin.__qualname__,
        "__doc__": origin.__doc__,
        "_fused_from": origin,
        "forward": forward,
    }
    return type(origin.__name__, (Fused, origin), namespace)


def _steps(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _walk(module: Any, steps: tuple[str, ...]) -> Any:
    for step in steps:
        module = module._modules[step]
    return module


def _compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    space = {**ALWAYS, **names}
    exec(compile(source, "<rewritten by batchnorm>", "exec"), space)
    return space["forward"]


def importable(value: Any) -> tuple[str, str] | None:
    """Where a global of a rewritten forward can be imported from.

    Parameters
    ----------
    value : object
        A module, function or class.

    Returns
    -------
    tuple of str, or None
        Module, and the name in it (empty for the module itself).
    """
    if isinstance(value, ModuleType):
        return (value.__name__, "")
    attribute = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    for home in (getattr(value, "__module__", None), *_HOMES):
        if home and attribute and "<" not in attribute:
            try:
                if _imported(home, attribute) is value:
                    return (home, attribute)
            except (ImportError, AttributeError):
                continue
    return None


def _imported(home: str, attribute: str) -> Any:
    module = importlib.import_module(home)
    return operator.attrgetter(attribute)(module) if attribute else module


def _revive(parts: Any, rest: Any) -> Plan:
    body, head = (None if p is None else (p[0], {k: _imported(*v) for k, v in p[1].items()}) for p in parts)
    return Plan(body, head, *rest)  # type: ignore[arg-type]
