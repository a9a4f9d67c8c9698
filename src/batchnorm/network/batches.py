"""How a batch of any usual structure goes into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError

FORWARD = "pass forward=lambda model, batch: model(...)."
"""The way out where it is not clear how a model takes a batch."""


def batches_of(data: Any, verb: str) -> Iterable[Any]:
    """Give the batches that ``data`` holds.

    Parameters
    ----------
    data : iterable of batches, Tensor, or mapping
        A tensor or a mapping is one batch.
    verb : str
        Who asks, for the message.

    Returns
    -------
    iterable
        Of batches.

    Raises
    ------
    ArgumentError
        It can't be iterated.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"{verb}: data of type {type(data).__name__} is no iterable of batches.",
            why="the statistics come from batches of inputs.",
            mend="give a loader, a list of batches, a generator, or one tensor.",
        )
    return data


def run_batch(model: nn.Module, batch: Any, verb: str) -> Any:
    """Call a model on a batch.

    Parameters
    ----------
    model : Module
        The network.
    batch : Tensor, mapping, tuple or list
        A tensor; keyword arguments; or a tuple or list whose first element is one of these.
    verb : str
        Who asks, for the message.

    Returns
    -------
    object
        What the model gives.

    Raises
    ------
    ArgumentError
        The batch is of another structure.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        return run_batch(model, batch[0], verb)
    raise ArgumentError(
        f"{verb}: a batch of type {type(batch).__name__} is neither a tensor, a mapping, nor a tuple or list "
        "whose first element is one.",
        why="it is not clear what of it the model takes.",
        mend=FORWARD,
    )


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


def move_to(batch: Any, device: torch.device) -> Any:
    """Give a batch with its tensors on a device.

    Parameters
    ----------
    batch : Tensor, mapping, tuple, list or anything else
        What is not one of these stays as it is.
    device : torch.device
        Where to.

    Returns
    -------
    object
        Of the same structure; tuples become lists.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: move_to(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [move_to(value, device) for value in batch]
    return batch
