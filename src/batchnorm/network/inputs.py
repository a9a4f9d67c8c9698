"""What goes into a network: an example that is given, or a batch of data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.errors import ArgumentError
from batchnorm.network.model import check_model, check_whole, unwrapped

Forward = Callable[[nn.Module, Any], Any] | None
"""How a network is called on an input, where that is not plain: ``forward(model, batch)``."""

FORWARD = "pass forward=lambda model, batch: model(...)."
"""The way out where it is not clear how a model takes a batch."""

_NO_INPUT = (bool, int, float, complex, str, bytes, type(None))


def run(model: nn.Module, batch: Any, tool: str, forward: Forward = None, **named: Any) -> Any:
    """Call a network on one input.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batch : Tensor, tuple, list, mapping or object
        A tensor; keyword arguments; or a tuple or list of what ``forward`` requires, in order. What lies
        behind that in a tuple, a label, is left out, so that a batch of a loader is an input as it is.
    tool : str
        Who asks, for the message.
    forward : callable, optional
        ``forward(model, batch)`` calls it instead.
    **named : object
        More keyword arguments.

    Returns
    -------
    object
        What the network returns.

    Raises
    ------
    ArgumentError
        The batch is a number or a text, or empty.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**{**batch, **named})
    if isinstance(batch, (tuple, list)) and batch:
        if len(batch) == 1 or required(model) == 1:
            first = batch[0]
            return run(model, first, tool, **named) if isinstance(first, Mapping) else model(first, **named)
        return model(*batch[: required(model)], **named)
    if isinstance(batch, (*_NO_INPUT, tuple, list)):
        raise ArgumentError(
            f"{tool}: an input of type {type(batch).__name__} is neither a tensor, a mapping, nor a tuple or "
            "list of what forward requires.",
            why="it is not clear what of it the model takes.",
            mend=FORWARD,
        )
    return model(batch, **named)


def run_each(model: nn.Module, batches: Iterable[Any], tool: str, forward: Forward = None) -> int:
    """Call a network on batches, each moved to its device; one that is compiled runs as it was written.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batches : iterable
        As `run` takes them.
    tool : str
        Who asks, for the message.
    forward : callable, optional
        ``forward(model, batch)``, which gets a batch as the loader gave it.

    Returns
    -------
    int
        How many there were.
    """
    device, number = single_device(model), 0
    # a compiled module does not see hooks that are younger than its graph
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            run(model, batch if forward else move_to(batch, device), tool, forward)
            number += 1
    return number


def required(model: nn.Module) -> int | None:
    """How many positional arguments a network requires.

    Parameters
    ----------
    model : torch.nn.Module
        Its forward's signature is read; of a wrapper that hands on what it is given, that of what it holds.

    Returns
    -------
    int or None
        At least one; None where it takes any number.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    needed = sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
    )
    if needed == 0 and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        # a wrapper hands on what it is given
        inner = list(model.children())
        return required(inner[0]) if len(inner) == 1 else None
    return max(needed, 1)


def check_forward(forward: Any, tool: str) -> None:
    """Raise `ArgumentError` unless ``forward`` can be called.

    Parameters
    ----------
    forward : object
        As given.
    tool : str
        Who asks.
    """
    if forward is not None and not callable(forward):
        raise ArgumentError(f"{tool}: forward={forward!r} is no function.", mend=FORWARD)


def own(tree: Any) -> Any:
    """Copy an input: a network may overwrite it, and the caller's is not ours to spoil.

    Parameters
    ----------
    tree : object
        Tensors in tuples, lists and dictionaries.

    Returns
    -------
    object
        Of the same structure, with tensors of its own.
    """
    return each_tensor(lambda tensor: tensor.detach().clone(), tree)


def each_tensor(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Give an input with each of its tensors changed.

    Parameters
    ----------
    change : callable
        Of a tensor.
    tree : object
        Tensors in tuples, lists and mappings.

    Returns
    -------
    object
        Of the same structure; a mapping of another kind becomes a dictionary.
    """
    if isinstance(tree, Mapping) and type(tree) not in pytree.SUPPORTED_NODES:
        tree = dict(tree)
    return pytree.tree_map_only(Tensor, change, tree)


def doubled(tree: Any) -> Any:
    """Give an input in float64.

    Parameters
    ----------
    tree : object
        Tensors in tuples, lists and mappings.

    Returns
    -------
    object
        Of the same structure; integers and booleans stay.
    """
    return each_tensor(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, tree)


def copied(model: nn.Module) -> nn.Module:
    """Copy a network.

    Parameters
    ----------
    model : torch.nn.Module
        May keep tensors with a history as plain attributes, as old-style weight norm does, which
        ``copy.deepcopy`` alone refuses.

    Returns
    -------
    torch.nn.Module
        A deep copy.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def target(model: nn.Module, tool: str, inplace: bool) -> nn.Module:
    """What a tool changes: the network that it is given, or a copy of what is inside of it.

    Parameters
    ----------
    model : object
        As given.
    tool : str
        Who asks.
    inplace : bool
        As given.

    Returns
    -------
    torch.nn.Module
        ``model`` itself where ``inplace`` is true.
    """
    check_model(model, tool)
    if inplace:
        return model
    check_whole(model, tool, "inplace=True")
    return copied(unwrapped(model))


def batches_of(data: Any, verb: str) -> Iterable[Any]:
    """Give the batches that ``data`` holds.

    Parameters
    ----------
    data : iterable of batches, Tensor, or mapping
        A tensor or a mapping is one batch. A tuple is several, as ``Tensor.split`` gives them.
    verb : str
        Who asks, for the message.

    Returns
    -------
    iterable
        Of batches.

    Raises
    ------
    ArgumentError
        It can't be iterated, or is a tuple whose parts are unlike each other: one batch with its label.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"{verb}: data of type {type(data).__name__} is no iterable of batches.",
            why="the statistics come from batches of inputs.",
            mend="give a loader, a list of batches, a generator, or one tensor.",
        )
    if isinstance(data, tuple) and len({_form(part) for part in data}) > 1:
        raise ArgumentError(
            f"{verb}: data is a tuple of unlike parts, {', '.join(map(_form, data))}.",
            why="it is one batch with a label, rather than several batches.",
            mend="[batch] for one batch, list(data) for several.",
        )
    return data


def _form(part: Any) -> str:
    return f"{part.ndim}-d {part.dtype}" if isinstance(part, Tensor) else type(part).__name__


def single_device(model: nn.Module) -> torch.device | None:
    """Give the device that all of a model is on.

    Parameters
    ----------
    model : Module
        The network.

    Returns
    -------
    torch.device or None
        None where it is on several, or has no tensor.
    """
    devices = {tensor.device for group in (model.parameters(), model.buffers()) for tensor in group}
    return devices.pop() if len(devices) == 1 else None


def move_to(batch: Any, device: torch.device | None) -> Any:
    """Give a batch with its tensors on a device.

    Parameters
    ----------
    batch : object
        Tensors in tuples, lists and mappings.
    device : torch.device or None
        Where to; None leaves it where it is.

    Returns
    -------
    object
        Of the same structure.
    """
    if device is None:
        return batch
    return each_tensor(lambda tensor: tensor.to(device, non_blocking=True), batch)
