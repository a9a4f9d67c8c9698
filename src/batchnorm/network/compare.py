"""What a network gave, taken apart into numbers and other values, and how far two such answers are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def leaves(tree: Any, path: str = "", seen: dict[int, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values in an answer, wherever they are.

    Parameters
    ----------
    tree : object
        Containers, data classes and any object with attributes are looked into; modules are not.
    path : str, optional
        Where it is in the whole.
    seen : dict, optional
        What was looked into already, by ``id``.

    Yields
    ------
    tuple of str and object
        Where, and a dense tensor or a plain value. What can't be looked into is passed over.
    """
    if isinstance(tree, Tensor):
        if tree.is_nested:
            yield from leaves(tree.unbind(), path, seen)
        else:
            dense = tree.to_dense() if tree.layout is not torch.strided else tree
            yield path, dense.dequantize() if dense.is_quantized else dense
        return
    if isinstance(tree, _PLAIN):
        yield path, tree
        return
    seen = {} if seen is None else seen
    if isinstance(tree, (nn.Module, type, ModuleType)) or id(tree) in seen:
        return
    seen[id(tree)] = tree  # kept alive: an id may come again
    if type(tree).__module__ == "numpy" and getattr(tree, "dtype", None) is not None:
        if tree.dtype.kind in "biufc":
            yield path, torch.as_tensor(tree)
        return
    if isinstance(tree, Mapping):
        parts: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, Sequence) and tree and all(isinstance(item, float) for item in tree):
        # numbers of one list are of one scale, and one of them alone may be near 0
        yield path, torch.tensor(tree, dtype=torch.float32)
        return
    elif isinstance(tree, Sequence):
        parts = list(enumerate(tree))
    else:
        slots = [name for kind in type(tree).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [(name, getattr(tree, name)) for name in slots if hasattr(tree, name)]
        parts += list(getattr(tree, "__dict__", {}).items())
    for key, item in parts:
        yield from leaves(item, f"{path}.{key}", seen)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in a result: in containers, data classes and other objects.

    Parameters
    ----------
    tree : object
        What a forward took or returned.

    Yields
    ------
    Tensor
        In the order in which they are stored.
    """
    yield from (leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor))


def kept(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of an answer, with copies of its tensors: what runs later may write to them.

    Parameters
    ----------
    tree : object
        What a network gave.

    Returns
    -------
    list of tuple of str and object
        As `leaves` gives them.
    """
    return [(path, x.detach().clone() if isinstance(x, Tensor) else x) for path, x in leaves(tree)]


def epsilon(value: Any) -> float | None:
    """One unit in the last place of 1, for a number that rounding reaches.

    Parameters
    ----------
    value : object
        A leaf.

    Returns
    -------
    float or None
        None for integers, booleans, text: they are the same or not.
    """
    if isinstance(value, Tensor):
        rounded = value.is_floating_point() or value.is_complex()
        return torch.finfo(value.dtype).eps if rounded and value.numel() else None
    # what dtype a plain number had as a tensor it does not say
    return torch.finfo(torch.float32).eps if isinstance(value, (float, complex)) else None


def apart(a: Any, b: Any) -> float:
    """How far two leaves are apart.

    Parameters
    ----------
    a, b : object
        Leaves at the same place of two answers.

    Returns
    -------
    float
        For numbers that rounding reaches, the largest difference over the largest value of ``a``; inf where
        kind, shape or the places of NaN and inf differ. For others 0 or inf.
    """
    if type(a) is not type(b):
        return float("inf")
    if not isinstance(a, Tensor):
        if epsilon(a) is None:
            return 0.0 if a == b else float("inf")
        a, b = torch.tensor(a), torch.tensor(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if epsilon(a) is None:
        return 0.0 if torch.equal(a, b) else float("inf")
    kind = torch.complex128 if a.is_complex() else torch.float64
    a, b = (x.detach().cpu().to(kind) for x in (a, b))
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((a[finite] - b[finite]).abs().max()) / max(float(a[finite].abs().max()), 1e-30)
