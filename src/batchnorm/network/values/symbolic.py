"""The flow of values without numbers: torch.fx over the largest parts of a network that it can follow.

Unlike ``torch.fx.symbolic_trace`` a part that can't be followed does not spoil the rest: a module whose
forward fails becomes one opaque call in its parent and is looked at on its own, down to its children. A
branch on a symbolic value is followed both ways; where all ways but one end in the model's own ``raise`` or
``assert`` that one is the flow, and otherwise every way becomes a view of its own.
"""

from __future__ import annotations

import dis
import inspect
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from batchnorm.network.values.claims import answering
from batchnorm.network.values.modules import has_hooks, is_leaf
from batchnorm.network.values.operations import SHAPE_ONLY
from batchnorm.network.values.proxies import ParameterProxy, Proxy, TensorProxy, claim
from batchnorm.network.values.untouched import put_back, snapshot, untouched
from batchnorm.network.values.values import Value, View, append_call, canonical, values_in

_MOST_WAYS = 16


# torch.fx patches nn.Module while it traces: one tool at a time, and calls of other threads pass through
_one_at_a_time = threading.RLock()


_CONSTANT = "<constant>"


class CannotFollow(BaseException):
    """A forward can't be followed symbolically; the text says where and why.

    No ``Exception``: the model's own ``except Exception`` must not swallow it.
    """


class _Raised(BaseException):
    """The model's own ``raise`` or ``assert`` ended this way through a branch."""


def _files(model: nn.Module) -> set[str]:
    """Files that hold the code of a model's classes, torch's own left out."""
    names = {base.__module__ for m in model.modules() for base in type(m).__mro__}
    return {name for name in names if not name.startswith(("torch.", "builtins"))}


class _Ways:
    """The ways through one forward's branches: decisions taken so far, and those still to try."""

    def __init__(self) -> None:
        self.waiting: list[list[bool]] = [[]]
        self.taken: list[bool] = []
        self.given: list[bool] = []
        self.tried = 0

    def next(self) -> bool:
        if not self.waiting:
            return False
        self.given, self.taken = self.waiting.pop(), []
        self.tried += 1
        return True

    def decide(self) -> bool:
        position = len(self.taken)
        if position >= len(self.given):
            if len(self.waiting) + self.tried > _MOST_WAYS:
                raise CannotFollow("it branches on values too often")
            self.waiting.append([*self.taken, True])
        choice = self.given[position] if position < len(self.given) else False
        self.taken.append(choice)
        return choice


