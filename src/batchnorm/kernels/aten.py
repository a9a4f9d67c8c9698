"""The engine of torch operations: every device, every floating dtype.

It is the fallback where no kernel of ours is built, so it puts being right before speed: on CPU it computes
in float64 and rounds once at the end, elsewhere in float32 (float64 for a float64 z).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.contract import LEAKY_SLOPE, Backward, Forward
from batchnorm.layout import values_per_channel, vector_shape
from batchnorm.population import Tracking, commit


def inverse_deviation(var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Give ``1 / sqrt(var + eps)``, the root taken in float64."""
    return (var.double() + eps).rsqrt().to(dtype)


def vector_dtype(z: Tensor) -> torch.dtype:
    """Dtype of statistics and sums: float32, float64 for float64."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def compute_dtype(z: Tensor) -> torch.dtype:
    """Dtype of the arithmetic; float64 on CPU also keeps squares of 1e30 in range."""
    return torch.float64 if z.device.type in ("cpu", "meta") else vector_dtype(z)


def activate(u: Tensor, activation: str | None) -> Tensor:
    """Apply an activation of the contract by its name."""
    match activation:
        case None:
            return u
        case "relu":
            return torch.relu(u)
        case "relu6":
            return F.relu6(u)
        case "leaky_relu":
            return F.leaky_relu(u, LEAKY_SLOPE)
        case "silu":
            return F.silu(u)
        case "hardswish":
            return F.hardswish(u)
        case "sigmoid":
            return torch.sigmoid(u)
        case "tanh":
            return torch.tanh(u)
    return F.gelu(u)


def _activate_backward(dy: Tensor, u: Tensor, activation: str | None) -> Tensor:
    aten = torch.ops.aten
    match activation:
        case None:
            return dy
        case "relu":
            return aten.threshold_backward(dy, u, 0)
        case "relu6":
            return aten.hardtanh_backward(dy, u, 0, 6)
        case "leaky_relu":
            return aten.leaky_relu_backward(dy, u, LEAKY_SLOPE, False)
        case "silu":
            return aten.silu_backward(dy, u)
        case "hardswish":
            return aten.hardswish_backward(dy, u)
        case "sigmoid":
            return aten.sigmoid_backward(dy, torch.sigmoid(u))
        case "tanh":
            return aten.tanh_backward(dy, torch.tanh(u))
    return aten.gelu_backward(dy, u)


def batch_mean_m2(
    z: Tensor, axis: int, mask: Tensor | None, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations, two sweeps, in the dtype of z; differentiable."""
    others = [a for a in range(z.dim()) if a != axis]
    shape = vector_shape(z.dim(), axis)
    if mask is None:
        count = torch.full((), values_per_channel(z.shape, axis), dtype=z.dtype, device=z.device)
        mean = z.mean(others)
        return count, mean, (z - mean.view(shape)).square().sum(others)
    # the mask is the same for every channel, so one count serves all of them
    every = [1 if a == axis else n for a, n in enumerate(z.shape)]
    count = (mask.expand(every).sum() if count is None else count).to(z.dtype)
    mean = torch.where(mask, z, 0).sum(others) / count.clamp(min=1)
    return count, mean, torch.where(mask, z - mean.view(shape), 0).square().sum(others)


def _as(z: Tensor, value: Tensor) -> Tensor:
    """Give ``value`` the dtype and memory format of ``z``, whatever it was computed beside."""
    result = torch.empty_like(z)
    return value.to(z.dtype) if value.stride() == result.stride() else result.copy_(value)


