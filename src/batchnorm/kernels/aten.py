"""The engine of torch operations: every device, every floating dtype.

It is the fallback where no kernel of ours is built, so it puts being right before speed: on CPU it computes
in float64 and rounds once at the end, elsewhere in float32 (float64 for a float64 z). The functions are
differentiable, and also serve where torch's operations must be seen.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from batchnorm.kernels.activations import activate, find
from batchnorm.kernels.contract import Backward, Forward, Moments, Norm, Statistics
from batchnorm.layout import values_per_channel, vector_shape
from batchnorm.population import Tracking, commit

_Maybe = TypeVar("_Maybe", Tensor, "Tensor | None")


def inverse_deviation(var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Give ``1 / sqrt(var + eps)``, the root taken in float64."""
    return (var.to(exact_dtype(var.device)) + eps).rsqrt().to(dtype)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which counts, and statistics on their way, lose nothing; float32 where there is no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def vector_dtype(z: Tensor) -> torch.dtype:
    """Dtype of statistics and sums: float32, float64 for float64."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def compute_dtype(z: Tensor) -> torch.dtype:
    """Dtype of the arithmetic; float64 on CPU also keeps squares of 1e30 in range."""
    return torch.float64 if z.device.type in ("cpu", "meta") else vector_dtype(z)


def batch_statistics(wide: Tensor, axis: int, mask: Tensor | None) -> Statistics:
    """Count, mean and sum of squared deviations, two sweeps, in the dtype of ``wide``; differentiable."""
    others = [a for a in range(wide.dim()) if a != axis]
    shape = vector_shape(wide.dim(), axis)
    if mask is None:
        m = values_per_channel(wide.shape, axis)
        mean = wide.mean(others) if m else wide.sum(others)
        deviation = wide - mean.view(shape)
        return Statistics(counted(m, wide), mean, deviation.square().sum(others))
    # the mask is the same for every channel, so one count serves all of them
    count = counted(mask.expand([1 if a == axis else n for a, n in enumerate(wide.shape)]).sum(), wide)
    mean = torch.where(mask, wide, 0).sum(others) / count.clamp(min=1).to(wide.dtype)
    deviation = torch.where(mask, wide - mean.view(shape), 0)
    return Statistics(count, mean, deviation.square().sum(others))


def counted(count: int | float | Tensor, z: Tensor) -> Tensor:
    """Give a count as a tensor beside z, exact: in `exact_dtype`."""
    dtype = exact_dtype(z.device)
    if isinstance(count, Tensor):
        return count.to(dtype)
    return torch.full((), count, dtype=dtype, device=z.device)


def pre_activation(z: Tensor, norm: Norm, moments: Moments) -> tuple[Tensor, Tensor]:
    """Give u and z_hat in the dtype of the arithmetic; differentiable."""
    wide = z.to(compute_dtype(z))
    shape = vector_shape(z.dim(), norm.axis)

    def spread(vector: Tensor) -> Tensor:
        return vector.to(wide.dtype).view(shape)

    z_hat = (wide - spread(moments.mean)) * spread(moments.inv_std)
    u = z_hat
    if norm.gamma is not None:
        u = u * spread(norm.gamma)
    if norm.beta is not None:
        u = u + spread(norm.beta)
    if norm.residual is not None:
        u = u + norm.residual
    return u, z_hat


def kept(mask: Tensor | None, t: _Maybe) -> _Maybe:
    """Put 0 where a mask is False: what stands there may be NaN, and NaN times zero is NaN."""
    return t if mask is None or t is None else torch.where(mask, t, 0)


def _as(z: Tensor, value: Tensor) -> Tensor:
    """Give ``value`` the dtype and memory format of ``z``, whatever it was computed beside."""
    result = torch.empty_like(z)
    return value.to(z.dtype) if value.stride() == result.stride() else result.copy_(value)


class AtenEngine:
    """`Engine` made of torch operations."""

    name = "aten"
    fuses_masks = False

    def batch_statistics(
        self, z: Tensor, axis: int, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Statistics:
        dtype = dtype or vector_dtype(z)
        # what is asked for in float64 is summed so too: a mean that is rounded to float32 first has lost it
        wide = z.to(torch.promote_types(compute_dtype(z), dtype))
        count, mean, m2 = batch_statistics(wide, axis, mask)
        return Statistics(count, mean.to(dtype), m2.to(dtype))

    def normalize(
        self,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        *,
        mask: Tensor | None = None,
        out: Tensor | None = None,
        save: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        used = norm._replace(residual=kept(mask, norm.residual))
        u, _ = pre_activation(kept(mask, z), used, moments)
        y = kept(mask, activate(u, norm.activation))
        return _as(z, y) if out is None else out.copy_(y), norm.saved(u) if save else None

    def infer(self, z: Tensor, norm: Norm, mean: Tensor, var: Tensor, out: Tensor | None = None) -> Tensor:
        dtype = vector_dtype(z)
        moments = Moments(mean.to(dtype), inverse_deviation(var, norm.eps, dtype))
        return self.normalize(z, norm, moments, out=out)[0]

    def backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        *,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        du, z_hat = self._derivative(dy, z, norm, moments, saved, mask)
        return self._sums(du, z_hat, norm.axis, dtype or vector_dtype(z))

    def backward_input(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        sums: tuple[Tensor, Tensor],
        count: Tensor,
        with_residual: bool,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        du, z_hat = self._derivative(dy, z, norm, moments, saved, mask)
        return self._gradients(z, du, z_hat, norm, moments, sums, count, with_residual, mask)

    def forward(
        self, z: Tensor, norm: Norm, tracking: Tracking | None, mask: Tensor | None = None
    ) -> Forward:
        count, mean, m2 = batch_statistics(z.to(compute_dtype(z)), norm.axis, None)
        var = m2 / count.to(m2.dtype)
        inv_std = (var + norm.eps).rsqrt()
        y, saved = self.normalize(z, norm, Moments(mean, inv_std), save=True)
        dtype = vector_dtype(z)
        mean, var, inv_std = mean.to(dtype), var.to(dtype), inv_std.to(dtype)
        if tracking is not None:
            commit(tracking, values_per_channel(z.shape, norm.axis), mean, var)
        return Forward(y, mean, var, inv_std, saved)

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        training: bool,
        with_residual: bool,
        mask: Tensor | None = None,
    ) -> Backward:
        du, z_hat = self._derivative(dy, z, norm, moments, saved, None)
        sums = self._sums(du, z_hat, norm.axis, du.dtype)
        count = counted(values_per_channel(z.shape, norm.axis) if training else float("inf"), z)
        dz, dresidual = self._gradients(z, du, z_hat, norm, moments, sums, count, with_residual, None)
        dtype = vector_dtype(z)
        return Backward(dz, sums[0].to(dtype), sums[1].to(dtype), dresidual)

    @staticmethod
    def _derivative(
        dy: Tensor, z: Tensor, norm: Norm, moments: Moments, saved: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if z.numel():  # of no value there is nothing to save
            norm.check_saved(saved)
        residual = kept(mask, saved) if norm.saves_residual else None
        u, z_hat = pre_activation(kept(mask, z), norm._replace(residual=residual), moments)
        du, activation = kept(mask, dy).to(u.dtype), find(norm.activation)
        if saved is not None and activation.side is not None:
            return torch.where(saved, du, du * activation.slope), z_hat
        return activation.backward(du, u), z_hat

    @staticmethod
    def _sums(du: Tensor, z_hat: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        others = [a for a in range(du.dim()) if a != axis]
        return du.sum(others).to(dtype), (du * z_hat).sum(others).to(dtype)

    @staticmethod
    def _gradients(
        z: Tensor,
        du: Tensor,
        z_hat: Tensor,
        norm: Norm,
        moments: Moments,
        sums: tuple[Tensor, Tensor],
        count: Tensor,
        with_residual: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        shape = vector_shape(z.dim(), norm.axis)
        # where the statistics are constants, a NaN in the sums must not spread through them
        first, second = (
            torch.where(count.isinf(), 0, total / count.clamp(min=1).to(total.dtype)).to(du.dtype).view(shape)
            for total in sums
        )
        scale = moments.inv_std.to(du.dtype)
        scale = scale if norm.gamma is None else scale * norm.gamma.to(du.dtype)
        dz = kept(mask, (du - first - z_hat * second) * scale.view(shape))
        return _as(z, dz), _as(z, du) if with_residual else None


engine = AtenEngine()
