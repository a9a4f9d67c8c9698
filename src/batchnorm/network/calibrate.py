"""Population statistics from mini-batches of data: what M11 collects, collected anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.distributed.groups import Names, members
from batchnorm.domain import active_domain
from batchnorm.errors import ArgumentError, DataError
from batchnorm.layout import channel_axis
from batchnorm.modules import Layer
from batchnorm.network.batches import FORWARD, batches_of, move_to, run_batch, single_device
from batchnorm.network.model import check_model, check_number
from batchnorm.network.progress import watched
from batchnorm.network.record import Record, write_record
from batchnorm.network.shards import Shards, pool
from batchnorm.population import merge

Estimator = Literal["pooled", "average", "moving"]
Forward = Callable[[nn.Module, Any], Any]

_ESTIMATORS = ("pooled", "average", "moving")
# elements that are widened to float64 at a time: bounds the extra memory at 32 MiB
_CHUNK = 1 << 22


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    estimator: Estimator = "pooled",
    momentum: float = 0.1,
    forward: Forward | None = None,
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
        a tuple or list whose first element is the input, as loaders of (input, target) give it. Batches may
        be of different sizes. They are moved to the model's device when all of it is on one.
    estimator : {"pooled", "average", "moving"}, default "pooled"
        ``"pooled"``: mean and variance of all values together, merged in float64, the spread between batches
        included: exact whatever the split. ``"average"``: the average of the batches' means and of their
        variances, weighted by their counts. ``"moving"``: the exponentially weighted average of both in the
        order seen, with weights that sum to 1, so that what stood in the layer before does not enter.
    momentum : float in (0, 1], default 0.1
        Weight of the NEW batch, as everywhere in torch (Keras' momentum is 1 minus it). Only for
        ``"moving"``.
    forward : callable, optional
        ``forward(model, batch)`` runs the model on a batch of any structure.
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
    if forward is not None and not callable(forward):
        raise ArgumentError(f"calibrate: forward={forward!r} is no function.", mend=FORWARD)
    told = Record()
    begun: list[Layer] = []
    shards: Shards | None = None
    try:
        meters = _meters(model, estimator, momentum, told, begun)
        shards = Shards(list(meters.values()), group)
        device = single_device(model)
        batches = 0
        stream = batches_of(data, "calibrate")
        with _batch_statistics_mode(model, meters):
            for batch in watched(shards.stream(stream), "calibrate", progress and shards.first):
                if forward is not None:
                    forward(model, batch)
                else:
                    run_batch(model, batch if device is None else move_to(batch, device), "calibrate")
                batches += 1
        if not shards.merge(batches):
            raise DataError(
                "calibrate: the data holds no batch.",
                why="there is nothing to take statistics from.",
                mend="give an iterable of batches; a generator that was read once is empty the second time.",
            )
    except BaseException as error:
        if shards is not None:
            shards.fail(error)
        _forget(begun)
        raise
    for meter in meters.values():
        meter.commit(told)
    _forget([layer for layer in begun if not meters[layer].calls])
    return write_record(model, told)


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

    def commit(self, told: Record) -> None:
        """Write what was collected into the layer, channel by channel where there is an answer."""
        if not self.calls:
            told.leave(
                self.path,
                _kind(self.layer),
                "never called: its statistics are as they were",
                tool="calibrate",
            )
            return
        if self.estimator == "pooled":
            free = self.count - self.correction
            mean, var, known = self.mean, self.spread / free.clamp(min=1), free > 0
        else:
            mean, var, known = self.mean, self.spread, self.var_weight > 0
        if not bool(known.any()):
            told.leave(
                self.path,
                _kind(self.layer),
                "too few finite values per channel for a variance",
                tool="calibrate",
            )
            return
        old_mean, old_var = self.mean_buffer.to(mean), self.var_buffer.to(mean)
        mean, var = torch.where(known, mean, old_mean), torch.where(known, var, old_var)
        scale = (var + self.layer.eps).sqrt()
        shift = float(((mean - old_mean).abs() / scale).max())
        ratio = float(((old_var + self.layer.eps).sqrt() / scale).log().abs().max().exp())
        self.mean_buffer.copy_(mean)
        self.var_buffer.copy_(var)
        for name, value in (
            ("num_batches_tracked", self.calls),
            ("num_batches_skipped", None),
            ("skipped_channels", self.skipped),
        ):
            counter = self.holder._buffers.get(name)
            if counter is None:
                continue
            if value is None:
                value = int(self.skipped.max())
            counter.copy_(torch.as_tensor(value))
        told.add(self.path, _kind(self.layer), "calibrated", self._detail(shift, ratio), tool="calibrate")

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
    model: nn.Module, estimator: Estimator, momentum: float, told: Record, begun: list[Layer]
) -> dict[nn.Module, _Meter]:
    """One meter for each layer that is to be measured; the others go into the record."""
    meters: dict[nn.Module, _Meter] = {}
    frozen = _put_in_eval(model)
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, _BatchNorm):
            continue
        if layer.running_mean is None or layer.running_var is None:
            told.leave(path, _kind(layer), "keeps no running statistics", tool="calibrate")
        elif isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            told.leave(path, _kind(layer), "is lazy and has not seen its first batch", tool="calibrate")
        elif getattr(layer, "frozen_statistics", False):
            told.leave(path, _kind(layer), "frozen", tool="calibrate")
        elif layer in frozen:
            told.leave(
                path, _kind(layer), "in eval mode inside a module in training mode: frozen", tool="calibrate"
            )
        else:
            meters[layer] = _Meter(layer, _holder(layer, begun), path, estimator, momentum)
    return meters


def _holder(layer: _BatchNorm, begun: list[Layer]) -> nn.Module:
    """Whose buffers are meant: the layer's own, or those of the domain in force."""
    name = active_domain()
    if name is None or not isinstance(layer, Layer):
        return layer
    if name not in layer._modules.get("domains", {}):
        begun.append(layer)
    return layer.add_domain(name)


def _forget(begun: list[Layer]) -> None:
    """Take back domains that were begun for nothing."""
    for layer in begun:
        del layer.domains[str(active_domain())]
        if not layer.domains:
            del layer.domains


def _put_in_eval(model: nn.Module) -> set[nn.Module]:
    """Layers that somebody put in eval mode while the module that holds them trains."""
    held_still: set[nn.Module] = set()
    held_trained: set[nn.Module] = set()
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, _BatchNorm) and not child.training:
                (held_still if parent.training else held_trained).add(child)
    return held_still - held_trained


@contextlib.contextmanager
def _batch_statistics_mode(model: nn.Module, meters: Mapping[nn.Module, _Meter]) -> Iterator[None]:
    """Everything in eval mode, the measured layers normalizing with their batch; all of it undone after.

    A measured layer stays in eval mode and finds its batch's statistics in the place of the running ones.
    That is what training mode computes, and it also serves a single value per channel, a layer that
    synchronizes over ranks, and a subclass with a forward of its own.
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for module, _ in modes:
            module.training = False
        for layer, meter in meters.items():
            handles.append(layer.register_forward_pre_hook(meter.observe, with_kwargs=True))
        # a compiled module does not see hooks that are younger than its graph
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for meter in meters.values():
            meter.holder._buffers["running_mean"] = meter.mean_buffer
            meter.holder._buffers["running_var"] = meter.var_buffer
        for module, mode in modes:
            module.training = mode
