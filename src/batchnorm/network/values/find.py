"""One finding of layers and of how values flow between them, for every tool that changes a network.

Evidence comes from symbolic tracing of the largest parts that can be followed (``tracing``) and, where an
example input is at hand, from a real run (``watching``). A statement about a module holds when it holds in
every view that calls the module; what cannot be seen raises :class:`Unproven` with the reason, which the
tools write into their record.
"""

from __future__ import annotations

import dis
import inspect
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from batchnorm.network.inputs import call_with, guesses
from batchnorm.network.modes import modes
from batchnorm.network.values.modules import is_batch_norm
from batchnorm.network.values.observe import watch
from batchnorm.network.values.symbolic import follow
from batchnorm.network.values.values import Call, Value, View

# seconds after which no further made-up input is tried
_PATIENCE = 3.0


class Unproven(Exception):
    """A statement about the flow of values can't be shown; the text is the reason for the record."""


@dataclass(eq=False)
class Flow:
    """How values flow through a network.

    Parameters
    ----------
    model : torch.nn.Module
        The network looked at; nothing in it was changed.
    views : list of View
        Every look at a part of it.
    unseen : dict
        Path of a module whose own forward can't be followed, to the reason.
    reads : dict
        ``id`` of a parameter or buffer that code other than its own module's call reads, to the paths of
        the modules whose forward does.
    modes : tuple of bool
        The training flags that a statement must hold for.
    result : object
        What the model returned for the example in eval mode; None without one.
    example : object
        The input of that run; None without one.
    """

    model: nn.Module
    views: list[View]
    unseen: dict[str, str]
    reads: dict[int, set[str]]
    modes: tuple[bool, ...] = (False,)
    result: Any = None
    example: Any = None
    _calls: dict[int, list[Call]] = field(default_factory=dict)
    _names: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        for view in self.views:
            for call in view.calls:
                if call.module is not None:
                    self._calls.setdefault(id(call.module), []).append(call)

    def path(self, module: nn.Module) -> str:
        """Path of a module in the model.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        str
            The first of its names.
        """
        return self._names[id(module)][0]

    def names(self, module: nn.Module) -> list[str]:
        """Every path under which a module is registered.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        list of str
            More than one for a module registered twice.
        """
        return self._names[id(module)]

    @property
    def whole(self) -> list[View]:
        """Views of the whole model's forward, from its input to its output; may be empty."""
        return [view for view in self.views if view.scope == ""]

    def calls(self, module: nn.Module) -> list[Call]:
        """Every call of a module, in every view.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        list of Call
            Never empty.

        Raises
        ------
        Unproven
            No view calls it, or it may be called where nobody looked.
        """
        calls = self._calls.get(id(module), [])
        if not calls:
            raise Unproven(self._why_unseen(module))
        for training in self.modes:
            # where all above it was followed and no call was found, that mode does not call it
            if not any(call.view.training is training for call in calls) and self._has_unseen_above(module):
                raise Unproven(f"its flow can't be seen in {'training' if training else 'eval'} mode")
        if not any(call.view.evidence == "run" for call in calls):
            self._check_not_touched(module, {call.view.scope for call in calls})
        return calls

    def sole_reader(self, value: Value) -> Call:
        """The one call that reads a value.

        Parameters
        ----------
        value : Value
            Output of a call.

        Returns
        -------
        Call
            Its only consumer.

        Raises
        ------
        Unproven
            It is read by several, by none, or by somebody that was not seen.
        """
        if value.escape:
            raise Unproven(f"its output is {value.escape}")
        if len(value.consumers) != 1:
            readers = (
                ", ".join(dict.fromkeys(f"{c.op} {c.path}".strip() for c in value.consumers)) or "nothing"
            )
            raise Unproven(f"its output is used {len(value.consumers)} times: by {readers}")
        return value.consumers[0]

    def next_call(self, call: Call) -> Call:
        """The one call that reads the output of a call, past Identity and dropout in eval mode.

        Parameters
        ----------
        call : Call
            A call of any view.

        Returns
        -------
        Call
            The first that does something to the value.

        Raises
        ------
        Unproven
            As :meth:`sole_reader`.
        """
        reader = self.sole_reader(call.output)
        while reader.passes_on:
            reader = self.sole_reader(reader.output)
        return reader

    def readers_elsewhere(self, module: nn.Module) -> list[str]:
        """Who reads parameters or buffers of a module by name, other than the module when it is called.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        list of str
            Paths of the modules whose forward does; ``"(the model)"`` for the model's own.
        """
        tensors = [*module._parameters.values(), *module._buffers.values()]
        found: set[str] = set()
        for tensor in tensors:
            found |= self.reads.get(id(tensor), set()) if tensor is not None else set()
        return sorted(path or "(the model)" for path in found)

    def _has_unseen_above(self, module: nn.Module) -> bool:
        return any(above in self.unseen for name in self.names(module) for above in _ancestors(name))

    # -- what was not seen ------------------------------------------------------------------------------
    def _why_unseen(self, module: nn.Module) -> str:
        for name in self.names(module):
            for above in _ancestors(name):
                if above in self.unseen:
                    return f"the forward of {above or 'the model'} can't be followed ({self.unseen[above]})"
        return "no call of it was seen"

    def _check_not_touched(self, module: nn.Module, scopes: Iterable[str]) -> None:
        names = self.names(module)
        if len(names) > 1:
            for name in names:
                for above in _ancestors(name):
                    if above in self.unseen:
                        raise Unproven(
                            f"it is registered {len(names)} times, and the forward of {above or 'the model'} "
                            f"can't be followed ({self.unseen[above]})"
                        )
        modules = dict(self.model.named_modules())
        for scope in scopes:
            inside = [
                n for name in names for n in name[len(scope) :].split(".") if name.startswith(scope) and n
            ]
            for above in _ancestors(scope):
                if above not in self.unseen or above not in modules:
                    continue
                kind: Any = type(modules[above])
                touched = _touched_by(kind)
                methods = _own_methods(type(modules[scope]))
                for name in [*inside, *sorted(methods)]:
                    if name in touched and not name.isdigit():
                        raise Unproven(
                            f"the forward of {above or 'the model'}, which can't be followed "
                            f"({self.unseen[above]}), may reach into {scope} for .{name}"
                        )


