"""Hold statistics, or gamma and beta, still through fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.modules import Layer
from batchnorm.network.inputs import copied
from batchnorm.network.model import Where, check_model, chooser, unwrapped
from batchnorm.network.record import ATTRIBUTE, Record, write_record
from batchnorm.network.undo import Undo, keep_attribute


def freeze(
    model: nn.Module,
    statistics: bool = True,
    affine: bool = False,
    *,
    where: Where = None,
    inplace: bool = True,
) -> nn.Module:
    """Freeze the batch norms of a model, so that ``.train()`` does not thaw them.

    A layer whose statistics are frozen normalizes with its running statistics in train mode too, and never
    moves them. Freezing gamma and beta sets ``requires_grad`` to False on both. What is frozen shows in
    ``repr``, and a copy or a pickled model keeps it. A state dict says nothing of it: loading one, whoever
    wrote it, neither freezes nor thaws.

    Parameters
    ----------
    model : Module
        A network with batch norms of this package, or one such layer; changed in place.
    statistics : bool, default True
        Freeze running means and variances. False leaves them as they are, frozen or not.
    affine : bool, default False
        Freeze gamma and beta. False leaves them as they are.
    where : str or callable, optional
        Which layers: a pattern for their names (``"layer4.*"``), or ``where(name, layer)``. All by default.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy; ``batchnorm.record`` of it names the layers.

    Raises
    ------
    ArgumentError
        No batch norm in the model; one of ``torch.nn``, which the next ``.train()`` would thaw; or
        statistics of a layer that keeps none. Nothing is changed then.

    Examples
    --------
    >>> import batchnorm
    >>> layer = batchnorm.freeze(batchnorm.BatchNorm1d(3)).train()
    >>> layer.frozen_statistics
    True
    """
    check_model(model, "freeze")
    model = model if inplace else copied(unwrapped(model))
    layers = _layers(model, "freeze", where)
    if statistics:
        for path, layer in layers.items():
            if layer.running_mean is None:
                raise ArgumentError(
                    "freeze: a layer with track_running_stats=False has no statistics to freeze.",
                    why="it always normalizes with the batch's.",
                    mend="statistics=False, or give the layer statistics and calibrate it.",
                    at=path,
                )
    undo = Undo()
    with undo, undo:
        undo.add(partial(_set, _flags(layers)))
        for layer in layers.values():
            layer.frozen_statistics = layer.frozen_statistics or statistics
            if affine:
                layer.freeze_affine(True)
        return _tell(undo, model, layers, "frozen", statistics, affine)


def unfreeze(
    model: nn.Module,
    statistics: bool = True,
    affine: bool = True,
    *,
    where: Where = None,
    inplace: bool = True,
) -> nn.Module:
    """Undo `freeze`.

    Parameters
    ----------
    model : Module
        A network with batch norms of this package, or one such layer; changed in place.
    statistics : bool, default True
        Let running statistics move again in train mode.
    affine : bool, default True
        Let gamma and beta learn again, those that `freeze` stopped.
    where : str or callable, optional
        Which layers: a pattern for their names (``"layer4.*"``), or ``where(name, layer)``. All by default.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy; ``batchnorm.record`` of it names the layers.

    Raises
    ------
    ArgumentError
        As for `freeze`.

    Examples
    --------
    >>> import batchnorm
    >>> layer = batchnorm.unfreeze(batchnorm.freeze(batchnorm.BatchNorm1d(3)))
    >>> layer.frozen_statistics
    False
    """
    check_model(model, "unfreeze")
    model = model if inplace else copied(unwrapped(model))
    layers, undo = _layers(model, "unfreeze", where), Undo()
    with undo, undo:
        undo.add(partial(_set, _flags(layers)))
        for layer in layers.values():
            layer.frozen_statistics = layer.frozen_statistics and not statistics
            if affine and layer.frozen_affine:
                layer.freeze_affine(False)
        return _tell(undo, model, layers, "thawed", statistics, affine)


def _tell(
    undo: Undo, model: nn.Module, layers: dict[str, Layer], action: str, statistics: bool, affine: bool
) -> nn.Module:
    what = " and ".join(["statistics"] * statistics + ["gamma and beta"] * affine)
    told = Record()
    for path, layer in layers.items():
        told.add(
            path, type(layer).__name__, action, what, tool="freeze" if action == "frozen" else "unfreeze"
        )
    keep_attribute(undo, model, ATTRIBUTE)
    return write_record(model, told) if what else model


def _flags(layers: dict[str, Layer]) -> list[tuple[Any, str, bool]]:
    names = ("frozen_statistics", "frozen_affine")
    flags: list[tuple[Any, str, bool]] = [
        (layer, name, getattr(layer, name)) for layer in layers.values() for name in names
    ]
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    return flags + [(p, "requires_grad", p.requires_grad) for p in parameters]


def _set(flags: list[tuple[Any, str, bool]]) -> None:
    for holder, name, value in flags:
        setattr(holder, name, value)


def _layers(model: nn.Module, verb: str, where: Where) -> dict[str, Layer]:
    chosen = chooser(where, verb)
    layers = {p: m for p, m in unwrapped(model).named_modules() if isinstance(m, Layer) and chosen(p, m)}
    strangers = [
        path
        for path, module in unwrapped(model).named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, Layer) and chosen(path, module)
    ]
    if strangers:
        raise ArgumentError(
            f"{verb}: {len(strangers)} batch norms are torch.nn's own.",
            why="they hold still only until somebody calls .train().",
            mend='batchnorm.convert(model, "batchnorm") first: it makes them ours and keeps their parameters.',
            at=strangers[0],
        )
    if not layers:
        raise ArgumentError(
            f"{verb}: {type(model).__name__} has no batch norm{'' if where is None else ' that where= means'}.",
            why="there is nothing to do, and you expected that there is.",
            mend="look at the model; a folded network has none left.",
        )
    return layers
