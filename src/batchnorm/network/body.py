"""One module's own forward, followed symbolically: its children are steps, and what it rests on is noted.

A forward is followed to be run again in another form, so everything that Python decided while it was followed
must be known: which attributes were read and with which values, which arguments were taken for tensors. What
cannot be repeated (random numbers, attributes that are set, values that are branched on) is refused.
"""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from batchnorm.network.claims import answering
from batchnorm.network.untouched import same_hooks

# a forward that asks these answers otherwise the next time
_CHANGING = frozenset(["is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_inference"])
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    Enum,
    torch.dtype,
    torch.device,
    torch.memory_format,
)
_MOST_BRANCHES = 6
_FIXED = (FunctionType, BuiltinFunctionType, type)


class OtherWay(Exception):
    """A value is not what it was when the forward was followed; nothing has happened yet."""


def agree(value: Any, expected: bool) -> None:
    """Leave a rewritten forward at a branch that it does not take.

    Parameters
    ----------
    value : object
        What the written forward branches on.
    expected : bool
        The branch that was followed.

    Raises
    ------
    OtherWay
        The other branch is to be taken.
    """
    if bool(value) is not expected:
        raise OtherWay


class Refused(Exception):
    """A forward cannot be rewritten; the text says why."""


@dataclass
class Body:
    """A forward that was followed.

    Parameters
    ----------
    graph : torch.fx.Graph
        Calls of children, functions and methods.
    required : tuple of str
        Arguments without default.
    defaults : dict
        Arguments with default, and the default that they were followed with.
    tensors : frozenset of str
        Required arguments of which the forward asked whether they are tensors.
    guards : tuple of (str, str, object)
        Path of a module, attribute, and the value that was read.
    """

    graph: fx.Graph
    required: tuple[str, ...]
    defaults: dict[str, Any]
    tensors: frozenset[str]
    guards: tuple[tuple[str, str, Any], ...] = ()


class _Proxy(fx.Proxy):
    """A value whose type the forward may ask for, where the answer is known."""


def _claim(value: Any) -> type | None:
    if not issubclass(type(value), _Proxy):
        return None
    value.tracer.asked(value.node)
    return Tensor


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


# a plain proxy would turn `x += y` into `x = x + y`, and whoever else holds x would not see it
for _symbol in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
):
    setattr(_Proxy, f"__{_symbol}__", _in_place(getattr(operator, _symbol)))


@dataclass
class _Reads:
    """Attributes of modules read while a forward runs."""

    paths: dict[int, str]
    found: dict[tuple[str, str], Any] = field(default_factory=dict)

    def note(self, module: nn.Module, name: str) -> None:
        path = self.paths.get(id(module))
        if path is None or name[:1] == "_":
            return
        own = object.__getattribute__(module, "__dict__")
        if name in own:
            if (path, name) not in self.found and not _holds_settings(own[name]):
                self.found[path, name] = _frozen(own[name], name)
            return
        for table in ("_parameters", "_buffers", "_modules"):
            if name in own[table] and own[table][name] is None:
                self.found[path, name] = None


def _frozen(value: Any, name: str) -> Any:
    """A copy of an attribute's value that can be compared later."""
    if isinstance(value, (_PLAIN, _FIXED)):
        return value
    if type(value) in (tuple, list):
        return type(value)(_frozen(item, name) for item in value)
    if isinstance(value, (nn.Module, Tensor)):
        raise Refused(f"its forward reads {name!r}, which is no registered part of it")
    raise Refused(f"its forward reads {name!r}, a {type(value).__name__} that may change")


class _Settings:
    """Stands for an object that holds settings, such as a config, and notes what is read from it."""

    def __init__(self, held: Any, path: str, name: str, reads: _Reads) -> None:
        self.__dict__.update(_held=held, _path=path, _name=name, _reads=reads)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._held)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._held, name)
        inner = f"{self._name}.{name}"
        if _holds_settings(value):
            return _Settings(value, self._path, inner, self._reads)
        if (self._path, inner) not in self._reads.found:
            self._reads.found[self._path, inner] = _frozen(value, inner)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"its forward sets {self._name}.{name}")


def _holds_settings(value: Any) -> bool:
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not issubclass(kind, (fx.Proxy, nn.Module, Tensor, dict, list, tuple, *_FIXED, *_PLAIN))
        and not callable(value)
        and kind.__module__ != "builtins"
    )


