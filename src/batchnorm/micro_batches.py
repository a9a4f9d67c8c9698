"""Statistics of several micro-batches, pooled by count before they move the running ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from batchnorm import skips
from batchnorm.population import Tracking, commit, merge


class _Pool:
    """Count, mean and sum of squared deviations per channel, in float64."""

    def __init__(self, tracking: Tracking) -> None:
        self.tracking = tracking
        # float64 is not there on every accelerator; the count of values is exact in float32 to 2**24
        like = tracking.running_mean
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self.count = torch.zeros_like(like, dtype=dtype)
        self.mean = torch.zeros_like(like, dtype=dtype)
        self.m2 = torch.zeros_like(like, dtype=dtype)

    def add(self, count: int | Tensor, mean: Tensor, var: Tensor) -> None:
        with torch.no_grad():
            dtype = self.mean.dtype
            # filled on the device: a copy of a number from the host would be waited for
            counts = (
                count.to(dtype)
                if isinstance(count, Tensor)
                else torch.full((), count, dtype=dtype, device=mean.device)
            ).expand(mean.shape)
            keep = counts > 0
            if self.tracking.skip_nonfinite:
                finite = torch.isfinite(mean) & torch.isfinite(var)
                keep = keep & ~skips.count(self.tracking.running_mean, keep & ~finite)
            values = (counts, mean.to(dtype), var.to(dtype) * counts)
            merged = merge(self.count, self.mean, self.m2, *values)
            for old, new in zip((self.count, self.mean, self.m2), merged, strict=True):
                old.copy_(torch.where(keep, new, old))

    def commit(self) -> None:
        commit(self.tracking, self.count, self.mean, self.m2 / self.count.clamp(min=1))


class Accumulator:
    """Pools what a layer sees, by the buffers it would have moved.

    A layer has one set of buffers for each domain, and each is pooled by itself.

    Parameters
    ----------
    known : iterable of Tracking
        Buffers that the layer has. Others may come; but a compiled forward that has not seen them yet
        would be compiled again.
    """

    def __init__(self, known: Iterable[Tracking] = ()) -> None:
        self._pools = {id(tracking.running_mean): _Pool(tracking) for tracking in known}

    def __reduce__(self) -> tuple:
        # a copy of a layer, or one that was saved, is outside the window: no block would end it
        return (type(None), ())

    def taking(self, tracking: Tracking) -> Callable[[int | Tensor, Tensor, Tensor], None]:
        """Give what takes (count, mean, var) in place of moving ``tracking``.

        Parameters
        ----------
        tracking : Tracking
            What `commit` will move.

        Returns
        -------
        callable
            Takes count, mean and variance (divisor m).
        """
        key = id(tracking.running_mean)
        if key not in self._pools:
            self._pools[key] = _Pool(tracking)
        return self._pools[key].add

    def commit(self) -> None:
        """Move every set of running statistics once, by all that it was given."""
        for pool in self._pools.values():
            pool.commit()
