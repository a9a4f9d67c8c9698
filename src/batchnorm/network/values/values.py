"""The flow of values as the tools see it: calls, the values they make, and who reads each value.

Two observers fill it: ``tracing`` (symbolic, without numbers) and ``watching`` (a real run). Each gives
views; a statement about a module is true when it holds in every view that calls the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from batchnorm.network.values.activations import activation_name, is_nonlinear
from batchnorm.network.values.modules import is_dropout
from batchnorm.network.values.operations import SHAPE_OF_SECOND, SHAPE_ONLY, VIEWS

_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "radd": "add"}
_SCALARS = (
    "inplace",
    "negative_slope",
    "approximate",
    "min_val",
    "max_val",
    "min",
    "max",
    "alpha",
    "dim",
    "training",
)


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
    shape : tuple of int, or None
        Known in views of a real run.
    base : Value or None
        The value whose storage this one may share.
    stale : str
        Why a read from now on would not see what the producer made; empty when it would.
    """

    producer: Call | None = None
    consumers: list[Call] = field(default_factory=list)
    escape: str = ""
    shape: tuple[int, ...] | None = None
    base: Value | None = None
    stale: str = ""


@dataclass(eq=False)
class Call:
    """One call of a module or function.

    Parameters
    ----------
    op : str
        Canonical name of a function (``"add"`` for ``+``, ``torch.add``, ``add_``, ``iadd``), or the class
        name of a module.
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
    def activation(self) -> str | None:
        """Name of the activation in the kernels' contract, when the call is exactly one of those."""
        return activation_name(self.module, self.op, self.scalars())

    @property
    def nonlinear(self) -> bool:
        """Whether the call is an elementwise nonlinearity of any kind, or a gate."""
        return is_nonlinear(self.module, self.op)

    @property
    def is_sum(self) -> bool:
        """Whether the call adds two tensors with weight one each."""
        return (
            self.module is None
            and self.op == "add"
            and len(self.inputs) == 2
            and self.scalars().get("alpha", 1) == 1
        )

    @property
    def passes_on(self) -> bool:
        """Whether the call hands on its input as it is: Identity, and dropout in eval mode."""
        if self.module is None:
            return self.op in ("alias", "identity", "detach") or (
                self.op.endswith("dropout") and self.scalars().get("training") is False
            )
        return isinstance(self.module, nn.Identity) or (is_dropout(self.module) and not self.view.training)

    def scalars(self) -> dict[str, Any]:
        """Scalar arguments by the names that torch gives them.

        Returns
        -------
        dict
            Those that were given.
        """
        found = {name: value for name, value in self.kwargs.items() if name in _SCALARS}
        rest = self.args[1:]
        positions = {
            "leaky_relu": ("negative_slope", "inplace"),
            "hardtanh": ("min_val", "max_val", "inplace"),
            "clamp": ("min", "max"),
            "clip": ("min", "max"),
            "dropout": ("p", "training", "inplace"),
        }.get(self.op, ())
        return {**dict(zip(positions, rest, strict=False)), **found}

    def __repr__(self) -> str:
        return f"<{self.op} {'in' if self.module is None else 'at'} {self.path or 'the model'}>"


@dataclass(eq=False)
class View:
    """One look at one module's forward.

    Parameters
    ----------
    scope : str
        Path of the module whose forward was looked at; ``""`` for the whole model.
    training : bool
        The mode in which it was looked at.
    evidence : str
        ``"traced"`` (symbolic) or ``"run"`` (seen in a run on an example).
    calls : list of Call
        In the order of execution.
    returned : list of Value
        What the forward returns.
    """

    scope: str
    training: bool
    evidence: str
    calls: list[Call] = field(default_factory=list)
    returned: list[Value] = field(default_factory=list)


def canonical(name: str) -> tuple[str, bool]:
    """Canonical name of a function, and whether the name says that it works in place.

    Parameters
    ----------
    name : str
        ``relu_``, ``iadd``, ``__add__``, ``add``, ...

    Returns
    -------
    tuple of str and bool
        Name and in-place flag.
    """
    inplace = False
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.endswith("_") and not name.startswith("__"):
        name, inplace = name[:-1], True
    if name in _OPERATORS:
        inplace = name.startswith("i")
        name = _OPERATORS[name]
    return name, inplace


def values_in(tree: Any) -> Iterator[Value]:
    """Every value in nested tuples, lists, dictionaries and slices, in order.

    Parameters
    ----------
    tree : object
        Arguments or results.

    Yields
    ------
    Value
        In the order in which they are written.
    """
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from values_in(item)
    elif isinstance(tree, slice):
        yield from values_in((tree.start, tree.stop, tree.step))


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


def append_call(
    view: View,
    op: str,
    path: str,
    module: nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    inplace: bool,
    outputs: int = 1,
    replace: Callable[[Value, Value], None] | None = None,
) -> Call:
    """Write a call into a view and connect it to the values it reads.

    Parameters
    ----------
    view : View
        Changed: the call is appended.
    op, path, module, args, kwargs, inplace
        As in :class:`Call`.
    outputs : int
        How many tensors it returns.
    replace : callable, optional
        Called with the overwritten value and its successor when the call works in place.

    Returns
    -------
    Call
        The new call.
    """
    call = Call(op, path, module, view, args, kwargs, inplace, order=len(view.calls))
    read = list(values_in(args)) + list(values_in(kwargs))
    if module is None and op in SHAPE_ONLY:
        read = []
    elif module is None and op in SHAPE_OF_SECOND:
        read = read[:1]
    call.inputs = read
    for value in dict.fromkeys(read):
        value.consumers.append(call)
        value.escape = value.escape or value.stale
    base = root_of(read[0]) if read and (inplace or _may_share(call)) else None
    call.outputs = [Value(call, base=base) for _ in range(outputs)]
    view.calls.append(call)
    if inplace and read:
        for value in family(view, read[0]):
            if value is not read[0] and value not in call.outputs:
                value.stale = f"read after {call.op} changed it in place through another view of it"
        if replace is not None and call.outputs:
            replace(read[0], call.outputs[0])
    return call


def _may_share(call: Call) -> bool:
    if call.module is None:
        return call.op in VIEWS
    return call.passes_on or is_dropout(call.module) or isinstance(call.module, (nn.Flatten, nn.Unflatten))
