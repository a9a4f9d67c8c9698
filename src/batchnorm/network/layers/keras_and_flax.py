"""Statistics and affine values from the layouts of Keras and flax, as plain dictionaries of arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError, DataError, ShapeError
from batchnorm.network.inputs import target
from batchnorm.network.layers.keras_and_flax_order import in_order
from batchnorm.network.model import check_number, unwrapped
from batchnorm.network.record import Record, write_record
from batchnorm.network.undo import Undo, keep_modules, keep_values, write_together

Names = Mapping[str, str] | Literal["order"] | None

_KERAS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_FLAX = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Keras lists what learns before what does not
_KERAS_LISTED = ("gamma", "beta", "moving_mean", "moving_variance")


def load_keras(
    model: nn.Module,
    weights: Mapping[str, Any] | Sequence[Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    names: Names = None,
    inplace: bool = True,
) -> nn.Module:
    """Give batch-norm layers the values, epsilon and momentum of Keras' ``BatchNormalization``.

    In inference both compute ``gamma * (z - mean) / sqrt(var + epsilon) + beta``, so the values are taken
    as they are. Three conventions differ, and are translated: Keras' epsilon is 1e-3; its momentum is the
    share that is KEPT, torch's the weight of the NEW batch; its ``moving_variance`` has divisor m, torch's
    ``running_var`` m - 1 (ours is switched with ``running_var_correction=0``; ``torch.nn`` has no switch,
    and the record says so).

    Parameters
    ----------
    model : Module
        A batch-norm layer, or a network that holds some.
    weights : mapping, or list of arrays
        For a layer: arrays of shape (C,) named ``gamma``, ``beta``, ``moving_mean``, ``moving_variance``; or
        what its ``get_weights()`` lists. For a network: the same under the layers' names, nested or flat
        (``"block1_bn/gamma:0"``), or ``{layer.name: layer.get_weights() for layer in keras_model.layers}``.
        Entries of other layers are passed over. An absent ``gamma`` is 1, an absent ``beta`` 0
        (``scale=False``, ``center=False``); a list without them does not say which is absent, and is
        refused but for the two statistics alone of a single layer.
    momentum : float in [0, 1], default 0.99
        Of the Keras layers: share of the old value that is kept.
    epsilon : float, default 1e-3
        Of the Keras layers [z]**2.
    names : mapping of str to str, or "order", optional
        From a layer's name in ``weights`` to its path in ``model``. By default the names are the paths, with
        ``/`` for ``.``; ``"order"`` pairs the layers in the order in which both sides list them, where numbers
        in names count as numbers (``bn_2`` before ``bn_10``). An order that contradicts them is refused.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy.

    Raises
    ------
    DataError
        No batch-norm values in ``weights``, a field is missing, or a list does not say what it holds.
    ArgumentError
        ``model`` is no network, ``weights`` no dictionary; a name without a layer, an order that is none, a
        momentum out of range, affine values for a layer without them.
    ShapeError
        An array's length is not the layer's number of channels. In every case nothing was written.

    References
    ----------
    Keras documentation, BatchNormalization layer,
    https://keras.io/api/layers/normalization_layers/batch_normalization/

    Examples
    --------
    >>> import numpy as np, torch
    >>> from batchnorm.network.layers.keras_and_flax import load_keras
    >>> c = {"gamma": np.ones(2), "beta": np.zeros(2), "moving_mean": np.ones(2), "moving_variance": np.ones(2)}
    >>> layer = load_keras(torch.nn.BatchNorm1d(2), c)
    >>> layer.eps, round(layer.momentum, 3)
    (0.001, 0.01)
    """
    model = target(model, "load_keras", inplace)
    _check(momentum, epsilon, names, "load_keras")
    if isinstance(weights, (list, tuple)):
        if not isinstance(model, _BatchNorm):
            raise ArgumentError(
                f"load_keras: a list of {len(weights)} arrays for a whole network.",
                why="a list does not say which layer an array belongs to.",
                mend="weights={layer.name: layer.get_weights() for layer in keras_model.layers}.",
            )
        weights = _named("", weights, statistics_alone=True)
    named = _with_names(_checked(weights, "load_keras", "weights"))
    groups = _groups(named, _KERAS, "moving_mean")
    return _load(model, groups, momentum, epsilon, names, "load_keras")


def load_flax(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    names: Names = None,
    inplace: bool = True,
) -> nn.Module:
    """Give batch-norm layers the values, epsilon and momentum of flax' ``BatchNorm``.

    The conventions that differ are those of :func:`load_keras`: flax' momentum is the share that is KEPT,
    and its ``var`` has divisor m.

    Parameters
    ----------
    model : Module
        A batch-norm layer, or a network that holds some.
    variables : mapping
        ``{"params": {...: {"scale", "bias"}}, "batch_stats": {...: {"mean", "var"}}}`` with arrays of shape
        (C,), nested by module name as flax nests them; for a single layer without the names. Entries of
        other layers are passed over.
    momentum : float in [0, 1], default 0.99
        Of the flax layers: share of the old value that is kept.
    epsilon : float, default 1e-5
        Of the flax layers [z]**2.
    names : mapping of str to str, or "order", optional
        From a layer's name (joined by ``/``) to its path in ``model``; see :func:`load_keras`. flax sorts
        its dictionaries, so ``"order"`` goes by the numbers at the end of its automatic names, and by the
        numbers of channels where layers with other names stand beside them; it refuses where neither tells.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy.

    Raises
    ------
    DataError
        No batch statistics in ``variables``, or a field is missing.
    ArgumentError
        ``model`` is no network, ``variables`` no dictionary; a name without a layer, an order that can't be
        known, a momentum out of range, affine values for a layer without them.
    ShapeError
        An array's length is not the layer's number of channels. In every case nothing was written.

    References
    ----------
    flax documentation, flax.linen.BatchNorm,
    https://flax.readthedocs.io/en/latest/api_reference/flax.linen/layers.html

    Examples
    --------
    >>> import numpy as np, torch
    >>> from batchnorm.network.layers.keras_and_flax import load_flax
    >>> v = {"params": {"scale": np.ones(2), "bias": np.zeros(2)},
    ...      "batch_stats": {"mean": np.ones(2), "var": np.ones(2)}}
    >>> layer = load_flax(torch.nn.BatchNorm1d(2), v)
    >>> layer.running_mean.tolist()
    [1.0, 1.0]
    """
    model = target(model, "load_flax", inplace)
    _check(momentum, epsilon, names, "load_flax")
    if not isinstance(_checked(variables, "load_flax", "variables").get("batch_stats"), Mapping):
        raise DataError(
            "load_flax: variables has no 'batch_stats'.",
            why="flax keeps a layer's population mean and variance there.",
            mend="give the whole dictionary of variables that init or training returned.",
        )
    groups = _groups(variables["batch_stats"], _FLAX, "mean")
    affine = _groups(variables.get("params", {}), _FLAX, None)
    for name, group in groups.items():
        group.update({field: v for field, v in affine.get(name, {}).items() if field in ("weight", "bias")})
    return _load(model, groups, momentum, epsilon, names, "load_flax")


def _check(momentum: Any, epsilon: Any, names: Any, who: str) -> None:
    share = "it is a share of the old value."
    check_number(who, "momentum", momentum, "in [0, 1]", lambda kept: 0 <= kept <= 1, share)
    variance = "a channel may have variance 0."
    check_number(who, "epsilon", epsilon, "positive", lambda e: 0 < e < float("inf"), variance)
    if not (names is None or names == "order" or isinstance(names, Mapping)):
        raise ArgumentError(
            f"{who}: names={names!r} is unknown.", mend='a mapping from name to path, "order", or None.'
        )


def _checked(values: Any, who: str, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ArgumentError(
            f"{who}: {name} is a {type(values).__name__}, and no dictionary of arrays.",
            why="the arrays are found by their names.",
            mend="see its layout in the docstring.",
        )
    return values


def _with_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same nesting, with the lists of Keras' ``get_weights()`` under the names of their fields."""
    named: dict[str, Any] = {}
    for key, value in weights.items():
        if isinstance(value, Mapping):
            named[key] = _with_names(value)
        else:
            # a list of arrays, unless the name says that it is one; of other layers: nothing in it is looked for
            listed = isinstance(value, (list, tuple)) and key not in _KERAS
            named[key] = _named(str(key), value) if listed else value
    return named