class AtenEngine:
    """`Engine` made of torch operations."""

    name = "aten"

    def takes(
        self,
        z: Tensor,
        channel_dim: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        tracking: Tracking | None,
    ) -> bool:
        """Say nothing: no quick look is made here."""
        return False

    def batch_statistics(
        self, z: Tensor, channel_dim: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, m2 = batch_mean_m2(z.to(compute_dtype(z)), channel_dim, mask)
        dtype = vector_dtype(z)
        return count.to(dtype), mean.to(dtype), m2.to(dtype)

    def normalize(
        self,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        out: Tensor | None = None,
    ) -> Tensor:
        u, _ = self._pre_activation(z, channel_dim, mean, inv_std, gamma, beta, residual)
        y = activate(u, activation)
        return _as(z, y) if out is None else out.copy_(y)

    def infer(
        self,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        var: Tensor,
        eps: float,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`normalize` with population statistics."""
        dtype = vector_dtype(z)
        inv_std = inverse_deviation(var, eps, dtype)
        return self.normalize(z, channel_dim, mean.to(dtype), inv_std, gamma, beta, residual, activation, out)

    def backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        du, z_hat = self._derivative(dy, z, channel_dim, mean, inv_std, gamma, beta, activation, saved)
        return self._sums(du, z_hat, channel_dim, vector_dtype(z))

    def backward_input(
        self,
        dy: Tensor,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
        sum_dy: Tensor,
        sum_dy_zhat: Tensor,
        count: Tensor,
        with_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        du, z_hat = self._derivative(dy, z, channel_dim, mean, inv_std, gamma, beta, activation, saved)
        shape = vector_shape(z.dim(), channel_dim)
        scale = inv_std.to(du.dtype) if gamma is None else inv_std.to(du.dtype) * gamma
        through = (sum_dy / count).to(du.dtype).view(shape) + z_hat * (sum_dy_zhat / count).to(du.dtype).view(
            shape
        )
        dz = (du - through) * scale.view(shape)
        return _as(z, dz), _as(z, du) if with_residual else None

    def forward(
        self,
        z: Tensor,
        channel_dim: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
        tracking: Tracking | None,
    ) -> Forward:
        wide = z.to(compute_dtype(z))
        m = values_per_channel(z.shape, channel_dim)
        _, mean, m2 = batch_mean_m2(wide, channel_dim, None)
        var = m2 / m
        inv_std = (var + eps).rsqrt()
        u, _ = self._pre_activation(wide, channel_dim, mean, inv_std, gamma, beta, residual)
        y = _as(z, activate(u, activation))
        dtype = vector_dtype(z)
        mean, var, inv_std = mean.to(dtype), var.to(dtype), inv_std.to(dtype)
        if tracking is not None:
            commit(tracking, m, mean, var)
        return Forward(y, mean, var, inv_std, residual if activation else None)

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
        training: bool,
        with_residual: bool,
    ) -> Backward:
        du, z_hat = self._derivative(dy, z, channel_dim, mean, inv_std, gamma, beta, activation, saved)
        sum_dy, sum_dy_zhat = self._sums(du, z_hat, channel_dim, du.dtype)
        shape = vector_shape(z.dim(), channel_dim)
        scale = inv_std.to(du.dtype) if gamma is None else inv_std.to(du.dtype) * gamma
        inner = du
        if training:
            m = max(values_per_channel(z.shape, channel_dim), 1)
            inner = du - (sum_dy / m).view(shape) - z_hat * (sum_dy_zhat / m).view(shape)
        dtype = vector_dtype(z)
        dz = _as(z, inner * scale.view(shape))
        return Backward(
            dz, sum_dy.to(dtype), sum_dy_zhat.to(dtype), du.to(z.dtype) if with_residual else None
        )

    @staticmethod
    def _pre_activation(
        z: Tensor,
        axis: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        shape = vector_shape(z.dim(), axis)
        wide = z.to(compute_dtype(z))
        z_hat = (wide - mean.to(wide.dtype).view(shape)) * inv_std.to(wide.dtype).view(shape)
        u = z_hat
        if gamma is not None:
            u = u * gamma.to(wide.dtype).view(shape)
        if beta is not None:
            u = u + beta.to(wide.dtype).view(shape)
        if residual is not None:
            u = u + residual
        return u, z_hat

    def _derivative(
        self,
        dy: Tensor,
        z: Tensor,
        axis: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u, z_hat = self._pre_activation(z, axis, mean, inv_std, gamma, beta, residual)
        return _activate_backward(dy.to(u.dtype), u, activation), z_hat

    @staticmethod
    def _sums(du: Tensor, z_hat: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        others = [a for a in range(du.dim()) if a != axis]
        return du.sum(others).to(dtype), (du * z_hat).sum(others).to(dtype)


engine = AtenEngine()
