"""What goes into a network: an example that is given, a batch of data, or an input made up."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError

_SIDES = (64, 224, 32, 299, 128, 28, 384)


def call_with(model: nn.Module, example: Any) -> Any:
    """Call a network with an example.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    example : Tensor, tuple, list or dict
        One tensor, positional arguments, or keyword arguments.

    Returns
    -------
    object
        What the network returns.
    """
    # a network may overwrite its input, and the caller's example is not ours to spoil
    example = _cloned(example)
    if isinstance(example, (tuple, list)):
        return model(*example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(example)


def _cloned(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if type(tree) in (tuple, list):
        return type(tree)(_cloned(item) for item in tree)
    if isinstance(tree, Mapping):
        return {key: _cloned(item) for key, item in tree.items()}
    return tree


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


def guesses(model: nn.Module) -> Iterator[Any]:
    """Inputs that a network may accept, as far as its signature, configuration and first layer tell.

    Parameters
    ----------
    model : torch.nn.Module
        Looked at, not run.

    Yields
    ------
    Tensor or dict
        As :func:`call_with` takes them, the most likely first; the global random state is not touched.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    like = first if first is not None else torch.empty(0)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    config, name = getattr(model, "config", None), getattr(model, "main_input_name", "")
    if config is not None and name:
        yield from _guesses_from_config(config, name, draw)
    given = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if isinstance(given, dict) and isinstance(given.get("input_size"), tuple):
        channels, *sides = given["input_size"]
        yield draw(2, channels, *[min(_SIDES[0], side) for side in sides])
        yield draw(2, channels, *sides)
    with suppress(TypeError, ValueError):
        needed = [
            p
            for p in inspect.signature(model.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(needed) > 1:
            return
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            yield draw(4, layer.in_features)
            yield draw(2, 5, layer.in_features)
            return
        if isinstance(layer, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.long, device=layer.weight.device)
            return
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            for side in (32, 400, 4000, 16000):
                yield draw(2, layer.in_channels, side)
                if layer.in_channels == 1:
                    yield draw(2, side)
            return
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            for side in (1, 4, 8) if isinstance(layer, nn.ConvTranspose2d) else _SIDES:
                yield draw(2, layer.in_channels, side, side)
            return
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            for side in (1, 4) if isinstance(layer, nn.ConvTranspose3d) else (16, 32, 64):
                yield draw(2, layer.in_channels, side, side, side)
            return
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            channels = layer.num_features
            yield from (draw(2, channels, *[8] * axes) for axes in range(4))
            return


def _guesses_from_config(config: Any, name: str, draw: Any) -> Iterator[dict[str, torch.Tensor]]:
    channels = getattr(config, "num_channels", 3) or 3
    if name == "pixel_values":
        own = getattr(config, "image_size", None)
        sides = [own] if isinstance(own, int) else list(own) if isinstance(own, (tuple, list)) else []
        for side in dict.fromkeys([_SIDES[0], *sides[:1], *_SIDES]):
            yield {name: draw(2, channels, side, side)}
    elif name in ("input_values", "input_features"):
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_dim", None) or 80
        for length in (400, 2000, 16000):
            yield {name: draw(2, length)}
            yield {name: draw(2, length // 10, bins)}
            yield {name: draw(2, bins, length // 10)}


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
