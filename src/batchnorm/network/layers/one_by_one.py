"""Layers of a network changed one by one: what can't be changed stays as it was, and the record says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from batchnorm.network.model import unwrapped
from batchnorm.network.record import ATTRIBUTE, Record, write_record
from batchnorm.network.undo import Undo, keep_attribute, keep_modules

Change = Callable[[str, nn.Module, Undo], str | None]


class Impossible(Exception):
    """A layer stays as it is; the text says why."""


def one_by_one(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    change: Change,
    tool: str,
    done: str,
) -> nn.Module:
    """Change layers in place; on any other exception than `Impossible` all are as they were.

    Parameters
    ----------
    model : torch.nn.Module
        Gets the record.
    layers : iterable of tuple of str and torch.nn.Module
        With their paths.
    change : callable
        Of a path, a layer, and what takes steps back; gives what the layer became, or None where it was that
        already, or raises `Impossible`.
    tool, done : str
        Who asks, and what the record calls a change.

    Returns
    -------
    torch.nn.Module
        ``model``.
    """
    told, undo = Record(tool=tool), Undo()
    with undo, undo:
        for path, layer in layers:
            kind, one = type(layer).__name__, Undo()
            undo.add(one.back)
            keep_modules(one, [layer])
            detail, why = _tried(change, path, layer, one)
            if why:
                told.leave(path, kind, why)
            elif detail is not None:
                told.add(path, kind, done, detail)
        keep_attribute(undo, unwrapped(model), ATTRIBUTE)
        return write_record(model, told)


def _tried(change: Change, path: str, layer: nn.Module, one: Undo) -> tuple[str | None, str]:
    """What became of a layer, and why nothing did."""
    # a function of its own: an interrupt at the very ``try`` would slip out of a ``with`` around it
    try:
        return change(path, layer, one), ""
    except Impossible as why:
        one.back()
        return None, str(why)