def find_flow(
    model: nn.Module,
    example: Any = None,
    *,
    modes_needed: tuple[bool, ...] = (False,),
    run: Callable[[nn.Module], Any] | None = None,
    make_up: bool = False,
) -> Flow:
    """Find how values flow through a network.

    Parameters
    ----------
    model : torch.nn.Module
        Any network. Nothing in it is changed: modes, buffers and attributes that a forward sets are put back.
    example : Tensor, tuple, dict, or None
        An input for one run in eval mode without gradients: a tensor, positional arguments, or keyword
        arguments. With it, parts that can't be followed symbolically are seen as well.
    modes_needed : tuple of bool
        Training flags for which statements must hold: ``(False,)`` for inference, ``(False, True)`` for both.
    run : callable, optional
        ``run(model)`` calls the model on an input of any structure, in place of ``example``.
    make_up : bool, default False
        Where no example is given, try inputs made up from what the model says about itself.

    Returns
    -------
    Flow
        The views, and what could not be seen and why.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.network.values.find import find_flow
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> flow = find_flow(net)
    >>> flow.next_call(flow.calls(net[0])[0]).path
    '1'
    """
    views: list[View] = []
    unseen: dict[str, str] = {}
    reads: dict[int, set[str]] = {}
    for training in modes_needed:
        with modes(model, training):
            found, missed, read = follow(model, training=training)
        views += found
        for path, reason in missed.items():
            unseen.setdefault(path, reason)
        for key, where in read.items():
            reads.setdefault(key, set()).update(where)
    state, begun = torch.get_rng_state(), time.monotonic()
    try:
        for given in guesses(model) if make_up and run is None and example is None else [example]:
            if run is None and given is None:
                continue
            torch.set_rng_state(state)
            call = run if run is not None else partial(call_with, example=given)
            try:
                view, read, result = watch(model, partial(call, model))
            except Exception:
                if not make_up or example is not None or run is not None:
                    raise
                if time.monotonic() - begun > _PATIENCE:
                    break
                continue
            views.append(view)
            for key, where in read.items():
                reads.setdefault(key, set()).update(where)
            return Flow(model, views, unseen, reads, modes_needed, result, given)
    finally:
        torch.set_rng_state(state)
    return Flow(model, views, unseen, reads, modes_needed)


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every batch norm of a model with its path: torch's, ours, frozen lookalikes.

    Parameters
    ----------
    model : torch.nn.Module
        Any network.

    Returns
    -------
    list of tuple of str and torch.nn.Module
        Each module once, in the order of ``named_modules()``.
    """
    return [(path, m) for path, m in model.named_modules() if is_batch_norm(m)]


def _ancestors(path: str) -> list[str]:
    """Paths above a path, nearest first, ``""`` last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _own_methods(kind: type) -> set[str]:
    """Methods other than forward through which a parent could run a module's children."""
    if kind.__module__.startswith("torch.nn."):
        return set()
    return {name for name in vars(kind) if name != "forward" and not name.startswith("__")}


@cache
def _touched_by(kind: Any) -> frozenset[str]:
    """Names that the code reachable from a class's forward loads from anything but ``self``."""
    touched: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        function = inspect.unwrap(getattr(kind, waiting.pop(), None) or (lambda: None))
        codes = [function.__code__] if isinstance(function, types.FunctionType) else []
        while codes:
            code = codes.pop()
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            before: Any = None
            for step in dis.get_instructions(code):
                if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    own = before is not None and "LOAD_FAST" in before.opname and "self" in str(before.argval)
                    if not own:
                        touched.add(step.argval)
                    elif step.argval not in seen and inspect.isfunction(getattr(kind, step.argval, None)):
                        seen.add(step.argval)
                        waiting.append(step.argval)
                before = step
    return frozenset(touched)
