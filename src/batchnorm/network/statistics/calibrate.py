"""Population statistics from mini-batches of data: what M11 collects, collected anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import skips
from batchnorm.distributed.groups import Names, members
from batchnorm.domain import active_domain
from batchnorm.errors import ArgumentError, DataError
from batchnorm.layout import channel_axis
from batchnorm.modules import Layer
from batchnorm.network.inputs import Forward, batches_of, check_forward, copied, move_to, run, single_device
from batchnorm.network.model import Where, check_model, check_number, chooser, unwrapped
from batchnorm.network.progress import watched
from batchnorm.network.ranks.shards import Shards, pool
from batchnorm.network.record import ATTRIBUTE, Record, write_record
from batchnorm.network.undo import (
    Undo,
    hook_before,
    keep_attribute,
    keep_values,
    set_modes,
    stop_gradients,
    write_together,
)
from batchnorm.population import merge

Estimator = Literal["pooled", "average", "moving"]

_ESTIMATORS = ("pooled", "average", "moving")
# elements that are widened to float64 at a time: bounds the extra memory at 32 MiB
_CHUNK = 1 << 22


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
    check_model(model, "calibrate")
    model = model if inplace else copied(unwrapped(model))
    chosen = chooser(where, "calibrate")
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
    told = Record()
    undo, measured = Undo(), Undo(always=True)
    shards: Shards | None = None
    with undo, undo:
        try:
            meters, begun = _meters(unwrapped(model), chosen, estimator, momentum, told, undo)
            shards = Shards(list[Any](meters.values()), group)
            with measured, measured:
                _measure(measured, model, meters)
                # a compiled module does not see hooks that are younger than its graph
                with torch.compiler.set_stance("force_eager"):
                    stream = shards.stream(batches_of(data, "calibrate"))
                    batches = _run(model, watched(stream, "calibrate", progress and shards.first), forward)
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
        keep_attribute(undo, model, ATTRIBUTE)
        keep_values(undo, buffers)
        write_record(model, told)
        write_together(buffers, values)
    for meter in meters.values():
        if meter.calls:
            skips.forget(meter.mean_buffer)
    return model


def _run(model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> int:
    """Run the model on every batch; give their number."""
    device, number = single_device(model), 0
    for batch in batches:
        # a forward of the caller's may want the batch as the loader gave it
        run(model, batch if forward else move_to(batch, device), "calibrate", forward)
        number += 1
    return number


class _Meter:
    """What one layer saw so far, in float64."""

    def __init__(
        self, layer: _BatchNorm, holder: nn.Module, path: str, estimator: Estimator, momentum: float
    ) -> None:
        self.layer, self.holder, self.path = layer, holder, path
        self.estimator, self.momentum = estimator, momentum
        self.mean_buffer: Tensor = holder._buffers["running_mean"]  # type: ignore[assignment]
        self.var_buffer: Tensor = holder._buffers["running_var"]  # type: ignore[assignment]
        self.correction = int(getattr(layer, "running_var_correction", 1))
        device = torch.device("cpu") if self.mean_buffer.device.type == "mps" else self.mean_buffer.device
        self.count, self.mean, self.spread, self.var_weight = (
            torch.zeros(self.mean_buffer.shape, dtype=torch.float64, device=device) for _ in range(4)
        )
        self.calls = 0
        # of a layer that pools: where there is somebody to pool with
        names = getattr(layer, "process_group", None) if isinstance(layer, Layer) else None
        self.groups: Names | None = names if names is not None and members(names) else None
        self.skipped = torch.zeros(self.mean_buffer.shape, dtype=torch.int64, device=device)

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Take the statistics of the layer's input, and let the layer normalize with them."""
        z = args[0] if args else kwargs["input"]
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        count, mean, m2 = _statistics(z.detach(), int(getattr(layer, "channel_dim", 1)), mask)
        count, mean, m2 = (value.to(self.mean.device) for value in (count, mean, m2))
        if self.groups is not None:
            count, mean, m2 = pool(self.groups, self.path, count, mean, m2)
        # an empty batch has no mean; its output is empty too, so that any will do
        var = m2 / count.clamp(min=1)
        self.holder._buffers["running_mean"] = mean.to(self.mean_buffer)
        self.holder._buffers["running_var"] = var.to(self.var_buffer)
        finite = torch.isfinite(mean) & torch.isfinite(m2)
        self.skipped += ~finite
        self.calls += 1
        zero = torch.zeros_like(mean)
        self._add(
            torch.where(finite, count, zero), torch.where(finite, mean, zero), torch.where(finite, m2, zero)
        )

    def give_back(self) -> None:
        """Put the running statistics back in their place."""
        self.holder._buffers["running_mean"] = self.mean_buffer
        self.holder._buffers["running_var"] = self.var_buffer

    def _add(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        if self.estimator == "pooled":
            self.count, self.mean, self.spread = merge(self.count, self.mean, self.spread, count, mean, m2)
            return
        free = count - self.correction
        var = m2 / free.clamp(min=1)
        if self.estimator == "average":
            weight, var_weight = count, torch.where(free > 0, count, torch.zeros_like(count))
            before, var_before = self.count, self.var_weight
        else:
            # a channel without values leaves the average as it is
            weight = (count > 0).double() * self.momentum
            var_weight = (free > 0).double() * self.momentum
            before, var_before = self.count * (1 - weight), self.var_weight * (1 - var_weight)
        self.count, self.var_weight = before + weight, var_before + var_weight
        tiny = torch.finfo(torch.float64).tiny
        self.mean = self.mean + (mean - self.mean) * (weight / self.count.clamp(min=tiny))
        self.spread = self.spread + (var - self.spread) * (var_weight / self.var_weight.clamp(min=tiny))

    def result(self, told: Record) -> list[tuple[Tensor, Tensor]]:
        """Give the layer's buffers with what was collected for them, channel by channel where there is an answer."""
        if not self.calls:
            return self._leave(told, "never called: its statistics are as they were")
        if self.estimator == "pooled":
            free = self.count - self.correction
            mean, var, known = self.mean, self.spread / free.clamp(min=1), free > 0
        else:
            mean, var, known = self.mean, self.spread, self.var_weight > 0
        if not bool(known.any()):
            return self._leave(told, "too few finite values per channel for a variance")
        old_mean, old_var = self.mean_buffer.to(mean), self.var_buffer.to(mean)
        mean, var = torch.where(known, mean, old_mean), torch.where(known, var, old_var)
        scale = (var + self.layer.eps).sqrt()
        shift = float(((mean - old_mean).abs() / scale).max())
        ratio = float(((old_var + self.layer.eps).sqrt() / scale).log().abs().max().exp())
        told.add(self.path, _kind(self.layer), "calibrated", self._detail(shift, ratio), tool="calibrate")
        written = [(self.mean_buffer, mean), (self.var_buffer, var)]
        counter = self.holder._buffers.get("num_batches_tracked")
        return written if counter is None else [*written, (counter, torch.tensor(self.calls))]

    def _leave(self, told: Record, reason: str) -> list[tuple[Tensor, Tensor]]:
        told.leave(self.path, _kind(self.layer), reason, tool="calibrate")
        return []

    def _detail(self, shift: float, ratio: float) -> str:
        seen = f"{int(self.count.max())} values in " if self.estimator != "moving" else ""
        text = (
            f"{seen}{self.calls} {'call' if self.calls == 1 else 'calls'}; mean moved up to {shift:.2g} "
            f"standard deviations, standard deviation up to {ratio:.2f}x"
        )
        skipped = int(self.skipped.sum())
        return text + (f"; {skipped} non-finite channel batches left out" if skipped else "")


def _statistics(z: Tensor, channel_dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of each channel, in float64, in slices of bounded size."""
    axis = channel_axis(z.ndim, channel_dim)
    if z.device.type == "mps":
        z = z.cpu()
    channels = z.shape[axis]
    zeros = torch.zeros(channels, dtype=torch.float64, device=z.device)
    count, mean, m2 = zeros, zeros, zeros
    rows = max(1, _CHUNK * len(z) // max(1, z.numel()))
    keep = None if mask is None else _broadcast_mask(mask.to(z.device), z, axis)
    for start in range(0, len(z), rows):
        part = z[start : start + rows].movedim(axis, -1).reshape(-1, channels).double()
        if keep is not None:
            chosen = keep[start : start + rows].movedim(axis, -1).reshape(-1)
            part = part[chosen]
        if len(part):
            part_mean = part.mean(0)
            part_m2 = (part - part_mean).square().sum(0)
            count, mean, m2 = merge(count, mean, m2, torch.full_like(zeros, len(part)), part_mean, part_m2)
    return count, mean, m2


def _broadcast_mask(mask: Tensor, z: Tensor, axis: int) -> Tensor:
    """Give the mask of the positions in ``z``, with an axis of length 1 for the channel."""
    return mask.broadcast_to(z.shape[:axis] + z.shape[axis + 1 :]).unsqueeze(axis)


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__


def _meters(
    model: nn.Module,
    chosen: Callable[[str, nn.Module], bool],
    estimator: Estimator,
    momentum: float,
    told: Record,
    undo: Undo,
) -> tuple[dict[nn.Module, _Meter], list[Layer]]:
    """One meter for each layer that is to be measured, and the layers that began a domain for it."""
    meters: dict[nn.Module, _Meter] = {}
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
            told.leave(path, _kind(layer), reason, tool="calibrate")
        else:
            meters[layer] = _Meter(layer, _holder(layer, begun, undo), path, estimator, momentum)
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


def _measure(undo: Undo, model: nn.Module, meters: Mapping[nn.Module, _Meter]) -> None:
    """Put everything in eval mode, the measured layers normalizing with their batch; to be undone.

    A measured layer stays in eval mode and finds its batch's statistics in the place of the running ones.
    That is what training mode computes, and it also serves a single value per channel, a layer that
    synchronizes over ranks, and a subclass with a forward of its own.
    """
    set_modes(undo, model, False)
    for layer, meter in meters.items():
        undo.add(meter.give_back)
        hook_before(undo, layer, meter.observe)
    stop_gradients(undo)
