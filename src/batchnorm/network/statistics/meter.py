"""What a layer sees of the data: moments of its input, in float64, and what they add up to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.distributed.groups import Names, members
from batchnorm.layout import channel_axis
from batchnorm.modules import Layer
from batchnorm.network.ranks.shards import pool
from batchnorm.network.record import Record
from batchnorm.population import merge
from batchnorm.validation import spread_mask

# elements that are widened to float64 at a time: bounds the extra memory at 32 MiB
_CHUNK = 1 << 22


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The input and the mask that a batch norm is called with.

    Parameters
    ----------
    args, kwargs : tuple, dict
        Of the call.

    Returns
    -------
    tuple of Tensor
        The mask is None where there is none.
    """
    z = args[0] if args else kwargs["input"]
    return z.detach(), args[2] if len(args) > 2 else kwargs.get("mask")


def moments(z: Tensor, axis: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of each channel, in float64, in slices of bounded size.

    Parameters
    ----------
    z : Tensor
        Any floating dtype.
    axis : int
        The channel axis.
    mask : Tensor of bool, optional
        Which positions count.

    Returns
    -------
    tuple of Tensor, each of shape (C,)
        On the CPU where the device has no float64.
    """
    z = z.cpu() if z.device.type == "mps" else z
    axis, channels = axis % z.ndim, z.shape[axis]
    count = mean = m2 = zeros = torch.zeros(channels, dtype=torch.float64, device=z.device)
    rows = max(1, _CHUNK * len(z) // max(1, z.numel()))
    keep = None if mask is None else spread_mask(mask.to(z.device), z, axis)
    for start in range(0, len(z), rows):
        part = z[start : start + rows].movedim(axis, -1).reshape(-1, channels).double()
        if keep is not None:
            part = part[keep[start : start + rows].movedim(axis, -1).reshape(-1)]
        if len(part):
            part_mean = part.mean(0)
            part_m2 = (part - part_mean).square().sum(0)
            count, mean, m2 = merge(count, mean, m2, torch.full_like(zeros, len(part)), part_mean, part_m2)
    return count, mean, m2


class Meter:
    """What one layer saw so far, in float64.

    Parameters
    ----------
    layer : torch.nn.Module
        The batch norm.
    holder : torch.nn.Module
        Whose buffers are meant: the layer, or the domain in force.
    path : str
        Where it is.
    estimator : {"pooled", "average", "moving"}
        As in `calibrate`.
    momentum : float
        Weight of the new batch, for ``"moving"``.
    """

    def __init__(
        self, layer: _BatchNorm, holder: nn.Module, path: str, estimator: str, momentum: float
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
        """Take the statistics of the layer's input, and let the layer normalize with them.

        Parameters
        ----------
        layer : torch.nn.Module
            The batch norm.
        args, kwargs : tuple, dict
            What it is called with.
        """
        z, mask = given(args, kwargs)
        axis = channel_axis(z.ndim, int(getattr(layer, "channel_dim", 1)))
        count, mean, m2 = (value.to(self.mean.device) for value in moments(z, axis, mask))
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
        """Give the layer's buffers with what was collected for them, channel by channel where there is an answer.

        Parameters
        ----------
        told : Record
            Takes a row.

        Returns
        -------
        list of tuple of Tensor
            What to write where; empty where there is no answer.
        """
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
        told.add(
            self.path, type(self.layer).__name__, "calibrated", self._detail(shift, ratio), tool="calibrate"
        )
        written = [(self.mean_buffer, mean), (self.var_buffer, var)]
        counter = self.holder._buffers.get("num_batches_tracked")
        return written if counter is None else [*written, (counter, torch.tensor(self.calls))]

    def _leave(self, told: Record, reason: str) -> list[tuple[Tensor, Tensor]]:
        told.leave(self.path, type(self.layer).__name__, reason)
        return []

    def _detail(self, shift: float, ratio: float) -> str:
        seen = f"{int(self.count.max())} values in " if self.estimator != "moving" else ""
        text = (
            f"{seen}{self.calls} {'call' if self.calls == 1 else 'calls'}; mean moved up to {shift:.2g} "
            f"standard deviations, standard deviation up to {ratio:.2f}x"
        )
        skipped = int(self.skipped.sum())
        return text + (f"; {skipped} non-finite channel batches left out" if skipped else "")
