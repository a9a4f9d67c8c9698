"""The operations that every engine offers.

Notation: z is the input, ``z_hat = (z - mean) * inv_std``, ``u = gamma * z_hat + beta + residual``,
``y = activation(u)``. A channel holds m values. ``du = dy * activation'(u)``.

The operator is split where communication happens, so that masks, accumulation and pooling over ranks are
slots between operations and never kernels of their own; `forward` and `backward` are the fused pairs that
the speed comes from.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from batchnorm.population import Tracking

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", "gelu")
"""Activations that join the normalizing pass; leaky_relu has slope 0.01, gelu is the exact (erf) one."""

PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu")
"""Those whose derivative is one bit an element."""

LEAKY_SLOPE = 0.01


class Forward(NamedTuple):
    """What a fused training forward gives.

    ``saved`` is what the backward needs beyond z, mean and inv_std: None without a residual or without an
    activation; else a bit an element for the piecewise linear activations, or the residual itself for the
    others. Only the engine that made it reads it.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    inv_std: Tensor
    saved: Tensor | None


class Backward(NamedTuple):
    """What a fused backward gives: ``sum_dy`` is d(beta), ``sum_dy_zhat`` is d(gamma)."""

    dz: Tensor
    sum_dy: Tensor
    sum_dy_zhat: Tensor
    dresidual: Tensor | None


class Engine(Protocol):
    """What serves a tensor.

    Vectors (mean, var, inv_std, gamma, beta, sums) have length C and are float32, float64 for a float64 z.
    ``channel_dim`` is the channel axis, non-negative. Outputs have z's dtype and memory format. Variances
    have divisor m. No operation but `forward` (through ``tracking``) writes to what it is given, unless
    ``out`` says so.
    """

    name: str

    def takes(
        self,
        z: Tensor,
        channel_dim: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        tracking: Tracking | None,
    ) -> bool:
        """Whether a training forward has nothing to find fault with, and two values a channel.

        False says nothing: the arguments must then be looked at one by one.
        """

    def batch_statistics(
        self, z: Tensor, channel_dim: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean, and sum of squared deviations of each channel; ``mask`` broadcasts against z."""

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
        """Give y; into ``out`` (which may be z) when it is given."""

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
        """`normalize` with population statistics, of any floating dtype."""

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
        """Give sum_dy and sum_dy_zhat, over du."""

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
        """Give dz and du; an infinite ``count`` makes the statistics constants."""

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
        """Normalize with z's own statistics, and move the running statistics of ``tracking``."""

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
        """Give every gradient; ``training=False`` takes the statistics for constants."""
