"""Running statistics as a module holds them: torch's three buffers, in a dtype of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import skips
from batchnorm.population import WIDE, Tracking

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MOMENTS = BUFFERS[:2]


class RunningStatistics(nn.Module):
    """Keeps running means and variances in float32, or float64, whatever becomes of the module around them.

    Means and variances are sums over many batches: in half precision they would stand still, or overflow. So
    they do not follow ``.half()``, a default dtype or the dtype of a checkpoint, as parameters do.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    @property
    def num_batches_skipped(self) -> int:
        """Batches that on_nonfinite="skip" left out of these statistics, in one channel or more.

        Returns
        -------
        int
            Counted in this process since the statistics were made, loaded, reset or moved; neither saved nor
            copied. To read it waits for the device.
        """
        return skips.counted(self._buffers["running_mean"])

    def widen(self) -> None:
        """Bring means and variances that somebody put in half precision into float32."""
        for name in _MOMENTS:
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype not in WIDE:
                self._buffers[name] = buffer.float()

    def _tracking(self, momentum: float | None, correction: int, skip_nonfinite: bool) -> Tracking:
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean.dtype not in WIDE or var.dtype not in WIDE:  # type: ignore[union-attr]
            # not all who change a dtype come by what is overridden below
            self.widen()
            mean, var = buffers["running_mean"], buffers["running_var"]
        return Tracking(mean, var, buffers["num_batches_tracked"], momentum, correction, skip_nonfinite)  # type: ignore[arg-type]

    def _restart(self) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and name in BUFFERS:
                buffer.fill_(1 if name == "running_var" else 0)
        skips.forget(self._buffers["running_mean"])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MOMENTS and isinstance(value, Tensor) and value.dtype not in WIDE:
            value = value.float()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        mean, var, batches = (self._buffers.get(name) for name in BUFFERS)

        def keep(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # the values as they were, for a trip through half precision would round them
            if (tensor is mean or tensor is var) and result.dtype not in WIDE:
                return tensor.to(result.device, torch.float32)
            if tensor is batches and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(keep, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.widen()
        if f"{prefix}running_mean" in state_dict:
            skips.forget(self._buffers["running_mean"])


class DomainStatistics(RunningStatistics):
    """Running statistics of one domain; a part of a batch norm layer, never called.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    device : torch.device, optional
        Where the buffers are made.
    dtype : torch.dtype, optional
        Dtype of mean and variance.
    """

    def __init__(
        self, num_features: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