class _Tracer(fx.Tracer):
    """Children are steps; tensors that are no parameter or buffer are refused."""

    proxy_buffer_attributes = True

    def __init__(self, decisions: list[bool], steps: tuple[FunctionType, ...]) -> None:
        super().__init__(autowrap_modules=(), autowrap_functions=steps)  # type: ignore[arg-type]
        self.decisions, self.decided = decisions, 0
        self.required: list[str] = []
        self.defaults: dict[str, Any] = {}
        self.tensors: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        # only while going back to the start is free: no module was called, no tensor changed
        for node in self.graph.nodes:
            own = isinstance(node.target, FunctionType) and not node.target.__module__.startswith(
                ("torch", __name__)
            )
            if (
                own
                or node.op == "call_module"
                or (node.op == "call_method" and str(node.target).endswith("_"))
            ):
                raise Refused("its forward branches on a value that it computes")
        if self.decided == len(self.decisions):
            if self.decided >= _MOST_BRANCHES:
                raise Refused("its forward branches on values too often")
            self.decisions.append(False)
        choice = self.decisions[self.decided]
        self.decided += 1
        self.create_node("call_function", agree, (obj.node, choice), {})
        return choice

    def asked(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.tensors.add(node.meta["argument"])
        elif node.op != "call_module" or not type(
            self.root.get_submodule(str(node.target))
        ).__module__.startswith("torch.nn.modules"):
            raise Refused("its forward asks for the type of a value")

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            if p.default is p.empty:
                value: Any = self.create_proxy("placeholder", p.name, (), {})
                value.node.meta["argument"] = p.name
                self.required.append(p.name)
            else:
                if not isinstance(p.default, _PLAIN):
                    raise Refused(f"the default of its argument {p.name!r} may change")
                value = self.defaults[p.name] = p.default
            if p.kind is p.KEYWORD_ONLY:
                named[p.name] = value
            else:
                positional.append(value)

        def entry(root: nn.Module) -> Any:
            return root_fn(root, *positional, **named)

        return entry, [self.root]

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, fx.Proxy):
            return a.node
        if kind is torch.Size:
            return tuple(a)
        if kind in (tuple, list):
            return kind(self.create_arg(item) for item in a)
        if kind is dict:
            if not all(type(key) in (str, int) for key in a):
                raise Refused("its forward uses a dictionary whose keys are no names")
            return {key: self.create_arg(value) for key, value in a.items()}
        if kind is slice:
            return slice(self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step))
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, Tensor):
            for name, tensor in (*self.root.named_parameters(), *self.root.named_buffers()):
                if tensor is a:
                    return self.create_node("get_attr", name, (), {})
            raise Refused("its forward uses a tensor that is no parameter or buffer of it")
        if isinstance(a, _PLAIN) or a is Ellipsis:
            return a
        raise Refused(f"its forward hands on a {kind.__name__}")


def follow_body(module: nn.Module) -> Body:
    """Follow the forward of one module in the mode it is in; nothing in it is changed.

    Parameters
    ----------
    module : torch.nn.Module
        Any module whose class defines a forward.

    Returns
    -------
    Body
        The graph, and what it rests on.

    Raises
    ------
    Refused
        With the reason.
    """
    forward = type(module).forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        raise Refused("its forward is not written in Python")
    changing = sorted(_CHANGING & set(code.co_names))
    if changing:
        raise Refused(f"its forward asks for {changing[0]}()")
    paths = {id(m): path for path, m in module.named_modules()}
    decisions: list[bool] = []
    steps: tuple[FunctionType, ...] = ()
    while True:
        reads, tracer = _Reads(paths), _Tracer(decisions, steps)
        try:
            asking = answering([inspect.unwrap(forward).__module__], _claim)
            with _watched(reads), _same_random_numbers(), same_hooks(module), asking:
                graph = tracer.trace(module)
            break
        except Refused:
            raise
        except Exception as error:
            # the way that ends in the forward's own error is not the one to follow
            while decisions and decisions[-1]:
                decisions.pop()
            if not decisions and not steps:
                # functions beside the class become steps themselves: they run again as they are
                steps = _functions_called(forward)
                if steps:
                    continue
            if not decisions:
                first = str(error).strip().splitlines()
                raise Refused(
                    f"its forward cannot be followed: {type(error).__name__}: {first[0][:100] if first else ''}"
                ) from error
            decisions[-1] = True
    modules = dict(module.named_modules())
    for (path, name), value in reads.found.items():
        if value is not None and _frozen(operator.attrgetter(name)(modules[path]), name) != value:
            raise Refused(f"its forward changes {name!r}")
    guards = [(path, name, value) for (path, name), value in reads.found.items()]
    guards += [(path, "_modules", tuple(m._modules)) for path, m in _opened(module)]
    return Body(graph, tuple(tracer.required), tracer.defaults, frozenset(tracer.tensors), tuple(guards))


def _functions_called(forward: Any) -> tuple[FunctionType, ...]:
    """Functions of Python, other than torch's, that a forward names."""
    forward = inspect.unwrap(forward)
    found = (forward.__globals__.get(name) for name in forward.__code__.co_names)
    return tuple(f for f in found if isinstance(f, FunctionType) and not f.__module__.startswith("torch"))


def _opened(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Containers whose children the forward may have listed."""
    if isinstance(module, nn.Sequential):
        yield "", module
    waiting = [("", module)]
    while waiting:
        path, holder = waiting.pop()
        for name, child in holder._modules.items():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                inner = f"{path}.{name}" if path else name
                yield inner, child
                if not isinstance(child, nn.Sequential):
                    waiting.append((inner, child))


@contextmanager
def _watched(reads: _Reads) -> Iterator[None]:
    """Note every attribute of a module that is read, and refuse any that is set."""
    plain_set = nn.Module.__setattr__

    def reading(module: nn.Module, name: str) -> Any:
        reads.note(module, name)
        value = object.__getattribute__(module, name)
        path = reads.paths.get(id(module))
        if path is not None and name[:1] != "_" and _holds_settings(value):
            return _Settings(value, path, name, reads)
        return value

    def setting(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in reads.paths:
            raise Refused(f"its forward sets {name!r}")
        plain_set(module, name, value)

    nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
    nn.Module.__setattr__ = setting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain_set  # type: ignore[method-assign]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Refuse a forward that draws random numbers while it is followed: they would be the same for ever."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
        same = (
            random.getstate() == states[0]
            and all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
            and torch.equal(torch.get_rng_state(), states[2])
        )
        if not same:
            raise Refused("its forward draws random numbers")
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
