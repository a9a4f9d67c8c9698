"""What a step of a Dynamo graph writes to, and which steps may not be moved across it."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

EVERYTHING = -1
"""Stands among storages for: any of them."""

_WRITERS = frozenset(
    [
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
        operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift,
        operator.irshift, operator.setitem, operator.delitem,
    ]
)  # fmt: skip
_WITHOUT_SIGNATURE: dict[Any, tuple[str, ...]] = {
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"
    ),
    torch.instance_norm: ("input", "weight", "bias", "running_mean", "running_var"),
    F.hardtanh_: ("input", "min_val", "max_val"),
    F.leaky_relu_: ("input", "negative_slope"),
}  # fmt: skip
_PURE_HOMES = (
    "_operator",
    "math",
    "builtins",
    "torch._C._nn",
    "torch.nn.functional",
    "torch._C._special",
    "torch",
)


def value(node: Any) -> Any:
    """Give the fake tensor that Dynamo saw a step return.

    Parameters
    ----------
    node : torch.fx.Node or object
        A step of the graph, or a constant among its arguments.

    Returns
    -------
    object
        None where it is not known.
    """
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor that a step returned, or that its arguments hold."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, fx.Node):
            yield from tensors(value(leaf))
        elif isinstance(leaf, Tensor):
            yield leaf


def storages(tree: Any) -> frozenset[int]:
    """Identities of the memory behind what a step returned: equal where one is a view of the other."""
    found = set()
    for tensor in tensors(tree):
        try:
            found.add(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, or a subclass without memory of its own
            found.add(EVERYTHING)
    return frozenset(found)


def overlap(some: frozenset[int], others: frozenset[int]) -> bool:
    """Whether two sets of storages may share one."""
    return (
        bool(some & others) or (bool(some) and EVERYTHING in others) or (bool(others) and EVERYTHING in some)
    )


@lru_cache(maxsize=512)
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name.

    Parameters
    ----------
    node : torch.fx.Node
        A call.

    Returns
    -------
    dict
        Those that were given.
    """
    names = _WITHOUT_SIGNATURE.get(node.target, ())
    signature = _signature(node.target) if node.op == "call_function" and not names else None
    if signature is not None:
        try:
            return dict(signature.bind(*node.args, **node.kwargs).arguments)
        except TypeError:
            return dict(node.kwargs)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_mode_change(node: fx.Node) -> bool:
    """Whether a step changes how those after it run (gradients, autocast, transformations, hooks).

    Steps on both sides of one never become one call.
    """
    if node.op != "call_function":
        return False
    target: Any = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    home = getattr(target, "__module__", None) or ""
    if home in _PURE_HOMES or (home == "" and _is_torch_builtin(target)):
        return False
    # what is known and pure has tensors in and a tensor out
    return not any(True for _ in tensors(node))


def _is_torch_builtin(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return getattr(torch, name, None) is target or getattr(F, name, None) is target


def written(node: fx.Node) -> frozenset[int]:
    """Storages that a step changes.

    Parameters
    ----------
    node : torch.fx.Node
        Any step.

    Returns
    -------
    frozenset of int
        With `EVERYTHING` where it is not known.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return frozenset()
    if "out" in node.kwargs and node.kwargs["out"] is not None:
        return storages(node.kwargs["out"])
    if node.op == "call_method":
        name = str(node.target)
        if name in ("set_", "resize_", "__setitem__") or name.startswith("__i"):
            return storages(node.args[0]) | ({EVERYTHING} if name == "set_" else frozenset())
        if name.endswith("_") and not name.endswith("__"):
            return storages(node.args[0])
        return frozenset()
    if node.op != "call_function":
        return frozenset({EVERYTHING})
    target: Any = node.target
    if target in _WRITERS:
        return storages(node.args[0])
    if isinstance(target, torch._ops.OpOverload):
        return storages((node.args, node.kwargs)) if target._schema.is_mutable else frozenset()
    if isinstance(target, torch._ops.OpOverloadPacket):
        return storages((node.args, node.kwargs))
    if target in (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm):
        given = arguments(node)
        return storages([given.get("running_mean"), given.get("running_var")])
    home = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    if home in _PURE_HOMES or target in vars(math).values() or _is_torch_builtin(target):
        if name.endswith("_") and not name.endswith("__"):
            return storages(node.args[0])
        given = arguments(node)
        if given.get("inplace") or given.get("max_norm") is not None:
            return storages((node.args, node.kwargs))
        return frozenset()
    return storages((node.args, node.kwargs))
