"""The flow of values as the tools see it: calls, the values they make, and who reads each value.

A statement about a module is true when it holds in every view that calls the module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from batchnorm.network.values.modules import is_dropout
from batchnorm.network.values.operations import SHAPE_ONLY


@dataclass(eq=False)
class Value:
    """A tensor on its way through the network, one version of it (an in-place change makes a new one).

    Parameters
    ----------
    producer : Call or None
        The call that made it; None for what comes in from outside the view.
    consumers : list of Call
        The calls that read its numbers, in order, one entry a call. Reading only the shape, dtype or
        device is not consuming.
    escape : str
        Why there may be readers that ``consumers`` does not list (returned, stored, changed through a view);
        empty when there are none.
    shape : tuple of int
        That of the tensor.
    base : Value or None
        The value whose storage this one may share.
    stale : str
        Why a read from now on would not see what the producer made; empty when it would.
    """

    producer: Call | None = None
    consumers: list[Call] = field(default_factory=list)
    escape: str = ""
    shape: tuple[int, ...] = ()
    base: Value | None = None
    stale: str = ""


@dataclass(eq=False)
class Call:
    """One call of a module or function.

    Parameters
    ----------
    op : str
        Name of an operation of the dispatcher, without the underscore of one in place (``"add"`` for ``+``
        and ``add_``), or the class name of a module.
    path : str
        Path of the module called; for a function, of the module whose forward calls it.
    module : torch.nn.Module or None
        The module called; None for a function.
    view : View
        Where the call was seen.
    args, kwargs : tuple, dict
        Arguments with :class:`Value` in the place of tensors.
    inplace : bool
        Whether the first input is overwritten.
    inputs : list of Value
        The tensors among the arguments whose numbers are read, in order.
    outputs : list of Value
        The tensors returned.
    order : int
        Position in the view.
    """

    op: str
    path: str
    module: nn.Module | None
    view: View
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inplace: bool = False
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    order: int = 0

    @property
    def output(self) -> Value:
        """The first tensor returned."""
        return self.outputs[0]

    @property
    def is_sum(self) -> bool:
        """Whether the call adds two tensors with weight one each."""
        return (
            self.module is None
            and self.op == "add"
            and len(self.inputs) == 2
            and self.kwargs.get("alpha", 1) == 1
        )

    @property
    def passes_on(self) -> bool:
        """Whether the call hands on its input as it is: Identity, and dropout in eval mode."""
        if self.module is None:
            return self.op in ("alias", "detach")
        return isinstance(self.module, nn.Identity) or (is_dropout(self.module) and not self.view.training)

    def __repr__(self) -> str:
        return f"<{self.op} {'in' if self.module is None else 'at'} {self.path or 'the model'}>"


@dataclass(eq=False)
class View:
    """One run of a network.

    Parameters
    ----------
    training : bool
        The mode in which it ran.
    calls : list of Call
        In the order of execution.
    reads : dict
        ``id`` of a parameter or buffer that something other than its own module reads, to the paths of the
        modules that do.
    """

    training: bool
    calls: list[Call] = field(default_factory=list)
    reads: dict[int, set[str]] = field(default_factory=dict)


def root_of(value: Value) -> Value:
    """The value that owns the storage.

    Parameters
    ----------
    value : Value
        Any value.

    Returns
    -------
    Value
        ``value`` itself when it is no view.
    """
    while value.base is not None:
        value = value.base
    return value


def family(view: View, value: Value) -> list[Value]:
    """All values of a view that may share storage with one.

    Parameters
    ----------
    view : View
        Where to look.
    value : Value
        One of its values.

    Returns
    -------
    list of Value
        With ``value`` itself and the owner of the storage.
    """
    root = root_of(value)
    made = [out for call in view.calls for out in call.outputs]
    return [root, *(out for out in made if out is not root and root_of(out) is root)]


def write_down(call: Call, bases: list[Value | None]) -> Call:
    """Write a call into its view and connect it to the values it reads.

    Parameters
    ----------
    call : Call
        With arguments; it gets its place, its inputs and its outputs.
    bases : list of Value or None
        For each tensor that it returns, the argument whose storage it shares.

    Returns
    -------
    Call
        ``call``.
    """
    read = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Value)]
    call.inputs = [] if call.module is None and call.op in SHAPE_ONLY else read
    call.order = len(call.view.calls)
    for value in dict.fromkeys(call.inputs):
        value.consumers.append(call)
        value.escape = value.escape or value.stale
    call.outputs = [Value(call, base=None if base is None else root_of(base)) for base in bases]
    call.view.calls.append(call)
    if call.inplace and read:
        for value in family(call.view, read[0]):
            if value is not read[0] and value not in call.outputs:
                value.stale = f"read after {call.op} changed it in place through another view of it"
    return call
