"""Hold statistics, or gamma and beta, still through fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.modules import Layer
from batchnorm.network.inputs import target
from batchnorm.network.model import Where, chooser, unwrapped
from batchnorm.network.record import Record, write_record
from batchnorm.network.undo import Undo, keep_modules


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
    return _hold(model, "freeze", statistics, affine, where, inplace)


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
    return _hold(model, "unfreeze", statistics, affine, where, inplace)


def _hold(
    model: nn.Module, tool: str, statistics: bool, affine: bool, where: Where, inplace: bool
) -> nn.Module:
    model, frozen = target(model, tool, inplace), tool == "freeze"
    layers, undo, told = _layers(model, tool, where), Undo(), Record(tool=tool)
    if frozen and statistics:
        for path, layer in layers.items():
            if layer.running_mean is None:
                raise ArgumentError(
                    "freeze: a layer with track_running_stats=False has no statistics to freeze.",
                    why="it always normalizes with the batch's.",
                    mend="statistics=False, or give the layer statistics and calibrate it.",
                    at=path,
                )
    what = " and ".join(["statistics"] * statistics + ["gamma and beta"] * affine)
    with undo, undo:
        keep_modules(undo, [unwrapped(model), *layers.values()])
        for path, layer in layers.items():
            for parameter in layer.parameters():
                undo.add(partial(parameter.requires_grad_, parameter.requires_grad))
            if statistics:
                layer.frozen_statistics = frozen
            if affine and layer.frozen_affine is not frozen:
                layer.freeze_affine(frozen)
            told.add(path, type(layer).__name__, "frozen" if frozen else "thawed", what)
        return write_record(model, told) if what else model


def _layers(model: nn.Module, verb: str, where: Where) -> dict[str, Layer]:
    chosen = chooser(where, verb)
    layers: dict[str, Any] = {
        p: m for p, m in unwrapped(model).named_modules() if isinstance(m, _BatchNorm) and chosen(p, m)
    }
    strangers = [path for path, layer in layers.items() if not isinstance(layer, Layer)]
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
