"""Population statistics from mini-batches of data: what M11 collects, collected anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import skips
from batchnorm.domain import active_domain
from batchnorm.errors import ArgumentError, DataError
from batchnorm.modules import Layer
from batchnorm.network.inputs import Forward, batches_of, check_forward, run_each, target
from batchnorm.network.model import Where, check_number, check_runs, chooser, unwrapped
from batchnorm.network.progress import watched
from batchnorm.network.ranks.shards import Shards
from batchnorm.network.record import ATTRIBUTE, Record, write_record
from batchnorm.network.statistics.meter import Meter
from batchnorm.network.undo import (
    Undo,
    hook_before,
    keep_attribute,
    keep_values,
    set_modes,
    stop_gradients,
    write_together,
)

Estimator = Literal["pooled", "average", "moving"]

_ESTIMATORS = ("pooled", "average", "moving")


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    estimator: Estimator = "pooled",
    momentum: float = 0.1,
    where: Where = None,
    forward: Forward = None,
    inplace: bool = True,
    progress: bool = True,
    group: Any = None,
) -> nn.Module:
    """Collect the population statistics of every batch-norm layer anew, from mini-batches of ``data``.

    While it runs, a batch-norm layer normalizes with the statistics of the batch at hand, as in training,
    and everything else (dropout, stochastic depth) behaves as in inference. So a layer is measured on what
    the layers before it put out when *they* normalize by the batch: that is what training saw. It also
    means that the answer for a deep layer depends, through those before it, on how the data is cut into
    batches, by as much as the batches differ from the population; the first layer's does not.

    The layers are ours, ``torch.nn.BatchNorm1d/2d/3d`` and ``torch.nn.SyncBatchNorm``. The model is changed
    in place: only ``running_mean``, ``running_var`` and ``num_batches_tracked`` are written, and only after
    the last batch has passed. On an exception everything is as it was.

    Parameters
    ----------
    model : Module
        The network, in any mode. Modes and hooks are restored.
    data : iterable of batches, or one Tensor
        Read once; it need not have a length. A batch is a tensor, a mapping (given as keyword arguments), or
        a tuple or list of what ``forward`` requires; what lies behind that, a label, is left out. Batches may
        be of different sizes. They are moved to the model's device when all of it is on one.
    estimator : {"pooled", "average", "moving"}, default "pooled"
        ``"pooled"``: mean and variance of all values together, merged in float64, the spread between batches
        included: exact whatever the split. ``"average"``: the average of the batches' means and of their
        variances, weighted by their counts. ``"moving"``: the exponentially weighted average of both in the
        order seen, with weights that sum to 1, so that what stood in the layer before does not enter.
    momentum : float in (0, 1], default 0.1
        Weight of the NEW batch, as everywhere in torch (Keras' momentum is 1 minus it). Only for
        ``"moving"``.
    where : str or callable, optional
        Which layers: a pattern for names (``"layer4.*"``), or ``where(name, module)``. All by default.
    forward : callable, optional
        ``forward(model, batch)`` calls the network, where ``model(batch)`` is not how it takes one.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.
    progress : bool, default True
        Show a progress bar when standard error is a terminal; over ranks, on the first.
    group : str, ProcessGroup, optional
        Ranks that each have a shard of the data: ``"world"`` is all of them. Every rank ends with the
        statistics of all shards, with the same bits; a shard may be empty. Layers that pool (`synchronize`)
        calibrate over their own group by themselves, step by step, each step on what all ranks have.

    Returns
    -------
    Module
        ``model``. ``batchnorm.record(model)`` tells each layer's count of values, and how far it moved.

    Raises
    ------
    ArgumentError
        ``model`` is no network that can be looked into; an unknown estimator, a momentum outside its range,
        ``data`` that can't be iterated, a batch whose structure cannot be read.
    DataError
        ``data`` holds no batch, on no rank.
    PoolingError
        Another rank failed; this one is then as it was, too.

    Notes
    -----
    ``running_var`` has divisor m - 1, as in torch, unless the layer says ``running_var_correction=0``
    (divisor m). For ``"average"`` and ``"moving"`` that holds batch by batch.

    A layer stays as it is, and the record says so, when it is frozen (by :func:`batchnorm.freeze`, or in
    eval mode inside a module in training mode), keeps no statistics, is never called, or sees a single value
    per channel in all. A layer called several times in one pass counts every call. A channel of a batch
    that holds NaN or inf does not count. Of an input with a ``mask`` only the values under it count.

    Inside ``with batchnorm.domain(name)`` it is the statistics of that domain that are collected.

    On several ranks without ``group``, layers that do not pool are calibrated by every rank on its own.

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu and Johnson 2021, arXiv:2105.07576, section 3;
    Chan, Golub and LeVeque 1983 for the merge.

    Examples
    --------
    >>> import torch, batchnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> x = torch.randn(50, 3)
    >>> _ = batchnorm.calibrate(model, [x[:32], x[32:]])
    >>> z = model[0](x)
    >>> torch.allclose(model[1].running_mean, z.mean(0), atol=1e-6)
    True
    """
    model, chosen = target(model, "calibrate", inplace), chooser(where, "calibrate")
    if not isinstance(estimator, str) or estimator not in _ESTIMATORS:
        raise ArgumentError(
            f"calibrate: estimator={estimator!r} is unknown.",
            mend=f"one of {', '.join(map(repr, _ESTIMATORS))}.",
        )
    if estimator == "moving":
        check_number(
            "calibrate",
            "momentum",
            momentum,
            "in (0, 1]",
            lambda share: 0 < share <= 1,
            why="it is the weight of the new batch; 0 would never look at the data.",
        )
    check_forward(forward, "calibrate")
    if not any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in model.modules()):
        check_runs(model, "calibrate", forward)
    told = Record(tool="calibrate")
    undo, measured = Undo(), Undo(always=True)
    shards: Shards | None = None
    with undo, undo:
        try:
            meters, begun = _meters(unwrapped(model), chosen, estimator, momentum, told, undo)
            shards = Shards(list[Any](meters.values()), group)
            with measured, measured:
                # everything in eval mode, and the measured layers normalize with their batch
                set_modes(measured, model, False)
                for layer, meter in meters.items():
                    measured.add(meter.give_back)
                    hook_before(measured, layer, meter.observe)
                stop_gradients(measured)
                stream = shards.stream(batches_of(data, "calibrate"))
                shown = watched(stream, "calibrate", progress and shards.first)
                batches = run_each(model, shown, "calibrate", forward)
            if not shards.merge(batches):
                raise DataError(
                    "calibrate: the data holds no batch.",
                    why="there is nothing to take statistics from.",
                    mend="give an iterable of batches; a generator that was read once is empty the second time.",
                )
        except BaseException as error:
            if shards is not None:
                shards.fail(error)
            raise
        found = [pair for meter in meters.values() for pair in meter.result(told)]
        for layer in begun:
            if not meters[layer].calls:
                _forget(layer, str(active_domain()))
        buffers, values = [buffer for buffer, _ in found], [value for _, value in found]
        keep_attribute(undo, unwrapped(model), ATTRIBUTE)
        keep_values(undo, buffers)
        write_record(model, told)
        write_together(buffers, values)
    for meter in meters.values():
        if meter.calls:
            skips.forget(meter.mean_buffer)
    return model


def _meters(
    model: nn.Module,
    chosen: Callable[[str, nn.Module], bool],
    estimator: Estimator,
    momentum: float,
    told: Record,
    undo: Undo,
) -> tuple[dict[nn.Module, Meter], list[Layer]]:
    """One meter for each layer that is to be measured, and the layers that began a domain for it."""
    meters: dict[nn.Module, Meter] = {}
    begun: list[Layer] = []
    frozen = _put_in_eval(model)
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, _BatchNorm) or not chosen(path, layer):
            continue
        reason = ""
        if layer.running_mean is None or layer.running_var is None:
            reason = "keeps no running statistics"
        elif isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            reason = "is lazy and has not seen its first batch"
        elif getattr(layer, "frozen_statistics", False):
            reason = "frozen"
        elif layer in frozen:
            reason = "in eval mode inside a module in training mode: frozen"
        if reason:
            told.leave(path, type(layer).__name__, reason)
        else:
            meters[layer] = Meter(layer, _holder(layer, begun, undo), path, estimator, momentum)
    return meters, begun


def _holder(layer: _BatchNorm, begun: list[Layer], undo: Undo) -> nn.Module:
    """Whose buffers are meant: the layer's own, or those of the domain in force."""
    name = active_domain()
    if name is None or not isinstance(layer, Layer):
        return layer
    if name not in layer._modules.get("domains", {}):
        undo.add(partial(_forget, layer, name))
        begun.append(layer)
    return layer.add_domain(name)


def _forget(layer: Layer, name: str) -> None:
    """Take back a domain that was begun for nothing."""
    domains: Any = layer._modules.get("domains")
    if domains is not None:
        domains._modules.pop(name, None)
        if not domains:
            layer._modules.pop("domains", None)


def _put_in_eval(model: nn.Module) -> set[nn.Module]:
    """Layers that somebody put in eval mode while the module that holds them trains."""
    held_still: set[nn.Module] = set()
    held_trained: set[nn.Module] = set()
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, _BatchNorm) and not child.training:
                (held_still if parent.training else held_trained).add(child)
    return held_still - held_trained