def _named(layer: str, arrays: Sequence[Any], statistics_alone: bool = False) -> dict[str, Any]:
    shapes = [np.shape(array) for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        if not statistics_alone:
            return {}
    elif len(arrays) == 4:
        return dict(zip(_KERAS_LISTED, arrays, strict=True))
    elif len(arrays) == 2 and statistics_alone:
        return dict(zip(_KERAS_LISTED[2:], arrays, strict=True))
    elif len(arrays) == 1:
        return {}
    raise DataError(
        f"load_keras: {f'{layer!r} lists' if layer else 'a list of'} {len(arrays)} arrays of shapes {shapes}.",
        why="4 vectors of one length are gamma, beta, moving_mean, moving_variance; fewer do not say which of "
        "them they are, and may be another layer's.",
        mend='name them: {"gamma": ..., "moving_mean": ..., "moving_variance": ...}; leave other layers out.',
    )


def _groups(
    weights: Mapping[str, Any], fields: dict[str, str], sign: str | None
) -> dict[str, dict[str, Any]]:
    """Arrays by layer name and torch's field name; only the groups that hold the field ``sign``."""
    groups: dict[str, dict[str, Any]] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}/{key}" if prefix else str(key)
            if isinstance(value, Mapping):
                walk(value, path)
                continue
            layer, _, field = re.sub(r":\d+$", "", path).rpartition("/")
            if field in fields:
                groups.setdefault(layer, {})[fields[field]] = value

    walk(weights, "")
    return {name: g for name, g in groups.items() if sign is None or fields[sign] in g}