class _Tracer(fx.Tracer):
    """Follows one scope and remembers which modules it had to leave opaque."""

    proxy_buffer_attributes = True

    def __init__(self, paths: dict[int, str], tensors: dict[int, str], scope: nn.Module, ways: _Ways) -> None:
        super().__init__()
        self.paths, self.tensors, self.ways = paths, tensors, ways
        self.opaque: dict[int, tuple[nn.Module, str]] = {}
        self.where = [paths[id(scope)]]
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.cache: dict[str, fx.Proxy] = {}
        self.thread = threading.get_ident()

    # -- what fx asks for -------------------------------------------------------------------------------
    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        args, kwargs = self.arguments

        def placeholder(name: str, value: Any) -> Any:
            return self.create_proxy("placeholder", name, (), {}) if value is _SYMBOL else value

        given = [placeholder(f"argument{i}", value) for i, value in enumerate(args)]
        named = {name: placeholder(name, value) for name, value in kwargs.items()}

        def entry(root: nn.Module) -> Any:
            return _run(root.forward, tuple(given), named)

        return entry, [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op in ("placeholder", "call_module", "get_attr"):
            tensor = True
        else:
            name = canonical(node.target if isinstance(node.target, str) else _name_of(node.target))[0]
            if name == "getattr":
                name = str(node.args[1])
            tensor = name not in SHAPE_ONLY and any(n.meta.get("tensor") for n in node.all_input_nodes)
        node.meta["tensor"] = tensor
        node.meta["where"] = self.where[-1]
        return TensorProxy(node, self) if tensor else Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            return self.create_node("get_attr", self.tensors.get(id(a), _CONSTANT), (), {})
        if isinstance(a, nn.Module) or callable(a):
            raise CannotFollow(f"{type(a).__name__} is handed on as an argument")
        if isinstance(a, torch.Size):
            return tuple(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return repr(type(a))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        elsewhere = threading.get_ident() != self.thread
        if elsewhere or not isinstance(attr_val, torch.Tensor) or issubclass(type(attr_val), fx.Proxy):
            return attr_val
        name = self.tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self.cache:
            node = self.create_node("get_attr", name, (), {})
            node.meta["tensor"] = True
            self.cache[name] = ParameterProxy(self, node, attr_val)
        return self.cache[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.ways.decide()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = self.paths.get(id(m))
        if path is None:
            raise CannotFollow(f"it calls a {type(m).__name__} that is not in the model")
        if is_leaf(m):
            return self.create_proxy("call_module", path, args, kwargs)
        if has_hooks(m):
            return self._leave_opaque(m, path, args, kwargs, "it has hooks")
        if id(m) in self.opaque:
            return self.create_proxy("call_module", path, args, kwargs)
        mark, outer, held = self._last(), self.ways, snapshot(args, kwargs)
        self.where.append(path)
        self.ways = ways = _Ways()
        good: list[list[bool]] = []
        try:
            while ways.next():
                self._rewind(mark)
                put_back(held)
                try:
                    result = _run(m.forward, args, kwargs)
                    good.append(list(ways.taken))
                except _Raised:
                    continue
            if len(good) == 1:
                if ways.taken != good[0]:
                    self._rewind(mark)
                    put_back(held)
                    ways.waiting = [good[0]]
                    ways.next()
                    result = _run(m.forward, args, kwargs)
                return result
            reason = "it branches on values or shapes" if good else "it raises for every input tried"
        except CannotFollow as error:
            reason = str(error)
        finally:
            self.ways = outer
            self.where.pop()
        self._rewind(mark)
        put_back(held)
        return self._leave_opaque(m, path, args, kwargs, reason)

    # -- going back -------------------------------------------------------------------------------------
    def _leave_opaque(self, m: nn.Module, path: str, args: Any, kwargs: Any, reason: str) -> fx.Proxy:
        self.opaque[id(m)] = (m, reason)
        return self.create_proxy("call_module", path, args, kwargs)

    def _last(self) -> fx.Node:
        return self.graph._root._prev

    def _rewind(self, mark: fx.Node) -> None:
        while self._last() is not mark:
            node = self._last()
            if node.op == "get_attr":
                self.cache.pop(str(node.target), None)
            self.graph.erase_node(node)


_SYMBOL = object()


def _name_of(target: Any) -> str:
    return getattr(target, "__name__", str(target)).split(".")[0]


def _run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a forward; tell the model's own ``raise`` from what symbols can't do."""
    try:
        return forward(*args, **kwargs)
    except (CannotFollow, _Raised):
        raise
    except RecursionError:
        raise
    except Exception as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is not None and _is_own_raise(last):
            raise _Raised(str(error)) from error
        first = str(error).strip().splitlines()
        raise CannotFollow(f"{type(error).__name__}: {first[0][:120] if first else ''}") from error


def _is_own_raise(last: Any) -> bool:
    code = last.tb_frame.f_code
    if "torch/fx" in code.co_filename.replace("\\", "/") or code.co_filename == __file__:
        return False
    return dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _argument_sets(module: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments to follow a forward with: defaults as they are, then None and bool defaults turned round."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    star = [_SYMBOL] if any(p.kind is p.VAR_POSITIONAL for p in parameters) and not positional else []

    def first(p: inspect.Parameter) -> Any:
        return _SYMBOL if p.default is p.empty else p.default

    def turned(p: inspect.Parameter) -> Any:
        if p.default is None or p.default is p.empty:
            return _SYMBOL
        return (not p.default) if isinstance(p.default, bool) else p.default

    yield tuple(map(first, positional)) + tuple(star), {p.name: first(p) for p in named}
    if any(turned(p) is not first(p) for p in [*positional, *named]):
        yield tuple(map(turned, positional)) + tuple(star), {p.name: turned(p) for p in named}


def follow(model: nn.Module, *, training: bool) -> tuple[list[View], dict[str, str], dict[int, set[str]]]:
    """Follow a model's values symbolically, the largest parts that can be followed.

    Parameters
    ----------
    model : torch.nn.Module
        Looked at in the mode it is in; whatever its forwards set on modules is put back.
    training : bool
        The mode it is in, for the views.

    Returns
    -------
    views : list of View
        One or more for each part.
    unseen : dict
        Path of a module whose forward could not be followed, to the reason.
    reads : dict
        ``id`` of a parameter or buffer that some forward reads by name, to the paths of those modules.
    """
    paths = {id(m): name for name, m in model.named_modules()}
    modules = dict(model.named_modules())
    tensors: dict[int, str] = {}
    for owner, m in model.named_modules():
        for name, tensor in [*m._parameters.items(), *m._buffers.items()]:
            if tensor is not None:
                tensors.setdefault(id(tensor), f"{owner}.{name}" if owner else name)
    by_name = {name: key for key, name in tensors.items()}
    views: list[View] = []
    unseen: dict[str, str] = {}
    reads: dict[int, set[str]] = {}
    queue, seen = [model], {id(model)}
    while queue:
        scope = queue.pop(0)
        if is_leaf(scope):
            continue
        graphs, opaque, reason = (
            ([], {}, "") if _has_no_forward(scope) else _graphs_of(scope, model, paths, tensors)
        )
        for graph, kept in graphs:
            views.append(_view_of(graph, kept, paths[id(scope)], training, modules))
            for node in graph.nodes:
                if node.op == "get_attr" and node.users and node.target in by_name:
                    reads.setdefault(by_name[node.target], set()).update(
                        n.meta.get("where", "") for n in node.users
                    )
        if reason:
            unseen[paths[id(scope)]] = reason
        following = [m for m, _ in opaque.values()] if graphs else list(scope.children())
        for m in following:
            if id(m) not in seen:
                seen.add(id(m))
                queue.append(m)
    return views, unseen, reads


def _has_no_forward(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "forward" not in vars(type(module))


def _graphs_of(
    scope: nn.Module, model: nn.Module, paths: dict[int, str], tensors: dict[int, str]
) -> tuple[list[tuple[fx.Graph, dict[int, str]]], dict[int, tuple[nn.Module, str]], str]:
    """Every way through a scope's forward; or no graph, and the reason."""
    graphs: list[tuple[fx.Graph, dict[int, str]]] = []
    opaque: dict[int, tuple[nn.Module, str]] = {}
    reason = "it raises for every input tried"
    for number, arguments in enumerate(_argument_sets(scope)):
        ways, found, seen_opaque = _Ways(), [], {}
        try:
            while ways.next():
                tracer = _Tracer(paths, tensors, scope, ways)
                tracer.arguments = arguments
                try:
                    with _one_at_a_time, untouched(scope) as kept, answering(_files(scope), claim):
                        graph = tracer.trace(scope)
                except _Raised:
                    continue
                found.append((graph, kept))
                seen_opaque.update(tracer.opaque)
        except (CannotFollow, RecursionError) as error:
            reason = str(error) or type(error).__name__
            # a part may be called with what its defaults do not show; the whole model rarely is
            if scope is not model and number > 0:
                return [], {}, f"with other than its default arguments: {reason}"
            continue
        graphs += found
        opaque.update(seen_opaque)
    return graphs, opaque, "" if graphs else reason


def _view_of(
    graph: fx.Graph, kept: dict[int, str], path: str, training: bool, modules: dict[str, nn.Module]
) -> View:
    view = View(path, training, "traced")
    made: dict[fx.Node, Any] = {}

    def replace(old: Value, new: Value) -> None:
        for node, value in made.items():
            if value is old:
                made[node] = new

    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.get)
        if node.op == "placeholder":
            made[node] = Value()
        elif node.op == "output":
            view.returned = list(values_in(args))
            for value in view.returned:
                value.escape = value.escape or value.stale or f"returned by {path or 'the model'}"
        elif node.op == "call_module":
            module = modules[node.target]
            inplace = bool(getattr(module, "inplace", False))
            name = type(module).__name__
            made[node] = append_call(
                view, name, node.target, module, args, kwargs, inplace=inplace, replace=replace
            ).output
        elif node.op != "get_attr":
            name, inplace = _function(node)
            args = args[:1] if name == "getattr" else args
            name = str(node.args[1]) if name == "getattr" else name
            where = node.meta.get("where", path)
            made[node] = append_call(
                view, name, where, None, args, kwargs, inplace=inplace, replace=replace
            ).output
        if id(node) in kept:
            made[node].escape = f"kept by the forward in {kept[id(node)]}"
    return view


def _function(node: fx.Node) -> tuple[str, bool]:
    """Canonical name of a function node, and whether it overwrites its first argument."""
    target = node.target
    name, inplace = canonical(target if isinstance(target, str) else _name_of(target))
    if node.kwargs.get("inplace") is True:
        inplace = True
    elif callable(target) and len(node.args) > 1:
        place = _place_of_inplace(target)
        inplace = inplace or (place is not None and len(node.args) > place and node.args[place] is True)
    return name, inplace


@cache
def _place_of_inplace(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