def _load(
    model: nn.Module,
    groups: dict[str, dict[str, Any]],
    momentum: float,
    epsilon: float,
    names: Names,
    who: str,
) -> nn.Module:
    if not groups:
        raise DataError(
            f"{who}: no batch-norm statistics in the dictionary.", mend="see its layout in the docstring."
        )
    pairs = _pair(model, groups, names, who)
    planned = [
        (path, layer, _values(layer, path, groups[name], who)) for name, (path, layer) in pairs.items()
    ]
    told, undo = Record(tool=who), Undo()
    with undo, undo:
        keep_modules(undo, [unwrapped(model), *(layer for _, layer, _ in planned)])
        _write(planned, undo, momentum, epsilon, told, who)
        write_record(model, told)
    return model


_Plan = list[tuple[str, _BatchNorm, dict[str, Tensor]]]


def _write(planned: _Plan, undo: Undo, momentum: float, epsilon: float, told: Record, who: str) -> None:
    tensors, values = [], []
    for path, layer, given in planned:
        tensors += [getattr(layer, field) for field in given]
        values += list(given.values())
        if layer.num_batches_tracked is not None:
            tensors.append(layer.num_batches_tracked)
            values.append(torch.zeros_like(layer.num_batches_tracked))
        layer.eps, layer.momentum = epsilon, 1 - momentum
        said = f"eps {epsilon:g}, momentum {1 - momentum:g} (the share kept was {momentum:g})"
        if hasattr(layer, "running_var_correction"):
            setattr(layer, "running_var_correction", 0)  # noqa: B010 - torch's class has no such attribute
            said += ", running_var with divisor m"
        else:
            said += "; trained on, running_var will have divisor m - 1: convert(model, to='batchnorm') has the switch"
        told.add(path, type(layer).__name__, "loaded", said)
    keep_values(undo, tensors)
    write_together(tensors, values)


def _pair(
    model: nn.Module, groups: dict[str, dict[str, Any]], names: Names, who: str
) -> dict[str, tuple[str, _BatchNorm]]:
    layers = {path: m for path, m in unwrapped(model).named_modules() if isinstance(m, _BatchNorm)}
    if names == "order":
        if len(layers) != len(groups):
            raise ArgumentError(
                f"{who}: {len(groups)} layers in the dictionary and {len(layers)} in the model.",
                why="names='order' pairs them one by one.",
                mend="give names as a mapping.",
            )
        channels = {name: int(np.size(group.get("running_mean", ()))) for name, group in groups.items()}
        wanted = [int(layer.num_features) for layer in layers.values()]
        ordered = in_order(channels, wanted, sorts=who == "load_flax", who=who)
        return dict(zip(ordered, layers.items(), strict=True))
    mapping = names if isinstance(names, Mapping) else {}
    unused = [name for name in mapping if name not in groups]
    if unused:
        known = ", ".join(map(repr, list(groups)[:8]))
        raise ArgumentError(
            f"{who}: names holds {unused[0]!r}, and the dictionary no batch norm of that name.",
            why="the layer it stands for would keep its values.",
            mend=f"one of {known}.",
        )
    pairs = {}
    for name in groups:
        path = mapping.get(name, name.replace("/", "."))
        if path not in layers:
            known = ", ".join(repr(p) for p in list(layers)[:8]) or "none"
            raise ArgumentError(
                f"{who}: {name!r} has no batch-norm layer at {path!r} in the model.",
                mend=f"give names={{{name!r}: path, ...}}; the model's layers are {known}.",
            )
        pairs[name] = (path, layers[path])
    return pairs


def _values(layer: _BatchNorm, path: str, group: dict[str, Any], who: str) -> dict[str, Tensor]:
    """What is to be written into the layer, checked."""
    missing = [field for field in ("running_mean", "running_var") if field not in group]
    if missing:
        raise DataError(f"{who}: {' and '.join(missing)} missing.", at=path)
    if layer.running_mean is None:
        raise ArgumentError(
            f"{who}: the layer keeps no running statistics.",
            mend="build it with track_running_stats=True.",
            at=path,
        )
    values = {}
    for field, neutral in (("weight", 1.0), ("bias", 0.0), ("running_mean", None), ("running_var", None)):
        held = getattr(layer, field)
        if field not in group:
            if held is not None and neutral is not None:
                values[field] = torch.full_like(held, neutral)
            continue
        try:
            array = torch.from_numpy(np.array(group[field], dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise DataError(f"{who}: {field} is no array of numbers: {error}.", at=path) from error
        if held is None:
            if not bool((array == torch.full_like(array, neutral or 0.0)).all()):
                raise ArgumentError(
                    f"{who}: the layer has no {field} to take the given one.",
                    mend="build it with affine=True.",
                    at=path,
                )
            continue
        if array.shape != held.shape:
            raise ShapeError(
                f"{who}: {field} has shape {tuple(array.shape)}, and the layer {tuple(held.shape)}.", at=path
            )
        if not bool(torch.isfinite(array).all()) or (field == "running_var" and bool((array < 0).any())):
            raise DataError(f"{who}: {field} holds values that are no {field.replace('_', ' ')}.", at=path)
        values[field] = array
    return values
